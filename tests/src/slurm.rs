//! A Slurm of the test's own, out of Debian's packages: its controller and some nodes, all on the loopback of this machine.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::eventually;
use crate::place::free_port;
use crate::tools::binary;

/// Times that it is started until none of its daemons ends.
const ATTEMPTS_MAX: usize = 5;

/// Differences from a plain Slurm.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Its topology.conf.
    pub topology: Option<&'a str>,
    /// Whether there are partitions `low` and `high`: jobs of the second have those of the first queued again once they had
    /// some seconds of grace.
    pub preempts: bool,
}

/// A controller and its nodes, n0 first. Dropped, they are killed; and they end when the thread does that started them.
pub struct Slurm {
    dir: tempfile::TempDir,
    tree: PathBuf,
    daemons: Vec<Child>,
}

impl Slurm {
    /// Starts it and waits until every node is idle. None where `cargo xtask setup --tools` could not bring it.
    pub fn start(nodes: usize) -> Option<Self> {
        Self::start_with(nodes, Options::default())
    }

    /// As [`Self::start`], and not a plain one.
    pub fn start_with(nodes: usize, options: Options<'_>) -> Option<Self> {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/slurm").canonicalize().ok()?;
        // Between the choice of a port and its use by a daemon somebody else may take it, and the daemon ends.
        let slurm = (0..ATTEMPTS_MAX).find_map(|_| Self::attempt(&tree, nodes, options));
        assert!(slurm.is_some(), "Slurm's daemons do not stay");
        slurm
    }

    /// None once one of its daemons has ended.
    fn attempt(tree: &Path, nodes: usize, options: Options<'_>) -> Option<Self> {
        let tree = tree.to_owned();
        let dir = tempfile::tempdir().unwrap();
        let mut slurm = Self { dir, tree, daemons: Vec::new() };
        std::fs::create_dir(slurm.dir.path().join("state")).unwrap();
        std::fs::write(slurm.dir.path().join("cgroup.conf"), "CgroupAutomount=no\n").unwrap();
        let mut configuration = slurm.configuration(nodes, options.preempts);
        if let Some(topology) = options.topology {
            configuration.push_str("TopologyPlugin=topology/tree\n");
            std::fs::write(slurm.dir.path().join("topology.conf"), topology).unwrap();
        }
        std::fs::write(slurm.dir.path().join("slurm.conf"), configuration).unwrap();
        slurm.run_daemon("slurmctld-wlm", &["-D"]);
        let stepd = slurm.tree.join("usr/sbin/slurmstepd-wlm").display().to_string();
        for node in 0..nodes {
            slurm.run_daemon("slurmd-wlm", &["-D", "-N", &format!("n{node}"), "-d", &stepd]);
        }
        let stays = eventually("Slurm's nodes", || {
            if slurm.daemons.iter_mut().any(|daemon| daemon.try_wait().unwrap().is_some()) {
                return Ok(false);
            }
            let listed = slurm.command("sinfo").args(["-h", "-N", "-o", "%T"]).output().unwrap();
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            // Once for each partition.
            let expected = nodes * if options.preempts { 2 } else { 1 };
            if listed.lines().filter(|state| *state == "idle").count() == expected {
                Ok(true)
            } else {
                Err((listed, slurm.log()))
            }
        });
        stays.then_some(slurm)
    }

    /// One of its programs, such as `srun`, for this Slurm.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.tree.join("usr/bin").join(name));
        self.environment(&mut command);
        // Jobs find its programs, and ours.
        let ours = binary("muster").parent().map(Path::to_owned).unwrap();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = [self.tree.join("usr/bin"), ours].into_iter().chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(path).unwrap());
        command.stdin(Stdio::null());
        command
    }

    fn environment(&self, command: &mut Command) {
        command.env("SLURM_CONF", self.dir.path().join("slurm.conf"));
    }

    fn run_daemon(&mut self, name: &str, args: &[&str]) {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(self.tree.join("usr/sbin").join(name)).args(args);
        self.environment(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.daemons.push(command.spawn().unwrap());
    }

    /// What its controller has logged, and its first nodes.
    pub fn log(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        ["slurmctld.log", "slurmd.n0.log", "slurmd.n1.log"].map(read).concat()
    }

    /// Without what it keeps of jobs, and without a key that its parts would share: nobody else reaches them.
    fn configuration(&self, nodes: usize, preempts: bool) -> String {
        let dir = self.dir.path().display();
        let plugins = self.tree.join("usr/lib/x86_64-linux-gnu/slurm-wlm");
        let output = |command: &mut Command| {
            String::from_utf8(command.output().unwrap().stdout).unwrap().trim().to_owned()
        };
        let host = output(Command::new("hostname").arg("-s"));
        let user = output(Command::new("id").arg("-un"));
        let mut text = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={}\nSlurmUser={user}\nSlurmdUser={user}\n\
             AuthType=auth/none\nCredType=cred/none\nPluginDir={}\n\
             StateSaveLocation={dir}/state\nSlurmdSpoolDir={dir}/spool.%n\nSlurmctldPidFile={dir}/slurmctld.pid\n\
             SlurmdPidFile={dir}/slurmd.%n.pid\nSlurmctldLogFile={dir}/slurmctld.log\nSlurmdLogFile={dir}/slurmd.%n.log\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n\
             AccountingStorageType=accounting_storage/none\nJobCompType=jobcomp/none\nSelectType=select/cons_tres\n\
             SelectTypeParameters=CR_CPU\nSwitchType=switch/none\nMpiDefault=none\nReturnToService=2\n\
             SchedulerType=sched/backfill\nSchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=5\n\
             MinJobAge=10\nSlurmdParameters=config_overrides\n",
            free_port(),
            plugins.display(),
        );
        for node in 0..nodes {
            let port = free_port();
            writeln!(
                text,
                "NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 State=UNKNOWN"
            )
            .unwrap();
        }
        let all = format!("Nodes=n[0-{}] MaxTime=INFINITE State=UP", nodes - 1);
        if preempts {
            text.push_str("PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n");
            writeln!(text, "PartitionName=low {all} Default=YES PriorityTier=1 GraceTime=5").unwrap();
            writeln!(text, "PartitionName=high {all} PriorityTier=10").unwrap();
        } else {
            writeln!(text, "PartitionName=all {all} Default=YES OverSubscribe=FORCE:64").unwrap();
        }
        text
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            daemon.kill().ok();
            daemon.wait().ok();
        }
    }
}
