//! A machine: what survives its daemon, what survives its processes, and what survives a reboot.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use muster_core::types::{Assignment, GangId, Incarnation, Millis, RankExit};
use muster_worker_core::{Core, Fence, Input, ShimRecord};

/// Process ids are few, so that they are used again soon.
const PIDS: i32 = 40;

/// A rank, as its shim has it.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a thing of its own that may happen to a process")]
pub struct Rank {
    /// Executes instructions.
    pub executes: bool,
    pub exit: Option<RankExit>,
    /// Waits for something that never comes.
    pub hangs: bool,
    /// Will not be gone when it is killed.
    pub unkillable: bool,
    /// Killed, and held by the kernel.
    pub held: bool,
}

/// A shim and its ranks.
#[derive(Clone, Debug)]
pub struct Shim {
    pub assignment: Assignment,
    pub start_time: u64,
    pub launched: bool,
    pub ranks: Vec<Rank>,
    pub frozen: bool,
    pub fence: Option<Fence>,
    pub fenced: bool,
    /// Its ranks are killed then, on the machine's clock.
    pub kill_at: Option<Millis>,
    /// What it was told while it was frozen.
    pub told: VecDeque<Told>,
}

/// What a daemon tells a shim.
#[derive(Clone, Debug)]
pub enum Told {
    Launch(Box<Assignment>, Option<Fence>),
    Stop(Millis),
    Fence(Fence),
}

/// What lies on the disk of a shim.
#[derive(Clone, Debug)]
pub struct Record {
    pub shim: ShimRecord,
    pub assignment: Assignment,
    pub launched: bool,
    /// What a shim wrote that ended without a daemon.
    pub last: Option<Vec<RankExit>>,
}

/// Where a daemon is with its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Idle,
    Joining { asked: Millis, since: Millis },
    Opening { asked: Millis, since: Millis },
    Open,
}

/// A daemon that runs.
#[derive(Debug)]
pub struct Daemon {
    pub core: Core,
    pub incarnation: Incarnation,
    pub frozen: bool,
    /// What happened while it was frozen.
    pub inbox: VecDeque<Inbox>,
    pub conn: u64,
    /// Longest pause before the next attempt to connect.
    pub pause: u64,
    pub phase: Phase,
    pub heard: Millis,
    pub beats: u64,
    pub sent: VecDeque<(u64, Millis)>,
    /// Ends, once nothing runs any more; then it stays away this long.
    pub leaves_for: Option<u64>,
}

/// Something that waits for a frozen daemon.
#[derive(Clone, Debug)]
pub enum Inbox {
    Observed(Input),
    Heard(u64, crate::messages::Down),
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub last_octet: u8,
    pub data_id: String,
    pub boots: u32,
    pub up: bool,
    /// How many freezes hold it.
    pub frozen: u32,
    /// Its clock against true time: parts per million, and milliseconds at the start.
    pub rate: i64,
    pub offset: u64,
    pub daemon: Option<Daemon>,
    pub daemons: u32,
    pub shims: BTreeMap<i32, Shim>,
    /// Processes of others, by id, and when they began.
    pub foreign: BTreeMap<i32, u64>,
    pub next_pid: i32,
    pub disk: BTreeMap<GangId, Record>,
    /// Launched once, and never again.
    pub markers: BTreeSet<GangId>,
    /// When its daemon was last killed, in true time.
    pub restarted: u64,
    /// Its daemon is away for long enough that its ranks may be replaced.
    pub away: bool,
    /// How many cuts hold each direction.
    pub cut_up: u32,
    pub cut_down: u32,
    /// When it last was in trouble, in true time.
    pub troubled: u64,
    /// Somebody else has its name.
    pub cloned: u32,
}

impl Machine {
    pub fn new(name: String, last_octet: u8, data_id: String, rate: i64, offset: u64) -> Self {
        Self {
            name,
            last_octet,
            data_id,
            boots: 1,
            up: true,
            frozen: 0,
            rate,
            offset,
            daemon: None,
            daemons: 0,
            shims: BTreeMap::new(),
            foreign: BTreeMap::new(),
            next_pid: 0,
            disk: BTreeMap::new(),
            markers: BTreeSet::new(),
            restarted: 0,
            away: false,
            cut_up: 0,
            cut_down: 0,
            troubled: 0,
            cloned: 0,
        }
    }

    /// The machine's clock at a true time.
    pub fn local(&self, now: u64) -> Millis {
        let drift = (now as i64).saturating_mul(self.rate) / 1_000_000;
        Millis(self.offset + now.saturating_add_signed(drift))
    }

    /// The first true time at which the machine's clock shows this.
    pub fn when(&self, now: u64, local: Millis) -> u64 {
        let left = local.since(self.local(now)).0 as i64;
        now + (left * 1_000_000 / (1_000_000 + self.rate)) as u64 + u64::from(left > 0)
    }

    pub fn boot_id(&self) -> String {
        format!("boot{}", self.boots)
    }

    /// A process id that nobody has; ids of ended processes come again.
    pub fn new_pid(&mut self) -> i32 {
        loop {
            self.next_pid = self.next_pid % PIDS + 1;
            let pid = self.next_pid;
            if !self.shims.contains_key(&pid) && self.foreign.remove(&pid).is_none() {
                return pid;
            }
        }
    }

    /// When the process that has this id began.
    pub fn start_time(&self, pid: i32) -> Option<u64> {
        self.shims.get(&pid).map(|shim| shim.start_time).or_else(|| self.foreign.get(&pid).copied())
    }

    /// The shim of a gang.
    pub fn pid_of(&self, gang: &GangId) -> Option<i32> {
        self.shims.iter().find(|(_, shim)| shim.assignment.gang == *gang).map(|(pid, _)| *pid)
    }

    /// Whether something is wrong with it now.
    pub fn is_troubled(&self) -> bool {
        let daemon = self.daemon.as_ref();
        !self.up
            || self.frozen + self.cut_up + self.cut_down + self.cloned > 0
            || self.away
            || daemon.is_some_and(|daemon| daemon.frozen || daemon.leaves_for.is_some())
    }
}

impl Shim {
    pub fn is_over(&self) -> bool {
        self.launched && self.ranks.iter().all(|rank| !rank.executes && !rank.held)
    }

    pub fn holds(&self) -> bool {
        self.ranks.iter().any(|rank| rank.held)
    }

    /// When it must act next, on the machine's clock.
    pub fn deadline(&self) -> Option<Millis> {
        let fence = self.fence.filter(|_| self.launched);
        let fence = fence.map(|fence| if self.fenced { fence.kill } else { fence.term });
        self.kill_at.into_iter().chain(fence).min()
    }
}
