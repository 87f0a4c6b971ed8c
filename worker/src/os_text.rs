//! Paths and words in files of ours: text where they are text, else their bytes. The system's are
//! not always UTF-8.

use std::ffi::{OsStr, OsString};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Text, or the bytes of what is none.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Utf8(String),
    Bytes(OsString),
}

impl From<&OsStr> for Text {
    fn from(text: &OsStr) -> Self {
        text.to_str().map_or_else(|| Self::Bytes(text.to_owned()), |text| Self::Utf8(text.to_owned()))
    }
}

impl From<Text> for OsString {
    fn from(text: Text) -> Self {
        match text {
            Text::Utf8(text) => text.into(),
            Text::Bytes(bytes) => bytes,
        }
    }
}

/// Writes a path.
pub(crate) fn serialize<S: Serializer>(path: &impl AsRef<OsStr>, to: S) -> Result<S::Ok, S::Error> {
    Text::from(path.as_ref()).serialize(to)
}

/// Reads a path.
pub(crate) fn deserialize<'de, P: From<OsString>, D: Deserializer<'de>>(from: D) -> Result<P, D::Error> {
    Text::deserialize(from).map(|text| OsString::from(text).into())
}

/// Several words.
pub(crate) mod words {
    use super::{Deserialize, Deserializer, OsString, Serialize, Serializer, Text};

    /// Writes them.
    pub(crate) fn serialize<S: Serializer>(words: &[OsString], to: S) -> Result<S::Ok, S::Error> {
        words.iter().map(|word| Text::from(word.as_os_str())).collect::<Vec<_>>().serialize(to)
    }

    /// Reads them.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OsString>, D::Error> {
        Ok(Vec::<Text>::deserialize(from)?.into_iter().map(OsString::from).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::path::PathBuf;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Kept {
        #[serde(with = "crate::os_text")]
        path: PathBuf,
        #[serde(with = "crate::os_text::words")]
        words: Vec<OsString>,
    }

    #[test]
    fn bytes_come_back_as_they_were_and_text_is_text() {
        let odd = || OsString::from_vec(b"/a\xff\n".to_vec());
        for (path, word) in [(odd(), odd()), ("/a".into(), "b c".into())] {
            let kept = Kept { path: path.into(), words: vec![word] };
            let json = serde_json::to_string(&kept).unwrap();
            assert_eq!(serde_json::from_str::<Kept>(&json).unwrap(), kept, "{json}");
        }
        let text = Kept { path: "/a".into(), words: vec!["b".into()] };
        assert_eq!(serde_json::to_string(&text).unwrap(), r#"{"path":"/a","words":["b"]}"#);
    }
}
