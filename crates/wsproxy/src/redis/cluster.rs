//! The nodes of a Redis Cluster and the slots that they serve, as this instance knows them now.
//!
//! A publish waits in the queue of the node that serves its slot. When a slot gets another node, its queued publishes go
//! there before any later one ([`Cluster::hand_over`]), so that the messages of a channel keep their order.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::RwLock;
use tokio::{sync::Notify, time::Instant};
use wsproxy_proto::names;

pub(super) use commands::unserved;

use crate::{
    bus::{
        deliver::Slots,
        publish::{Keep, Outcome, Publish},
    },
    queue::Back,
    redis::{
        address::RedisEndpoint,
        cluster::{line::NodeLine, receivers::Receivers, redirect::Redirect},
        node::{Node, Target},
        pipeline::PipelineRequest,
        topology::Topology,
    },
};

pub(super) mod commands;
pub(super) mod follow;
pub(super) mod line;
pub(super) mod receivers;
pub(super) mod redirect;

/// A Cluster.
pub(super) struct Cluster {
    seeds: Vec<RedisEndpoint>,
    publish_queue_bytes: usize,
    /// Never held over an await. Held for writing only while slots change.
    table: RwLock<Table>,
    doubted: Notify,
    failed_over: Notify,
    pub(super) receivers: Receivers,
}

struct Table {
    /// The first one is no server: in its queue wait the publishes of slots that no node serves. Others have their place
    /// for ever.
    members: Vec<Member>,
    /// By their numbers.
    slots: Vec<Slot>,
    /// Times at which a node told another owner of a slot than was known.
    moves: HashMap<u16, Instant>,
    /// Place of the node at which the instance subscribes.
    home: usize,
    /// Slots whose earlier node failed: its last messages may be lost.
    failed_over: Slots,
}

struct Member {
    id: String,
    endpoint: Option<Arc<RedisEndpoint>>,
    node: Arc<Node>,
    is_master: bool,
    is_failed: bool,
    /// Set while some node names this one.
    is_present: bool,
    /// Number of its slots.
    slots: usize,
}

#[derive(Clone, Copy)]
struct Slot {
    /// Place of the node that serves the slot; [`NOWHERE`] if none does.
    owner: u16,
    /// Place of the node in whose queue the slot's publishes wait. Becomes the owner by [`Cluster::hand_over`].
    route: u16,
    /// Number of the configuration that made the owner one.
    epoch: u64,
}

/// Members that are new, and the pipelines that they need.
pub(super) struct NewMember {
    pub(super) node: Arc<Node>,
    pub(super) publishes: bool,
    pub(super) commands: bool,
}

impl Cluster {
    /// Creates a Cluster of which only some nodes are known, by their addresses.
    pub(super) fn new(seeds: Vec<RedisEndpoint>, publish_queue_bytes: usize) -> Self {
        let nowhere = Member {
            id: String::new(),
            endpoint: None,
            node: Arc::new(Node::new(Target::Named, 0, publish_queue_bytes)),
            is_master: false,
            is_failed: true,
            is_present: false,
            slots: SLOTS,
        };
        let slot = Slot { owner: NOWHERE, route: NOWHERE, epoch: 0 };
        let table = Table {
            members: vec![nowhere],
            slots: vec![slot; SLOTS],
            moves: HashMap::new(),
            home: usize::from(NOWHERE),
            failed_over: Slots::default(),
        };
        Self {
            seeds,
            publish_queue_bytes,
            table: RwLock::new(table),
            doubted: Notify::new(),
            failed_over: Notify::new(),
            receivers: Receivers::default(),
        }
    }

    /// Puts a publish into the queue of the node that serves its slot.
    pub(super) fn publish(&self, publish: Publish) -> Result<(), (Back, Publish)> {
        let slot = slot_of(&publish);
        let bytes = publish.queued_bytes();
        let table = self.table.read();
        let route = usize::from(table.slots[usize::from(slot)].route);
        table.members[route].node.publishes.queue.push(publish, bytes)
    }

