//! As whom ranks run where the daemon is root: whom the job names, else whom the node has for that.
//!
//! The daemon, the shims and their directories stay root's. What ranks write goes into files that were opened for them, and
//! they have a directory of their own to start in; nothing that root reads or removes by its name is theirs to replace.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use muster_core::types::UserName;
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, getgrouplist};

use crate::data_dir::{make_dir, private_file};

/// Ids below are the system's own users (login.defs). A job names none of them; a node may.
const PEOPLE: u32 = 1000;
/// Where ranks of a user start, in their log directory, if the job does not say where.
const WORK: &str = "work";

/// A user as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// With the first.
    pub groups: Vec<u32>,
    home: PathBuf,
    shell: PathBuf,
}

/// As whom the ranks of a job run; none for as whom this process does. The error is for the job's user.
pub(crate) fn of_job(asked: Option<&UserName>, node: Option<&UserName>) -> Result<Option<User>, String> {
    let Some(name) = asked.or(node) else { return Ok(None) };
    let user = find(name.as_str())?;
    let own = Uid::effective();
    if user.uid == own.as_raw() && (!own.is_root() || node == Some(name)) {
        return Ok(None);
    }
    if !own.is_root() {
        return Err(format!(
            "ranks are to run as {name}, and this node's daemon, which runs as user {own}, can start none as somebody else; run it \
             as root"
        ));
    }
    if user.uid < PEOPLE && node != Some(name) {
        return Err(format!(
            "ranks do not run as {name}, who is the system's own (user {}); name a person's user",
            user.uid
        ));
    }
    Ok(Some(user))
}

/// Whether a node can have its ranks run so.
pub(crate) fn check(node: Option<&UserName>) -> Result<(), String> {
    of_job(None, node).map(drop)
}

/// Looks a user up by name.
pub(super) fn find(name: &str) -> Result<User, String> {
    let failed = |why: String| format!("ranks cannot run as {name} on this node: {why}");
    let found = nix::unistd::User::from_name(name).map_err(|error| failed(error.to_string()))?;
    let found = found.ok_or_else(|| failed("it has no such user".to_owned()))?;
    let text = CString::new(name).map_err(|error| failed(error.to_string()))?;
    let groups = getgrouplist(&text, found.gid).map_err(|error| failed(error.to_string()))?;
    Ok(User {
        name: found.name,
        uid: found.uid.as_raw(),
        gid: found.gid.as_raw(),
        groups: groups.into_iter().map(Gid::as_raw).collect(),
        home: found.dir,
        shell: found.shell,
    })
}

impl User {
    /// What a login would set.
    pub fn variables(&self) -> [(&'static str, OsString); 4] {
        [
            ("HOME", self.home.clone().into()),
            ("USER", self.name.clone().into()),
            ("LOGNAME", self.name.clone().into()),
            ("SHELL", self.shell.clone().into()),
        ]
    }

    /// Makes what a rank of this user needs in its log directory: where it starts, and its error file.
    pub fn furnish(&self, log_dir: &Path, error_file: &Path) -> Result<(), String> {
        let work = work_dir(log_dir);
        let made = make_dir(&work).and_then(|()| self.own(&work)).and_then(|()| {
            fs::set_permissions(&work, fs::Permissions::from_mode(0o700))?;
            // Opened as what it is: another generation's cannot be there, nor a link.
            let flags = OFlag::O_NOFOLLOW.bits();
            let file = private_file().append(true).custom_flags(flags).open(error_file)?;
            self.own_file(&file)
        });
        made.map_err(|error| format!("failed to make {} for {}: {error}", work.display(), self.name))
    }

    /// Makes a file this user's.
    pub fn own_file(&self, file: &File) -> io::Result<()> {
        fchown(file, Some(self.uid), Some(self.gid))
    }

    /// Makes it this user's.
    pub fn own(&self, path: &Path) -> io::Result<()> {
        chown(path, Some(self.uid), Some(self.gid))
    }

    /// The ranks reach what is theirs in there, or it is said which directory keeps them out.
    pub fn check_way(&self, log_dir: &Path) -> Result<(), String> {
        for dir in log_dir.ancestors().skip(1) {
            let passes = fs::metadata(dir).is_ok_and(|meta| {
                let group = self.groups.contains(&meta.gid());
                let bit = if meta.uid() == self.uid {
                    0o100
                } else if group {
                    0o010
                } else {
                    0o001
                };
                meta.mode() & bit != 0
            });
            if !passes {
                return Err(format!(
                    "{} cannot pass through {}, where this daemon keeps what ranks write; choose another --data-dir, or `chmod o+x {}`",
                    self.name,
                    dir.display(),
                    dir.display()
                ));
            }
        }
        Ok(())
    }
}

/// Where ranks of a user start that a job names no directory for.
pub(crate) fn work_dir(log_dir: &Path) -> PathBuf {
    log_dir.join(WORK)
}

/// Whether this process can be another user in its children.
pub(crate) fn is_root() -> bool {
    Uid::effective().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(text: &str) -> UserName {
        UserName::new(text).unwrap()
    }

    #[test]
    fn users_are_found_and_the_systems_own_are_not_for_jobs() {
        if !is_root() {
            eprintln!("skipped: only root can be somebody else");
            return;
        }
        assert_eq!(of_job(None, None), Ok(None));
        let nobody = of_job(Some(&name("nobody")), None).unwrap().unwrap();
        assert!(nobody.uid >= PEOPLE && nobody.groups.contains(&nobody.gid), "{nobody:?}");
        // A node may.
        assert_eq!(of_job(None, Some(&name("daemon"))).unwrap().unwrap().uid, 1);
        assert_eq!(of_job(None, Some(&name("root"))), Ok(None));
        for (asked, words) in
            [("daemon", "the system's own"), ("root", "the system's own"), ("no.such", "no such user")]
        {
            let why = of_job(Some(&name(asked)), None).unwrap_err();
            assert!(why.contains(words), "{asked}: {why}");
        }
    }

    #[test]
    fn who_is_kept_out_is_told_where() {
        let dir = tempfile::tempdir().unwrap();
        let log_dir = dir.path().join("logs/0");
        fs::create_dir_all(&log_dir).unwrap();
        let groups = vec![7];
        let [home, shell] = ["/", "/bin/sh"].map(PathBuf::from);
        let user = User { name: "ann".to_owned(), uid: 54321, gid: 7, groups, home, shell };
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let why = user.check_way(&log_dir).unwrap_err();
        assert!(why.contains(&format!("ann cannot pass through {}", dir.path().display())), "{why}");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        user.check_way(&log_dir).unwrap();
    }
}
