//! Every method that concerns a job or a run, every role, and whether what is asked for is the caller's own.

use std::collections::BTreeSet;
use std::sync::Arc;

use muster_core::access::{Role, Token};
use muster_core::agents::{Hello, Spec};
use muster_core::types::text::REDACTED;
use muster_core::types::{Incarnation, JobSpec, Millis, NodeName, Owner, RequestId, TokenName};
use muster_core::{Caller, Input, Reply, Rights};
use muster_proto::v1::{self, job_service_server::JobService};
use muster_store::MemoryStore;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status};

use super::{Api, agents};
use crate::access::{Identity, NodeCertificate, hash, rules};
use crate::agents::Runs;
use crate::clock::Clock;
use crate::driver;
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::office::{Office, Reign, Standing};

const SECRET: &str = "s3cret";
const SERVICE: &str = "muster.v1.JobService/";

/// What became of a call on a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The role does not suffice.
    NoRole,
    /// It would, for a job of the caller's own.
    NotOwner,
    /// Done, with everything that the caller may see, but for what is the owner's.
    Redacted,
    /// Done, and all was shown.
    Whole,
}
use End::{NoRole, NotOwner, Redacted, Whole};

fn bearer(name: &str, role: Role) -> Identity {
    Identity::Bearer(Box::new(Token {
        name: TokenName::new(name).unwrap(),
        role,
        hash: hash(""),
        created: Millis(0),
        expires: None,
        uses_left: None,
        run_as: None,
        node: None,
    }))
}

fn local(name: &str, rights: Rights) -> Identity {
    Identity::Local(Caller { name: Owner::new(name).ok(), rights })
}

fn node(name: &str) -> Identity {
    let node = NodeName::new(name).unwrap();
    Identity::Node(NodeCertificate { node, issued: Millis(0), expires: Millis(1) })
}

/// Everybody. Each calls once as `ann`, whose the jobs are, where a caller can be called so.
fn everybody() -> Vec<(&'static str, Identity)> {
    vec![
        ("viewer, own", bearer("ann", Role::Viewer)),
        ("viewer", bearer("bob", Role::Viewer)),
        ("submitter, own", bearer("ann", Role::Submitter)),
        ("submitter", bearer("bob", Role::Submitter)),
        ("operator, own", bearer("ann", Role::Operator)),
        ("operator", bearer("bob", Role::Operator)),
        ("admin, own", bearer("ann", Role::Admin)),
        ("admin", bearer("bob", Role::Admin)),
        ("join", bearer("bob", Role::Node)),
        ("node", node("ann")),
        ("local", local("root", Rights::All)),
        ("listed, own", local("ann", Rights::OwnAndUnowned)),
        ("listed", local("bob", Rights::OwnAndUnowned)),
    ]
}

/// What is right, written down by what each method is for.
fn expected(caller: &str, method: &str) -> End {
    let is_own = caller.ends_with(", own");
    let role = caller.trim_end_matches(", own");
    if matches!(role, "node" | "join") {
        return NoRole;
    }
    let is_operator = matches!(role, "operator" | "admin" | "local");
    let sees_all = is_own || is_operator;
    match method {
        "SubmitJob" | "CancelJob" if role == "viewer" => NoRole,
        // Everybody's own.
        "SubmitJob" | "PlanJob" | "StreamMetrics" => Whole,
        "CancelJob" | "StreamLogs" => {
            if sees_all {
                Whole
            } else {
                NotOwner
            }
        }
        "GetJob" | "GetJobEnvironment" | "ListJobs" | "WatchJob" => {
            if sees_all {
                Whole
            } else {
                Redacted
            }
        }
        other => panic!("{other} is a method of which this test does not know"),
    }
}

struct Bed {
    api: Api,
    driver: driver::Handle,
    /// Dropped, nobody leads.
    _standing: watch::Sender<Standing>,
}

impl Bed {
    fn new(open_jobs: bool) -> Self {
        let (metrics, monitor, clock) = (Metrics::new("/nowhere".into()), Monitor::new(), Clock::start());
        let store = Box::new(MemoryStore::default());
        let core = muster_core::Config::default();
        let started = driver::start(store, core, metrics.clone(), monitor.clone(), clock, Arc::new(|| true));
        let (handle, mut running) = started.unwrap();
        let over = CancellationToken::new();
        let reign = Reign {
            driver: handle.clone(),
            agents: Runs::new(clock, over.clone()),
            term: 1,
            coordinators: 1,
            cluster_id: "c".into(),
            over,
        };
        tokio::spawn(async move { running.run(&CancellationToken::new(), &CancellationToken::new()).await });
        let (standing, office) = watch::channel(Standing::Leading(reign));
        let config = crate::Config { open_jobs, ..crate::Config::new("/nowhere".into()) };
        let api = Api::new(Office::new(office, clock), metrics, monitor, &config);
        Self { api, driver: handle, _standing: standing }
    }