    /// Returns `Pending` while the queue of a node that can be reached is full. The messages for others must not wait for
    /// a node that is away.
    pub(super) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let table = self.table.read();
        let mut reached = table.members.iter().map(|member| &member.node.publishes);
        let is_full = reached
            .any(|pipeline| pipeline.link.is_up() && pipeline.queue.poll_open(cx).is_pending());
        if is_full { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Moves the queued publishes of a node's slots to the nodes that serve the slots now; `first` were taken from the
    /// queue before. Call it only while no publish of the node waits for an answer.
    pub(super) fn hand_over(
        &self,
        from: &Node,
        first: impl Iterator<Item = Publish>,
    ) -> Vec<Publish> {
        let mut table = self.table.write();
        for slot in &mut table.slots {
            let is_known = slot.owner != NOWHERE || from.removed.is_cancelled();
            if usize::from(slot.route) == from.number && is_known {
                slot.route = slot.owner;
            }
        }
        let mut queued = Vec::new();
        from.publishes.queue.take(usize::MAX, usize::MAX, &mut queued);
        let first = first.map(PipelineRequest::Publish);
        let mut homeless = Vec::new();
        for request in first.chain(queued) {
            let route = match &request {
                PipelineRequest::Publish(publish) => {
                    table.slots[usize::from(slot_of(publish))].route
                }
                // The slot is on its way to this node.
                _ => from.number as u16,
            };
            homeless.extend(table.members[usize::from(route)].node.take_over(request));
        }
        homeless
    }

    /// Sends a publish on to the node that serves its slot, ahead of those that wait at the earlier node.
    fn forward(&self, publish: Publish, to: u16) -> Result<(), Publish> {
        let node = self.table.read().members[usize::from(to)].node.clone();
        node.take_over(PipelineRequest::Publish(publish)).map_or(Ok(()), Err)
    }

    /// Takes the answer that a node has given to a publish in place of doing it. Returns the publish if it must be tried
    /// again soon; gives it to another node otherwise.
    pub(super) fn redirected(
        &self,
        publish: Publish,
        redirect: &Redirect,
        at: &Node,
    ) -> Result<(), Publish> {
        match redirect {
            Redirect::Moved { slot, to } => match self.moved(*slot, to) {
                Some(place) if usize::from(place) != at.number => self.forward(publish, place),
                _ => Err(publish),
            },
            Redirect::Ask(to) => match self.place_of(to) {
                Some(place) => {
                    let node = self.table.read().members[usize::from(place)].node.clone();
                    node.take_over(PipelineRequest::Asking(publish)).map_or(Ok(()), Err)
                }
                None => Err(publish),
            },
            Redirect::Wait => {
                self.doubt();
                Err(publish)
            }
        }
    }

    /// Notes the node that serves a slot, as another node tells. Returns its place; `None` if it is not known, or if the
    /// nodes contradict each other, so that the caller must wait.
    pub(super) fn moved(&self, slot: u16, to: &RedisEndpoint) -> Option<u16> {
        let Some(place) = self.place_of(to) else {
            self.doubt();
            return None;
        };
        let from = {
            let mut table = self.table.write();
            let entry = table.slots[usize::from(slot)];
            if entry.owner == place {
                return Some(place);
            }
            let now = Instant::now();
            if table.moves.get(&slot).is_some_and(|at| now.duration_since(*at) < CONTRADICTION) {
                return None;
            }
            table.moves.insert(slot, now);
            table.give(slot, place, entry.epoch);
            table.members[usize::from(entry.route)].node.clone()
        };
        from.publishes.reroute();
        self.doubt();
        Some(place)
    }

    /// Has the nodes asked again.
    pub(super) fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Returns the node that serves a slot.
    pub(super) fn owner(&self, slot: u16) -> Option<Arc<Node>> {
        let table = self.table.read();
        let owner = table.slots[usize::from(slot)].owner;
        (owner != NOWHERE).then(|| table.members[usize::from(owner)].node.clone())
    }

    /// Returns the node at an address.
    pub(super) fn node_at(&self, endpoint: &RedisEndpoint) -> Option<Arc<Node>> {
        let place = self.place_of(endpoint)?;
        Some(self.table.read().members[usize::from(place)].node.clone())
    }

    fn place_of(&self, endpoint: &RedisEndpoint) -> Option<u16> {
        let table = self.table.read();
        let found = table
            .members
            .iter()
            .position(|member| member.is_present && member.endpoint.as_deref() == Some(endpoint));
        found.and_then(|place| u16::try_from(place).ok())
    }

    /// Returns the node with a number.
    pub(super) fn node(&self, number: usize) -> Option<Arc<Node>> {
        self.table.read().members.get(number).map(|member| member.node.clone())
    }

    /// Returns the nodes, masters and replicas.
    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        let table = self.table.read();
        let present = table.members.iter().filter(|member| member.is_present);
        present.map(|member| member.node.clone()).collect()
    }

    /// Returns the nodes that have not failed.
    pub(super) fn living(&self) -> Vec<Arc<Node>> {
        let table = self.table.read();
        let living = table.members.iter().filter(|member| member.is_present && !member.is_failed);
        living.map(|member| member.node.clone()).collect()
    }

    /// Returns the nodes that serve slots.
    pub(super) fn masters(&self) -> Vec<Arc<Node>> {
        let table = self.table.read();
        let masters = table.members.iter().skip(1).filter(|member| member.slots > 0);
        masters.map(|member| member.node.clone()).collect()
    }

