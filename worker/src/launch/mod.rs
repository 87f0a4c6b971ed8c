//! What it takes to start, signal and find the processes of ranks. Used by shims, which are their parents.
//!
//! One process per rank, each in a session of its own, so that a signal reaches a rank and everything it
//! started. Ranks die with the thread that started them (PR_SET_PDEATHSIG), which is why that is a shim's main one.

pub(crate) mod cgroup;
pub(crate) mod checks;
pub(crate) mod env_files;
pub(crate) mod environment;
pub(crate) mod error_file;
mod files;
mod interpreter;
pub(crate) mod oom;
pub(crate) mod prepare;
pub(crate) mod process;
pub(crate) mod procfs;
mod script;
mod spawn;
pub(crate) mod stacks;
pub(crate) mod store;
pub(crate) mod sweep;
pub(crate) mod timer;
pub(crate) mod user;
pub(crate) mod way;
