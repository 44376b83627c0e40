//! The table of nodes and slots. Knows no lock and no answer of a node, but its lines.

use std::sync::Arc;

use hashbrown::HashMap;
use tokio::time::Instant;

use super::{MEMBERS_MAX, NOWHERE, NewMember, SLOTS, line::NodeLine};
use crate::{
    bus::{
        deliver::Slots,
        publish::{Keep, Publish},
    },
    redis::{
        address::RedisEndpoint,
        node::{Node, Target},
    },
};

/// The nodes and the slots.
pub(super) struct Table {
    /// The first one is no server: in its queue wait the publishes of slots that no node serves. Others have their place
    /// for ever.
    pub(super) members: Vec<Member>,
    /// By their numbers.
    pub(super) slots: Vec<Slot>,
    /// Times at which a node told another owner of a slot than was known.
    pub(super) moves: HashMap<u16, Instant>,
    /// Place of the node at which the instance subscribes.
    pub(super) home: usize,
    /// Slots whose node has left the Cluster.
    pub(super) orphans: Slots,
    /// Slots whose earlier node failed: its last messages may be lost.
    pub(super) failed_over: Slots,
}

/// A node.
pub(super) struct Member {
    pub(super) id: String,
    pub(super) endpoint: Option<Arc<RedisEndpoint>>,
    /// Its other address, by name or by number.
    pub(super) alias: Option<RedisEndpoint>,
    pub(super) node: Arc<Node>,
    pub(super) is_master: bool,
    pub(super) is_failed: bool,
    /// Set while some node names this one.
    pub(super) is_present: bool,
    /// Number of its slots.
    pub(super) slots: usize,
}

/// A slot.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    /// Place of the node that serves the slot; [`NOWHERE`] if none does.
    pub(super) owner: u16,
    /// Place of the node in whose queue the slot's publishes wait. Becomes the owner by [`Cluster::hand_over`].
    pub(super) route: u16,
    /// Number of the configuration that made the owner one.
    pub(super) epoch: u64,
}

impl Table {
    /// Returns the place of a node, which is new if the node or its address is.
    pub(super) fn place(&mut self, line: &NodeLine, publish_queue_bytes: usize) -> Option<u16> {
        let endpoint = line.endpoint.as_ref();
        let known =
            self.members.iter().position(|member| member.is_present && member.id == line.id);
        if let Some(known) = known {
            let member = &mut self.members[known];
            if endpoint.is_none_or(|endpoint| member.endpoint.as_deref() == Some(endpoint)) {
                return u16::try_from(known).ok();
            }
            // The node has moved to another address.
            member.is_present = false;
            member.node.removed.cancel();
        }
        let place = u16::try_from(self.members.len()).ok().filter(|place| *place < MEMBERS_MAX)?;
        let endpoint = Arc::new(endpoint?.clone());
        let node =
            Node::new(Target::Node(endpoint.clone()), usize::from(place), publish_queue_bytes);
        self.members.push(Member {
            id: line.id.clone(),
            endpoint: Some(endpoint),
            alias: line.alias.clone(),
            node: Arc::new(node),
            is_master: line.is_master,
            is_failed: line.is_failed,
            is_present: true,
            slots: 0,
        });
        if let Some(known) = known {
            for slot in self.slots_at(known) {
                self.give(slot, place, self.slots[usize::from(slot)].epoch);
            }
        }
        Some(place)
    }

    /// Returns the member in whose queue a publish waits. A plain one needs no slot: another node takes it while the one of
    /// its channel is away.
    pub(super) fn member_for(&self, publish: &Publish, slot: u16) -> &Member {
        let member = &self.members[usize::from(self.slots[usize::from(slot)].route)];
        let is_away = member.endpoint.is_none() || member.node.publishes.link.is_away();
        if !is_away || !matches!(publish.keep, Keep::Nothing) {
            return member;
        }
        let is_up = |other: &&Member| other.slots > 0 && other.node.publishes.link.is_up();
        self.members.iter().skip(1).find(is_up).unwrap_or(member)
    }

    /// Returns the slots that a node serves.
    pub(super) fn slots_at(&self, place: usize) -> Vec<u16> {
        let is_owned = |slot: &u16| usize::from(self.slots[usize::from(*slot)].owner) == place;
        (0..SLOTS as u16).filter(is_owned).collect()
    }

    pub(super) fn give(&mut self, slot: u16, place: u16, epoch: u64) {
        let entry = &mut self.slots[usize::from(slot)];
        let old = std::mem::replace(&mut entry.owner, place);
        entry.epoch = epoch;
        self.members[usize::from(old)].slots -= 1;
        self.members[usize::from(place)].slots += 1;
    }

    /// Returns the nodes in whose queues publishes of other nodes' slots wait.
    pub(super) fn rerouted(&self) -> Vec<Arc<Node>> {
        let mut places: Vec<_> = self
            .slots
            .iter()
            .filter(|slot| slot.route != slot.owner && slot.owner != NOWHERE)
            .map(|slot| slot.route)
            .collect();
        places.sort_unstable();
        places.dedup();
        places.into_iter().map(|place| self.members[usize::from(place)].node.clone()).collect()
    }

    /// Returns the members that lack a pipeline; they count as started.
    pub(super) fn starting(&self) -> Vec<NewMember> {
        let present = self.members.iter().filter(|member| member.is_present);
        let new = present.map(|member| NewMember {
            commands: member.node.commands.start(),
            publishes: (member.is_master || member.slots > 0) && member.node.publishes.start(),
            node: member.node.clone(),
        });
        new.filter(|new| new.publishes || new.commands).collect()
    }
}

impl Member {
    pub(super) fn is_away(&self) -> bool {
        !self.is_present || self.is_failed || !self.node.publishes.link.is_up()
    }
}
