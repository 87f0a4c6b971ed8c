//! scikit-learn's digits.csv.gz as the four idx files that MNIST's readers know.

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

const SIDE: usize = 8;
/// The first so many are for training, the rest for testing: other people wrote the last ones.
const TRAIN: usize = 1500;
/// A pixel counts the inked dots of a 4x4 block.
const INK_MAX: u16 = 16;

/// Images and their labels, as they lie in idx files.
#[derive(Default)]
struct Set {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

/// Reads the gzipped CSV (64 pixels of 0 to 16, then the label) and writes the files into `folder`.
pub fn convert(csv: &Path, folder: &Path) -> Result<()> {
    let file = File::open(csv).with_context(|| format!("failed to open {}", csv.display()))?;
    let mut sets = [Set::default(), Set::default()];
    for (index, line) in BufReader::new(GzDecoder::new(file)).lines().enumerate() {
        let line = line.context("failed to read the digits")?;
        let set = &mut sets[usize::from(index >= TRAIN)];
        parse(&line, set).with_context(|| format!("line {} of the digits is damaged", index + 1))?;
    }
    for (set, name) in sets.iter().zip(["train", "t10k"]) {
        let count = set.labels.len();
        write(&folder.join(format!("{name}-images-idx3-ubyte.gz")), &[count, SIDE, SIDE], &set.pixels)?;
        write(&folder.join(format!("{name}-labels-idx1-ubyte.gz")), &[count], &set.labels)?;
    }
    Ok(())
}

fn parse(line: &str, set: &mut Set) -> Result<()> {
    let values = line.split(',').map(|value| value.trim().parse::<u16>()).collect::<Result<Vec<_>, _>>()?;
    let (label, pixels) = values.split_last().context("it is empty")?;
    ensure!(pixels.len() == SIDE * SIDE, "it has {} pixels, not 64", pixels.len());
    ensure!(pixels.iter().all(|ink| *ink <= INK_MAX), "a pixel is over 16");
    ensure!(*label <= 9, "its label is {label}, not a digit");
    // Readers of idx files expect the full range of a byte.
    set.pixels.extend(pixels.iter().map(|ink| (ink * 255 / INK_MAX) as u8));
    set.labels.push(*label as u8);
    Ok(())
}

/// An idx file of bytes: two zeros, the type 8, the number of dimensions, each of them, the bytes.
fn write(path: &Path, shape: &[usize], bytes: &[u8]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut gz = GzEncoder::new(file, Compression::default());
    gz.write_all(&[0, 0, 8, shape.len() as u8])?;
    for dimension in shape {
        gz.write_all(&(*dimension as u32).to_be_bytes())?;
    }
    gz.write_all(bytes)?;
    gz.finish().with_context(|| format!("failed to write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn unzipped(path: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        GzDecoder::new(File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn convert_lines(lines: &[String]) -> Result<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let csv = folder.path().join("digits.csv.gz");
        let mut gz = GzEncoder::new(File::create(&csv).unwrap(), Compression::fast());
        gz.write_all(lines.join("\n").as_bytes()).unwrap();
        gz.finish().unwrap();
        convert(&csv, folder.path())?;
        Ok(folder)
    }

    fn line(ink: u16, label: usize) -> String {
        format!("{}{label}", format!("{ink},").repeat(64))
    }

    #[test]
    fn the_four_files_have_idx_headers_and_the_range_of_a_byte() {
        let lines: Vec<String> =
            (0..1797).map(|index| line(if index == 0 { 16 } else { 4 }, index % 10)).collect();
        let folder = convert_lines(&lines).unwrap();
        let train = unzipped(&folder.path().join("train-images-idx3-ubyte.gz"));
        assert_eq!(train[..16], [0, 0, 8, 3, 0, 0, 0x05, 0xdc, 0, 0, 0, 8, 0, 0, 0, 8]);
        assert_eq!((train[16], train[16 + 64], train.len()), (255, 63, 16 + 1500 * 64));
        let labels = unzipped(&folder.path().join("t10k-labels-idx1-ubyte.gz"));
        assert_eq!(labels[..10], [0, 0, 8, 1, 0, 0, 0x01, 0x29, 0, 1]);
        assert_eq!(labels.len(), 8 + 297);
        assert_eq!(unzipped(&folder.path().join("t10k-images-idx3-ubyte.gz")).len(), 16 + 297 * 64);
    }

    #[test]
    fn damaged_lines_are_refused_by_number() {
        for (bad, why) in
            [("1,2,3", "2 pixels"), (&line(17, 1), "over 16"), (&line(1, 10), "label is 10"), ("x", "digit")]
        {
            let words = format!("{:#}", convert_lines(&[line(1, 1), bad.to_owned()]).unwrap_err());
            assert!(words.contains("line 2") && words.contains(why), "{bad}: {words}");
        }
    }
}
