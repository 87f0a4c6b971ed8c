//! Checks before a launch that the gang's first node can be reached at the address that its ranks
//! are told. Otherwise they would wait for half an hour.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use muster_core::types::Assignment;

use crate::devices::network::source_towards;

/// Time for a connection on loopback: the kernel itself answers.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Returns, as an error in words, why ranks here cannot reach their store at `port` of the first
/// node.
pub(crate) fn check(assignment: &Assignment, port: u16) -> Result<(), String> {
    if assignment.placement.group_rank == 0 {
        return Ok(());
    }
    let (first, own) = (assignment.master_addr, assignment.placement.address);
    if let Err(error) = source_towards(first) {
        return Err(format!(
            "the first node's address is {first}, to which this node ({own}) has no way: {error}; start both daemons with \
             --address and addresses that reach each other, of one family"
        ));
    }
    if first.is_loopback() && !is_served(first, port) {
        return Err(format!(
            "the first node's address is {first}, which is loopback and means this node here: it has called its coordinator by \
             loopback; start its daemon with --address, or name the coordinator there as the other nodes do"
        ));
    }
    Ok(())
}

fn is_served(address: IpAddr, port: u16) -> bool {
    TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_MAX).is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use muster_core::types::{
        DesiredPhase, GangId, Generation, JobId, JobSpec, Millis, NodeName, NodePlacement, Rank, StopMode,
        StopSignal,
    };

    use super::*;

    fn assignment(group_rank: u32, first: &str) -> Assignment {
        Assignment {
            gang: GangId { job: JobId::new("k3v9x2ma").unwrap(), generation: Generation(1) },
            phase: DesiredPhase::Running,
            spec: JobSpec::new(vec!["train".into()]),
            placement: NodePlacement {
                node: NodeName::new("n1").unwrap(),
                address: [10, 0, 0, 7].into(),
                group_rank,
                first_rank: Rank(group_rank),
                procs: 1,
                gpus: Vec::new(),
            },
            world_size: 2,
            group_world_size: 2,
            master_addr: first.parse().unwrap(),
            master_port: None,
            restart_count: 0,
            stop: StopMode { signal: StopSignal::default(), grace: Millis(0), dump_stacks: false },
        }
    }

    #[test]
    fn a_loopback_address_is_the_first_nodes_only_where_its_store_serves() {
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = store.local_addr().unwrap().port();
        check(&assignment(1, "127.0.0.1"), port).unwrap();
        drop(store);
        let why = check(&assignment(1, "127.0.0.1"), port).unwrap_err();
        assert!(why.contains("is 127.0.0.1, which is loopback") && why.contains("--address"), "{why}");
        check(&assignment(0, "127.0.0.1"), port).unwrap();
    }
}
