//! `deploy/slurm/muster.sbatch` in a real Slurm: its exit code is the job's, and an allocation whose time is up is queued
//! again and goes on from its checkpoint.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use muster_tests::{Outcome, Slurm, binary, deployed, eventually, is_running, processes_with, skip};

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
        let mut sbatch = slurm.command("sbatch");
        // The nodes of this Slurm have names that lead nowhere.
        sbatch.env("MUSTER_ADDRESS", "127.0.0.1").env("MUSTER_DIR", dir.join("run"));
        sbatch.args(["--parsable", "--nodes=2", "--time=10"]);
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
    let started = |times: usize| {
        eventually("every rank's start", || {
            let starts: Vec<_> = (0..4).map(|rank| lines(&format!("starts.{rank}"))).collect();
            if starts.iter().all(|of_rank| of_rank.len() == times) {
                Ok(starts)
            } else {
                Err((starts, job.output()))
            }
        })
    };
    let counted = |above: u64| {
        eventually("the count", || {
            let at: u64 = job.checkpoint("at.3").trim().parse().unwrap_or(0);
            if at > above { Ok(()) } else { Err((at, job.output())) }
        });
    };
    started(1);
    counted(5);
    only_its_user_may_call(&dir.path().join("run/env"));
    // As --signal=B:TERM@120 does.
    Outcome::of(slurm.command("scancel").args(["--batch", "--signal=TERM", &job.id])).ok();
    job.wait_for("PENDING");
    assert!(job.field("Restarts") == "1" && job.field("Requeue") == "1", "{}", job.output());
    // Slurm lets it wait for two minutes by itself. Nodes count the end of the first start in whole seconds, and take no
    // second one before the next.
    let at = ["update", &format!("JobId={}", job.id), "StartTime=now+3"];
    Outcome::of(slurm.command("scontrol").args(at)).ok();
    job.wait_for("RUNNING");
    for (rank, of_rank) in started(2).into_iter().enumerate() {
        let reached: u64 = job.checkpoint(&format!("count.{rank}")).trim().parse().unwrap();
        assert_eq!(
            of_rank,
            ["1 0 4".to_owned(), format!("2 {reached} 4")],
            "the same job, its next generation"
        );
    }
    counted(lines("count.3")[0].parse().unwrap());

    std::fs::write(dir.path().join("run/checkpoints/exit"), "3").unwrap();
    job.wait_for("FAILED");
    assert_eq!(job.field("ExitCode"), "3:0", "{}", job.output());
    nothing_is_left(dir.path());
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
}

/// Where it could not work, it says so and runs nothing.
#[test]
fn what_cannot_work_is_said() {
    let Some(slurm) = slurm() else { return };
    let table = [
        ("MUSTER_ADDRESS", "", "set MUSTER_ADDRESS"),
        ("MUSTER_ADDRESS", "10.1.2.3", "failed to listen on 10.1.2.3"),
        ("PATH", "/usr/bin:/bin", "there is no muster in the PATH"),
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
fn the_binary_under_test_is_the_one_that_jobs_find() {
    let Some(slurm) = slurm() else { return };
    let path = Outcome::of(slurm.command("srun").args(["sh", "-c", "command -v muster"])).ok();
    assert_eq!(Path::new(path.trim()), binary("muster"));
}
