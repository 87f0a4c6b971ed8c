//! Image data sets in the idx format of MNIST: finding the files, reading them, refusing damaged ones.
//!
//! A file is never trusted: its sizes are bounded before anything is allocated, and whatever is wrong
//! with it becomes an error that names the file.

mod find;
mod idx;

pub use find::find;

use anyhow::ensure;
use std::path::Path;
use tch::{Kind, Tensor};

/// Images and their labels, as the bytes of the files: one copy in memory, converted batch by batch.
#[derive(Debug)]
pub struct Split {
    images: idx::Images,
    /// One for each image.
    labels: Vec<u8>,
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
        let highest = train.labels.iter().chain(&test.labels).max().copied().unwrap_or(0);
        Ok(Self { train, test, classes: i64::from(highest) + 1 })
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
        Ok(Self { images, labels })
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Height and width in pixels.
    pub fn size(&self) -> (i64, i64) {
        (self.images.height as i64, self.images.width as i64)
    }

    /// The images and labels of these indices, each below [`Split::len`]: `[n, 1, height, width]` floats around 0, and `[n]`.
    pub fn batch(&self, indices: &[i64]) -> (Tensor, Tensor) {
        let (height, width) = self.size();
        let bytes_each = self.images.height * self.images.width;
        let mut pixels = Vec::with_capacity(indices.len() * bytes_each);
        for index in indices {
            let start = *index as usize * bytes_each;
            pixels.extend_from_slice(&self.images.pixels[start..start + bytes_each]);
        }
        let labels: Vec<i64> = indices.iter().map(|index| i64::from(self.labels[*index as usize])).collect();
        let images = Tensor::from_slice(&pixels).view([-1, 1, height, width]);
        // Mean and deviation of Fashion-MNIST; near enough for its relatives. In place: a batch is copied once.
        let mut images = images.to_kind(Kind::Float);
        let _ = images.g_sub_scalar_(255.0 * 0.286).g_div_scalar_(255.0 * 0.353);
        (images, Tensor::from_slice(&labels))
    }
}
