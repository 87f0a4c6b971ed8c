//! Files that hold a secret, and who may read them.

use std::fs::metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Permissions that let everybody read or write a file.
const ALL_READ_WRITE: u32 = 0o006;

/// Returns a warning about a file with a secret that every user of this machine may read or write.
pub fn secret_file_warning(path: &Path) -> Option<String> {
    let mode = metadata(path).ok()?.mode() & 0o777;
    (mode & ALL_READ_WRITE != 0).then(|| {
        let path = path.display();
        format!(
            "every user of this machine may read or write the secret in {path} (mode {mode:o}); \
             run `chmod go= {path}`"
        )
    })
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_that_everybody_may_read_is_warned_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert_eq!(secret_file_warning(&path), None, "what is not there is said when it is read");
        std::fs::write(&path, "muster.a.b").unwrap();
        for (mode, warned) in [(0o600, false), (0o640, false), (0o400, false), (0o644, true), (0o602, true)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let warning = secret_file_warning(&path);
            assert_eq!(warning.is_some(), warned, "{mode:o}: {warning:?}");
            assert!(warning.is_none_or(|words| words.contains("chmod go=")), "{mode:o}");
        }
    }
}
