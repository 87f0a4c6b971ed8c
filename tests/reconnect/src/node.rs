//! One node: the real session and the real core of the node daemon, around ranks that do nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use muster_core::types::{GangId, GangReport, Incarnation, Millis, NodeName};
use muster_proto::v1::session_request::Message as Up;
use muster_proto::v1::session_response::Message as Down;
use muster_proto::{convert, v1};
use muster_worker::load::{Event, Identity, Queues, boot_now, keep, request};
use muster_worker_core::{Core, Effect, Input};
use std::path::Path;

use tokio::sync::{mpsc, watch};

use crate::stats::Stats;

/// Session events that may wait for a node.
const EVENTS_MAX: usize = 16;

pub struct Node {
    index: usize,
    name: NodeName,
    incarnation: String,
    core: Core,
    fenced_at: watch::Sender<Option<Millis>>,
    link: Option<Queues>,
    hellos: u64,
    /// When the heartbeat was sent that renewed the lease last.
    renewed: Option<Millis>,
    /// Gangs whose ranks "run" here.
    running: Vec<GangId>,
    stats: Arc<Stats>,
}

/// Who the node of this number is.
///
/// All say that they are on this boot of this machine, so that a loopback address is the coordinator's own. Each notes what it learns in
/// a directory of its own in `data_dir`, and gets a certificate by the token in the file `join`, if there is one.
pub fn identity(index: usize, coordinator: &str, data_dir: &Path, join: Option<&Path>) -> Identity {
    let name = NodeName::new(format!("node-{index:05}")).expect("a valid name");
    let mut config =
        muster_worker::Config::new(vec![coordinator.to_owned()], name, std::path::PathBuf::from("unused"));
    let [_, _, high, low] = u32::try_from(index).expect("few nodes").to_be_bytes();
    config.address = Some([10, 0, high, low].into());
    config.join_token_file = join.map(Path::to_owned);
    let data_dir = data_dir.join(config.name.as_str());
    std::fs::create_dir_all(&data_dir).expect("a directory can be made");
    Identity {
        incarnation: format!("incarnation-{index}"),
        boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        data_id: format!("data-{index}"),
        data_dir,
        inventory: watch::channel(std::sync::Arc::new(muster_core::Inventory {
            total: muster_core::types::Resources { gpus: 0, cpu_millis: 64_000, memory_bytes: 1 << 38 },
            ..muster_core::Inventory::default()
        }))
        .1,
        fenced_at: watch::channel(None).1,
        config,
    }
}

/// Runs a node until the process ends.
pub async fn run(index: usize, mut identity: Identity, stats: Arc<Stats>) {
    let (fenced_at, fences) = watch::channel(None);
    identity.fenced_at = fences;
    let (sender, mut events) = mpsc::channel(EVENTS_MAX);
    let (name, incarnation) = (identity.config.name.clone(), identity.incarnation.clone());
    let core = Core::default();
    let (link, hellos, renewed, running) = (None, 0, None, Vec::new());
    let mut node = Node { index, name, incarnation, core, fenced_at, link, hellos, renewed, running, stats };
    debug_assert!(Incarnation::new(node.incarnation.clone()).is_ok());
    let keeping = tokio::spawn(Box::pin(keep(identity, sender)));
    loop {
        let due = node.core.next_deadline();
        let sleep = due.map_or(Duration::MAX, |at| Duration::from_millis(at.since(boot_now()).0));
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => node.hear(event).await,
                None => break,
            },
            () = tokio::time::sleep(sleep), if due.is_some() => node.step(Input::Tick).await,
        }
    }
    panic!("node {index} was refused: {:?}", keeping.await);
}

impl Node {
    async fn hear(&mut self, event: Event) {
        match event {
            Event::Open { hello, queues, .. } => {
                self.hellos += 1;
                let gangs = self.core.reports().iter().map(convert::gang_report_to_wire).collect();
                let (node_name, incarnation) = (self.name.to_string(), self.incarnation.clone());
                let number = self.hellos;
                hello.send(v1::Hello { node_name, incarnation, gangs, number, ..v1::Hello::default() }).ok();
                self.link = Some(queues);
            }
            Event::Heard(message) => match *message {
                Down::Welcome(welcome) => {
                    self.stats.welcomed(self.index, boot_now());
                    self.stats.open.fetch_add(1, Ordering::Relaxed);
                    let all: Result<_, _> =
                        welcome.assignments.into_iter().map(convert::assignment_from_wire).collect();
                    self.step(Input::Welcome(all.expect("assignments are valid"))).await;
                }
                Down::Assignment(wire) => {
                    let assignment = convert::assignment_from_wire(wire).expect("assignments are valid");
                    self.step(Input::Assign(Box::new(assignment))).await;
                }
                _ => {}
            },
            Event::Closed => {
                if self.link.take().is_some() {
                    self.stats.closed.fetch_add(1, Ordering::Relaxed);
                    // Saturates: a session may end before its welcome.
                    let less = |open: usize| Some(open.saturating_sub(1));
                    self.stats.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
                }
            }
            Event::Renewed { sent, lease } => {
                self.stats.renewed(boot_now(), sent, self.renewed.replace(sent));
                self.step(Input::Renewed { sent, lease }).await;
            }
            Event::CoordinatorGone { at } => self.step(Input::CoordinatorGone { at }).await,
        }
    }

    /// Does what the core wants, at once and with success.
    async fn step(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for effect in self.core.step(boot_now(), input) {
                match effect {
                    Effect::Start(assignment) => {
                        let port = (assignment.placement.group_rank == 0).then_some(29_500);
                        inputs.push_back(Input::Prepared(assignment.gang.clone(), port));
                    }
                    Effect::Launch(assignment, _) => {
                        self.running.push(assignment.gang.clone());
                        self.stats.running.fetch_add(1, Ordering::Relaxed);
                        inputs.push_back(Input::Launched(assignment.gang.clone()));
                    }
                    Effect::Stop(gang, _) => {
                        self.end(&gang);
                        self.stats.stopped.fetch_add(1, Ordering::Relaxed);
                        inputs.push_back(Input::Gone(gang));
                    }
                    Effect::Kill(gang) => {
                        self.end(&gang);
                        self.stats.fenced.fetch_add(1, Ordering::Relaxed);
                        inputs.push_back(Input::Gone(gang));
                    }
                    Effect::Report(gang) => {
                        if let Some(report) = self.core.report(&gang) {
                            self.send(&report).await;
                        }
                    }
                    Effect::Fence(..) | Effect::Leaving(_) | Effect::Release(_) => {}
                }
            }
        }
        self.fenced_at.send_replace(self.core.fenced_at());
    }

    fn end(&mut self, gang: &GangId) {
        if let Some(at) = self.running.iter().position(|running| running == gang) {
            self.running.swap_remove(at);
            self.stats.running.fetch_sub(1, Ordering::Relaxed);
        }
    }

    async fn send(&self, report: &GangReport) {
        if let Some(link) = &self.link {
            // A session that ends meanwhile says it again at the start of the next.
            link.control.send(request(Up::Gang(convert::gang_report_to_wire(report)))).await.ok();
        }
    }
}
