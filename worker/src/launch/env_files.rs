//! Variables whose values a node has in files: read as the user who runs the ranks, and handed to nobody but them.
//!
//! Nothing here keeps, logs or quotes what is in a file.

#![expect(unsafe_code, reason = "a thread becomes somebody else by system calls")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;

use muster_core::types::JobSpec;
use nix::fcntl::OFlag;
use nix::libc;

use super::user::User;

/// Largest file: a variable of 128 KiB is the largest that Linux hands to a program, and its name is a part of it.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Reads every variable of a job that comes from a file. The error is for the job's user.
pub(crate) fn read(spec: &JobSpec, user: Option<&User>) -> Result<BTreeMap<OsString, OsString>, String> {
    let read_all = || {
        let all = spec.env_files.iter().map(|(name, path)| {
            let value = value_in(path).map_err(|why| failed(name, path, user, &why))?;
            Ok((name.into(), value.into()))
        });
        all.collect()
    };
    match user {
        Some(user) if !spec.env_files.is_empty() => as_user(user, read_all),
        Some(_) | None => read_all(),
    }
}

fn failed(name: &str, path: &str, user: Option<&User>, why: &str) -> String {
    let by = user.map(|user| format!(" as {}", user.name)).unwrap_or_default();
    format!(
        "variable {name} is to come from {path}, which cannot be read{by}: {why}; put it there on this node, and let the user \
         who runs the ranks read it"
    )
}

fn value_in(path: &str) -> Result<String, String> {
    let words = |error: io::Error| error.to_string();
    // Nothing waits for the other end of a pipe, and no terminal becomes ours.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(words)?;
    if !file.metadata().map_err(words)?.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(words)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it has more than {FILE_BYTES_MAX} bytes"));
    }
    let mut text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    if text.contains('\0') {
        return Err("it contains a NUL byte, which no variable can hold".to_owned());
    }
    // Editors and `echo` end a line that is no part of a secret.
    let kept =
        text.strip_suffix('\n').map_or(text.len(), |line| line.strip_suffix('\r').unwrap_or(line).len());
    text.truncate(kept);
    Ok(text)
}

/// Does something that opens files with the rights of another user, on a thread that has no others.
fn as_user<T: Send>(user: &User, act: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let acting = thread::Builder::new().name("as-user".to_owned()).spawn_scoped(scope, || {
            become_for_files(user)
                .map_err(|error| format!("failed to read files as {}: {error}", user.name))?;
            act()
        });
        let acting = acting.map_err(|error| format!("failed to start a thread: {error}"))?;
        acting.join().unwrap_or_else(|_| Err("a thread that read files has ended".to_owned()))
    })
}

/// The calling thread loses root's rights over files for good. It stays root's otherwise, so that the user
/// cannot signal it. The C library's functions would take all threads along.
fn become_for_files(user: &User) -> io::Result<()> {
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    let (uid, gid) = (i64::from(user.uid), i64::from(user.gid));
    // SAFETY: system calls on numbers, and on a list that lives through its own.
    let (is_group, is_user) = unsafe {
        check(libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()))?;
        libc::syscall(libc::SYS_setfsgid, user.gid);
        libc::syscall(libc::SYS_setfsuid, user.uid);
        // They report no failure, and return what was; nobody has the id -1.
        (libc::syscall(libc::SYS_setfsgid, -1) == gid, libc::syscall(libc::SYS_setfsuid, -1) == uid)
    };
    if is_group && is_user { Ok(()) } else { Err(io::Error::from(io::ErrorKind::PermissionDenied)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::user;
    use muster_core::types::UserName;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn spec(path: &str) -> JobSpec {
        let env_files = [("SECRET".to_owned(), path.to_owned())].into();
        JobSpec { env_files, ..JobSpec::new(vec!["train".into()]) }
    }

    #[test]
    fn what_a_file_holds_is_a_value_or_it_is_said_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let text = path.to_str().unwrap();
        let large = vec![b's'; FILE_BYTES_MAX as usize + 1];
        let table: [(&[u8], Result<&str, &str>); 8] = [
            (b"s3cret", Ok("s3cret")),
            (b"s3cret\n", Ok("s3cret")),
            (b"two\r\nlines\r\n", Ok("two\r\nlines")),
            (b"\n\n", Ok("\n")),
            (b"", Ok("")),
            (b"s3cr\0t", Err("a NUL byte")),
            (b"s3cr\xfft", Err("not UTF-8")),
            (&large, Err("more than 65536 bytes")),
        ];
        for (held, expected) in table {
            fs::write(&path, held).unwrap();
            match (read(&spec(text), None), expected) {
                (Ok(all), Ok(value)) => assert_eq!(all, [("SECRET".into(), value.into())].into()),
                (Err(why), Err(words)) => {
                    assert!(why.contains(words) && why.contains("variable SECRET"), "{why}");
                    assert!(!why.contains("s3cr"), "{why}");
                }
                (found, expected) => panic!("{found:?}, expected {expected:?}"),
            }
        }
        let missing = dir.path().join("none");
        for (path, words) in
            [(missing.to_str().unwrap(), "No such file"), ("/dev/zero", "not a regular file")]
        {
            let why = read(&spec(path), None).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        assert_eq!(read(&JobSpec::new(vec!["train".into()]), None), Ok(BTreeMap::new()));
    }

    #[test]
    fn a_file_is_read_with_the_rights_of_who_runs_the_ranks() {
        if !user::is_root() {
            eprintln!("SKIPPED: only root can be somebody else");
            return;
        }
        let name = UserName::new("nobody").unwrap();
        let user = user::of_job(Some(&name), None).unwrap().unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let path = dir.path().join("secret");
        fs::write(&path, "s3cret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let spec = spec(path.to_str().unwrap());
        let why = read(&spec, Some(&user)).unwrap_err();
        assert!(why.contains("cannot be read as nobody: Permission denied"), "{why}");
        user.own(&path).unwrap();
        let read_as_them = read(&spec, Some(&user)).unwrap();
        assert_eq!(read_as_them, [("SECRET".into(), "s3cret".into())].into());
        let roots = dir.path().join("roots");
        fs::write(&roots, "s3cret").unwrap();
        fs::set_permissions(&roots, fs::Permissions::from_mode(0o000)).unwrap();
        assert!(fs::read(&roots).is_ok(), "this thread is root's still");
    }
}
