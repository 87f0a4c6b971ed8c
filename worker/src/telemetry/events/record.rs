//! The frames of an event file, TensorFlow's TFRecord: a length, its checksum, the data, its checksum.

/// Largest record that is read. Scalars take some dozens of bytes each; what is larger is an image or a graph, and passed
/// over. Decoded, a hostile one takes a hundred times as much.
pub(super) const DATA_BYTES_MAX: u64 = 256 << 10;
/// Longest record there can be, that of a protobuf message. A longer one is damage.
const RECORD_BYTES_MAX: u64 = 2 << 30;
/// Bytes before the data, and after it.
const HEADER_BYTES: usize = 12;
const FOOTER_BYTES: usize = 4;
/// Bytes of the largest frame that is read.
pub(super) const FRAME_BYTES_MAX: usize = DATA_BYTES_MAX as usize + HEADER_BYTES + FOOTER_BYTES;

/// What some bytes begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    /// No more than a part of a record.
    Part,
    /// A record, and the bytes that it takes.
    Record(&'a [u8], usize),
    /// A record of so many bytes that is too large to be of interest.
    Large(u64),
    /// No record, for this reason.
    Damage(&'static str),
}

/// The first record in some bytes.
pub(crate) fn first(bytes: &[u8]) -> Found<'_> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return Found::Part };
    let Some((checksum, rest)) = rest.split_first_chunk::<4>() else { return Found::Part };
    if masked_crc(length) != u32::from_le_bytes(*checksum) {
        return Found::Damage("the length of a record does not match its checksum");
    }
    let length = u64::from_le_bytes(*length);
    if length > RECORD_BYTES_MAX {
        return Found::Damage("a record is longer than any can be");
    }
    if length > DATA_BYTES_MAX {
        return Found::Large(length + (HEADER_BYTES + FOOTER_BYTES) as u64);
    }
    let Some((data, rest)) = rest.split_at_checked(length as usize) else { return Found::Part };
    let Some((checksum, _)) = rest.split_first_chunk::<4>() else { return Found::Part };
    if masked_crc(data) != u32::from_le_bytes(*checksum) {
        return Found::Damage("the data of a record does not match its checksum");
    }
    Found::Record(data, HEADER_BYTES + data.len() + FOOTER_BYTES)
}

/// TensorFlow's: a CRC of data that holds CRCs would else be a poor one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A frame around some data.
#[cfg(any(test, fuzzing))]
pub(crate) fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let checksums = [masked_crc(&length), masked_crc(data)].map(u32::to_le_bytes);
    [&length, &checksums[0][..], data, &checksums[1]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scalar as the library `tensorboard` 2.21 wrote it.
    const WRITTEN: [u8; 42] = [
        0x1a, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x9b, 0xd8, 0x2d, 0x09, 0xb0, 0xbc, 0xb4, 0x11, 0xd1, 0xc1, 0xda,
        0x41, 0x10, 0x01, 0x2a, 0x0d, 0x0a, 0x0b, 0x0a, 0x04, b'l', b'o', b's', b's', 0x15, 0xcd, 0xcc, 0xcc,
        0x3d, 0x14, 0xc3, 0xb6, 0x6f,
    ];

    #[test]
    fn a_part_of_a_record_is_none_at_every_byte_and_a_flipped_bit_is_damage() {
        let (record, data) = (&WRITTEN[..], &WRITTEN[12..38]);
        assert_eq!(first(record), Found::Record(data, record.len()));
        assert_eq!(framed(data), record);
        let two = [record, &record[..5]].concat();
        assert_eq!(first(&two), Found::Record(data, record.len()));
        for end in 0..record.len() {
            assert_eq!(first(&record[..end]), Found::Part, "{end} bytes");
            let mut flipped = record.to_vec();
            flipped[end] ^= 0x10;
            assert!(matches!(first(&flipped), Found::Damage(_)), "byte {end}");
        }
        assert_eq!(first(&framed(b"")), Found::Record(b"", 16));
    }

    #[test]
    fn a_length_is_believed_only_if_it_can_be() {
        let head = |length: u64| {
            let length = length.to_le_bytes();
            [&length[..], &masked_crc(&length).to_le_bytes()].concat()
        };
        let table = [
            (head(DATA_BYTES_MAX), Found::Part),
            (head(DATA_BYTES_MAX + 1), Found::Large(DATA_BYTES_MAX + 17)),
            (head(RECORD_BYTES_MAX), Found::Large(RECORD_BYTES_MAX + 16)),
            (head(RECORD_BYTES_MAX + 1), Found::Damage("a record is longer than any can be")),
            (head(u64::MAX), Found::Damage("a record is longer than any can be")),
            (vec![0; 12], Found::Damage("the length of a record does not match its checksum")),
        ];
        for (bytes, expected) in table {
            assert_eq!(first(&bytes), expected);
        }
    }
}
