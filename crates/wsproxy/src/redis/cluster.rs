//! The nodes of a Redis Cluster and the slots that they serve, as this instance knows them now.
//!
//! A publish waits in the queue of the node that serves its slot. When a slot gets another node, its queued publishes go
//! there before any later one ([`Cluster::hand_over`]), so that the messages of a channel keep their order.

use std::{
    borrow::Cow,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::RwLock;
use tokio::{sync::Notify, time::Instant};
use wsproxy_proto::names::{self, Names};

pub(super) use commands::unserved;

use crate::{
    bus::{
        deliver::Slots,
        publish::{Keep, Outcome, Publish},
    },
    queue::Back,
    redis::{
        address::RedisEndpoint,
        cluster::{
            line::NodeLine,
            receivers::Receivers,
            redirect::Redirect,
            table::{Member, Slot, Table},
        },
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
mod table;

/// A Cluster.
pub(super) struct Cluster {
    seeds: Vec<RedisEndpoint>,
    names: Names,
    publish_queue_bytes: usize,
    /// Never held over an await. Held for writing only while slots change.
    table: RwLock<Table>,
    doubted: Notify,
    failed_over: Notify,
    pub(super) receivers: Receivers,
}

/// Members that are new, and the pipelines that they need.
pub(super) struct NewMember {
    pub(super) node: Arc<Node>,
    pub(super) publishes: bool,
    pub(super) commands: bool,
}

impl Cluster {
    /// Creates a Cluster of which only some nodes are known, by their addresses.
    pub(super) fn new(seeds: Vec<RedisEndpoint>, names: Names, publish_queue_bytes: usize) -> Self {
        let nowhere = Member {
            id: String::new(),
            endpoint: None,
            alias: None,
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
            orphans: Slots::default(),
        };
        Self {
            seeds,
            names,
            publish_queue_bytes,
            table: RwLock::new(table),
            doubted: Notify::new(),
            failed_over: Notify::new(),
            receivers: Receivers::new(publish_queue_bytes),
        }
    }

    /// Puts a publish into the queue of the node that serves its slot.
    pub(super) fn publish(&self, publish: Publish) -> Result<(), (Back, Publish)> {
        let (bytes, slot) = (publish.queued_bytes(), self.slot_of_publish(&publish));
        let table = self.table.read();
        table.member_for(&publish, slot).node.publishes.queue.push(publish, bytes)
    }

    /// Returns `Pending` while the queue of a node that can be reached is full. The messages for others must not wait for
    /// a node that is away.
    pub(super) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let table = self.table.read();
        let mut reached = table.members.iter().map(|member| &member.node.publishes);
        let is_full = reached
            .any(|pipeline| pipeline.link.is_up() && pipeline.queue.poll_open(cx).is_pending());
        if is_full { Poll::Pending } else { self.receivers.poll_open(cx) }
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
            let request = match request {
                // A slot does not come to a node that is away.
                PipelineRequest::Asking(publish) if !from.publishes.link.is_up() => {
                    PipelineRequest::Publish(publish)
                }
                request => request,
            };
            let node = match &request {
                PipelineRequest::Publish(publish) => {
                    &table.member_for(publish, self.slot_of_publish(publish)).node
                }
                // The slot is on its way to this node.
                _ => from,
            };
            homeless.extend(node.take_over(request));
        }
        homeless
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
                // Ahead of those that wait at the earlier node.
                Some(node) if node.number != at.number => {
                    node.take_over(PipelineRequest::Publish(publish)).map_or(Ok(()), Err)
                }
                _ => Err(publish),
            },
            Redirect::Ask(to) => match self.node_at(to) {
                Some(node) if !node.publishes.link.is_away() => {
                    node.take_over(PipelineRequest::Asking(publish)).map_or(Ok(()), Err)
                }
                _ => Err(publish),
            },
            Redirect::Wait => {
                self.doubt();
                Err(publish)
            }
        }
    }

    /// Notes the node that serves a slot, as another node tells. Returns it; `None` if it is not known, or if the
    /// nodes contradict each other, so that the caller must wait.
    pub(super) fn moved(&self, slot: u16, to: &RedisEndpoint) -> Option<Arc<Node>> {
        let Some(place) = self.place_of(to) else {
            self.doubt();
            return None;
        };
        let (from, owner) = {
            let mut table = self.table.write();
            let entry = table.slots[usize::from(slot)];
            let owner = table.members[usize::from(place)].node.clone();
            if entry.owner == place {
                return Some(owner);
            }
            let now = Instant::now();
            if table.moves.get(&slot).is_some_and(|at| now.duration_since(*at) < CONTRADICTION) {
                return None;
            }
            table.moves.insert(slot, now);
            table.give(slot, place, entry.epoch);
            (table.members[usize::from(entry.route)].node.clone(), owner)
        };
        from.publishes.reroute();
        self.doubt();
        Some(owner)
    }

    /// Returns the slot of the keys that a publish touches; of a plain message that of its channel's log, which keeps the
    /// messages of a channel in order.
    pub(super) fn slot_of_publish(&self, publish: &Publish) -> u16 {
        let key = match &publish.keep {
            Keep::Nothing => self.names.publishing_key(&publish.channel),
            Keep::History(history) => Cow::from(&*history.log),
            Keep::IfNoReceiver { log, .. } => Cow::from(&**log),
            Keep::Room(write) => Cow::from(&*write.keys[0]),
            Keep::Positions(write) => Cow::from(&*write.keys[0]),
        };
        names::slot(key.as_bytes())
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
        let found = table.members.iter().position(|member| {
            let names = [member.endpoint.as_deref(), member.alias.as_ref()];
            member.is_present && names.contains(&Some(endpoint))
        });
        found.and_then(|place| u16::try_from(place).ok())
    }

    /// Returns the node with a number.
    pub(super) fn node(&self, number: usize) -> Option<Arc<Node>> {
        self.table.read().members.get(number).map(|member| member.node.clone())
    }

    /// Returns the nodes, masters and replicas.
    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        self.nodes_where(|member| member.is_present)
    }

    /// Returns the nodes that have not failed.
    pub(super) fn living(&self) -> Vec<Arc<Node>> {
        self.nodes_where(|member| member.is_present && !member.is_failed)
    }

    /// Returns the nodes that serve slots.
    pub(super) fn masters(&self) -> Vec<Arc<Node>> {
        self.nodes_where(|member| member.slots > 0)
    }

    fn nodes_where(&self, which: impl Fn(&Member) -> bool) -> Vec<Arc<Node>> {
        let table = self.table.read();
        let found = table.members.iter().skip(1).filter(|member| which(member));
        found.map(|member| member.node.clone()).collect()
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

    /// Takes the answer of a node. Returns the members whose connections are to be made; `None` if the answer does not count.
    pub(super) fn learn(&self, lines: &[NodeLine]) -> Option<Vec<NewMember>> {
        let mut table = self.table.write();
        let present = table.members.iter().filter(|member| member.is_present).count();
        if lines.len() * 2 < present {
            // A node that was reset knows itself alone.
            return None;
        }
        let mut has_failed_over = false;
        let mut named = Vec::with_capacity(lines.len());
        for line in lines {
            let Some(place) = table.place(line, self.publish_queue_bytes) else { continue };
            let member = &mut table.members[usize::from(place)];
            (member.is_master, member.is_failed) = (line.is_master, line.is_failed);
            member.alias.clone_from(&line.alias);
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
                let is_lost = owner != NOWHERE && (old.is_failed || !old.is_master);
                if is_lost || table.orphans.has(slot) {
                    has_failed_over = true;
                    table.failed_over.insert(slot);
                }
                table.give(slot, place, line.epoch);
            }
        }
        let rerouted = table.rerouted();
        let new = table.starting();
        drop(table);
        for node in rerouted {
            node.publishes.reroute();
            node.commands.reroute();
        }
        if has_failed_over {
            self.failed_over.notify_one();
        }
        Some(new)
    }

    /// Resolves once another node has slots of one that failed, with these slots.
    pub(super) async fn failed_over(&self) -> Slots {
        self.failed_over.notified().await;
        let mut table = self.table.write();
        table.orphans = Slots::default();
        std::mem::take(&mut table.failed_over)
    }

    /// Returns the slots of the nodes with these ids.
    pub(super) fn slots_of(&self, ids: &[Vec<u8>]) -> Slots {
        let table = self.table.read();
        let named = |member: &Member| ids.iter().any(|id| *id == member.id.as_bytes());
        let places = (0..table.members.len()).filter(|place| named(&table.members[*place]));
        let mut slots = Slots::default();
        places.flat_map(|place| table.slots_at(place)).for_each(|slot| slots.insert(slot));
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
                for slot in table.slots_at(place) {
                    table.orphans.insert(slot);
                    table.give(slot, NOWHERE, 0);
                }
            }
        }
    }

    /// Returns whether no node serves any slot, as far as is known.
    pub(super) fn is_unserved(&self) -> bool {
        self.table.read().members[usize::from(NOWHERE)].slots == SLOTS
    }

    /// Returns the number of the node at which the instance subscribes.
    pub(super) fn home(&self) -> usize {
        self.table.read().home
    }

    /// Returns the slots of a node.
    pub(super) fn slots_at(&self, number: usize) -> Slots {
        let mut slots = Slots::default();
        self.table.read().slots_at(number).into_iter().for_each(|slot| slots.insert(slot));
        slots
    }

    /// Returns whether the nodes should be asked often.
    pub(super) fn is_troubled(&self) -> bool {
        let table = self.table.read();
        table.members.iter().any(|member| member.slots > 0 && member.is_away())
    }
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
