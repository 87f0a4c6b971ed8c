//! A model cluster around the core: nodes that do what they are told, a store that keeps what is written, a
//! clock that moves when the test says so.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use muster_core::types::{
    Assignment, DesiredPhase, GangId, GangReport, Incarnation, JobSpec, Millis, NodeName, ObservedPhase,
    Rank, RankExit, RequestId, Resources, Session,
};
use muster_core::{
    Caller, Config, Core, Device, Effects, Heard, Input, Inventory, Job, JobState, Join, Node, Reply,
    Snapshot, ToNode, Write,
};

/// A node that follows its assignments at once.
#[derive(Debug, Default)]
pub struct ModelNode {
    pub incarnation: u32,
    pub session: Option<Session>,
    pub gangs: BTreeMap<GangId, (Assignment, GangReport)>,
    /// Takes messages but does nothing with them until it is thawed.
    pub frozen: bool,
    inbox: VecDeque<ToNode>,
    pub address: Option<IpAddr>,
    pub gpus: u32,
    /// Its data directory's identity, if it is not the name.
    pub data_id: Option<String>,
    pub labels: BTreeMap<String, String>,
}

pub struct World {
    pub core: Core,
    pub now: Millis,
    pub nodes: BTreeMap<NodeName, ModelNode>,
    stored: BTreeMap<String, String>,
    pub config: Config,
    hellos: u64,
}

pub fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

/// A spec of `nodes` x `procs`, checked.
pub fn spec(nodes: u32, procs: u32) -> JobSpec {
    JobSpec { min_nodes: nodes, procs_per_node: procs, ..JobSpec::new(vec!["train".into()]) }.check().unwrap()
}

impl Default for World {
    fn default() -> Self {
        let config = Config { ended_max: 50, ..Config::default() };
        let now = Millis::from_secs(1_000_000);
        let (core, effects) = Core::load(now, config.clone(), 42, Snapshot::default());
        let mut world =
            Self { core, now, nodes: BTreeMap::new(), stored: BTreeMap::new(), config, hellos: 0 };
        world.carry_out(effects);
        world
    }
}

impl World {
    pub fn with_nodes(names: &[&str]) -> Self {
        let mut world = Self::default();
        for (i, node) in names.iter().enumerate() {
            world.node(node).address = Some(IpAddr::from([10, 0, 0, i as u8 + 1]));
            world.connect(node);
        }
        world
    }

    pub fn node(&mut self, node: &str) -> &mut ModelNode {
        self.nodes.entry(name(node)).or_default()
    }

    /// One input, its effects, and everything that follows from them.
    pub fn input(&mut self, input: Input) -> Option<Result<Reply, muster_core::Refusal>> {
        let mut effects = self.core.step(self.now, input);
        let reply = effects.reply.take();
        self.carry_out(effects);
        self.settle();
        reply
    }

    pub fn submit(&mut self, spec: JobSpec) -> String {
        self.submit_as(None, spec).unwrap().id.to_string()
    }

    pub fn submit_as(&mut self, request: Option<&str>, spec: JobSpec) -> Result<Job, muster_core::Refusal> {
        let request_id = request.map(|id| RequestId::new(id).unwrap());
        match self
            .input(Input::Submit { by: Caller::trusted(), request_id, spec: Box::new(spec) })
            .unwrap()?
        {
            Reply::Job(job) => Ok(*job),
            other => panic!("{other:?}"),
        }
    }

    pub fn cancel(&mut self, job: &str) {
        self.input(Input::Cancel {
            by: Caller::trusted(),
            job: job.to_owned(),
            reason: String::new(),
            signal: None,
        })
        .unwrap()
        .unwrap();
    }

    pub fn job(&self, id: &str) -> &Job {
        self.core.job(id).unwrap()
    }

    pub fn state(&self, id: &str) -> JobState {
        self.job(id).state
    }

    /// What a daemon registers with.
    pub fn join_of(&mut self, node: &str) -> Join {
        let model = self.node(node);
        Join {
            name: name(node),
            address: model.address.unwrap_or(IpAddr::from([10, 0, 0, 1])),
            incarnation: Incarnation::new(format!("i{}", model.incarnation)).unwrap(),
            boot_id: "boot".into(),
            data_id: model.data_id.clone().unwrap_or_else(|| node.to_owned()),
            inventory: Inventory {
                total: Resources { gpus: model.gpus, cpu_millis: 8000, memory_bytes: 1 << 34 },
                gpus: (0..model.gpus).map(device).collect(),
                labels: model.labels.clone(),
                ..Inventory::default()
            },
        }
    }

