//! Nodes come, are heard, fall silent and go: registration, sessions and leases.

use crate::bugs::{Bug, planted};
use crate::core::{Core, Timer};
use crate::effects::{Effects, Refusal, Reply, ToNode};
use crate::node::{Join, Node, NodeState};
use crate::types::{GangReport, Incarnation, Millis, NodeName, Session};

/// The first message of a session.
pub(crate) struct Hello {
    pub incarnation: Incarnation,
    pub gangs: Vec<GangReport>,
    pub leaving: Option<String>,
    pub number: u64,
}

impl Core {
    pub(crate) fn join(&mut self, now: Millis, join: Join, fx: &mut Effects) -> Result<Reply, Refusal> {
        let name = join.name.clone();
        match self.nodes.get_mut(&name) {
            None => {
                if self.nodes.len() >= self.config.nodes_max {
                    return Err(Refusal::TooManyNodes { nodes: self.nodes.len() });
                }
                self.fleet.add(&join.inventory);
                self.nodes.insert(name.clone(), Node::new(join, now));
                self.grant_lease(now, &name);
                fx.store_node(&name);
            }
            Some(node) => {
                let same = node.incarnation == join.incarnation;
                if !same {
                    check_takeover(now, node, &join)?;
                    node.leaving = None;
                    if let Some(older) = node.session.take() {
                        let why = "the daemon was started anew".to_owned();
                        fx.sends.push((name.clone(), older, ToNode::Close(why)));
                    }
                    let was_gone = matches!(node.state, NodeState::Lost | NodeState::Left);
                    // Its ranks are as they were until the new daemon says what is left of them.
                    self.set_node_state(now, &name, NodeState::Disconnected, fx);
                    // A lease that runs is left alone: a node that is heard and hears nothing may join for ever, and
                    // has long stopped its ranks.
                    if was_gone {
                        self.grant_lease(now, &name);
                    }
                }
                let Some(node) = self.nodes.get_mut(&name) else { return Err(Refusal::NotJoined(name)) };
                // Written only if something differs: ten thousand nodes that reconnect cost no write.
                if !same || node.address != join.address || *node.inventory != join.inventory {
                    if !same {
                        node.hello = 0;
                    }
                    node.incarnation = join.incarnation;
                    node.boot_id = join.boot_id;
                    node.data_id = join.data_id;
                    node.address = join.address;
                    fx.store_node(&name);
                    self.room.appear();
                    self.set_inventory(&name, join.inventory, fx);
                }
            }
        }
        let node = &self.nodes[&name];
        Ok(Reply::Node(Box::new(node.clone())))
    }

    pub(crate) fn hello(
        &mut self,
        now: Millis,
        name: &NodeName,
        hello: Hello,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let Hello { incarnation, gangs, leaving, number } = hello;
        let Some(node) = self.nodes.get_mut(name).filter(|node| node.incarnation == incarnation) else {
            return Err(Refusal::NotJoined(name.clone()));
        };
        let late = number > 0 && number <= node.hello;
        if late && !planted(Bug::LateHelloCounts) {
            return Err(Refusal::LateHello(name.clone()));
        }
        node.hello = number;
        if let Some(older) = node.session.take() {
            fx.sends.push((name.clone(), older, ToNode::Close("a newer session was opened".to_owned())));
        }
        self.meta.sessions += 1;
        fx.meta_changed = true;
        let session = Session(self.meta.sessions);
        node.session = Some(session);
        node.leaving = None;
        self.grant_lease(now, name);
        self.set_node_state(now, name, NodeState::Ready, fx);
        self.room.appear();
        self.observe_leftovers(now, name, &gangs, fx);
        self.observe_all(now, name, &gangs, fx);
        if let Some(reason) = leaving {
            self.leaving(now, name, reason, fx);
        }
        let jobs = &self.nodes[name].reserved.jobs;
        let wanted = jobs.iter().filter_map(|(id, rank)| self.jobs.get(id)?.assignment(*rank));
        let assignments = wanted.chain(self.leftover_assignments(name)).collect();
        // What the reports just caused is already in the assignments.
        fx.sends.retain(|(node, at, _)| !(node == name && *at == session));
        fx.sends.push((name.clone(), session, ToNode::Welcome(assignments)));
        Ok(Reply::Session(session))
    }

