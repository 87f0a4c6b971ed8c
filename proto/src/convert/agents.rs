//! What agents say that Muster did not start, and what they are told.

use std::net::{IpAddr, SocketAddr};

use muster_core::agents::{Hello, Place, Said, Spec, Tell};
use muster_core::types::{Incarnation, Millis, NodeName, RequestId, limits};

use super::time::span_from_wire;
use super::{FieldError, field_error, required};
use crate::v1;
use crate::v1::rendezvous_service_join_request::Message as Request;
use crate::v1::rendezvous_service_join_response::Message as Response;

/// Longest failure that is told to others; the rest of a longer one is left out.
const FAILURE_BYTES_MAX: usize = 2048;

fn at(prefix: &str, address: &str, port: u32) -> Result<SocketAddr, FieldError> {
    let ip: IpAddr = super::gang::address(&format!("{prefix}address"), address)?;
    match u16::try_from(port) {
        Ok(port @ 1..) => Ok(SocketAddr::new(ip, port)),
        _ => Err(field_error(&format!("{prefix}port"), format!("{port} is not a port"))),
    }
}

/// Checks the first message of a stream.
pub fn agent_hello_from_wire(wire: v1::AgentHello) -> Result<Hello, FieldError> {
    let (min, max) = (wire.min_agents, wire.max_agents);
    if min == 0 || max < min || max > limits::NODES_MAX {
        let most = limits::NODES_MAX;
        let why = format!("{max} and min_agents {min}: they must be 1 <= min <= max <= {most}");
        return Err(field_error("hello.max_agents", why));
    }
    let last_call = span_from_wire("hello.last_call", wire.last_call.as_ref(), Millis(0))?;
    Ok(Hello {
        run: RequestId::new(wire.run_id).map_err(|why| field_error("hello.run_id", why))?,
        agent: Incarnation::new(wire.agent_id).map_err(|why| field_error("hello.agent_id", why))?,
        node: NodeName::new(wire.node_name).map_err(|why| field_error("hello.node_name", why))?,
        spec: Spec { min, max, last_call },
        held: wire.held.map(|held| place_from_wire(&held)).transpose()?,
    })
}

fn place_from_wire(wire: &v1::AgentPlace) -> Result<Place, FieldError> {
    let size = wire.world_size;
    if wire.round == 0 || size > limits::NODES_MAX || wire.rank >= size || wire.store_rank >= size {
        return Err(field_error("hello.held", "is no place in any round"));
    }
    Ok(Place {
        round: wire.round,
        rank: wire.rank,
        world_size: size,
        store_rank: wire.store_rank,
        store: at("hello.held.store_", &wire.store_address, wire.store_port)?,
    })
}

/// Checks a later message. None is one that a newer version knows.
pub fn agent_said_from_wire(wire: v1::RendezvousServiceJoinRequest) -> Result<Option<Said>, FieldError> {
    Ok(match wire.message {
        None => None,
        Some(Request::Enter(enter)) => Some(Said::Enter(at("enter.", &enter.address, enter.port)?)),
        Some(Request::Leave(leave)) => {
            let mut failure = leave.failure;
            failure.truncate(failure.floor_char_boundary(FAILURE_BYTES_MAX));
            Some(Said::Leave(failure))
        }
        Some(Request::Hello(_)) => return Err(field_error("message", "hello comes once, at the start")),
    })
}

/// Takes hello out of the first message of a stream.
pub fn agent_first_from_wire(wire: Option<v1::RendezvousServiceJoinRequest>) -> Result<Hello, FieldError> {
    match wire.and_then(|wire| wire.message) {
        Some(Request::Hello(hello)) => agent_hello_from_wire(hello),
        other => {
            required("message", other)?;
            Err(field_error("message", "of a stream must be hello first"))
        }
    }
}

/// What an agent is told.
pub fn agent_tell_to_wire(tell: Tell) -> v1::RendezvousServiceJoinResponse {
    let message = match tell {
        Tell::Waiting(reason) => Response::Waiting(v1::AgentWaiting { reason }),
        Tell::Place(place) => Response::Place(place_to_wire(place)),
        Tell::Recall(reason) => Response::Recall(v1::AgentRecall { reason }),
        Tell::Closed(failure) => Response::Closed(v1::AgentClosed { failure }),
    };
    v1::RendezvousServiceJoinResponse { message: Some(message) }
}

fn place_to_wire(place: Place) -> v1::AgentPlace {
    v1::AgentPlace {
        round: place.round,
        rank: place.rank,
        world_size: place.world_size,
        store_rank: place.store_rank,
        store_address: place.store.ip().to_string(),
        store_port: place.store.port().into(),
    }
}

/// The first message, as agents send it.
#[cfg(any(test, fuzzing))]
pub(crate) fn agent_hello_to_wire(hello: &Hello) -> v1::AgentHello {
    v1::AgentHello {
        run_id: hello.run.to_string(),
        agent_id: hello.agent.to_string(),
        node_name: hello.node.to_string(),
        min_agents: hello.spec.min,
        max_agents: hello.spec.max,
        last_call: Some(super::duration_to_wire(hello.spec.last_call)),
        held: hello.held.map(place_to_wire),
    }
}
