//! Stock torchrun at a coordinator, through the plug-in of deploy/torchrun.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::process::{Child, Command, Stdio};

use muster_tests::{Cluster, Settings, eventually, free_port, torch_python, torchrun_python};
use nix::sys::signal::Signal;

/// Says where it is, and stays until it is told to end or has lost its agent.
const STAYS: &str = "
import os, sys, time
env = os.environ
agent = os.getppid()
os.write(1, f\"{env['TORCHELASTIC_RESTART_COUNT']} {env['RANK']}/{env['WORLD_SIZE']}\\n\".encode())
if env['RANK'] == env.get('FAILS'):
    sys.exit(3)
while not os.path.exists(sys.argv[1]) and os.getppid() == agent:
    time.sleep(0.05)
";

/// Fails once, in a collective's way: the store of the second attempt must know nothing of the first.
const FAILS_ONCE: &str = "
import os, torch, torch.distributed as dist
dist.init_process_group('gloo')
total = torch.ones(1)
dist.all_reduce(total)
attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
if attempt == 0 and dist.get_rank() == 1:
    raise ValueError('bad batch')
dist.barrier()
os.write(1, f'{attempt} {dist.get_rank()} sees {int(total.item())}\\n'.encode())
dist.destroy_process_group()
";

/// A stock torchrun. Dropped, it is killed; its workers see that.
struct Agent {
    child: Child,
    out: std::path::PathBuf,
}

impl Agent {
    fn lines(&self) -> Vec<String> {
        std::fs::read_to_string(&self.out).unwrap().lines().map(str::to_owned).collect()
    }

    fn err(&self) -> String {
        std::fs::read_to_string(self.out.with_extension("err")).unwrap()
    }

    /// Waits for the last line of a worker.
    fn says(&self, line: &str) {
        eventually(line, || {
            let lines = self.lines();
            if lines.last().is_some_and(|last| last == line) { Ok(()) } else { Err((lines, self.err())) }
        });
    }

    fn end(&mut self) -> i32 {
        eventually("torchrun's end", || self.child.try_wait().unwrap().ok_or(self.lines()))
            .code()
            .unwrap_or(-1)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

struct Bed {
    cluster: Cluster,
    agents: usize,
}

impl Bed {
    /// A coordinator, if there is a torchrun with the plug-in.
    fn new(what: &str) -> Option<Self> {
        torchrun_python(what)?;
        let cluster = Cluster::start(Settings { workers: 0, ..Settings::default() });
        std::fs::write(cluster.dir.path().join("stays.py"), STAYS).unwrap();
        std::fs::write(cluster.dir.path().join("fails_once.py"), FAILS_ONCE).unwrap();
        Some(Self { cluster, agents: 0 })
    }

    fn start_at(&mut self, endpoint: &str, args: &[&str], env: &[(&str, &str)]) -> Agent {
        self.agents += 1;
        let dir = self.cluster.dir.path();
        let out = dir.join(format!("agent-{}.out", self.agents));
        let mut command = Command::new(torch_python().unwrap());
        command.args(["-m", "torch.distributed.run", "--rdzv-backend=muster", "--rdzv-id=run-1"]);
        command.args(["--rdzv-endpoint", endpoint]).args(args).current_dir(dir).envs(env.iter().copied());
        command
            .env("OMP_NUM_THREADS", "1")
            .env("TORCHINDUCTOR_CACHE_DIR", dir.join("cache"))
            .env("TMPDIR", dir);
        command.stdin(Stdio::null()).stdout(File::create(&out).unwrap());
        let child = command.stderr(File::create(out.with_extension("err")).unwrap()).spawn().unwrap();
        Agent { child, out }
    }

    fn start(&mut self, args: &[&str]) -> Agent {
        let endpoint = self.cluster.address.clone();
        self.start_at(&endpoint, args, &[])
    }

    fn path(&self, name: &str) -> String {
        self.cluster.dir.path().join(name).display().to_string()
    }
}

#[test]
fn agents_come_and_go_and_the_coordinator_too() {
    let Some(mut bed) = Bed::new("stock torchrun that scales") else { return };
    let (stays, end) = (bed.path("stays.py"), bed.path("end"));
    let args = ["--nnodes=1:3", "--rdzv-conf=last_call_timeout=1", "--monitor-interval=0.1", &stays, &end];
    let mut first = bed.start(&args);
    first.says("0 0/1");
    let second = bed.start(&args);
    first.says("0 0/2");
    second.says("0 1/2");
    let mut third = bed.start(&args);
    first.says("0 0/3");
    third.says("0 2/3");
    // The agent alone; its workers notice by themselves, as nothing of stock torchrun stops them.
    drop(second);
    first.says("0 0/2");
    third.says("0 1/2");

    bed.cluster.coordinator.signal(Signal::SIGKILL);
    bed.cluster.restart_coordinator();
    let before = (first.lines(), third.lines());
    let mut fourth = bed.start(&args);
    fourth.says("0 2/3");
    first.says("0 0/3");
    third.says("0 1/3");
    assert_eq!(
        first.lines().len(),
        before.0.len() + 1,
        "started again for the fourth, not for the coordinator"
    );
    assert_eq!(third.lines().len(), before.1.len() + 1);

    std::fs::write(&end, "").unwrap();
    for agent in [&mut first, &mut third, &mut fourth] {
        assert_eq!(agent.end(), 0, "{}", agent.err());
    }
}

#[test]
fn a_failed_attempt_is_followed_by_one_with_a_store_of_its_own() {
    let Some(mut bed) = Bed::new("stock torchrun that starts again") else { return };
    let program = bed.path("fails_once.py");
    let args = ["--nnodes=2", "--max-restarts=2", "--monitor-interval=0.1", &program];
    let mut agents = [(); 2].map(|()| bed.start(&args));
    for agent in &mut agents {
        assert_eq!(agent.end(), 0, "{}", agent.err());
    }
    let mut said: Vec<String> = agents.iter().flat_map(Agent::lines).collect();
    said.sort();
    // The agent whose worker was broken off may count it as a failure of its own, as under torchrun's other backends.
    let ends: Vec<&str> = said.iter().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(ends, ["0 sees 2", "1 sees 2"], "{said:?}");
}

#[test]
fn a_node_that_fails_for_good_ends_the_others_and_they_say_why() {
    let Some(mut bed) = Bed::new("stock torchrun that fails") else { return };
    let (stays, end) = (bed.path("stays.py"), bed.path("end"));
    let args = ["--nnodes=2", "--monitor-interval=0.1", &stays, &end];
    let endpoint = bed.cluster.address.clone();
    let mut agents = [(); 2].map(|()| bed.start_at(&endpoint, &args, &[("FAILS", "1")]));
    let ends = [agents[0].end(), agents[1].end()];
    assert_eq!(ends, [1, 1]);
    let told = agents.iter().filter(|agent| {
        agent.err().contains("run 'run-1' has failed elsewhere: ")
            && agent.err().contains(": rank 1 ended with exit code 3")
    });
    assert_eq!(told.count(), 1, "{}\n{}", agents[0].err(), agents[1].err());
    // At once, under the same id.
    std::fs::write(&end, "").unwrap();
    let mut again = [(); 2].map(|()| bed.start(&args));
    for agent in &mut again {
        assert_eq!(agent.end(), 0, "{}", agent.err());
    }
}

#[test]
fn who_does_not_fit_or_waits_in_vain_is_told_why() {
    let Some(mut bed) = Bed::new("stock torchrun that is refused") else { return };
    let (stays, end) = (bed.path("stays.py"), bed.path("end"));
    let waits = bed.start(&["--nnodes=2", "--rdzv-conf=join_timeout=20", &stays, &end]);
    eventually("the first agent", || {
        let log = bed.cluster.coordinator.log();
        if log.contains("agent comes") || waits.err().contains("waiting for a round") {
            Ok(())
        } else {
            Err(log)
        }
    });
    let mut other = bed.start(&["--nnodes=3", &stays, &end]);
    assert_eq!(other.end(), 1);
    assert!(other.err().contains("start all with the same --nnodes"), "{}", other.err());
    let mut waits = waits;
    assert_eq!(waits.end(), 1);
    assert!(waits.err().contains("within 20 s (join_timeout): 1 of 2 agents have come"), "{}", waits.err());
    let nobody = format!("127.0.0.1:{}", free_port());
    let mut lost = bed.start_at(&nobody, &["--nnodes=2", "--rdzv-conf=join_timeout=2", &stays, &end], &[]);
    assert_eq!(lost.end(), 1);
    assert!(lost.err().contains(&format!("no coordinator at {nobody}: ")), "{}", lost.err());
    let mut conf = bed.start(&["--nnodes=2", "--rdzv-conf=join_timout=2", &stays, &end]);
    assert_eq!(conf.end(), 1);
    assert!(conf.err().contains("--rdzv-conf join_timout: the muster backend takes"), "{}", conf.err());
}
