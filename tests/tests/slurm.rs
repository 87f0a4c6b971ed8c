//! `deploy/slurm/muster.sbatch` in a real Slurm: its exit code is the job's, and an allocation whose time is up is queued
//! again and goes on from its checkpoint.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use muster_tests::{
    Outcome, Slurm, SlurmOptions, binary, deployed, eventually, is_running, processes_with, skip,
};

/// Counts in a checkpoint, as fast as a test wants it: told to end it writes where it is; it ends by itself when it finds a
/// file with the exit code. Each start says from where it goes on.
const COUNTS: &str = r#"
cd "$MUSTER_CHECKPOINT_DIR"
count=$(cat "count.$RANK" 2>/dev/null || echo 0)
echo "$MUSTER_GENERATION $count $WORLD_SIZE" >>"starts.$RANK"
trap 'echo "$count" >"count.$RANK"; exit 0' TERM
while [ ! -e exit ]; do
    count=$((count + 1))
    echo "$count" >"at.$RANK"
    sleep 0.05
done
exit "$(cat exit)"
"#;

/// A job of Slurm's.
struct Job<'a> {
    slurm: &'a Slurm,
    id: String,
    dir: &'a Path,
}

impl<'a> Job<'a> {
    /// Submits the script as it is deployed.
    fn submit(slurm: &'a Slurm, dir: &'a Path, args: &[&str]) -> Self {
        Self::submit_with(slurm, dir, &[], args)
    }

    /// As [`Self::submit`], with more flags for sbatch.
    fn submit_with(slurm: &'a Slurm, dir: &'a Path, flags: &[&str], args: &[&str]) -> Self {
        let mut sbatch = slurm.command("sbatch");
        // The nodes of this Slurm have names that lead nowhere.
        sbatch.env("MUSTER_ADDRESS", "127.0.0.1").env("MUSTER_DIR", dir.join("run"));
        sbatch.args(["--parsable", "--nodes=2", "--time=10"]).args(flags);
        sbatch.arg(format!("--output={}", dir.join("out").display()));
        let submitted = Outcome::of(sbatch.arg(deployed("slurm/muster.sbatch")).args(args)).ok();
        Self { slurm, id: submitted.trim().to_owned(), dir }
    }

    /// One of its fields, such as `JobState`, as `scontrol` shows it.
    fn field(&self, name: &str) -> String {
        let shown = Outcome::of(self.slurm.command("scontrol").args(["show", "job", "-o", &self.id]));
        assert_eq!(shown.code, 0, "{shown:?}: {}{}", self.output(), self.slurm.log());
        let shown = shown.stdout;
        let field = shown.split_whitespace().find_map(|field| field.strip_prefix(&format!("{name}=")));
        field.unwrap_or_else(|| panic!("no {name} in {shown}")).to_owned()
    }

    /// Starts of each rank so far, once every one has so many.
    fn started(&self, ranks: usize, times: usize) -> Vec<Vec<String>> {
        eventually("every rank's start", || {
            let lines =
                |rank| self.checkpoint(&format!("starts.{rank}")).lines().map(str::to_owned).collect();
            let starts: Vec<Vec<String>> = (0..ranks).map(lines).collect();
            let all = starts.iter().all(|of_rank| of_rank.len() == times);
            if all { Ok(starts) } else { Err((starts, self.output())) }
        })
    }

    /// Waits until the last rank has counted beyond that.
    fn counted(&self, rank: u32, above: u64) {
        eventually("the count", || {
            let at: u64 = self.checkpoint(&format!("at.{rank}")).trim().parse().unwrap_or(0);
            if at > above { Ok(()) } else { Err((at, self.output())) }
        });
    }

    /// Has a job that waits for its next start begin: Slurm lets it wait for two minutes by itself. Nodes count the end of the
    /// first start in whole seconds, and take no second one before the next.
    fn start_soon(&self) {
        let at = ["update", &format!("JobId={}", self.id), "StartTime=now+3"];
        Outcome::of(self.slurm.command("scontrol").args(at)).ok();
    }

    fn wait_for(&self, state: &str) {
        eventually(state, || {
            let now = self.field("JobState");
            if now == state { Ok(()) } else { Err((now, self.output())) }
        });
    }

    /// What the script has written, and the daemons.
    fn output(&self) -> String {
        let files =
            std::fs::read_dir(self.dir.join("run")).into_iter().flatten().flatten().map(|entry| entry.path());
        let logs = files.filter(|path| path.extension().is_some_and(|ext| ext == "log"));
        let all = [self.dir.join("out")].into_iter().chain(logs);
        all.map(|path| std::fs::read_to_string(path).unwrap_or_default()).collect()
    }