    /// Returns a new job of ann.
    async fn job(&self) -> String {
        let by = Caller { name: Owner::new("ann").ok(), rights: Rights::Own };
        let env = [("KEY".to_owned(), SECRET.to_owned())].into();
        let spec = JobSpec { env, ..JobSpec::new(vec!["train".into(), SECRET.into()]) }.check().unwrap();
        let submit = Input::Submit { by, request_id: None, spec: Box::new(spec) };
        match self.driver.request(submit).await.unwrap() {
            Reply::Job(job) => job.id.to_string(),
            other => panic!("{other:?}"),
        }
    }

    /// Calls a method on a job of ann as somebody.
    async fn call(&self, method: &str, identity: &Identity) -> End {
        let (rule, _) = rules::rule(&format!("/{SERVICE}{method}")).unwrap();
        if rules::check(rule, identity).is_err() {
            return NoRole;
        }
        let (api, job_id) = (&self.api, self.job().await);
        let spec = Some(v1::JobSpec { command: vec!["x".into()], ..Default::default() });
        let found = match method {
            "SubmitJob" => {
                let wire = v1::SubmitJobRequest { request_id: "r".into(), spec };
                let job = api.submit_job(by(identity, wire)).await.map(|answer| answer.into_inner().job);
                let job = job.map(Option::unwrap);
                if let Ok(job) = &job {
                    let name = identity.caller().name.unwrap();
                    assert_eq!(job.owner, name.as_str(), "the request of somebody else is another one");
                }
                job.map(|job| shown(&job))
            }
            "CancelJob" => {
                let wire = v1::CancelJobRequest { job_id, ..Default::default() };
                api.cancel_job(by(identity, wire))
                    .await
                    .map(|answer| shown(&answer.into_inner().job.unwrap()))
            }
            "GetJob" => {
                let answer = api.get_job(by(identity, v1::GetJobRequest { job_id })).await;
                answer.map(|answer| shown(&answer.into_inner().job.unwrap()))
            }
            "GetJobEnvironment" => {
                let wire = v1::GetJobEnvironmentRequest { job_id: job_id.clone() };
                let answer = api.get_job_environment(by(identity, wire)).await;
                // Nothing is known of a job that waits: it goes by the same look as the job itself.
                let job = api.find_job(&job_id).unwrap();
                let sight = api.sight(&job, &identity.caller());
                answer.map(|_| if sight == crate::view::Sight::Whole { Whole } else { Redacted })
            }
            "ListJobs" => {
                let answer = api.list_jobs(by(identity, v1::ListJobsRequest::default())).await;
                answer.map(|answer| {
                    let jobs = answer.into_inner().jobs;
                    shown(jobs.iter().find(|job| job.id == job_id).unwrap())
                })
            }
            "WatchJob" => match api.watch_job(by(identity, v1::WatchJobRequest { job_id })).await {
                Ok(answer) => {
                    let first = answer.into_inner().next().await.unwrap().unwrap();
                    Ok(shown(&first.job.unwrap()))
                }
                Err(status) => Err(status),
            },
            "PlanJob" => api.plan_job(by(identity, v1::PlanJobRequest { spec })).await.map(|_| Whole),
            "StreamMetrics" => {
                let wire = v1::StreamMetricsRequest { job_id, ..Default::default() };
                api.stream_metrics(by(identity, wire)).await.map(|_| Whole)
            }
            "StreamLogs" => {
                let wire = v1::StreamLogsRequest { job_id, ..Default::default() };
                match api.stream_logs(by(identity, wire)).await {
                    // It has no output yet.
                    Err(status) if status.code() == Code::FailedPrecondition => Ok(Whole),
                    other => other.map(|_| Whole),
                }
            }
            other => panic!("{other}"),
        };
        found.unwrap_or_else(|status| {
            assert_eq!(status.code(), Code::PermissionDenied, "{method}: {status}");
            let words = "belongs to ann, and only ann or an operator may change it or see all of it";
            assert!(status.message().contains(words), "{method}: {status}");
            NotOwner
        })
    }
}

fn by<T>(identity: &Identity, wire: T) -> Request<T> {
    let mut request = Request::new(wire);
    request.extensions_mut().insert(identity.clone());
    request
}

/// Whether all of a job is shown, or nothing of what is its owner's.
fn shown(job: &v1::Job) -> End {
    let all = format!("{job:?}");
    let spec = job.spec.as_ref().unwrap();
    if !job.redacted {
        assert!(!all.contains(REDACTED), "{all}");
        return Whole;
    }
    assert!(!all.contains(SECRET), "{all}");
    assert_eq!((spec.command.join(" "), spec.env["KEY"].as_str()), (REDACTED.to_owned(), REDACTED));
    Redacted
}

