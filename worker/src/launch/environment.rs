//! The environment of a rank: the shim's, which is the daemon's, then torchrun's contract and MUSTER_*, then the job's.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;

use muster_core::types::surroundings::VariableSource;
use muster_core::types::{Assignment, Rank, Surroundings};

use super::user::User;
use crate::attached::Attached;

/// Variables of the daemon that mean nothing to a rank: those of systemd, and what an outer job told a daemon that
/// it started where ours may not set it anew.
const DROPPED: [&str; 10] = [
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "LISTEN_PID",
    "WATCHDOG_USEC",
    // Where secrets lie is nothing that programs of users need to know.
    "MUSTER_JOIN_TOKEN_FILE",
    "MUSTER_TOKEN_FILE",
    "MUSTER_CHECKPOINT_DIR",
    "MUSTER_RUN_AS",
    SHIM_DIR,
    SHIM_LOG,
];
/// Variables of the daemon that its ranks have although they run as another user: where programs and libraries are, language
/// and time. Everything else of root's is not theirs to read. A site that wants more sets them for the job.
const PASSED_ON: [&str; 16] = [
    "PATH",
    "LD_LIBRARY_PATH",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TERM",
    "MODULEPATH",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
];
/// Begin those of the machine's hardware and its libraries, which a site sets for all of its jobs.
const PASSED_ON_PREFIXES: [&str; 12] =
    ["CUDA_", "FI_", "GLOO_", "IBV_", "LC_", "NCCL_", "NVIDIA_", "OMP_", "RDMAV_", "TORCH_", "UCC_", "UCX_"];
/// Tells a shim where its state directory is.
pub(crate) const SHIM_DIR: &str = "MUSTER_SHIM_DIR";
/// Tells it where its log goes, if not to its standard error.
pub const SHIM_LOG: &str = "MUSTER_SHIM_LOG";
/// Names the gang in the environment of each of its processes, by which they are found when their shim is dead.
pub(crate) const MARK: &str = "MUSTER_GANG";
/// torchrun's default of --signals-to-handle.
const SIGNALS_TO_HANDLE: &str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT";

/// Where a rank writes, and how it is found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RankContext<'a> {
    pub error_file: &'a Path,
    pub telemetry: &'a Path,
    /// The value of [`MARK`].
    pub mark: &'a str,
    pub attached: Option<&'a Attached>,
    /// What the machine adds.
    pub surroundings: Option<&'a Surroundings>,
    /// As whom the rank runs, if not as whom the daemon does.
    pub user: Option<&'a User>,
    /// Variables whose values were read from files.
    pub from_files: &'a BTreeMap<OsString, OsString>,
}

