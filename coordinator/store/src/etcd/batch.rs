//! What is too large for one request of etcd: values are cut into pieces, batches into groups.

use etcd_client::{DeleteOptions, TxnOp};

/// Largest value, or piece of one, in a request, whose limit is 1.5 MiB unless etcd is told otherwise.
pub(super) const PIECE_BYTES_MAX: usize = 512 << 10;
/// Bytes of keys and values of one transaction.
const GROUP_BYTES_MAX: usize = 1 << 20;
/// Changes of one transaction, whose limit is 128 unless etcd is told otherwise; a commit adds a few of its own.
const GROUP_OPS_MAX: usize = 100;

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put(String, Vec<u8>),
    Delete(String),
    /// Everything with this prefix.
    DeleteAll(String),
}

impl Change {
    fn bytes(&self) -> usize {
        match self {
            Self::Put(key, value) => key.len() + value.len(),
            Self::Delete(key) | Self::DeleteAll(key) => key.len(),
        }
    }

    /// For etcd.
    pub fn op(&self) -> TxnOp {
        match self {
            Self::Put(key, value) => TxnOp::put(key.as_str(), value.as_slice(), None),
            Self::Delete(key) => TxnOp::delete(key.as_str(), None),
            Self::DeleteAll(prefix) => {
                TxnOp::delete(prefix.as_str(), Some(DeleteOptions::new().with_prefix()))
            }
        }
    }
}

/// Changes in their order, in groups that each fit one transaction.
pub(super) fn groups(changes: Vec<Change>) -> Vec<Vec<Change>> {
    let mut all: Vec<Vec<Change>> = Vec::new();
    let mut bytes = 0;
    for change in changes {
        let more = change.bytes();
        match all.last_mut() {
            Some(group) if group.len() < GROUP_OPS_MAX && bytes + more <= GROUP_BYTES_MAX => {
                bytes += more;
                group.push(change);
            }
            Some(_) | None => {
                bytes = more;
                all.push(vec![change]);
            }
        }
    }
    all
}

/// A group as bytes: of each change its kind, and key and value with their lengths.
pub(super) fn encode(group: &[Change]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut text = |kind: u8, key: &str, value: &[u8]| {
        bytes.push(kind);
        for part in [key.as_bytes(), value] {
            bytes.extend((part.len() as u32).to_le_bytes());
            bytes.extend_from_slice(part);
        }
    };
    for change in group {
        match change {
            Change::Put(key, value) => text(b'p', key, value),
            Change::Delete(key) => text(b'd', key, &[]),
            Change::DeleteAll(prefix) => text(b'a', prefix, &[]),
        }
    }
    bytes
}

/// The group that these bytes are; none if they are not one.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<Change>> {
    fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        *bytes = rest;
        Some(part)
    }
    let mut rest = bytes;
    let mut group = Vec::new();
    while let Some((kind, after)) = rest.split_first() {
        rest = after;
        let key = String::from_utf8(part(&mut rest)?.to_vec()).ok()?;
        let value = part(&mut rest)?.to_vec();
        group.push(match kind {
            b'p' => Change::Put(key, value),
            b'd' => Change::Delete(key),
            b'a' => Change::DeleteAll(key),
            _ => return None,
        });
    }
    Some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, bytes: usize) -> Change {
        Change::Put(key.to_owned(), vec![7; bytes])
    }

    #[test]
    fn groups_fit_one_transaction_each_and_keep_the_order() {
        let changes: Vec<Change> = (0..250).map(|i| put(&format!("{i:03}"), 10)).collect();
        let cut = groups(changes.clone());
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 50]);
        assert_eq!(cut.concat(), changes);
        let large = (0..5).map(|i| put(&i.to_string(), PIECE_BYTES_MAX - 1)).collect();
        assert_eq!(groups(large).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
        assert!(groups(Vec::new()).is_empty());
    }

    #[test]
    fn a_group_comes_back_from_its_bytes_or_is_refused() {
        let group =
            vec![put("a", 3), Change::Delete("b".to_owned()), Change::DeleteAll("c/".to_owned()), put("", 0)];
        let bytes = encode(&group);
        assert_eq!(decode(&bytes), Some(group));
        assert_eq!(decode(&[]), Some(Vec::new()));
        let whole: Vec<usize> = (0..bytes.len()).filter(|cut| decode(&bytes[..*cut]).is_some()).collect();
        // Only where a change ends.
        assert_eq!(whole, [0, 13, 23, 34]);
        assert_eq!(decode(b"x\0\0\0\0\0\0\0\0"), None);
    }
}