    /// Returns a key that a node serves, made from `stem`; `None` if the node has few slots or none.
    pub(super) fn key_at(&self, stem: &str, node: &Node) -> Option<Arc<str>> {
        let table = self.table.read();
        let slots = table.members.get(node.number)?.slots;
        let is_there = |key: &String| {
            usize::from(table.slots[usize::from(names::slot(key.as_bytes()))].owner) == node.number
        };
        let mut keys =
            (0..KEYS_TRIED).filter(|_| slots > 0).map(|number| format!("{stem}:{number}"));
        keys.find(is_there).map(Arc::from)
    }

    /// Returns a slot of some node whose connection is up.
    fn slot_that_is_up(&self) -> u16 {
        let table = self.table.read();
        let is_up = |slot: &Slot| table.members[usize::from(slot.owner)].node.commands.link.is_up();
        table.slots.iter().position(is_up).unwrap_or_default() as u16
    }

    /// Returns the queue of publishes without a node.
    pub(super) fn nowhere(&self) -> Arc<Node> {
        self.table.read().members[0].node.clone()
    }

    /// Returns the part of the slots that is away, for operators; `None` while every slot is served.
    pub(super) fn away(&self) -> Option<String> {
        let table = self.table.read();
        let is_away: Vec<_> = table.members.iter().map(Member::is_away).collect();
        if !is_away.iter().zip(&table.members).any(|(away, member)| *away && member.slots > 0) {
            return None;
        }
        let away = |slot: &Slot| is_away[usize::from(slot.owner)];
        let mut told = String::from("slots");
        let mut slot = 0;
        while slot < SLOTS && told.len() < TOLD_BYTES {
            let Some(first) = table.slots[slot..].iter().position(away).map(|at| slot + at) else {
                break;
            };
            let owner = table.slots[first].owner;
            let more = table.slots[first..].iter().take_while(|slot| slot.owner == owner).count();
            let place = table.members[usize::from(owner)].endpoint.as_ref();
            let place = place.map_or_else(|| "no node".to_owned(), |endpoint| endpoint.to_string());
            told.push_str(&format!(" {first}-{} ({place})", first + more - 1));
            slot = first + more;
        }
        told.push_str(" are away");
        Some(told)
    }

    /// Names another node at which the instance subscribes than `not`, or than one that has failed.
    pub(super) fn find_home(&self, topology: &Topology, not: Option<&RedisEndpoint>) {
        let mut table = self.table.write();
        let home = &table.members[table.home];
        let is_good = home.is_present && !home.is_failed && home.endpoint.as_deref() != not;
        if is_good && table.home != usize::from(NOWHERE) {
            return;
        }
        let good = table.members.iter().enumerate().filter(|(place, member)| {
            *place != table.home
                && member.is_present
                && !member.is_failed
                && member.endpoint.is_some()
        });
        let good: Vec<_> = good.map(|(place, _)| place).collect();
        if good.is_empty() {
            return;
        }
        table.home = good[rand::random_range(0..good.len())];
        topology.name(table.members[table.home].endpoint.clone());
    }

    /// Takes the answer of a node. Returns the members whose connections are to be made.
    pub(super) fn learn(&self, lines: &[NodeLine]) -> Vec<NewMember> {
        let mut table = self.table.write();
        let present = table.members.iter().filter(|member| member.is_present).count();
        if lines.len() * 2 < present {
            // A node that was reset knows itself alone.
            return Vec::new();
        }
        let mut has_failed_over = false;
        let mut named = Vec::with_capacity(lines.len());
        for line in lines {
            let Some(place) = table.place(line, self.publish_queue_bytes) else { continue };
            let member = &mut table.members[usize::from(place)];
            (member.is_master, member.is_failed) = (line.is_master, line.is_failed);
            named.push((line, place));
        }
        for (line, place) in named {
            for slot in line.slots.iter().cloned().flatten() {
                let Slot { owner, epoch, .. } = table.slots[usize::from(slot)];
                let is_newer = line.epoch > epoch && !line.is_failed;
                if owner != NOWHERE && !is_newer {
                    continue;
                }
                let old = &table.members[usize::from(owner)];
                if owner != NOWHERE && (old.is_failed || !old.is_master) {
                    has_failed_over = true;
                    table.failed_over.insert(slot);
                }
                table.give(slot, place, line.epoch);
            }
        }
        let rerouted = table.rerouted();
        let new = table.starting();
        drop(table);
        rerouted.iter().for_each(|node| node.publishes.reroute());
        rerouted.iter().for_each(|node| node.commands.reroute());
        if has_failed_over {
            self.failed_over.notify_one();
        }
        new
    }

    /// Resolves once another node has slots of one that failed, with these slots.
    pub(super) async fn failed_over(&self) -> Slots {
        self.failed_over.notified().await;
        std::mem::take(&mut self.table.write().failed_over)
    }