    fn checkpoint(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join("run/checkpoints").join(name)).unwrap_or_default()
    }
}

fn slurm() -> Option<Slurm> {
    let slurm = Slurm::start(2);
    if slurm.is_none() {
        skip("the sbatch script", "Slurm could not be brought");
    }
    slurm
}

/// What the script leaves for its user lets him call the coordinator; another user of the machine has no token.
fn only_its_user_may_call(env: &Path) {
    let call = |before: &str| {
        let script = format!(". {}; {before} {} jobs", env.display(), binary("muster").display());
        Outcome::of(Command::new("sh").args(["-c", &script]))
    };
    assert!(call("").ok().contains("running"));
    let refused = call("env -u MUSTER_TOKEN_FILE");
    assert!(refused.code == 5 && refused.stderr.contains("this needs a token"), "{refused:?}");
    for secret in ["token", "join", "pki/ca.key"] {
        let mode = std::fs::metadata(env.with_file_name(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "others can read {secret}");
    }
}

/// Nothing that carries this directory's name runs any more.
fn nothing_is_left(dir: &Path) {
    let mark = dir.to_str().unwrap();
    eventually("the end of every process", || {
        let left: Vec<_> = processes_with(mark).into_iter().filter(|(pid, _)| is_running(*pid)).collect();
        let left: Vec<_> = left.into_iter().filter(|(_, command)| !command.contains("slurm")).collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
}

#[test]
fn the_exit_code_is_the_jobs() {
    let Some(slurm) = slurm() else { return };
    let table = [
        ("exit 0", "COMPLETED", "0:0"),
        ("[ $RANK = 2 ] && exit 7; sleep 1000", "FAILED", "7:0"),
        // As a shell says that a signal has ended something.
        ("[ $RANK = 1 ] && kill -ABRT $$; sleep 1000", "FAILED", "134:0"),
    ];
    for (script, state, code) in table {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::submit(&slurm, dir.path(), &["--nproc-per-node", "2", "--", "sh", "-c", script]);
        job.wait_for(state);
        assert_eq!(job.field("ExitCode"), code, "{script}: {}", job.output());
        nothing_is_left(dir.path());
    }
}

#[test]
fn the_end_of_the_time_is_a_checkpoint_and_another_allocation_goes_on_from_it() {
    let Some(slurm) = slurm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let job = Job::submit(&slurm, dir.path(), &["--nproc-per-node", "2", "--", "sh", "-c", COUNTS]);
    let lines = |name: &str| job.checkpoint(name).lines().map(str::to_owned).collect::<Vec<_>>();
    job.started(4, 1);
    job.counted(3, 5);
    only_its_user_may_call(&dir.path().join("run/env"));
    // As --signal=B:TERM@120 does.
    Outcome::of(slurm.command("scancel").args(["--batch", "--signal=TERM", &job.id])).ok();
    job.wait_for("PENDING");
    assert!(job.field("Restarts") == "1" && job.field("Requeue") == "1", "{}", job.output());
    job.start_soon();
    job.wait_for("RUNNING");
    let said = job.output();
    assert!(said.contains("is queued again, and") && !said.contains("not queued again"), "{said}");
    for (rank, of_rank) in job.started(4, 2).into_iter().enumerate() {
        let reached: u64 = job.checkpoint(&format!("count.{rank}")).trim().parse().unwrap();
        assert_eq!(
            of_rank,
            ["1 0 4".to_owned(), format!("2 {reached} 4")],
            "the same job, its next generation"
        );
    }
    job.counted(3, lines("count.3")[0].parse().unwrap());

    std::fs::write(dir.path().join("run/checkpoints/exit"), "3").unwrap();
    job.wait_for("FAILED");
    assert_eq!(job.field("ExitCode"), "3:0", "{}", job.output());
    nothing_is_left(dir.path());
}

/// Slurm signals the steps, not the script, and queues it again itself.
#[test]
fn an_allocation_whose_nodes_are_taken_for_another_goes_on_after_it() {
    let started = Slurm::start_with(2, SlurmOptions { preempts: true, ..SlurmOptions::default() });
    let Some(slurm) = started else { return skip("preemption", "Slurm could not be brought") };
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--partition=low", "--exclusive"];
    let job =
        Job::submit_with(&slurm, dir.path(), &flags, &["--nproc-per-node", "2", "--", "sh", "-c", COUNTS]);
    job.started(4, 1);
    job.counted(3, 5);
    let mut other = slurm.command("sbatch");
    other.args(["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]);
    Outcome::of(&mut other).ok();
    job.wait_for("PENDING");
    assert!(job.field("Restarts") == "1", "{}", job.output());
    job.start_soon();
    job.wait_for("RUNNING");
    for (rank, of_rank) in job.started(4, 2).into_iter().enumerate() {
        let reached: u64 = job.checkpoint(&format!("count.{rank}")).trim().parse().unwrap();
        assert_eq!(of_rank, ["1 0 4".to_owned(), format!("2 {reached} 4")]);
    }
    let said = job.output();
    assert!(said.contains("takes the nodes for another job") && !said.contains("not queued again"), "{said}");
    std::fs::write(dir.path().join("run/checkpoints/exit"), "0").unwrap();
    job.wait_for("COMPLETED");
    nothing_is_left(dir.path());
}

#[test]
fn a_job_goes_on_with_the_nodes_that_are_left_of_its_allocation() {
    let Some(slurm) = slurm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let args = ["--nnodes", "1:2", "--max-restarts", "1", "--", "sh", "-c", COUNTS];
    let job = Job::submit(&slurm, dir.path(), &args);
    eventually("both nodes at work", || {
        let starts = job.checkpoint("starts.1");
        if starts.is_empty() { Err(job.output()) } else { Ok(()) }
    });
    job.counted(1, 5);
    let down = ["update", "NodeName=n1", "State=DOWN", "Reason=test"];
    Outcome::of(slurm.command("scontrol").args(down)).ok();
    eventually("a start on what is left", || {
        let starts = job.checkpoint("starts.0");
        let last = starts.lines().last().unwrap_or_default();
        if last.ends_with(" 1") && !last.starts_with("1 ") {
            Ok(())
        } else {
            Err((starts.clone(), job.output()))
        }
    });
    assert_eq!(job.field("JobState"), "RUNNING", "{}", job.output());
    std::fs::write(dir.path().join("run/checkpoints/exit"), "0").unwrap();
    job.wait_for("COMPLETED");
    nothing_is_left(dir.path());
}

/// What the script has made gets to the nodes, whatever the job was to see of its user's environment.
#[test]
fn workers_know_their_coordinator_whatever_sbatch_exports() {
    let Some(slurm) = slurm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let own = |name: &str| {
        let command = slurm.command("true");
        let value = command.get_envs().find(|(key, _)| *key == name).unwrap().1.unwrap();
        value.to_str().unwrap().to_owned()
    };
    // An environment that a site would give its users at login.
    let script = dir.path().join("script");
    let (path, conf) = (own("PATH"), own("SLURM_CONF"));
    let (run, batch) = (dir.path().join("run").display().to_string(), deployed("slurm/muster.sbatch"));
    let set = format!("PATH='{path}' SLURM_CONF='{conf}' MUSTER_ADDRESS=127.0.0.1 MUSTER_DIR='{run}'");
    let text = format!("#!/bin/bash\nexport {set}\nexec bash '{}' \"$@\"\n", batch.display());
    std::fs::write(&script, text).unwrap();
    for export in ["NONE", "HOME"] {
        let out = dir.path().join(format!("out.{export}"));
        let mut sbatch = slurm.command("sbatch");
        sbatch.args(["--wait", "--nodes=2", "--ntasks-per-node=1"]);
        sbatch.arg(format!("--export={export}")).arg(format!("--output={}", out.display()));
        let job = ["--", "sh", "-c", "echo rank $RANK of $WORLD_SIZE"];
        let outcome = Outcome::of(sbatch.arg(&script).args(job));
        let said = std::fs::read_to_string(&out).unwrap_or_default();
        assert!(outcome.code == 0 && said.contains("rank 0 of 2"), "--export={export}: {said}");
    }
    // One that is started by hand, without.
    let mut worker = slurm.command("srun");
    worker.args(["--nodes=1", "muster", "worker", "--data-dir", dir.path().join("w").to_str().unwrap()]);
    let refused = Outcome::of(worker.env_remove("MUSTER_COORDINATOR"));
    assert!(refused.code != 0 && refused.stderr.contains("no coordinator is named"), "{refused:?}");
    assert!(!dir.path().join("w").exists(), "it has made nothing");
}

/// Addresses of IPv6 as people write them; and ranks beyond the cores that Slurm has given.
#[test]
fn an_address_has_either_spelling_and_ranks_without_cores_are_warned_of() {
    let Some(slurm) = slurm() else { return };
    let table: [(&str, &[&str], &str, bool); 3] = [
        ("::1", &["--exclusive"], "4", false),
        ("[::1]", &["--cpus-per-task=4"], "4", false),
        ("127.0.0.1", &[], "2", true),
    ];
    for (address, flags, ranks, warned) in table {
        let dir = tempfile::tempdir().unwrap();
        let mut sbatch = slurm.command("sbatch");
        sbatch.env("MUSTER_ADDRESS", address).env("MUSTER_DIR", dir.path().join("run"));
        sbatch.env("MUSTER_LOCAL_DIR", dir.path().join("local"));
        sbatch.args(["--wait", "--nodes=2"]).arg(format!("--output={}", dir.path().join("out").display()));
        sbatch.args(flags).arg(deployed("slurm/muster.sbatch"));
        let outcome = Outcome::of(sbatch.args(["--nproc-per-node", ranks, "--", "true"]));
        let said = std::fs::read_to_string(dir.path().join("out")).unwrap();
        assert_eq!(outcome.code, 0, "{address}: {said}");
        assert_eq!(said.contains("give sbatch --exclusive"), warned, "{flags:?}: {said}");
        let kept = std::fs::read_dir(dir.path().join("local")).unwrap().flatten().next().unwrap().path();
        assert!(kept.join("n0/worker.lock").exists() && kept.join("n1/worker.lock").exists(), "{kept:?}");
    }
}

#[test]
fn a_cancelled_allocation_is_not_queued_again() {
    let Some(slurm) = slurm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let job = Job::submit(&slurm, dir.path(), &["--", "sh", "-c", COUNTS]);
    eventually("the ranks", || {
        let at = job.checkpoint("at.1");
        if at.is_empty() { Err(job.output()) } else { Ok(()) }
    });
    Outcome::of(slurm.command("scancel").arg(&job.id)).ok();
    job.wait_for("CANCELLED");
    nothing_is_left(dir.path());
    assert_eq!(job.field("JobState"), "CANCELLED");

    // Another one with its directory goes on from its checkpoints, and has nothing else to do.
    let job = Job::submit(&slurm, dir.path(), &["--", "sh", "-c", COUNTS]);
    let starts = job.started(2, 2);
    let reached = job.checkpoint("count.1");
    assert_eq!(starts[1], ["1 0 2".to_owned(), format!("1 {} 2", reached.trim())], "{}", job.output());
    std::fs::write(dir.path().join("run/checkpoints/exit"), "0").unwrap();
    job.wait_for("COMPLETED");
}

/// Where it could not work, it says so and runs nothing.
#[test]
fn what_cannot_work_is_said() {
    let Some(slurm) = slurm() else { return };
    let table = [
        ("MUSTER_ADDRESS", "", "set MUSTER_ADDRESS"),
        ("MUSTER_ADDRESS", "10.1.2.3", "failed to listen on 10.1.2.3"),
        ("PATH", "/usr/bin:/bin", "there is no scontrol in the PATH"),
    ];
    for (variable, value, words) in table {
        let dir = tempfile::tempdir().unwrap();
        let mut sbatch = slurm.command("sbatch");
        sbatch
            .env("MUSTER_ADDRESS", "127.0.0.1")
            .env("MUSTER_DIR", dir.path().join("run"))
            .env(variable, value);
        sbatch.args(["--wait", "--nodes=2"]).arg(format!("--output={}", dir.path().join("out").display()));
        let outcome = Outcome::of(sbatch.arg(deployed("slurm/muster.sbatch")).args(["--", "true"]));
        let said = std::fs::read_to_string(dir.path().join("out")).unwrap();
        assert!(outcome.code != 0 && said.contains(words), "{variable}={value}: {said}");
    }
}

#[test]
fn a_heterogeneous_job_is_refused() {
    let Some(slurm) = slurm() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut sbatch = slurm.command("sbatch");
    sbatch.env("MUSTER_ADDRESS", "127.0.0.1").env("MUSTER_DIR", dir.path().join("run"));
    sbatch.arg("--wait").arg(format!("--output={}", dir.path().join("out").display()));
    sbatch.args(["--nodes=1", ":", "--nodes=1"]).arg(deployed("slurm/muster.sbatch"));
    let outcome = Outcome::of(sbatch.args(["--", "true"]));
    let said = std::fs::read_to_string(dir.path().join("out")).unwrap();
    assert!(outcome.code != 0 && said.contains("a heterogeneous job of 2 components"), "{said}");
}

#[test]
fn the_binary_under_test_is_the_one_that_jobs_find() {
    let Some(slurm) = slurm() else { return };
    let path = Outcome::of(slurm.command("srun").args(["sh", "-c", "command -v muster"])).ok();
    assert_eq!(Path::new(path.trim()), binary("muster"));
}
