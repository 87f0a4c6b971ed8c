//! Where the nodes of a run meet: nowhere, at a coordinator that is there, or at one that one of them serves.

use std::time::Duration;

use super::args::RunArgs;
use crate::exit::Failure;
use crate::output::say;
use muster_worker::trust::shown;

/// The port at which torchrun's nodes meet, if none is named: c10d and static.
const PORT_DEFAULT: u16 = 29400;
const MASTER_PORT_DEFAULT: u16 = 29500;
/// torchrun's time for all nodes to come.
const JOIN_TIMEOUT_DEFAULT: Duration = Duration::from_mins(10);

/// The same where they meet by static flags.
const STATIC_TIMEOUT_DEFAULT: Duration = Duration::from_mins(15);
/// torchrun's time for more than the fewest nodes to come.
const LAST_CALL_DEFAULT: Duration = Duration::from_secs(30);

/// Whether this node serves the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serve {
    Yes,
    No,
    /// If the place is here, and nobody serves there yet.
    IfHere,
}

/// Where nodes meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is one node.
    Alone,
    /// At a coordinator that is there.
    Coordinator,
    /// At one of them.
    Peers(Serve),
}

/// The rendezvous as the command line has it.
#[derive(Clone, Debug)]
pub(super) struct Meeting {
    pub place: Place,
    pub host: String,
    pub port: u16,
    /// The coordinator speaks TLS.
    pub is_encrypted: bool,
    /// Port of the ranks' store; 0 for any that is free.
    pub store_port: u16,
    /// This node's place among them.
    pub rank: Option<u32>,
    /// Time for all of them to come.
    pub join_timeout: Duration,
    /// Once the fewest are there, time for more to come before the first start.
    pub last_call: Duration,
    /// The place is the store of the job that this command is a rank of: nodes find each other
    /// there.
    pub is_agent_store: bool,
}

impl Meeting {
    pub fn of(args: &RunArgs) -> Result<Self, Failure> {
        let mut meeting = Self {
            place: Place::Alone,
            host: String::new(),
            port: 0,
            is_encrypted: false,
            store_port: 0,
            rank: None,
            join_timeout: JOIN_TIMEOUT_DEFAULT,
            last_call: LAST_CALL_DEFAULT,
            is_agent_store: false,
        };
        let backend = if args.standalone { "standalone" } else { args.rdzv_backend.as_str() };
        if backend == "static" {
            meeting.join_timeout = STATIC_TIMEOUT_DEFAULT;
        }
        let is_host = meeting.configure(&args.rdzv_conf, backend)?;
        say_passed_over(args, backend);
        if args.standalone && args.nnodes.max > 1 {
            return Err(Failure::Usage("--standalone is for one node; leave it out, or --nnodes".to_owned()));
        }
        let named = !args.rdzv_endpoint.is_empty();
        match args.rdzv_backend.as_str() {
            "muster" if !args.standalone => {
                let endpoint = if named { &args.rdzv_endpoint } else { "127.0.0.1:7070" };
                let encrypted = endpoint.strip_prefix("https://");
                meeting.is_encrypted = encrypted.is_some();
                (meeting.host, meeting.port) = host_and_port(encrypted.unwrap_or(endpoint), 7070)?;
                meeting.place = Place::Coordinator;
            }
            // Two runs on one machine must not want the same port, unless somebody says so.
            "static" if !args.standalone && args.nnodes.max == 1 => {
                meeting.store_port = args.master_port.unwrap_or(0);
            }
            "static" | "c10d" | "muster" if args.standalone || args.nnodes.max == 1 => {}
            "static" => {
                let port = args.master_port.unwrap_or(MASTER_PORT_DEFAULT);
                (meeting.host, meeting.port) = if named {
                    host_and_port(&args.rdzv_endpoint, port)?
                } else {
                    let host = args.master_addr.as_deref().unwrap_or("127.0.0.1");
                    if host.is_empty() {
                        return Err(Failure::Usage("--master-addr is empty; name the first node".to_owned()));
                    }
                    (host.trim_matches(['[', ']']).to_owned(), port)
                };
                let node_rank = args.node_rank.unwrap_or(0);
                if node_rank >= args.nnodes.max {
                    let (rank, nodes) = (node_rank, args.nnodes.max);
                    return Err(Failure::Usage(format!("--node-rank {rank} is not below --nnodes {nodes}")));
                }
                meeting.rank = Some(node_rank);
                meeting.place = Place::Peers(if node_rank == 0 { Serve::Yes } else { Serve::No });
            }
            "c10d" if named => {
                (meeting.host, meeting.port) = host_and_port(&args.rdzv_endpoint, PORT_DEFAULT)?;
                meeting.place = Place::Peers(match is_host {
                    Some(true) => Serve::Yes,
                    Some(false) => Serve::No,
                    None => Serve::IfHere,
                });
            }
            "c10d" => {
                let why = "--rdzv-backend c10d needs --rdzv-endpoint, the host:port of one of the nodes";
                return Err(Failure::Usage(why.to_owned()));
            }
            other => {
                let why = "is not known here; use static, c10d, or muster with the endpoint of a coordinator";
                return Err(Failure::Usage(format!("--rdzv-backend {other} {why}")));
            }
        }
        if meeting.place != Place::Alone && meeting.port == 0 {
            return Err(Failure::Usage("nodes cannot meet at port 0; name one".to_owned()));
        }
        let variable = |name: &str| std::env::var(name).ok();
        meeting.is_agent_store =
            matches!(meeting.place, Place::Peers(_)) && is_agent_store(&meeting.host, meeting.port, variable);
        Ok(meeting)
    }

