//! A small cluster to feed inputs to: two nodes, a job that runs on one of them, and a store that keeps what the core
//! writes.

use muster_core::access::{NewToken, Role};
use muster_core::types::{GangReport, JobId};
use muster_core::types::{
    Incarnation, JobSpec, Millis, NodeName, ObservedPhase, Resources, Session, TokenName,
};
use muster_core::{Caller, Config, Core, Device, Effects, Input, Inventory, Job, Join, Reply, Snapshot};
use muster_decoders::check_refusal;
use muster_store::{Batch, Fence, MemoryStore, Store};
use tonic::Status;

use crate::driver::RequestError;
use crate::persist;

/// When everything happens: near 2026.
pub(super) const NOW: Millis = Millis::from_secs(1_760_000_000);

/// A spec, checked.
pub(super) fn spec(nodes: u32, procs: u32, gpus: u32) -> JobSpec {
    let per_proc = Resources { gpus, ..Resources::default() };
    let spec =
        JobSpec { min_nodes: nodes, procs_per_node: procs, per_proc, ..JobSpec::new(vec!["sh".into()]) };
    spec.check().expect("the spec is valid")
}

pub(super) struct Cluster {
    pub core: Core,
    pub store: MemoryStore,
    fence: Fence,
    /// The node whose session speaks.
    pub node: NodeName,
    pub session: Session,
    /// The job that runs on it.
    pub job: JobId,
}

impl Cluster {
    pub fn new() -> Self {
        let (core, effects) = Core::load(NOW, Config::default(), 1, Snapshot::default());
        let mut store = MemoryStore::default();
        let fence = store.campaign().expect("memory has room");
        let node = NodeName::new("node-1").expect("the name is valid");
        let job = JobId::new("none").expect("the id is valid");
        let mut cluster = Self { core, store, fence, node: node.clone(), session: Session(0), job };
        cluster.keep(&effects);
        for name in ["node-2", "node-1"] {
            let (name, incarnation) = (NodeName::new(name), Incarnation::new("1"));
            let (name, incarnation) = (name.expect("it is valid"), incarnation.expect("it is valid"));
            let gpus: Vec<Device> =
                (0..4).map(|index| Device { index, memory_bytes: 1, ..Device::default() }).collect();
            let total = Resources { gpus: 4, cpu_millis: 4000, memory_bytes: 1 << 30 };
            cluster.feed(Input::Join(Box::new(Join {
                name: name.clone(),
                address: [10, 0, 0, 1].into(),
                incarnation: incarnation.clone(),
                boot_id: "boot".into(),
                data_id: "data".into(),
                inventory: Inventory { total, gpus, ..Inventory::default() },
            })));
            let hello = Input::Hello { node: name, incarnation, gangs: Vec::new(), leaving: None, number: 1 };
            if let Some(Reply::Session(session)) = cluster.feed(hello) {
                cluster.session = session;
            }
        }
        let name = TokenName::new("ci").expect("it is valid");
        let (life, uses) = (Some(Millis::from_secs(60)), Some(2));
        let hash = crate::access::hash("another secret");
        cluster.feed(Input::CreateToken(Box::new(NewToken {
            name,
            role: Role::Node,
            hash,
            life,
            uses,
            run_as: None,
            node: None,
        })));
        cluster.feed(Input::BarNode(NodeName::new("node-3").expect("it is valid")));
        let id = cluster.submit(&spec(1, 2, 1)).id;
        for phase in [ObservedPhase::Prepared, ObservedPhase::Running] {
            let job = cluster.core.job(id.as_str()).expect("the job is there");
            let gang = job.gang_id();
            let report = GangReport {
                gang,
                phase,
                master_port: Some(29_500),
                exits: Vec::new(),
                error: None,
                quiet: Vec::new(),
                processes: Vec::new(),
                rendezvous: None,
                surroundings: None,
            };
            let (node, session) = (node.clone(), cluster.session);
            cluster.feed(Input::Report { node, session, report: Box::new(report) });
        }
        cluster.job = id;
        cluster
    }

    /// One step; what it wrote is kept. A refusal is checked.
    pub fn feed(&mut self, input: Input) -> Option<Reply> {
        let effects = self.core.step(NOW, input);
        self.core.check_invariants().expect("the state is whole");
        self.keep(&effects);
        effects.reply?.map_err(refused).ok()
    }

    pub fn submit(&mut self, spec: &JobSpec) -> Job {
        match self.feed(Input::Submit {
            by: Caller::trusted(),
            request_id: None,
            spec: Box::new(spec.clone()),
        }) {
            Some(Reply::Job(job)) => *job,
            other => panic!("a valid spec was not taken: {other:?}"),
        }
    }

    /// The job of a request, as the handlers find it.
    pub fn find(&mut self, id: &str) -> Option<Job> {
        self.core.job(id).cloned().map_err(refused).ok()
    }

    /// What was stored is read again, and is what was there.
    pub fn check(&mut self) {
        let snapshot = persist::load(&mut self.store).expect("what the core writes can be read");
        let jobs = snapshot.jobs.len();
        let (again, _) = Core::load(NOW, Config::default(), 1, snapshot);
        again.check_invariants().expect("the state is whole after a restart");
        assert_eq!(jobs, self.core.jobs_total());
        assert_eq!(again.nodes_after(None).count(), self.core.nodes_after(None).count());
    }

    fn keep(&mut self, effects: &Effects) {
        let mut batch = Batch::default();
        effects.writes.iter().for_each(|write| persist::encode(&mut batch, write));
        self.store.commit(self.fence, &batch).expect("memory has room");
    }
}

fn refused(refusal: muster_core::Refusal) {
    let status = Status::from(RequestError::from(refusal));
    check_refusal(status.message(), status.details());
}