    /// Returns whether a node's session is this one.
    pub fn has_session(&self, name: &NodeName, session: Session) -> bool {
        self.nodes.get(name).is_some_and(|node| node.session == Some(session))
    }

    /// Makes a node's lease last from when it was heard on its session.
    pub(crate) fn renew(&mut self, heard: Millis, name: &NodeName, session: Session) {
        let lasts = heard.plus(self.config.lease);
        let node = self.nodes.get_mut(name).filter(|node| node.session == Some(session));
        // The timer that is set looks at this when it fires: a heartbeat costs no timer.
        if let Some(node) = node.filter(|_| !planted(Bug::LeaseNotRenewed)) {
            node.lease_expires = node.lease_expires.max(lasts);
        }
    }

    pub(crate) fn renew_all(&mut self, now: Millis) {
        for node in self.nodes.values_mut() {
            node.lease_expires = node.lease_expires.max(now.plus(self.config.lease));
        }
    }

    fn grant_lease(&mut self, now: Millis, name: &NodeName) {
        if let Some(node) = self.nodes.get_mut(name) {
            // An older session may have been heard since.
            node.lease_expires = node.lease_expires.max(now.plus(self.config.lease));
            self.timers.insert((node.lease_expires, Timer::Lease(name.clone())));
        }
    }

    pub(crate) fn set_node_state(
        &mut self,
        now: Millis,
        name: &NodeName,
        state: NodeState,
        fx: &mut Effects,
    ) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if state != NodeState::Ready {
            node.session = None;
        }
        if node.state != state {
            (node.state, node.changed) = (state, now);
            fx.show_node(name);
        }
    }

    /// The node's ranks are gone for good: it said so, or its lease ended.
    pub(crate) fn node_gone(&mut self, now: Millis, name: &NodeName, state: NodeState, fx: &mut Effects) {
        self.set_node_state(now, name, state, fx);
        self.gangs_gone(now, name, state, fx);
        self.timers.insert((now.plus(self.config.node_memory), Timer::ForgetNode(name.clone())));
    }

    pub(crate) fn lease_timer(&mut self, now: Millis, name: &NodeName, fx: &mut Effects) {
        let Some(node) = self.nodes.get(name) else { return };
        match node.state {
            NodeState::Lost | NodeState::Left => {}
            NodeState::Ready | NodeState::Disconnected if node.lease_expires > now => {
                self.timers.insert((node.lease_expires, Timer::Lease(name.clone())));
            }
            NodeState::Ready | NodeState::Disconnected => {
                if let Some(session) = node.session {
                    let why = "the lease ended without a heartbeat".to_owned();
                    fx.sends.push((name.clone(), session, ToNode::Close(why)));
                }
                self.node_gone(now, name, NodeState::Lost, fx);
            }
        }
    }

    pub(crate) fn forget_node(&mut self, now: Millis, name: &NodeName, fx: &mut Effects) {
        let Some(node) = self.nodes.get(name) else { return };
        let gone = matches!(node.state, NodeState::Lost | NodeState::Left);
        if gone && node.reserved.jobs.is_empty() && now.since(node.changed) >= self.config.node_memory {
            self.fleet.remove(&node.inventory);
            self.nodes.remove(name);
            fx.stored_nodes.insert(name.clone());
        }
    }
}

/// Whether a daemon may take the name of another that may still run. It may once the lease has ended, and before only
/// with proof that nothing of the other is left but what the new one knows of.
fn check_takeover(now: Millis, node: &Node, join: &Join) -> Result<(), Refusal> {
    if matches!(node.state, NodeState::Lost | NodeState::Left) || planted(Bug::TakeoverWithoutProof) {
        return Ok(());
    }
    // One daemon at a time uses a data directory, and it finds there whatever an earlier one has running. On the
    // same machine (the same boot, or the same address after a reboot, which ends everything) that is all there is.
    let same_dir = !join.data_id.is_empty() && join.data_id == node.data_id;
    if same_dir && (join.boot_id == node.boot_id || join.address == node.address) {
        return Ok(());
    }
    match node.state {
        NodeState::Ready => Err(Refusal::NameHeld(node.name.clone())),
        NodeState::Disconnected | NodeState::Lost | NodeState::Left => {
            Err(Refusal::LeaseHeld { node: node.name.clone(), millis: node.lease_expires.since(now).0 })
        }
    }
}