    /// Reads --rdzv-conf. Whether it says that this node serves.
    fn configure(&mut self, conf: &str, backend: &str) -> Result<Option<bool>, Failure> {
        let mut is_host = None;
        // A launcher without a shell passes the quotes on that its user has written.
        let quoted = |quote: char| conf.trim().strip_prefix(quote)?.strip_suffix(quote);
        let conf = quoted('\'').or_else(|| quoted('"')).unwrap_or(conf);
        for pair in conf.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let bad = || Failure::Usage(format!("--rdzv-conf: {pair:?} is not understood"));
            let (key, value) = pair.split_once('=').ok_or_else(bad)?;
            match key.trim() {
                // There it is none of torchrun's times for nodes to come.
                "timeout" if backend == "c10d" => {
                    say!(
                        "muster run: --rdzv-conf timeout has no effect with c10d; join_timeout is the time to come"
                    );
                }
                key @ ("join_timeout" | "timeout" | "last_call_timeout") => {
                    let seconds: f64 = value.trim().parse().map_err(|_| bad())?;
                    let span = Duration::try_from_secs_f64(seconds).map_err(|_| bad())?;
                    let which =
                        if key == "last_call_timeout" { &mut self.last_call } else { &mut self.join_timeout };
                    *which = span;
                }
                "is_host" => {
                    is_host = Some(match value.trim().to_lowercase().as_str() {
                        "1" | "true" | "t" | "yes" | "y" => true,
                        "0" | "false" | "f" | "no" | "n" => false,
                        _ => return Err(bad()),
                    });
                }
                key => say!("muster run: --rdzv-conf {key} has no effect here"),
            }
        }
        Ok(is_host)
    }

    /// Whether ranks meet where nodes do. Under c10d the node that serves need not be the first, whose store is the ranks'.
    pub fn shares_port(&self) -> bool {
        self.rank.is_some() && !self.is_agent_store
    }

    /// The coordinator's.
    pub fn url(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let scheme = if self.is_encrypted { "https" } else { "http" };
        format!("{scheme}://{host}:{}", self.port)
    }
}

/// Whether this process is a rank of a job whose store serves at that place, as torch's clients see
/// it.
fn is_agent_store(host: &str, port: u16, variable: impl Fn(&str) -> Option<String>) -> bool {
    let is = |name: &str, expected: &str| {
        variable(name).is_some_and(|value| value.trim_matches(['[', ']']).eq_ignore_ascii_case(expected))
    };
    is("TORCHELASTIC_USE_AGENT_STORE", "True")
        && is("MASTER_ADDR", host)
        && is("MASTER_PORT", &port.to_string())
}

/// Says which flags of the rendezvous are for another backend.
fn say_passed_over(args: &RunArgs, backend: &str) {
    let is_static = backend == "static" || backend == "standalone";
    let given = [
        ("--node-rank", args.node_rank.is_some(), "nodes are numbered as they come"),
        ("--master-addr", args.master_addr.is_some(), "nodes meet at --rdzv-endpoint"),
        ("--master-port", args.master_port.is_some(), "the ranks' store takes a free port"),
    ];
    for (flag, _, why) in given.into_iter().filter(|(_, given, _)| *given && !is_static) {
        say!("muster run: {flag} has no effect with --rdzv-backend {backend}: {why}");
    }
}

