//! Damaged files of every kind.

use super::*;
use flate2::{Compression, write::GzEncoder};
use std::io::Write as _;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn images(count: u32, height: u32, width: u32) -> Vec<u8> {
    let header = [MAGIC_IMAGES, count, height, width];
    let mut bytes: Vec<u8> = header.iter().flat_map(|n| n.to_be_bytes()).collect();
    bytes.extend((0..count * height * width).map(|i| (i * 37 % 251) as u8));
    bytes
}

fn check(file: &[u8]) -> Result<Images, IdxError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-images-idx3-ubyte.gz");
    std::fs::write(&path, file).unwrap();
    let result = read_images(&path, usize::MAX);
    if let Err(error) = &result {
        assert!(error.to_string().contains("train-images"), "{error}");
    }
    result
}

#[test]
fn whole_file_is_read_at_any_size_of_image() {
    for (height, width) in [(8, 8), (28, 28), (5, 9)] {
        let read = check(&gzip(&images(3, height, width))).unwrap();
        assert_eq!((read.count, read.height, read.width), (3, height as usize, width as usize));
        assert_eq!(read.pixels, images(3, height, width)[16..]);
    }
}

#[test]
fn a_file_torn_at_any_length_is_an_error() {
    let whole = gzip(&images(3, 8, 8));
    for len in 0..whole.len() {
        assert!(check(&whole[..len]).is_err(), "torn at {len} of {}", whole.len());
    }
    let plain = images(3, 8, 8);
    for len in 0..plain.len() {
        assert!(check(&gzip(&plain[..len])).is_err(), "torn inside at {len} of {}", plain.len());
    }
}

#[test]
fn a_flipped_bit_never_changes_what_is_read() {
    let whole = gzip(&images(3, 8, 8));
    // The ten bytes of gzip's own header say nothing about the contents.
    for byte in 10..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[byte] ^= 1 << bit;
            // Some bits are padding to gzip: what is read is then the same.
            if let Ok(read) = check(&bytes) {
                assert_eq!(read.pixels, images(3, 8, 8)[16..], "bit {bit} of byte {byte}");
            }
        }
    }
}

#[test]
fn sizes_are_bounded_before_anything_is_allocated() {
    for (count, height, width) in [(u32::MAX, 28, 28), (1, u32::MAX, 1), (1, 28, 257), (1_200_000, 256, 256)]
    {
        let header = [MAGIC_IMAGES, count, height, width];
        let bytes: Vec<u8> = header.iter().flat_map(|n| n.to_be_bytes()).collect();
        assert!(matches!(check(&gzip(&bytes)), Err(IdxError::TooLarge { .. })), "{count} {height} {width}");
    }
}

#[test]
fn other_files_are_told_apart() {
    let mut labels = images(3, 8, 8);
    labels[3] = 1;
    assert!(matches!(check(&gzip(&labels)), Err(IdxError::Magic { magic: MAGIC_LABELS, .. })));
    assert!(matches!(check(b"<html>not found</html>"), Err(IdxError::Damaged { .. })));
    assert!(matches!(check(&gzip(&images(0, 8, 8))), Err(IdxError::Empty { .. })));
    assert!(matches!(check(&gzip(&images(1, 2, 2))), Err(IdxError::Empty { .. })));
    let mut longer = images(3, 8, 8);
    longer.push(0);
    assert!(matches!(check(&gzip(&longer)), Err(IdxError::Trailing { .. })));
}

#[test]
fn limit_reads_the_first_items_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("images.gz");
    std::fs::write(&path, gzip(&images(5, 8, 8))).unwrap();
    let read = read_images(&path, 2).unwrap();
    assert_eq!((read.count, read.pixels.len()), (2, 2 * 64));
}