/// Every variable of one rank. `inherited` is the daemon's environment.
pub(crate) fn of_rank(
    assignment: &Assignment,
    local_rank: u32,
    port: u16,
    paths: RankContext<'_>,
    inherited: impl Iterator<Item = (OsString, OsString)>,
) -> BTreeMap<OsString, OsString> {
    let spec = &assignment.spec;
    let placement = &assignment.placement;
    let is_others = paths.user.is_some();
    let mut env: BTreeMap<OsString, OsString> = inherited
        .filter(|(key, _)| !DROPPED.iter().any(|dropped| key == dropped))
        .filter(|(key, _)| !is_others || is_passed_on(key))
        .collect();
    let defaults = [
        ("OMP_NUM_THREADS", "1", placement.procs > 1),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", true),
        ("TORCHELASTIC_SIGNALS_TO_HANDLE", SIGNALS_TO_HANDLE, true),
        // A rank that hangs is ended with SIGABRT; Python then prints where it hung.
        ("PYTHONFAULTHANDLER", "1", true),
        // GPUs are numbered as the bus has them; CUDA by itself counts from the fastest.
        ("CUDA_DEVICE_ORDER", "PCI_BUS_ID", !placement.gpus.is_empty()),
    ];
    for (key, value, applies) in defaults {
        if applies {
            env.entry(key.into()).or_insert_with(|| value.into());
        }
    }
    let derived = paths.surroundings.map_or(&[][..], |all| &all.variables);
    for variable in derived.iter().filter(|variable| variable.source == VariableSource::Node) {
        env.entry(variable.name.clone().into()).or_insert_with(|| variable.value.clone().into());
    }
    if let Some(user) = paths.user {
        env.extend(user.variables().map(|(key, value)| (key.into(), value)));
    }
    for (key, value) in &spec.env {
        env.insert(key.into(), value.into());
    }
    env.extend(paths.from_files.iter().map(|(key, value)| (key.clone(), value.clone())));
    let rank = Rank(placement.first_rank.0 + local_rank);
    let mut set = |key: &str, value: String| env.insert(key.into(), value.into());
    set("RANK", rank.to_string());
    set("ROLE_RANK", rank.to_string());
    set("ROLE_NAME", "default".to_owned());
    set("LOCAL_RANK", local_rank.to_string());
    set("GROUP_RANK", placement.group_rank.to_string());
    set("LOCAL_WORLD_SIZE", placement.procs.to_string());
    set("WORLD_SIZE", assignment.world_size.to_string());
    set("ROLE_WORLD_SIZE", assignment.world_size.to_string());
    set("GROUP_WORLD_SIZE", assignment.group_world_size.to_string());
    set("MASTER_ADDR", assignment.master_addr.to_string());
    set("MASTER_PORT", port.to_string());
    set("TORCHELASTIC_RESTART_COUNT", assignment.restart_count.to_string());
    set("TORCHELASTIC_MAX_RESTARTS", spec.max_restarts.to_string());
    set("TORCHELASTIC_RUN_ID", assignment.gang.job.to_string());
    // The shim on the gang's first node serves the store, and rank 0 is a client of it like the others.
    set("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned());
    set("MUSTER_JOB_ID", assignment.gang.job.to_string());
    set("MUSTER_GENERATION", assignment.gang.generation.to_string());
    set(MARK, paths.mark.to_owned());
    set("MUSTER_NODE", placement.node.to_string());
    if let Some(dir) = &spec.checkpoint_dir {
        set("MUSTER_CHECKPOINT_DIR", dir.clone());
    }
    env.insert("TORCHELASTIC_ERROR_FILE".into(), paths.error_file.into());
    env.insert("MUSTER_TELEMETRY".into(), paths.telemetry.into());
    let per_rank = spec.per_proc.gpus as usize;
    let mine = placement.gpus.chunks(per_rank.max(1)).nth(local_rank as usize);
    if let (Some(mine), true) = (mine, per_rank > 0) {
        let name = |index: &u32| {
            let named = paths.surroundings.into_iter().flat_map(|all| &all.devices);
            let own = named.into_iter().find(|device| device.index == *index);
            own.map_or_else(|| index.to_string(), |device| device.name.clone())
        };
        let list: Vec<String> = mine.iter().map(name).collect();
        env.insert("CUDA_VISIBLE_DEVICES".into(), list.join(",").into());
    }
    if let Some(attached) = paths.attached {
        of_attached(attached, local_rank, &mut env);
    }
    env
}

/// Returns whether ranks of another user have this variable of the daemon's.
fn is_passed_on(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    PASSED_ON.iter().any(|passed| name == *passed)
        || PASSED_ON_PREFIXES.iter().any(|prefix| bytes.starts_with(prefix.as_bytes()))
}

/// What `muster run` was told.
fn of_attached(attached: &Attached, local_rank: u32, env: &mut BTreeMap<OsString, OsString>) {
    env.insert("TORCHELASTIC_RUN_ID".into(), attached.run_id.clone().into());
    env.insert("TORCHELASTIC_SIGNALS_TO_HANDLE".into(), attached.signals.clone().into());
    env.insert("ROLE_NAME".into(), attached.role.clone().into());
    if let Some((host, port)) = &attached.master {
        env.insert("MASTER_ADDR".into(), host.into());
        env.insert("MASTER_PORT".into(), port.to_string().into());
    }
    // Of parts of GPUs a process sees the first of its list alone, so that all ranks would have the
    // same.
    let visible = env.get(OsStr::new("CUDA_VISIBLE_DEVICES")).and_then(|list| list.to_str());
    let parts: Vec<&str> = visible.unwrap_or_default().split(',').map(str::trim).collect();
    let is_parts = parts.len() > 1 && parts.iter().all(|name| name.starts_with("MIG-"));
    let part = parts.get(local_rank as usize).filter(|_| is_parts && !attached.virtual_local_rank);
    if let Some(part) = part.map(|part| OsString::from(*part)) {
        env.insert("CUDA_VISIBLE_DEVICES".into(), part);
    }
    if attached.virtual_local_rank {
        env.insert("LOCAL_RANK".into(), "0".into());
        let visible = env.get(OsStr::new("CUDA_VISIBLE_DEVICES")).and_then(|list| list.to_str());
        let own = match visible {
            Some(list) => list.split(',').nth(local_rank as usize).unwrap_or_default().to_owned(),
            None => local_rank.to_string(),
        };
        env.insert("CUDA_VISIBLE_DEVICES".into(), own.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{
        DesiredPhase, GangId, Generation, JobId, JobSpec, Millis, NodeName, NodePlacement, Resources,
        StopMode, StopSignal,
    };

    fn assignment() -> Assignment {
        let spec = JobSpec {
            env: [("OMP_NUM_THREADS".to_owned(), "4".to_owned()), ("MINE".to_owned(), "job".to_owned())]
                .into(),
            per_proc: Resources { gpus: 2, ..Resources::default() },
            max_restarts: 3,
            checkpoint_dir: Some("/shared/checkpoints".into()),
            ..JobSpec::new(vec!["train".into()])
        };
        Assignment {
            gang: GangId { job: JobId::new("k3v9x2ma").unwrap(), generation: Generation(2) },
            phase: DesiredPhase::Running,
            spec,
            placement: NodePlacement {
                node: NodeName::new("n2").unwrap(),
                address: [10, 0, 0, 2].into(),
                group_rank: 1,
                first_rank: Rank(2),
                procs: 2,
                gpus: vec![0, 1, 4, 7],
            },
            world_size: 4,
            group_world_size: 2,
            master_addr: [10, 0, 0, 1].into(),
            master_port: Some(29500),
            restart_count: 1,
            stop: StopMode { signal: StopSignal::default(), grace: Millis(0), dump_stacks: false },
        }
    }

    fn find_user(name: &str) -> User {
        super::super::user::find(name).unwrap()
    }

    fn env(local_rank: u32, inherited: &[(&str, &str)]) -> BTreeMap<String, String> {
        env_as(None, local_rank, inherited)
    }

    fn env_as(user: Option<&User>, local_rank: u32, inherited: &[(&str, &str)]) -> BTreeMap<String, String> {
        let paths = RankContext {
            error_file: Path::new("/logs/error.json"),
            telemetry: Path::new("/run/1.sock"),
            mark: "k3v9x2ma/2@d",
            attached: None,
            surroundings: None,
            user,
            from_files: &[("SECRET".into(), "s3cret".into()), ("RANK".into(), "9".into())].into(),
        };
        let inherited = inherited.iter().map(|(key, value)| (OsString::from(key), OsString::from(value)));
        let text = |text: OsString| text.into_string().unwrap();
        of_rank(&assignment(), local_rank, 29500, paths, inherited)
            .into_iter()
            .map(|(k, v)| (text(k), text(v)))
            .collect()
    }

    #[test]
    fn each_rank_sees_its_own_gpus_and_its_place() {
        let table = [
            ("CUDA_VISIBLE_DEVICES", "0,1", "4,7"),
            ("RANK", "2", "3"),
            ("LOCAL_RANK", "0", "1"),
            ("GROUP_RANK", "1", "1"),
            ("WORLD_SIZE", "4", "4"),
            ("MASTER_ADDR", "10.0.0.1", "10.0.0.1"),
            ("MASTER_PORT", "29500", "29500"),
            ("TORCHELASTIC_RESTART_COUNT", "1", "1"),
            ("TORCHELASTIC_MAX_RESTARTS", "3", "3"),
            ("TORCHELASTIC_RUN_ID", "k3v9x2ma", "k3v9x2ma"),
            ("TORCHELASTIC_ERROR_FILE", "/logs/error.json", "/logs/error.json"),
            ("MUSTER_GENERATION", "2", "2"),
            ("MUSTER_GANG", "k3v9x2ma/2@d", "k3v9x2ma/2@d"),
            ("PYTHONFAULTHANDLER", "1", "1"),
            ("MUSTER_CHECKPOINT_DIR", "/shared/checkpoints", "/shared/checkpoints"),
            ("TORCHELASTIC_SIGNALS_TO_HANDLE", SIGNALS_TO_HANDLE, SIGNALS_TO_HANDLE),
            ("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "PCI_BUS_ID"),
        ];
        let ranks = [env(0, &[]), env(1, &[])];
        for (name, first, second) in table {
            assert_eq!((ranks[0][name].as_str(), ranks[1][name].as_str()), (first, second), "{name}");
        }
    }

    #[test]
    fn the_job_comes_before_the_daemon_and_neither_before_the_contract() {
        let env =
            env(0, &[("MINE", "daemon"), ("HOME", "/root"), ("RANK", "77"), ("NOTIFY_SOCKET", "/run/x")]);
        let get = |name: &str| env.get(name).map(String::as_str);
        assert_eq!((get("MINE"), get("HOME"), get("RANK")), (Some("job"), Some("/root"), Some("2")));
        assert_eq!(get("SECRET"), Some("s3cret"));
        assert_eq!((get("OMP_NUM_THREADS"), get("NOTIFY_SOCKET")), (Some("4"), None));
    }

    #[test]
    fn ranks_of_another_user_have_what_is_listed_of_the_daemons() {
        let root = find_user("root");
        let daemon = [
            ("PATH", "/opt/bin:/bin"),
            ("LC_ALL", "C.UTF-8"),
            ("NCCL_IB_TC", "106"),
            ("LD_LIBRARY_PATH", "/usr/local/cuda/lib64"),
            ("AWS_SECRET_ACCESS_KEY", "s3cr3t"),
            ("XDG_RUNTIME_DIR", "/run/user/0"),
            ("SSH_AUTH_SOCK", "/run/agent"),
            ("CREDENTIALS_DIRECTORY", "/run/credentials"),
            ("MUSTER_COORDINATOR", "https://c:7070"),
            ("path", "no"),
        ];
        let env = env_as(Some(&root), 0, &daemon);
        for (name, value) in &daemon[..4] {
            assert_eq!(env.get(*name).map(String::as_str), Some(*value), "{name}");
        }
        for (name, _) in &daemon[4..] {
            assert_eq!(env.get(*name), None, "{name}");
        }
        assert_eq!((env["USER"].as_str(), env["MINE"].as_str()), ("root", "job"));
        assert!(env_as(None, 0, &daemon).contains_key("SSH_AUTH_SOCK"), "its own user's ranks have all");
    }
}