fn host_and_port(endpoint: &str, default: u16) -> Result<(String, u16), Failure> {
    let endpoint = endpoint.trim();
    let bad = || Failure::Usage(format!("{:?} is not host:port", shown(endpoint)));
    if endpoint.contains('@') {
        return Err(Failure::Usage("--rdzv-endpoint names no user and no password".to_owned()));
    }
    if endpoint.starts_with("https://") {
        let why = "only a coordinator speaks TLS, with --rdzv-backend muster";
        return Err(Failure::Usage(format!("--rdzv-endpoint {endpoint}: {why}")));
    }
    let endpoint = endpoint.trim_start_matches("http://").trim_end_matches('/');
    let (host, port) = match endpoint.rsplit_once(':') {
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => (endpoint, None),
        Some((host, port)) if !endpoint.ends_with(']') => (host, Some(port)),
        _ => (endpoint, None),
    };
    let port = port.map_or(Ok(default), |port| port.parse().map_err(|_| bad()))?;
    let host = host.trim_matches(['[', ']']);
    if host.is_empty() { Err(bad()) } else { Ok((host.to_owned(), port)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;

    fn meeting(line: &str) -> Result<(Place, String, Option<u32>), String> {
        let words = ["muster", "run"].into_iter().chain(line.split_whitespace()).chain(["x"]);
        let Command::Run(args) = Args::try_parse_from(words).unwrap().command else { panic!("{line}") };
        match Meeting::of(&args) {
            Ok(meeting) => Ok((meeting.place, meeting.url(), meeting.rank)),
            Err(Failure::Usage(why)) => Err(why),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn nodes_meet_where_torchrun_s_would() {
        let c10d = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint";
        let muster = "--rdzv-backend muster";
        let peers = Place::Peers;
        let table = [
            ("", Place::Alone, "", None),
            ("--standalone --rdzv-backend c10d", Place::Alone, "", None),
            ("--rdzv-backend c10d --rdzv-endpoint h:1", Place::Alone, "", None),
            ("--nnodes 2", peers(Serve::Yes), "http://127.0.0.1:29500", Some(0)),
            ("--nnodes 2 --node-rank 1 --master-addr h", peers(Serve::No), "http://h:29500", Some(1)),
            ("--nnodes 2 --master-addr [::1] --master-port 7", peers(Serve::Yes), "http://[::1]:7", Some(0)),
            (&format!("{c10d} h"), peers(Serve::IfHere), "http://h:29400", None),
            (
                &format!("{c10d} h:7 --rdzv-conf is_host=true,join_timeout=3"),
                peers(Serve::Yes),
                "http://h:7",
                None,
            ),
            (
                &format!("{c10d} [fe80::1]:7 --rdzv-conf is_host=0"),
                peers(Serve::No),
                "http://[fe80::1]:7",
                None,
            ),
            (
                &format!("{c10d} h --rdzv-conf 'is_host=1,join_timeout=5,timeout=7'"),
                peers(Serve::Yes),
                "http://h:29400",
                None,
            ),
            (&format!("{c10d} fe80::1"), peers(Serve::IfHere), "http://[fe80::1]:29400", None),
            (muster, Place::Coordinator, "http://127.0.0.1:7070", None),
            (
                &format!("{muster} --rdzv-endpoint http://h:7/ --nnodes 1:4"),
                Place::Coordinator,
                "http://h:7",
                None,
            ),
            (&format!("{muster} --rdzv-endpoint https://h"), Place::Coordinator, "https://h:7070", None),
        ];
        for (line, place, url, rank) in table {
            let found = meeting(line).unwrap();
            assert_eq!((found.0, found.2), (place, rank), "{line}");
            assert!(place == Place::Alone || found.1 == url, "{line}: {}", found.1);
        }
    }

    #[test]
    fn the_store_of_the_own_job_is_known_by_its_variables() {
        let job = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "h1"), ("MASTER_PORT", "7")];
        let all = |name: &str| job.iter().find(|(known, _)| *known == name).map(|pair| pair.1.to_owned());
        assert!(is_agent_store("H1", 7, all));
        assert!(!is_agent_store("h1", 8, all));
        assert!(!is_agent_store("h2", 7, all));
        for (missing, _) in job {
            assert!(!is_agent_store("h1", 7, |name| all(name).filter(|_| name != missing)), "{missing}");
        }
    }

    #[test]
    fn times_are_those_of_the_backend() {
        let join = |line: &str| {
            let words = ["muster", "run", "--nnodes", "2"].into_iter().chain(line.split_whitespace());
            let args = Args::try_parse_from(words.chain(["x"])).unwrap();
            let Command::Run(args) = args.command else { panic!("{line}") };
            Meeting::of(&args).unwrap().join_timeout.as_secs()
        };
        let c10d = "--rdzv-backend c10d --rdzv-endpoint h";
        assert_eq!(join(""), 900);
        assert_eq!(join("--rdzv-conf timeout=7"), 7);
        assert_eq!(join(c10d), 600);
        assert_eq!(join(&format!("{c10d} --rdzv-conf timeout=7")), 600);
        assert_eq!(join(&format!("{c10d} --rdzv-conf join_timeout=5,timeout=7")), 5);
    }

    #[test]
    fn what_cannot_be_met_at_is_refused() {
        for (line, words) in [
            ("--nnodes 2 --rdzv-backend etcd", "use static, c10d, or muster"),
            ("--nnodes 2 --rdzv-backend c10d", "needs --rdzv-endpoint"),
            ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:0", "cannot meet at port 0"),
            ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint h:x", "is not host:port"),
            ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint https://h:7", "only a coordinator speaks TLS"),
            ("--nnodes 2 --node-rank 1 --master-addr=", "--master-addr is empty"),
            ("--nnodes 2 --node-rank 2", "is not below --nnodes 2"),
            ("--nnodes 2 --standalone", "is for one node"),
            ("--rdzv-conf join_timeout", "is not understood"),
            ("--rdzv-conf join_timeout=-1", "is not understood"),
        ] {
            let why = meeting(line).unwrap_err();
            assert!(why.contains(words), "{line}: {why}");
        }
    }
}