    /// Joins and opens a session, as a daemon does whenever it connects.
    pub fn connect(&mut self, node: &str) {
        let join = self.join_of(node);
        let gangs = self.node(node).gangs.values().map(|(_, report)| report.clone()).collect();
        let incarnation = join.incarnation.clone();
        self.hellos += 1;
        let number = self.hellos;
        if self.input(Input::Join(Box::new(join))).unwrap().is_err() {
            return;
        }
        // The session must be known before the effects of Hello are carried out, as in the driver.
        let mut effects = self
            .core
            .step(self.now, Input::Hello { node: name(node), incarnation, gangs, leaving: None, number });
        if let Some(Ok(Reply::Session(session))) = effects.reply.take() {
            self.node(node).session = Some(session);
            self.node(node).inbox.clear();
        }
        self.carry_out(effects);
        self.settle();
    }

    pub fn disconnect(&mut self, node: &str) {
        if let Some(session) = self.node(node).session.take() {
            self.input(Input::Disconnected { node: name(node), session });
        }
    }

    /// The daemon dies with its ranks and is started anew, without connecting yet.
    pub fn crash(&mut self, node: &str) {
        self.disconnect(node);
        let model = self.node(node);
        model.incarnation += 1;
        model.gangs.clear();
        model.inbox.clear();
    }

    /// A rank ends by itself.
    pub fn exit(&mut self, rank: u32, job: &str, code: i32) {
        let held = self.job(job).placements().iter().find(|placement| placement.holds(Rank(rank)));
        let Some(placement) = held.cloned() else { return };
        let gang = self.job(job).gang_id();
        let now = self.now;
        let Some((_, report)) =
            self.nodes.get_mut(&placement.node).and_then(|node| node.gangs.get_mut(&gang))
        else {
            return;
        };
        if report.phase != ObservedPhase::Running || report.exits.iter().any(|exit| exit.rank.0 == rank) {
            return;
        }
        report.exits.push(exit_of(rank, Some(code), None, now));
        if report.exits.len() == placement.procs as usize {
            report.phase = ObservedPhase::Stopped;
        }
        let report = report.clone();
        self.report(&placement.node, report);
    }

    pub fn report(&mut self, node: &NodeName, report: GangReport) {
        if let Some(session) = self.nodes[node].session {
            self.input(Input::Report { node: node.clone(), session, report: Box::new(report) });
        }
    }

    /// Time passes in small steps; connected nodes that are not frozen send heartbeats.
    pub fn pass(&mut self, millis: u64) {
        let end = self.now.0 + millis;
        while self.now.0 < end {
            self.now = Millis((self.now.0 + 500).min(end));
            let beating: Vec<_> = self
                .nodes
                .iter()
                .filter(|(_, node)| !node.frozen)
                .filter_map(|(name, node)| Some((name.clone(), node.session?)))
                .collect();
            let at = self.now;
            let heard = beating.into_iter().map(|(node, session)| Heard { node, session, at });
            self.input(Input::Heartbeats(heard.collect()));
            if self.core.next_deadline().is_some_and(|at| at <= self.now) {
                self.input(Input::Tick);
            }
        }
    }

    /// The coordinator dies and starts again from its store; every session is gone.
    pub fn restart_coordinator(&mut self) {
        let mut snapshot = Snapshot::default();
        for (key, value) in &self.stored {
            match key.split_once('/').unwrap() {
                ("meta", _) => snapshot.meta = Some(serde_json::from_str(value).unwrap()),
                ("job", _) => snapshot.jobs.push(serde_json::from_str(value).unwrap()),
                ("barred", _) => snapshot.barred.push(serde_json::from_str(value).unwrap()),
                ("token", _) => snapshot.tokens.push(serde_json::from_str(value).unwrap()),
                ("node", _) => snapshot.nodes.push(serde_json::from_str::<Node>(value).unwrap()),
                other => panic!("{other:?}"),
            }
        }
        let (core, effects) = Core::load(self.now, self.config.clone(), 7, snapshot);
        self.core = core;
        for node in self.nodes.values_mut() {
            node.session = None;
            node.inbox.clear();
        }
        self.carry_out(effects);
        self.input(Input::Tick);
    }

