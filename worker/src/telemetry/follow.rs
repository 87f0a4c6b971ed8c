//! Looks now and then for what programs that know nothing of Muster leave of their progress: TensorBoard event files, and
//! lines of output. Whatever is found goes the way of the points that come through a socket.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use muster_core::types::{MetricPattern, Rank, limits};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::warn;

use super::events::{EventDir, Events, Owners};
use super::output::{LOOK_BYTES_MAX, OutputFile};
use super::source::Source;

/// Time between looks: a curve that grows each second is live.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time between looks in terms of what the last one took: directories on a slow disk are looked at more rarely.
const REST: u32 = 10;
/// Time to read what an ended rank has left, as long as there is more. It holds up the end of the gang's shim.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Time to wait for a look that a disk holds up, beyond that.
const STUCK_MAX: Duration = Duration::from_secs(5);

/// A rank that was started.
#[derive(Debug)]
pub(crate) struct Followed {
    pub pid: i32,
    pub source: Source,
    /// The file of its standard output, if that is one.
    pub stdout: Option<PathBuf>,
}

/// What is looked at, and how far it was read.
#[derive(Debug)]
pub(crate) struct Looker {
    events: Option<Events>,
    outputs: Vec<OutputFile>,
}

impl Looker {
    /// None if the job asks for nothing, or nothing of what it asks for can be on this node.
    pub fn new(pattern: Option<&str>, events: Option<EventDir>, ranks: &[Followed]) -> Option<Self> {
        let owners = || ranks.iter().map(|rank| (rank.pid, rank.source.rank())).collect();
        let sources = ranks.iter().map(|rank| rank.source.clone());
        let events = events.map(|dir| Events::new(dir, Owners::of_children(owners()), sources));
        // One that was checked when the job was submitted; a node of another version may see it otherwise.
        let pattern = pattern.and_then(|pattern| match MetricPattern::new(pattern) {
            Ok(pattern) => Some(Arc::new(pattern)),
            Err(why) => {
                warn!(%why, "no output is matched: metric_pattern cannot be used on this node");
                None
            }
        });
        let output = |(rank, pattern): (&Followed, &Arc<MetricPattern>)| {
            Some(OutputFile::new(rank.stdout.clone()?, pattern.clone(), rank.source.clone()))
        };
        let outputs: Vec<_> = ranks.iter().zip(pattern.iter().cycle()).filter_map(output).collect();
        (events.is_some() || !outputs.is_empty()).then_some(Self { events, outputs })
    }

    /// Reads on everywhere, with a bound for each file. Says whether there is more.
    fn look(&mut self) -> bool {
        let mut buffer = vec![0; LOOK_BYTES_MAX];
        let mut more = self.events.as_mut().is_some_and(|events| events.look(&mut buffer));
        for output in &mut self.outputs {
            more |= output.look(&mut buffer);
        }
        more
    }

    /// These ranks have ended, and what they wrote was read.
    fn finish(&mut self, ranks: &BTreeSet<Rank>) {
        for rank in ranks {
            self.events.iter_mut().for_each(|events| events.finish(*rank));
        }
        let mut buffer = vec![0; LOOK_BYTES_MAX];
        self.outputs.retain_mut(|output| {
            let ended = ranks.contains(&output.source.rank());
            if ended {
                output.finish(&mut buffer);
            }
            !ended
        });
    }
}

type Ended = (Rank, oneshot::Sender<()>);

/// What looks. It ends once all of its handles are dropped.
#[derive(Clone, Debug)]
pub(crate) struct Follower(mpsc::Sender<Ended>);

impl Follower {
    pub(super) fn start(looker: Looker, runtime: &Handle) -> Self {
        // Each rank ends once.
        let (sender, ended) = mpsc::channel(limits::PROCS_PER_NODE_MAX as usize);
        runtime.spawn(follow(looker, ended));
        Self(sender)
    }

    /// Reads what a rank has written before it ended.
    pub async fn drain(&self, rank: Rank) {
        let (done, waits) = oneshot::channel();
        if self.0.send((rank, done)).await.is_ok()
            && tokio::time::timeout(DRAIN_MAX + STUCK_MAX, waits).await.is_err()
        {
            warn!(%rank, "the last of what it wrote could not be read in time");
        }
    }
}

async fn follow(mut looker: Looker, mut ended: mpsc::Receiver<Ended>) {
    let mut rest = INTERVAL;
    loop {
        let mut drained: Vec<Ended> = Vec::new();
        tokio::select! {
            biased;
            rank = ended.recv() => match rank {
                Some(rank) => drained.push(rank),
                None => return,
            },
            () = tokio::time::sleep(rest) => {}
        }
        // All that wait share a look, which begins after they have ended.
        while let Ok(rank) = ended.try_recv() {
            drained.push(rank);
        }
        let ranks: BTreeSet<Rank> = drained.iter().map(|(rank, _)| *rank).collect();
        // On another thread: the sockets are read on this one, and a disk that hangs must not hold them up.
        let looked = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let mut more = looker.look();
            while more && !ranks.is_empty() && begun.elapsed() < DRAIN_MAX {
                more = looker.look();
            }
            if more && !ranks.is_empty() {
                warn!("ended ranks have written more than could be read in time");
            }
            looker.finish(&ranks);
            (looker, more, begun.elapsed())
        });
        let Ok((back, more, took)) = looked.await else { return };
        looker = back;
        // Never more than half of a processor's time.
        rest = if more { took } else { INTERVAL.max(took * REST) };
        for (_, done) in drained {
            done.send(()).ok();
        }
    }
}