    /// Returns the slots of the nodes with these ids.
    pub(super) fn slots_of(&self, ids: &[Vec<u8>]) -> Slots {
        let table = self.table.read();
        let mut slots = Slots::default();
        for slot in 0..SLOTS as u16 {
            let owner = &table.members[usize::from(table.slots[usize::from(slot)].owner)];
            if ids.iter().any(|id| *id == owner.id.as_bytes()) {
                slots.insert(slot);
            }
        }
        slots
    }

    /// Forgets the nodes that no answer of a whole round names.
    pub(super) fn forget_others(&self, named: &hashbrown::HashSet<String>) {
        let mut table = self.table.write();
        for place in 1..table.members.len() {
            let member = &mut table.members[place];
            if member.is_present && !named.contains(&member.id) {
                member.is_present = false;
                member.node.removed.cancel();
                tracing::info!(node = %member.endpoint.as_ref().map_or_else(String::new, |at| at.to_string()),
                    "A node has left the Cluster.");
                for slot in 0..SLOTS as u16 {
                    if usize::from(table.slots[usize::from(slot)].owner) == place {
                        table.give(slot, NOWHERE, 0);
                    }
                }
            }
        }
    }

    /// Returns whether the nodes should be asked often.
    pub(super) fn is_troubled(&self) -> bool {
        let table = self.table.read();
        table.members.iter().any(|member| member.slots > 0 && member.is_away())
    }
}

impl Table {
    /// Returns the place of a node, which is new if the node or its address is.
    fn place(&mut self, line: &NodeLine, publish_queue_bytes: usize) -> Option<u16> {
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
            node: Arc::new(node),
            is_master: line.is_master,
            is_failed: line.is_failed,
            is_present: true,
            slots: 0,
        });
        if let Some(known) = known {
            for slot in 0..SLOTS as u16 {
                if usize::from(self.slots[usize::from(slot)].owner) == known {
                    self.give(slot, place, self.slots[usize::from(slot)].epoch);
                }
            }
        }
        Some(place)
    }

    fn give(&mut self, slot: u16, place: u16, epoch: u64) {
        let entry = &mut self.slots[usize::from(slot)];
        let old = std::mem::replace(&mut entry.owner, place);
        entry.epoch = epoch;
        self.members[usize::from(old)].slots -= 1;
        self.members[usize::from(place)].slots += 1;
    }

    /// Returns the nodes in whose queues publishes of other nodes' slots wait.
    fn rerouted(&self) -> Vec<Arc<Node>> {
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
    fn starting(&self) -> Vec<NewMember> {
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
    fn is_away(&self) -> bool {
        !self.is_present || self.is_failed || !self.node.publishes.link.is_up()
    }
}

/// Returns the slot of the keys that a publish touches; of a plain message that of its channel, which keeps the messages
/// of a channel in order.
pub(super) fn slot_of(publish: &Publish) -> u16 {
    let key = match &publish.keep {
        Keep::Nothing => &*publish.channel,
        Keep::History(history) => &*history.log,
        Keep::IfNoReceiver { log, .. } => log,
        Keep::Room(write) => &*write.keys[0],
        Keep::Positions(write) => &*write.keys[0],
    };
    names::slot(key.as_bytes())
}

impl Node {
    /// Takes a request of another node's queue, also beyond the bound: it was within that of the other queue. Returns a
    /// publish that comes too late.
    fn take_over(&self, request: PipelineRequest) -> Option<Publish> {
        let bytes = match &request {
            PipelineRequest::Publish(publish) | PipelineRequest::Asking(publish) => {
                publish.queued_bytes()
            }
            PipelineRequest::Command(..) | PipelineRequest::Commands(..) => 0,
        };
        match self.publishes.queue.push_beyond(request, bytes) {
            Err(PipelineRequest::Publish(publish) | PipelineRequest::Asking(publish)) => {
                Some(publish)
            }
            _ => None,
        }
    }
}

/// Tells the senders of publishes that they may be lost.
pub(super) fn lose(publishes: impl IntoIterator<Item = Publish>) {
    for receipt in publishes.into_iter().filter_map(|publish| publish.receipt) {
        receipt.published(Outcome::Lost);
    }
}

/// Slots of a Cluster.
pub(super) const SLOTS: usize = 16384;

/// Place of the slots that no node serves.
const NOWHERE: u16 = 0;

/// Upper bound of nodes and of their addresses since the start.
const MEMBERS_MAX: u16 = 20_000;

/// Time within which a second owner of a slot contradicts the first.
const CONTRADICTION: Duration = Duration::from_millis(20);

/// Keys that are tried to find one of a node.
const KEYS_TRIED: u32 = 1000;

/// Length at which the list of slots that are away is cut.
const TOLD_BYTES: usize = 400;

#[cfg(test)]
mod tests;