    pub fn carry_out(&mut self, effects: Effects) {
        for write in effects.writes {
            let put = |record: &dyn erased::Json| record.json();
            match write {
                Write::Meta(meta) => _ = self.stored.insert("meta/".into(), put(&meta)),
                Write::Job(job) => _ = self.stored.insert(format!("job/{}", job.id), put(&*job)),
                Write::Node(node) => _ = self.stored.insert(format!("node/{}", node.name), put(&*node)),
                Write::Token(token) => _ = self.stored.insert(format!("token/{}", token.name), put(&*token)),
                Write::Barred(barred) => {
                    _ = self.stored.insert(format!("barred/{}", barred.node), put(&barred));
                }
                Write::DeleteBarred(node) => _ = self.stored.remove(&format!("barred/{node}")),
                Write::DeleteToken(name) => _ = self.stored.remove(&format!("token/{name}")),
                Write::DeleteJob(id) => _ = self.stored.remove(&format!("job/{id}")),
                Write::DeleteNode(name) => _ = self.stored.remove(&format!("node/{name}")),
            }
        }
        for (node, session, message) in effects.sends {
            let model = self.nodes.entry(node).or_default();
            if model.session == Some(session) {
                match message {
                    ToNode::Close(_) => (model.session, model.inbox) = (None, VecDeque::new()),
                    message => model.inbox.push_back(message),
                }
            }
        }
        self.core.check_invariants().unwrap();
    }

    /// Lets every node that is not frozen act on what it was sent, until nothing moves.
    pub fn settle(&mut self) {
        loop {
            let next = self.nodes.iter_mut().find_map(|(name, node)| {
                if node.frozen { None } else { Some((name.clone(), node.inbox.pop_front()?)) }
            });
            let Some((node, message)) = next else { return };
            let assignments = match message {
                ToNode::Welcome(all) => {
                    let model = self.nodes.get_mut(&node).unwrap();
                    model.gangs.retain(|gang, _| all.iter().any(|a| a.gang == *gang));
                    all
                }
                ToNode::Assign(one) => vec![*one],
                ToNode::Close(_) => vec![],
            };
            for assignment in assignments {
                let report = self.nodes.get_mut(&node).unwrap().follow(&assignment, self.now);
                if let (Some(report), Some(session)) = (report, self.nodes[&node].session) {
                    let input = Input::Report { node: node.clone(), session, report: Box::new(report) };
                    let effects = self.core.step(self.now, input);
                    self.carry_out(effects);
                }
            }
        }
    }
}

impl ModelNode {
    fn follow(&mut self, assignment: &Assignment, now: Millis) -> Option<GangReport> {
        let gang = assignment.gang.clone();
        if assignment.phase == DesiredPhase::Forgotten {
            self.gangs.remove(&gang);
            return None;
        }
        let placement = assignment.placement.clone();
        let (held, report) = self.gangs.entry(gang.clone()).or_insert_with(|| {
            let master_port = (placement.group_rank == 0).then_some(29500);
            let phase = ObservedPhase::Prepared;
            (
                assignment.clone(),
                GangReport {
                    gang,
                    phase,
                    master_port,
                    exits: vec![],
                    error: None,
                    quiet: vec![],
                    processes: vec![],
                    rendezvous: None,
                    surroundings: None,
                },
            )
        });
        held.clone_from(assignment);
        match assignment.phase {
            DesiredPhase::Running if report.phase == ObservedPhase::Prepared => {
                report.phase = ObservedPhase::Running;
            }
            DesiredPhase::Stopped if report.phase != ObservedPhase::Stopped => {
                if report.phase == ObservedPhase::Running {
                    for rank in placement.first_rank.0..placement.first_rank.0 + placement.procs {
                        if !report.exits.iter().any(|exit| exit.rank.0 == rank) {
                            report.exits.push(exit_of(rank, None, Some(15), now));
                        }
                    }
                }
                report.phase = ObservedPhase::Stopped;
            }
            DesiredPhase::Prepared
            | DesiredPhase::Running
            | DesiredPhase::Stopped
            | DesiredPhase::Forgotten => {}
        }
        Some(report.clone())
    }
}

pub fn exit_of(rank: u32, code: Option<i32>, signal: Option<i32>, time: Millis) -> RankExit {
    let (stderr_tail, out_of_memory, error) = (String::new(), false, None);
    RankExit { rank: Rank(rank), code, signal, time, stderr_tail, out_of_memory, error }
}

fn device(index: u32) -> Device {
    Device {
        index,
        uuid: format!("GPU-{index}"),
        model: "H100".into(),
        memory_bytes: 80 << 30,
        ..Device::default()
    }
}

mod erased {
    /// JSON of a record, as the store keeps it.
    pub trait Json {
        fn json(&self) -> String;
    }

    impl<T: serde::Serialize> Json for T {
        fn json(&self) -> String {
            serde_json::to_string(self).unwrap()
        }
    }
}
