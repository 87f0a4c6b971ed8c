//! Everything that can go wrong before the first rank runs, checked while nothing does.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use muster_core::types::{GangId, Rank};
use nix::unistd::{AccessFlags, access};

use super::env_files;
use super::script;
use super::store::RankStore;
use super::user::{self, User, work_dir};
use crate::data_dir::make_dir;
use crate::shim::Order;
use crate::telemetry::EventDir;

/// What a gang needs on this node, checked and made.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub program: PathBuf,
    /// One directory per local rank.
    pub log_dirs: Vec<PathBuf>,
    /// As whom the ranks run, if not as whom this process does.
    pub user: Option<Box<User>>,
    /// On the gang's first node: the store of its ranks, which serves for as long as this is held.
    pub store: Option<RankStore>,
    /// On the node of rank 0, if the job has TensorBoard's directory followed: what was there before.
    pub events: Option<EventDir>,
}

/// Directory of a gang's output. Every generation has its own, so nothing is ever written over.
pub(crate) fn gang_log_dir(data_dir: &Path, gang: &GangId) -> PathBuf {
    data_dir.join("logs").join(gang.job.as_str()).join(format!("attempt_{}", gang.generation))
}

/// Directory of one rank's.
pub(crate) fn log_dir(data_dir: &Path, gang: &GangId, local_rank: u32) -> PathBuf {
    gang_log_dir(data_dir, gang).join(local_rank.to_string())
}

/// Whether this gang was launched before.
fn mark_of_launch(data_dir: &Path, gang: &GangId) -> PathBuf {
    gang_log_dir(data_dir, gang).join("launched")
}

/// Notes that the gang is launched, which can be done once: whatever else is forgotten, a generation does not
/// train twice on one node.
pub(crate) fn mark_launched(data_dir: &Path, gang: &GangId) -> Result<(), String> {
    let path = mark_of_launch(data_dir, gang);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    made.map(drop).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => launched_before(gang),
        _ => format!("failed to make {}: {error}", path.display()),
    })
}

fn launched_before(gang: &GangId) -> String {
    format!("generation {} of job {} was launched on this node before", gang.generation, gang.job)
}

/// Checks program and directory, makes the log directories and, on the first node, starts the ranks' store. The
/// error is for the user: what is wrong on this node, and what to do.
/// `port` is the store's, 0 for any.
pub(crate) fn prepare(order: &Order, port: u16) -> Result<Prepared, String> {
    let Order { assignment, data_dir, .. } = order;
    let spec = &assignment.spec;
    let user = user::of_job(spec.run_as.as_ref(), order.run_as.as_ref())?;
    if let Some(dir) = order.working_dir() {
        let shown = dir.display();
        match fs::metadata(&dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(format!("working_dir {shown} is not a directory")),
            Err(error) => {
                return Err(format!("working_dir {shown} cannot be used: {error}; create it on this node"));
            }
        }
    }
    let program = find_program(order)?;
    check_script(order)?;
    // Read again right before the ranks start: it is kept nowhere meanwhile.
    env_files::read(spec, user.as_ref())?;
    let gang = &assignment.gang;
    let log_dirs: Vec<PathBuf> =
        (0..assignment.placement.procs).map(|local_rank| log_dir(data_dir, gang, local_rank)).collect();
    for (dir, local_rank) in log_dirs.iter().zip(0..) {
        make_log_dir(dir)?;
        if let Some(user) = &user {
            user.furnish(dir, &order.output(local_rank, dir).error_file)?;
            user.check_way(dir)?;
        }
    }
    if mark_of_launch(data_dir, gang).exists() {
        return Err(launched_before(gang));
    }
    let store = (assignment.placement.group_rank == 0)
        .then(|| {
            let address = assignment.placement.address;
            RankStore::host(address, port).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => {
                    format!(
                        "port {port} of {address} is taken; stop who has it, or name another --master-port"
                    )
                }
                _ => format!(
                    "the ranks' store cannot serve on {address}: {error}; is it an address of this node?"
                ),
            })
        })
        .transpose()?;
    let events = events(order, &log_dirs, user.as_ref());
    Ok(Prepared { program, log_dirs, user: user.map(Box::new), store, events })
}

/// Looked at here, while nothing waits: a disk may be slow, and what the ranks write comes after.
fn events(order: &Order, log_dirs: &[PathBuf], user: Option<&User>) -> Option<EventDir> {
    let assignment = &order.assignment;
    let spec = &assignment.spec;
    let (Rank(0), Some(dir), [log_dir, ..]) =
        (assignment.placement.first_rank, &spec.tensorboard_dir, log_dirs)
    else {
        return None;
    };
    EventDir::before(start_dir(order, log_dir, user).join(dir), user.map(|user| user.uid))
}

/// Where a rank with this log directory starts.
pub(crate) fn start_dir(order: &Order, log_dir: &Path, user: Option<&User>) -> PathBuf {
    match (order.working_dir(), user) {
        (Some(dir), _) => dir,
        (None, Some(_)) => work_dir(log_dir),
        (None, None) => log_dir.to_owned(),
    }
}

/// Makes a directory for output.
pub(crate) fn make_log_dir(dir: &Path) -> Result<(), String> {
    make_dir(dir).map_err(|error| format!("failed to make the log directory {}: {error}", dir.display()))
}

/// A script that is missing on one node is found here, and not by the ranks of all the others, which would run already.
fn check_script(order: &Order) -> Result<(), String> {
    let command = order.command();
    let Some(script) = script::of_python(&command) else { return Ok(()) };
    let path = match order.working_dir() {
        Some(dir) => dir.join(script),
        None => PathBuf::from(script),
    };
    if path.is_relative() {
        return Err(format!(
            "script {:?} is a relative path; give an absolute one, or set working_dir",
            script.to_string_lossy()
        ));
    }
    access(&path, AccessFlags::R_OK).map_err(|error| {
        format!(
            "script {} cannot be read: {}; put it there on this node, or on a disk that all nodes see",
            path.display(),
            error.desc()
        )
    })
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

fn find_program(order: &Order) -> Result<PathBuf, String> {
    let spec = &order.assignment.spec;
    let name = order.command().into_iter().next().unwrap_or_default();
    let shown = name.to_string_lossy();
    if name.as_encoded_bytes().contains(&b'/') {
        let path = match order.working_dir() {
            Some(dir) => dir.join(&name),
            None => PathBuf::from(&name),
        };
        return match path {
            path if path.is_relative() => {
                Err(format!("program {shown:?} is a relative path; give an absolute one, or set working_dir"))
            }
            path if is_program(&path) => Ok(path),
            path if path.exists() => Err(format!("{} is not an executable file", path.display())),
            path => Err(format!("program {} is not there; install it on this node", path.display())),
        };
    }
    let search =
        spec.env.get("PATH").map(OsStr::new).map(ToOwned::to_owned).or_else(|| std::env::var_os("PATH"));
    let search = search.unwrap_or_default();
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    let places: Vec<PathBuf> = std::env::split_paths(&search).chain(beside).collect();
    let found = places.iter().map(|dir| dir.join(&name)).find(|path| path.is_absolute() && is_program(path));
    found.ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|dir| dir.display().to_string()).collect();
        format!(
            "program {shown:?} was not found; looked in {}; install it there, or give an absolute path",
            places.join(", ")
        )
    })
}
