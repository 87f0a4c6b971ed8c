//! What goes down to the nodes.

use muster_core::types::{NodeName, Session};
use muster_core::{Input, ToNode};
use muster_proto::{convert, v1};
use tonic::Status;
use tracing::warn;

use super::Driver;

impl Driver {
    pub(super) fn send(&mut self, node: &NodeName, session: Session, what: ToNode) {
        let Some(link) = self.links.get(node).filter(|link| link.session == session) else { return };
        match &what {
            ToNode::Welcome(assignments) => assignments.iter().for_each(|one| link.assigned(one)),
            ToNode::Assign(assignment) => link.assigned(assignment),
            ToNode::Close(_) => {}
        }
        let message = match what {
            ToNode::Welcome(assignments) => v1::session_response::Message::Welcome(v1::Welcome {
                session: session.0,
                assignments: assignments.iter().map(convert::assignment_to_wire).collect(),
            }),
            ToNode::Assign(assignment) => {
                v1::session_response::Message::Assignment(convert::assignment_to_wire(&assignment))
            }
            ToNode::Close(why) => {
                warn!(%node, %session, %why, "session closed");
                self.links.remove(node, session);
                link.close(Status::aborted(why));
                return;
            }
        };
        if !link.send(message) {
            // The whole desired state goes out again when the node opens its next session.
            warn!(%node, %session, "node does not keep up; its session is closed");
            self.monitor.too_slow("session");
            self.settle(node, link.pulse.end());
            self.links.remove(node, session);
            link.close(Status::resource_exhausted("too many messages wait for this node; connect again"));
            self.step(Input::Disconnected { node: node.clone(), session }, None);
        }
    }
}
