//! Who may call which method: one table, and whatever is not in it is refused.

use muster_core::access::Role;
use muster_core::{Caller, Rights};
use tonic::Status;

use super::{Identity, denied};
use crate::audit::subject::Kind;

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Everybody, also without saying who he is.
    Open,
    /// Whoever says who he is.
    Known,
    /// Bearers of this role, or of one that covers it.
    Least(Role),
    /// The same, and nodes.
    LeastOrNode(Role),
    /// Nodes with a certificate.
    Node,
    /// Nodes with a certificate or a join token.
    Joining,
}

const VIEWER: Rule = Rule::Least(Role::Viewer);
const SUBMITTER: Rule = Rule::Least(Role::Submitter);
const OPERATOR: Rule = Rule::Least(Role::Operator);
const ADMIN: Rule = Rule::Least(Role::Admin);

/// What is only read leaves no audit line.
const READS: Option<Kind> = None;
/// A job that is named by the first field.
const JOB: Option<Kind> = Some(Kind::Field("job", &[1]));
/// A job that is made.
const NEW_JOB: Option<Kind> = Some(Kind::Told("job"));
/// A node that is named by the first field.
const NODE: Option<Kind> = Some(Kind::Field("node", &[1]));
/// A token that is named by the first field.
const TOKEN: Option<Kind> = Some(Kind::Field("token", &[1]));
/// A token that is made.
const NEW_TOKEN: Option<Kind> = Some(Kind::Told("token"));
/// The run of an agent, which its hello names.
const RUN: Option<Kind> = Some(Kind::Field("run", &[1, 1]));

/// Every method, who may call it, and what it changes, which is worth an audit line.
const RULES: [(&str, Rule, Option<Kind>); 27] = [
    ("/grpc.health.v1.Health/Check", Rule::Open, READS),
    ("/grpc.health.v1.Health/Watch", Rule::Open, READS),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Rule::Known, READS),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Rule::Known, READS),
    ("/muster.v1.ClusterService/GetCluster", VIEWER, READS),
    ("/muster.v1.JobService/CancelJob", SUBMITTER, JOB),
    ("/muster.v1.JobService/GetJob", VIEWER, READS),
    ("/muster.v1.JobService/GetJobEnvironment", VIEWER, READS),
    ("/muster.v1.JobService/ListJobs", VIEWER, READS),
    ("/muster.v1.JobService/PlanJob", VIEWER, READS),
    ("/muster.v1.JobService/StreamLogs", VIEWER, READS),
    ("/muster.v1.JobService/StreamMetrics", VIEWER, READS),
    ("/muster.v1.JobService/SubmitJob", SUBMITTER, NEW_JOB),
    ("/muster.v1.JobService/WatchJob", VIEWER, READS),
    ("/muster.v1.NodeService/CordonNode", OPERATOR, NODE),
    ("/muster.v1.NodeService/DrainNode", OPERATOR, NODE),
    ("/muster.v1.NodeService/GetNode", VIEWER, READS),
    ("/muster.v1.NodeService/ListNodes", VIEWER, READS),
    ("/muster.v1.NodeService/UncordonNode", OPERATOR, NODE),
    ("/muster.v1.NodeService/WatchNodes", VIEWER, READS),
    ("/muster.v1.RendezvousService/Join", Rule::LeastOrNode(Role::Submitter), RUN),
    ("/muster.v1.TokenService/CreateToken", ADMIN, NEW_TOKEN),
    ("/muster.v1.TokenService/ListTokens", ADMIN, READS),
    ("/muster.v1.TokenService/RevokeToken", ADMIN, TOKEN),
    ("/muster.v1.WorkerService/IssueCertificate", Rule::Joining, NODE),
    // The driver logs both, at each connect of each node.
    ("/muster.v1.WorkerService/Join", Rule::Node, READS),
    ("/muster.v1.WorkerService/Session", Rule::Node, READS),
];

/// Returns the rule of a method and what it changes; none for a method that is not known.
pub(crate) fn rule(path: &str) -> Option<(Rule, Option<Kind>)> {
    RULES.iter().find(|(method, ..)| *method == path).map(|(_, rule, changes)| (*rule, *changes))
}

/// Every method that is served, as `package.Service/Method`.
pub(crate) fn served() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|(path, ..)| &path[1..])
}

/// Whether somebody may do what the rule is for. The refusal says what would.
pub(crate) fn check(rule: Rule, identity: &Identity) -> Result<(), Status> {
    let role = match identity {
        Identity::Local(Caller { rights: Rights::All, .. }) => return Ok(()),
        Identity::Local(_) => return check_listed(rule, identity),
        Identity::Bearer(token) => Some(token.role),
        Identity::Node(_) => None,
    };
    let covers = |needed: Role| role.is_some_and(|role| role.covers(needed));
    let (may, needs) = match rule {
        Rule::Open => (true, String::new()),
        // A join token is for one call.
        Rule::Known => (role != Some(Role::Node), "a token that is no join token".to_owned()),
        Rule::Least(needed) => (covers(needed), needs(needed)),
        Rule::LeastOrNode(needed) => (role.is_none() || covers(needed), needs(needed)),
        Rule::Node => (role.is_none(), "the certificate of a node".to_owned()),
        Rule::Joining => (
            role.is_none_or(|role| role == Role::Node),
            "a join token or the certificate of a node".to_owned(),
        ),
    };
    if may {
        return Ok(());
    }
    Err(denied(format!("{identity} has the role {} and may not do this; it needs {needs}", identity.role())))
}

