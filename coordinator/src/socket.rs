//! The Unix socket in the data directory: whoever may open it may do everything, as he could with the directory itself.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::net::UnixListener;
use tracing::warn;

/// Its name in the data directory.
pub(crate) const NAME: &str = "muster.sock";

/// Listens there, if it is to be and can be: what else there is works without it.
pub(crate) fn open(path: Option<&Path>) -> Option<UnixListener> {
    let path = path?;
    listen(path)
        .inspect_err(|error| warn!(path = %path.display(), %error, "the Unix socket cannot be served"))
        .ok()
}

/// Listens there, in the place of whoever did before: the store is ours, and so is the directory.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // Nobody can connect before its permissions are set.
    let made = path.with_extension("new");
    match std::fs::remove_file(&made) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&made)?;
    std::fs::set_permissions(&made, Permissions::from_mode(0o600))?;
    std::fs::rename(&made, path)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_its_owners_and_takes_the_place_of_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let before = listen(&path).unwrap();
        let now = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(before);
        let (client, served) = tokio::join!(tokio::net::UnixStream::connect(&path), now.accept());
        assert!(client.is_ok() && served.is_ok());
        assert!(listen(&dir.path().join("x".repeat(200))).is_err(), "the path is too long for a socket");
    }
}
