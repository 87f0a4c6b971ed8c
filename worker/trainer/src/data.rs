//! Image data sets in the idx format of MNIST: finding the files, reading them, refusing damaged ones.
//!
//! A file is never trusted: its sizes are bounded before anything is allocated, and whatever is wrong
//! with it becomes an error that names the file.

mod find;
mod idx;

pub use find::find;

use anyhow::{Context as _, ensure};
use std::path::Path;
use tch::{Kind, Tensor};

/// Images and their labels, as bytes; converted batch by batch.
#[derive(Debug)]
pub struct Split {
    /// `[count, height, width]`, unsigned bytes.
    images: Tensor,
    /// `[count]`, 64-bit integers.
    labels: Tensor,
}

/// A data set.
#[derive(Debug)]
pub struct DataSet {
    /// What is learnt from.
    pub train: Split,
    /// What accuracy is measured on.
    pub test: Split,
    /// The number of labels, from 0.
    pub classes: i64,
}

impl DataSet {
    /// Reads the four files of a directory, the first `limit` training images if there is a limit.
    pub fn read(dir: &Path, limit: Option<usize>) -> anyhow::Result<Self> {
        let train = Split::read(dir, "train", limit)?;
        let test = Split::read(dir, "t10k", None)?;
        ensure!(
            train.size() == test.size(),
            "the training images of {} are {:?} and its test images {:?}",
            dir.display(),
            train.size(),
            test.size()
        );
        let highest = train.labels.max().int64_value(&[]).max(test.labels.max().int64_value(&[]));
        Ok(Self { train, test, classes: highest + 1 })
    }
}

impl Split {
    fn read(dir: &Path, name: &str, limit: Option<usize>) -> anyhow::Result<Self> {
        let limit = limit.unwrap_or(usize::MAX);
        let images_path = dir.join(format!("{name}-images-idx3-ubyte.gz"));
        let images = idx::read_images(&images_path, limit)?;
        let labels_path = dir.join(format!("{name}-labels-idx1-ubyte.gz"));
        let labels = idx::read_labels(&labels_path, limit)?;
        ensure!(
            images.count == labels.len(),
            "{} holds {} images and {} {} labels: they are of different data sets",
            images_path.display(),
            images.count,
            labels_path.display(),
            labels.len()
        );
        let (height, width) = (images.height as i64, images.width as i64);
        let pixels = Tensor::f_from_slice(&images.pixels)
            .and_then(|tensor| tensor.f_view([images.count as i64, height, width]))
            .with_context(|| format!("failed to make a tensor of {}", images_path.display()))?;
        Ok(Self { images: pixels, labels: Tensor::from_slice(&labels).to_kind(Kind::Int64) })
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.size()[0] as usize
    }

    /// Height and width in pixels.
    pub fn size(&self) -> (i64, i64) {
        let size = self.images.size();
        (size[1], size[2])
    }

    /// The images and labels of these indices: `[n, 1, height, width]` floats around 0, and `[n]`.
    pub fn batch(&self, indices: &[i64]) -> (Tensor, Tensor) {
        let indices = Tensor::from_slice(indices);
        let (height, width) = self.size();
        let images = self.images.index_select(0, &indices).view([-1, 1, height, width]);
        // Mean and deviation of Fashion-MNIST; near enough for its relatives.
        let images = ((images.to_kind(Kind::Float) / 255.0) - 0.286) / 0.353;
        (images, self.labels.index_select(0, &indices))
    }
}
