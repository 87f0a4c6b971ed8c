//! The idx format: a magic number, big-endian sizes, then bytes; gzipped.

use flate2::read::GzDecoder;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

/// Twenty times MNIST. A damaged header must not make us allocate a terabyte.
const IMAGES_MAX: usize = 1_200_000;
/// Pixels of a side.
const SIDE_MAX: usize = 256;
/// Of all pixels of a file: MNIST has 47 MB.
const PIXELS_MAX: usize = 1 << 30;
/// Bytes allocated on a header's word alone: the whole of Fashion-MNIST without growing, and no more.
const ALLOCATED_AT_ONCE: usize = 48 << 20;
/// Pixels of a side: three poolings have to leave something.
const SIDE_MIN: usize = 4;

const MAGIC_IMAGES: u32 = 0x0803;
const MAGIC_LABELS: u32 = 0x0801;

/// Why a file cannot be used. Each message names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum IdxError {
    /// It cannot be opened.
    #[error("failed to open {}: run `cargo xtask setup` to bring the data", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It ends too early, or the compressed stream is damaged.
    #[error("{} is cut short or damaged ({what}): delete it and run `cargo xtask setup`", path.display())]
    Damaged {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    /// It is something else than its name says.
    #[error("{} is not an idx file of {expected}: its magic number is {magic:#010x}", path.display())]
    Magic { path: PathBuf, expected: &'static str, magic: u32 },
    /// It says that it is larger than any file we would read.
    #[error("{} claims {what}, which is beyond {limit}: it is damaged, or not meant for this program", path.display())]
    TooLarge { path: PathBuf, what: String, limit: usize },
    /// There is more in it than it says.
    #[error("{} goes on after its last item: delete it and run `cargo xtask setup`", path.display())]
    Trailing { path: PathBuf },
    /// Nothing to train on.
    #[error("{} holds no item, or images too small to train on", path.display())]
    Empty { path: PathBuf },
}

/// All pixels of a file, row by row, image by image.
#[derive(Debug)]
pub struct Images {
    pub count: usize,
    pub height: usize,
    pub width: usize,
    pub pixels: Vec<u8>,
}

/// Reads the first `limit` images. With a limit below their number, the rest of the file is not looked at.
pub fn read_images(path: &Path, limit: usize) -> Result<Images, IdxError> {
    let mut file = Reader::open(path)?;
    file.magic(MAGIC_IMAGES, "images")?;
    let claimed = file.size("images", IMAGES_MAX)?;
    let height = file.size("rows", SIDE_MAX)?;
    let width = file.size("columns", SIDE_MAX)?;
    let count = claimed.min(limit);
    let pixels = count * height * width;
    if pixels > PIXELS_MAX {
        return Err(IdxError::TooLarge {
            path: path.into(),
            what: format!("{pixels} pixels"),
            limit: PIXELS_MAX,
        });
    }
    if count == 0 || height.min(width) < SIDE_MIN {
        return Err(IdxError::Empty { path: path.into() });
    }
    let pixels = file.bytes(pixels, "pixels")?;
    file.end_if(count == claimed)?;
    Ok(Images { count, height, width, pixels })
}

/// Reads the first `limit` labels.
pub fn read_labels(path: &Path, limit: usize) -> Result<Vec<u8>, IdxError> {
    let mut file = Reader::open(path)?;
    file.magic(MAGIC_LABELS, "labels")?;
    let claimed = file.size("labels", IMAGES_MAX)?;
    let count = claimed.min(limit);
    if count == 0 {
        return Err(IdxError::Empty { path: path.into() });
    }
    let labels = file.bytes(count, "labels")?;
    file.end_if(count == claimed)?;
    Ok(labels)
}

struct Reader<'a> {
    path: &'a Path,
    bytes: GzDecoder<BufReader<File>>,
}

impl<'a> Reader<'a> {
    fn open(path: &'a Path) -> Result<Self, IdxError> {
        let file = File::open(path).map_err(|source| IdxError::Open { path: path.into(), source })?;
        Ok(Self { path, bytes: GzDecoder::new(BufReader::new(file)) })
    }

    fn damaged(&self, what: &'static str, source: io::Error) -> IdxError {
        IdxError::Damaged { path: self.path.into(), what, source }
    }

    fn number(&mut self, what: &'static str) -> Result<u32, IdxError> {
        let mut bytes = [0; 4];
        self.bytes.read_exact(&mut bytes).map_err(|source| self.damaged(what, source))?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn magic(&mut self, wanted: u32, expected: &'static str) -> Result<(), IdxError> {
        let magic = self.number("magic number")?;
        if magic == wanted {
            return Ok(());
        }
        Err(IdxError::Magic { path: self.path.into(), expected, magic })
    }

    fn size(&mut self, what: &'static str, limit: usize) -> Result<usize, IdxError> {
        let size = self.number(what)? as usize;
        if size <= limit {
            return Ok(size);
        }
        Err(IdxError::TooLarge { path: self.path.into(), what: format!("{size} {what}"), limit })
    }

    fn bytes(&mut self, count: usize, what: &'static str) -> Result<Vec<u8>, IdxError> {
        let mut bytes = Vec::with_capacity(count.min(ALLOCATED_AT_ONCE));
        let read = self.bytes.by_ref().take(count as u64).read_to_end(&mut bytes);
        match read {
            Ok(read) if read == count => Ok(bytes),
            Ok(_) => Err(self.damaged(what, io::ErrorKind::UnexpectedEof.into())),
            Err(source) => Err(self.damaged(what, source)),
        }
    }

    /// The end also carries gzip's checksum, so reading up to it is what proves the file whole.
    fn end_if(&mut self, whole: bool) -> Result<(), IdxError> {
        if !whole {
            return Ok(());
        }
        match self.bytes.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(IdxError::Trailing { path: self.path.into() }),
            Err(source) => Err(self.damaged("checksum", source)),
        }
    }
}

#[cfg(test)]
mod tests;
