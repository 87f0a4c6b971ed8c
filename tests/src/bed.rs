//! One job under faults: its ranks write down when they live, so that what must hold can be read from the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{Cluster, Settings, eventually, processes_with};

/// A rank that says every 20 ms that it lives, until it is told that the work is done. BED is where it writes to.
pub const BEATS: &str = r#"
while [ ! -e $BED/done ]; do
    read up idle < /proc/uptime; echo "$MUSTER_GENERATION $RANK $$ $up $MUSTER_NODE" >> $BED/beats; echo beat; sleep 0.02
done"#;

/// A line that a rank wrote.
#[derive(Clone, Debug)]
pub struct Beat {
    /// Generation and rank.
    pub generation: u32,
    /// Global rank.
    pub rank: u32,
    /// Its process.
    pub pid: i32,
    /// Seconds since the machine was started.
    pub time: f64,
    /// Its node.
    pub node: String,
}

/// Everything that ranks with this BED have written.
pub fn beats(bed: &Path) -> Vec<Beat> {
    let text = std::fs::read_to_string(bed.join("beats")).unwrap_or_default();
    let parse = |line: &str| {
        let mut words = line.split(' ');
        Some(Beat {
            generation: words.next()?.parse().ok()?,
            rank: words.next()?.parse().ok()?,
            pid: words.next()?.parse().ok()?,
            time: words.next()?.parse().ok()?,
            node: words.next()?.to_owned(),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// A cluster with one job.
#[derive(Debug)]
pub struct Bed {
    /// The cluster.
    pub cluster: Cluster,
    /// The job's id.
    pub id: String,
    dir: PathBuf,
}

impl Bed {
    /// Starts a cluster, and a job of ranks that beat; `before` is run by each rank first.
    pub fn start(settings: Settings, flags: &[&str], before: &str) -> Self {
        let cluster = Cluster::start(settings);
        let dir = cluster.dir.path().join("bed");
        std::fs::create_dir(&dir).unwrap();
        let bed = format!("BED={}", dir.display());
        let flags: Vec<&str> = ["--env", &bed, "--stop-grace", "2s"].iter().chain(flags).copied().collect();
        let id = cluster.submit(&flags, &format!("{before}{BEATS}"));
        Self { cluster, id, dir }
    }

    /// Two nodes, one rank each, beating.
    pub fn pair(flags: &[&str]) -> Self {
        let flags: Vec<&str> = ["--nnodes", "2"].iter().chain(flags).copied().collect();
        let bed = Self::start(Settings { lease: "2s", ..Settings::default() }, &flags, "");
        bed.wait_for_ranks(1, 2);
        bed
    }

    /// Everything the ranks wrote.
    pub fn beats(&self) -> Vec<Beat> {
        beats(&self.dir)
    }

    /// Waits until so many ranks of a generation beat, and gives their processes by rank.
    pub fn wait_for_ranks(&self, generation: u32, count: usize) -> BTreeMap<u32, i32> {
        eventually("the ranks", || {
            let beats = self.beats();
            let of_generation = beats.iter().filter(|beat| beat.generation == generation);
            let ranks: BTreeMap<u32, i32> = of_generation.map(|beat| (beat.rank, beat.pid)).collect();
            if ranks.len() == count { Ok(ranks) } else { Err((ranks, self.job())) }
        })
    }

    /// The job as JSON.
    pub fn job(&self) -> Value {
        self.cluster.job(&self.id)
    }

    /// Waits until the reason of the job or of a past generation contains this, and gives it.
    pub fn wait_for_reason(&self, expected: &str) -> String {
        eventually(expected, || {
            let job = self.job();
            let past = job["past"].as_array().into_iter().flatten();
            let mut reasons = past.chain([&job]).filter_map(|of| of["reason"].as_str());
            reasons.find(|reason| reason.contains(expected)).map(str::to_owned).ok_or(job.clone())
        })
    }

    /// Shims of the job, all or those of one node.
    pub fn shims(&self, node: Option<&str>) -> Vec<i32> {
        let of_job = format!("{}.", self.id);
        let found = processes_with(&of_job).into_iter().filter(|(pid, command)| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let environ = String::from_utf8_lossy(&environ).into_owned();
            let here = node.is_none_or(|node| environ.contains(&format!("/{node}/run/")));
            command.contains(" shim") && environ.contains("MUSTER_SHIM_DIR=") && here
        });
        found.map(|(pid, _)| pid).collect()
    }

    /// Processes of the job's ranks, all or those of one node.
    pub fn ranks(&self, node: Option<&str>) -> Vec<i32> {
        let node = node.map(|node| format!("MUSTER_NODE={node} "));
        let found = processes_with(&format!("MUSTER_JOB_ID={} ", self.id)).into_iter().filter(|(pid, _)| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let environ = String::from_utf8_lossy(&environ).replace('\0', " ");
            node.as_ref().is_none_or(|node| environ.contains(node))
        });
        found.map(|(pid, _)| pid).collect()
    }

    /// Signals a whole node, as if its machine did it: daemon, shims and ranks.
    pub fn signal_node(&self, index: usize, signal: Signal) {
        let name = format!("n{}", index + 1);
        let all = [vec![self.cluster.workers[index].pid()], self.shims(Some(&name)), self.ranks(Some(&name))];
        for pid in all.concat() {
            kill(Pid::from_raw(pid), signal).ok();
        }
    }

    /// Kills a daemon and starts it again after a while.
    pub fn restart_worker(&mut self, index: usize, after: Duration) {
        self.cluster.workers[index].kill();
        std::thread::sleep(after);
        let name = format!("n{}", index + 1);
        self.cluster.workers[index] = self.cluster.spawn_worker(&name, &name);
    }

    /// Lets the ranks end, and checks what must hold of every history: the job succeeds in this generation, with so
    /// many restarts; no two generations lived at once; nothing of it is left.
    pub fn finish(self, generation: u32, restarts: u32) -> Vec<Beat> {
        std::fs::write(self.dir.join("done"), "").unwrap();
        let job = self.cluster.wait_for(&self.id, "SUCCEEDED");
        let seen = (job["generation"].as_u64().unwrap(), job["restartsUsed"].as_u64().unwrap());
        assert_eq!(seen, (u64::from(generation), u64::from(restarts)), "{job}");
        self.check()
    }

    /// The part of it that holds of a job that ended otherwise, too.
    pub fn check(self) -> Vec<Beat> {
        let left = || {
            let left = [self.ranks(None), self.shims(None)].concat();
            if left.is_empty() { Ok(()) } else { Err(left) }
        };
        eventually("the end of everything", left);
        let beats = self.beats();
        let mut newest = 0;
        for beat in &beats {
            // The file has the order in which the lines were written.
            assert!(
                beat.generation >= newest,
                "generation {} lives after {newest}: {beat:?}",
                beat.generation
            );
            newest = newest.max(beat.generation);
        }
        beats
    }
}