/// Checks a call of a user of this machine who was let in, and is neither root nor the one who runs the coordinator. They may
/// do what submitters and nodes may.
fn check_listed(rule: Rule, identity: &Identity) -> Result<(), Status> {
    match rule {
        Rule::Least(needed) if !Role::Submitter.covers(needed) => Err(denied(format!(
            "{identity} may submit jobs here and change its own, and may not do this; call as root or as the \
             user who runs the coordinator"
        ))),
        Rule::Open | Rule::Known | Rule::Least(_) | Rule::LeastOrNode(_) | Rule::Node | Rule::Joining => {
            Ok(())
        }
    }
}

fn needs(role: Role) -> String {
    format!("a token of the role {0} or above (`muster token create --role {0}`)", role.name())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use muster_core::access::Token;
    use muster_core::types::{Millis, NodeName, TokenName};
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::super::{NodeCertificate, hash};
    use super::*;

    fn methods() -> BTreeSet<String> {
        let sets = [
            muster_proto::DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let mut methods = BTreeSet::new();
        for file in sets.iter().flat_map(|set| FileDescriptorSet::decode(*set).unwrap().file) {
            for service in &file.service {
                let of = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
                methods.extend(service.method.iter().map(|method| of(method.name())));
            }
        }
        methods
    }

    fn bearer(role: Role) -> Identity {
        let name = TokenName::new(role.name()).unwrap();
        let (hash, created) = (hash(""), Millis(0));
        Identity::Bearer(Box::new(Token {
            name,
            role,
            hash,
            created,
            expires: None,
            uses_left: None,
            run_as: None,
            node: None,
        }))
    }

    /// Every caller and which methods he may call, written down a second time on purpose: by what it is for.
    #[test]
    fn every_method_of_the_descriptors_has_a_rule_for_every_role() {
        let node = NodeName::new("n1").unwrap();
        let node = Identity::Node(NodeCertificate { node, issued: Millis(0), expires: Millis(1) });
        let table = [
            ("viewer", bearer(Role::Viewer)),
            ("submitter", bearer(Role::Submitter)),
            ("operator", bearer(Role::Operator)),
            ("admin", bearer(Role::Admin)),
            ("join", bearer(Role::Node)),
            ("node", node),
            ("local", Identity::Local(Caller::trusted())),
            ("listed", Identity::Local(Caller { name: None, rights: Rights::OwnAndUnowned })),
        ];
        let reads = ["Get", "List", "Watch", "Stream", "Plan"];
        let methods = methods();
        assert!(methods.len() > 20, "the descriptors were found: {methods:?}");
        for method in &methods {
            let (rule, changes) = rule(method).unwrap_or_else(|| panic!("{method} has no rule"));
            let (service, name) = method.trim_start_matches('/').split_once('/').unwrap();
            let everybody = &["viewer", "submitter", "operator", "admin", "join", "node"][..];
            let may: &[&str] = match service {
                "grpc.health.v1.Health" => everybody,
                _ if service.starts_with("grpc.reflection.") => {
                    &["viewer", "submitter", "operator", "admin", "node"]
                }
                "muster.v1.TokenService" => &["admin"],
                "muster.v1.RendezvousService" => &["submitter", "operator", "admin", "node"],
                "muster.v1.WorkerService" if name == "IssueCertificate" => &["join", "node"],
                "muster.v1.WorkerService" => &["node"],
                _ if reads.iter().any(|read| name.starts_with(read)) => &everybody[..4],
                "muster.v1.JobService" => &everybody[1..4],
                "muster.v1.NodeService" => &everybody[2..4],
                other => panic!("{other} is a service of which this test does not know"),
            };
            for (caller, identity) in &table {
                let expected = match *caller {
                    "local" => true,
                    // Its daemons call as it does.
                    "listed" => may.contains(&"submitter") || may.contains(&"node"),
                    caller => may.contains(&caller),
                };
                assert_eq!(check(rule, identity).is_ok(), expected, "{caller} calls {method}");
            }
            let reads_only =
                !service.starts_with("muster") || reads.iter().any(|read| name.starts_with(read));
            assert!(!(reads_only && changes.is_some()), "{method} changes nothing");
        }
        let known: BTreeSet<String> = RULES.iter().map(|(method, ..)| (*method).to_owned()).collect();
        assert_eq!(known, methods, "no rule is for a method that does not exist");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for path in
            ["", "/", "/muster.v1.JobService", "/muster.v1.JobService/Nope", "muster.v1.JobService/GetJob"]
        {
            assert_eq!(rule(path), None, "{path}");
        }
        let refused = check(ADMIN, &bearer(Role::Viewer)).unwrap_err();
        let words = "token:viewer has the role viewer and may not do this; it needs a token of the role admin or above";
        assert!(refused.message().starts_with(words), "{refused}");
    }
}