#[tokio::test]
async fn every_method_of_jobs_for_every_role_and_owner() {
    let bed = Bed::new(false);
    let methods: BTreeSet<&str> = rules::served().filter_map(|path| path.strip_prefix(SERVICE)).collect();
    assert!(methods.len() >= 9, "{methods:?}");
    for method in methods {
        for (caller, identity) in everybody() {
            assert_eq!(
                bed.call(method, &identity).await,
                expected(caller, method),
                "{caller} calls {method}"
            );
        }
    }
}

#[tokio::test]
async fn a_setting_opens_what_is_shown_and_nothing_else() {
    let bed = Bed::new(true);
    let viewer = bearer("bob", Role::Viewer);
    for method in ["GetJob", "GetJobEnvironment", "ListJobs", "WatchJob", "StreamLogs"] {
        assert_eq!(bed.call(method, &viewer).await, Whole, "{method}");
    }
    assert_eq!(bed.call("CancelJob", &bearer("bob", Role::Submitter)).await, NotOwner);
}

#[tokio::test]
async fn lists_are_of_one_owner_where_that_is_asked_for() {
    let bed = Bed::new(false);
    let (anns, _) = (bed.job().await, bed.call("SubmitJob", &bearer("bob", Role::Submitter)).await);
    let list = async |identity: &Identity, owner: &str, mine| {
        let wire = v1::ListJobsRequest { owner: owner.into(), mine, ..Default::default() };
        let answer = bed.api.list_jobs(by(identity, wire)).await;
        answer.map(|answer| answer.into_inner().jobs.into_iter().map(|job| job.owner).collect::<Vec<_>>())
    };
    let (ann, bob) = (bearer("ann", Role::Viewer), bearer("bob", Role::Viewer));
    let only = |name: &str, found: Result<Vec<String>, Status>| {
        let found = found.unwrap();
        assert!(!found.is_empty() && found.iter().all(|owner| owner == name), "{name}: {found:?}");
    };
    only("ann", list(&ann, "", true).await);
    only("bob", list(&bob, "", true).await);
    only("ann", list(&bob, "ann", false).await);
    assert_eq!(list(&bob, "eve", false).await.unwrap(), Vec::<String>::new());
    let nobody = Identity::Local(Caller::trusted());
    for (identity, owner, mine) in [(&nobody, "", true), (&bob, "ann", true), (&bob, "a\nb", false)] {
        assert_eq!(list(identity, owner, mine).await.unwrap_err().code(), Code::InvalidArgument);
    }
    assert!(bed.api.find_job(&anns).is_ok());
}

#[tokio::test]
async fn a_run_of_agents_belongs_to_who_began_it() {
    let runs = Runs::new(Clock::start(), CancellationToken::new());
    let join = async |run: &str, identity: &Identity| {
        let (outbox, stream) = mpsc::channel(16);
        let hello = Hello {
            run: RequestId::new(run).unwrap(),
            agent: Incarnation::new(uuid::Uuid::new_v4().to_string()).unwrap(),
            node: NodeName::new("n1").unwrap(),
            spec: Spec { min: 2, max: 4, last_call: Millis(0) },
            held: None,
        };
        let joined = runs.join(hello, &agents::agent(identity), outbox).await;
        joined.map(|joined| (joined, stream))
    };
    let mut kept = Vec::new();
    let mut check = async |run: &str, identity: &Identity, may: bool| match join(run, identity).await {
        Ok(joined) => {
            assert!(may, "{identity:?} joins {run}");
            kept.push(joined);
        }
        Err(status) => {
            assert!(!may && status.code() == Code::PermissionDenied, "{identity:?} joins {run}: {status}");
            assert!(status.message().contains("another --rdzv-id"), "{status}");
        }
    };
    check("anns", &bearer("ann", Role::Submitter), true).await;
    for (caller, identity) in everybody() {
        let is_own = caller.ends_with(", own");
        let is_trusted = ["operator", "admin", "local", "node"].iter().any(|role| caller.starts_with(role));
        // Viewers and join tokens come no further than the table of rules.
        check("anns", &identity, is_own || is_trusted).await;
    }
    check("nodes", &node("n1"), true).await;
    check("nodes", &node("n2"), true).await;
    check("nodes", &bearer("ann", Role::Submitter), false).await;
    check("nobodys", &Identity::Local(Caller::trusted()), true).await;
    check("nobodys", &local("ann", Rights::OwnAndUnowned), true).await;
    check("nobodys", &bearer("ann", Role::Submitter), false).await;
}
