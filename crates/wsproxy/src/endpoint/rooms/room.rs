//! One room at this instance: its mirror, the members here, and the messages to them.
//!
//! Members here are served directly; the bus carries a message to other instances only. An entity has one writer, the
//! connection of its owner, so that the order of messages between instances does not matter.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use hashbrown::HashMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, OnceCell};
use tracing::{debug, warn};
use wsproxy_conn::{
    Link,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::Disconnect,
    names::Id,
    rooms::{
        check::Kind,
        mirror::{Entity, Limits, Merge, Mirror},
        positions::{Positions, Rules},
        snapshot,
        wire::{self, Connection},
    },
};

use crate::{
    endpoint::rooms::{
        Here, Rooms,
        counters::Traffic,
        fanout::Form,
        keeper::Join,
        member::{Ending, LeaveKind, Membership},
        record,
        reliable::Reliable,
        room::{owed::Owed, pace::Pace},
    },
    http::rejection::Rejection,
    hub::{inbox::Inbox, sink::Sink, subscription::Subscription},
};

mod again;
mod greet;
mod hear;
mod moves;
mod owed;
mod pace;
mod places;
mod read;
mod reliable;
mod say;
mod tell;

pub(super) use say::{NotSaid, Said};

/// A room with members at this instance.
pub(super) struct Room {
    /// Id of the room.
    pub(super) id: Id,
    me: Weak<Self>,
    rooms: Weak<Rooms>,
    channel: Arc<str>,
    /// Shortest time between two batches of positions or of presence events; 0: each leaves at once.
    tick: Micros,
    /// Number of this instance, which the heads of its messages have.
    server: u64,
    /// Set once the bus has confirmed the subscription and the mirror is complete.
    opened: OnceCell<()>,
    /// Bytes of the state of all rooms of the instance.
    state_bytes: Arc<AtomicUsize>,
    /// Messages of and to the members here.
    pub(super) traffic: Traffic,
    /// Wakes the task that waits for a reading.
    reader: Notify,
    state: Mutex<State>,
}

/// State of a room. Held for a few steps, or for one message to all members here.
struct State {
    mirror: Mirror,
    positions: Positions,
    members: Vec<MemberHere>,
    subscription: Option<Subscription>,
    /// Connections that are to be flushed when the lock is released, or at the end of a round of the bus.
    dirty: Vec<Arc<Link>>,
    /// Pace of joins, leaves and changes of presence.
    presence: Pace,
    /// Pace of all positions for members that read on.
    catch_up: Pace,
    /// Bytes of the mirror and of what is owed that are counted for the instance.
    counted: usize,
    /// Time of the reading for which a task waits; `None`: there is no task.
    reads_at: Option<u64>,
    /// Time at which all positions and what is owed are to be published, since a publish has failed.
    owes_at: Micros,
    /// Changes of members here that other instances may lack.
    owed: Owed,
    /// Entities of connections here whose members were taken for dead, until these join again; by number.
    lost: HashMap<u64, Vec<Entity>>,
    /// Writes of positions that the store has not answered.
    writes_waiting: usize,
    /// The room is read when the bus has delivered what it has taken.
    reads_behind: bool,
    /// Time at which the room wants to be called by the ticker.
    ticks_at: Micros,
    /// Times of the room's entries at the ticker: a few, since the room has few kinds of work that waits.
    entries: Vec<Micros>,
    /// The last tick came so late that this instance listens first.
    is_late: bool,
    /// The room was closed: no member is here.
    is_closed: bool,
}

/// Connection of this instance that is a member, or is about to be.
struct MemberHere {
    number: u64,
    client: Id,
    link: Arc<Link>,
    /// Not upgraded under the lock: the last owner of a membership takes it.
    membership: Weak<Membership>,
    /// Effect of the end of the membership.
    ending: Arc<Ending>,
    /// Form of the messages; `None` until ServerHello is sent, and nothing is sent before it.
    form: Option<Form>,
    /// The member reads batches of positions.
    reads_batches: bool,
    /// Reliable messages of a member that acknowledges them.
    reliable: Option<Box<Reliable>>,
    /// The member did not read the newest positions: they are sent when it reads on.
    is_behind: bool,
    /// The member is behind and has read on: it waits for the newest positions.
    reads_on: bool,
    /// Presence events wait to be flushed.
    is_unflushed: bool,
}

impl Room {
    /// Makes a room, which gets no messages before [`Self::open`].
    pub(super) fn new(
        rooms: &Arc<Rooms>,
        id: &Id,
        state_bytes: Arc<AtomicUsize>,
        now: Micros,
    ) -> Arc<Self> {
        let config = &rooms.config;
        let limits =
            Limits { member_entities_max: config.entities_max as usize, ..Limits::default() };
        let rules = Rules {
            tick: Micros::from(config.tick).0,
            spares_local: rooms.spares_local,
            is_shared: rooms.keeper.is_shared(),
        };
        Arc::new_cyclic(|me| Self {
            id: id.clone(),
            me: me.clone(),
            rooms: Arc::downgrade(rooms),
            channel: rooms.names.room(id).into(),
            tick: config.tick.into(),
            server: rooms.server,
            opened: OnceCell::new(),
            state_bytes,
            traffic: Traffic::default(),
            reader: Notify::new(),
            state: Mutex::new(State {
                mirror: Mirror::new(rooms.server, limits, MERGE, now.0),
                positions: Positions::new(rules),
                members: Vec::new(),
                subscription: None,
                dirty: Vec::new(),
                presence: Pace::NEW,
                catch_up: Pace::NEW,
                counted: 0,
                reads_at: None,
                owes_at: Micros::NEVER,
                owed: Owed::default(),
                lost: HashMap::new(),
                writes_waiting: 0,
                reads_behind: false,
                ticks_at: Micros::NEVER,
                entries: Vec::new(),
                is_late: false,
                is_closed: false,
            }),
        })
    }

    /// Subscribes to the room and reads it, where no member here has done so.
    ///
    /// # Errors
    /// 503: the bus or the store cannot be reached.
    pub(super) async fn open(self: &Arc<Self>, rooms: &Rooms) -> Result<(), Rejection> {
        let open = || async {
            // An earlier try may have subscribed, and then failed to read.
            let is_subscribed = self.state.lock().subscription.is_some();
            if !is_subscribed {
                let sink = Sink::Inbox(Arc::clone(self) as Arc<dyn Inbox>);
                let subscription = rooms.hub.subscribe([(Arc::clone(&self.channel), sink)]).await?;
                self.state.lock().subscription = Some(subscription);
            }
            self.read_first(rooms).await
        };
        self.opened.get_or_try_init(open).await.copied()
    }

    /// Ends the subscription: the last member is gone.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        self.state_bytes.fetch_sub(std::mem::take(&mut state.counted), Relaxed);
        let subscription = state.subscription.take();
        drop(state);
        // It takes locks of the hub, which come before that of the room.
        drop(subscription);
    }

    /// Adds a connection that is about to join. It gets no messages yet.
    pub(super) fn add(
        &self,
        number: u64,
        client: &Id,
        link: &Arc<Link>,
        (membership, ending): (&Weak<Membership>, &Arc<Ending>),
    ) {
        let mut state = self.state.lock();
        let members = &mut state.members;
        if members.len() == members.capacity() {
            // Most rooms are small, and a vector that doubles has room for six more at ten.
            members.reserve_exact((members.len() / 4).max(2));
        }
        members.push(MemberHere {
            number,
            client: client.clone(),
            link: Arc::clone(link),
            membership: membership.clone(),
            ending: Arc::clone(ending),
            form: None,
            reads_batches: false,
            reliable: None,
            is_behind: false,
            reads_on: false,
            is_unflushed: false,
        });
    }

    /// Removes a connection that has ended. Its member stays until it leaves.
    pub(super) fn remove(&self, number: u64) {
        let mut state = self.state.lock();
        state.lost.remove(&number);
        let at = state.members.iter().position(|member| member.number == number);
        let removed = at.map(|at| state.members.swap_remove(at));
        if let Some(removed) = &removed {
            self.write_positions_of(&mut state, removed);
        }
        drop(state);
        let waiting = removed.as_ref().and_then(|member| member.reliable.as_ref());
        if let (Some(reliable), Some(rooms)) = (waiting, self.rooms.upgrade()) {
            rooms.counters.acks_closed.add(reliable.len() as u64);
        }
        // It may be the last owner of a socket.
        drop(removed);
    }

    /// Applies the join of a member here, as the store has answered it. Returns whether the connection still has the
    /// place: newer news may have overtaken the answer.
    #[must_use]
    pub(super) fn joined(&self, join: Join<'_>, version: u64, before: Option<Connection>) -> bool {
        let now = clock::now();
        let mut state = self.state.lock();
        let record = record::line(join.connection, join.user, join.json);
        let client = join.client.as_str();
        let before = before.map(|before| before.to_string());
        let is_passed_on =
            before.as_ref().is_some_and(|before| *before != join.connection.to_string());
        let mut changes = Vec::new();
        let is_joined =
            state.mirror.join_here(client, &record, version, before.as_deref(), &mut changes);
        if let Some(before) = before.filter(|_| is_passed_on) {
            self.end_replaced(&state, &before, now);
        }
        if !is_joined {
            debug!(room = self.id.as_str(), client, "A join was overtaken by newer news.");
        }
        self.tell_changes(&mut state, changes, now);
        if is_joined && is_passed_on {
            // The connection that had the place may have lost it before its last positions were written.
            state.share_positions_of(client);
        }
        self.release(state, now);
        is_joined
    }

    /// Ends the connection here that had a member's place before.
    fn end_replaced(&self, state: &State, before: &str, now: Micros) {
        let Some(before) = Connection::parse(before) else { return };
        if before.server != self.server {
            return;
        }
        if let Some(member) = state.members.iter().find(|member| member.number == before.number) {
            // The leave still runs: after Redis lost its data only the store knows who has the place.
            member.ending.set(LeaveKind::Replaced);
            member.link.finish(&Disconnect::REPLACED, now);
        }
    }

    /// Ends members' connections here, by the name of the client, or all of them.
    fn end_members(&self, state: &State, client: Option<&str>, reason: &str, now: Micros) {
        for member in &state.members {
            if client.is_none_or(|client| client == member.client.as_str()) {
                member.ending.set(LeaveKind::SentAway);
                let (why, code) = (&Disconnect::BACKEND, Disconnect::BACKEND.code);
                let reason = if reason.is_empty() { Disconnect::BACKEND.reason } else { reason };
                member.link.finish_with(why, code, reason, now);
            }
        }
    }

    /// Ends a connection here.
    pub(super) fn end(&self, number: u64, why: &'static Disconnect, now: Micros) {
        if let Some(link) = self.link(number) {
            link.finish(why, now);
        }
    }

    /// Pings a client here.
    pub(super) fn probe(&self, number: u64, now: Micros) {
        if let Some(link) = self.link(number) {
            link.probe(now);
        }
    }

    /// Returns whether something came from a client here since `asked`.
    pub(super) fn has_heard(&self, number: u64, asked: Micros) -> bool {
        self.link(number).is_some_and(|link| link.heard() > asked)
    }

    /// Drops a client's connection here without a close frame. Returns whether there is one.
    pub(super) fn cut(&self, client: &Id) -> bool {
        let state = self.state.lock();
        let mine = state.members.iter().filter(|member| member.client == *client);
        mine.inspect(|member| member.link.abort()).count() > 0
    }

    fn link(&self, number: u64) -> Option<Arc<Link>> {
        let state = self.state.lock();
        let member = state.members.iter().find(|member| member.number == number)?;
        Some(Arc::clone(&member.link))
    }

    /// Returns at most `most` members of this instance that `is_wanted` chooses, with their connections.
    pub(super) fn here(&self, most: usize, is_wanted: impl Fn(&Id) -> bool) -> Vec<Here> {
        let members = self.memberships_with_links();
        // Behind the lock, since a membership may have got its last owner here.
        let of = |(membership, link): (Arc<Membership>, Arc<Link>)| {
            let (user, client) = (membership.user.clone(), membership.client.clone());
            Here { room: self.id.clone(), user, client, link }
        };
        let wanted = members.into_iter().filter(|(membership, _)| is_wanted(&membership.user));
        wanted.take(most).map(of).collect()
    }

    fn memberships_with_links(&self) -> Vec<(Arc<Membership>, Arc<Link>)> {
        let state = self.state.lock();
        let of =
            |member: &MemberHere| Some((member.membership.upgrade()?, Arc::clone(&member.link)));
        state.members.iter().filter_map(of).collect()
    }

    /// Returns the memberships of this instance.
    pub(super) fn memberships(&self) -> Vec<Arc<Membership>> {
        let state = self.state.lock();
        state.members.iter().filter_map(|member| member.membership.upgrade()).collect()
    }

    /// Returns whether the mirror is complete.
    pub(super) fn is_open(&self) -> bool {
        self.opened.initialized()
    }

    /// Counts a message of a member here; `kind` is `None` for one that is no envelope.
    pub(super) fn count_received(&self, rooms: &Rooms, kind: Option<Kind>, bytes: usize) {
        let counters = &rooms.counters;
        kind.map_or(&counters.opaque, |kind| &counters.received[kind as usize]).add(1);
        self.traffic.messages_in.add(1);
        self.traffic.bytes_in.add(bytes as u64);
    }

    /// Counts messages to members here of one kind, and the bytes of all of them.
    fn count_sent(&self, rooms: &Rooms, kind: Option<Kind>, messages: usize, bytes: usize) {
        if messages == 0 {
            return;
        }
        rooms.counters.sent(kind, messages as u64);
        self.traffic.messages_out.add(messages as u64);
        self.traffic.bytes_out.add(bytes as u64);
    }

    /// Returns the number of members on all instances.
    pub(super) fn len(&self) -> usize {
        self.state.lock().mirror.len()
    }

    /// Returns the numbers of connections here and of members everywhere, and of entities.
    pub(super) fn sizes(&self) -> Sizes {
        let state = self.state.lock();
        Sizes {
            here: state.members.len(),
            members: state.mirror.len(),
            entities: state.mirror.entities(),
        }
    }

    /// Returns whether a connection has the member's place, as far as the mirror knows.
    pub(super) fn is_held_by(&self, client: &str, connection: Connection) -> bool {
        let state = self.state.lock();
        let member = state.mirror.member(client);
        member.is_some_and(|member| member.record().connection() == Some(connection))
    }

    /// Returns the records of the members on all instances, as the mirror has them: client id and record.
    pub(super) fn records(&self) -> Vec<(String, String)> {
        let state = self.state.lock();
        let members = state.mirror.members();
        members.map(|(client, member)| (client.into(), member.record_text().into())).collect()
    }

    /// Returns the fields of these members' entities and positions in the store.
    pub(super) fn fields_of<'a>(&self, clients: impl Iterator<Item = &'a str>) -> Vec<String> {
        let state = self.state.lock();
        let fields = |client: &'a str| {
            let member = state.mirror.member(client);
            let entities = member.map(|member| member.entities()).into_iter().flatten();
            entities.map(move |entity| wire::field(client, entity.id())).collect::<Vec<_>>()
        };
        clients.flat_map(fields).collect()
    }

    /// Notes that Redis may have lost the state of the room: it is read and written again.
    pub(super) fn doubt(&self) {
        let now = clock::now();
        let mut state = self.state.lock();
        state.mirror.want_reading(now.0);
        state.share_positions();
        self.release(state, now);
    }

    /// Ends a turn with the state: counts its bytes, plans what is due, and flushes connections outside the lock.
    fn release(&self, mut state: MutexGuard<'_, State>, now: Micros) {
        self.settle(&mut state);
        let dirty = std::mem::take(&mut state.dirty);
        drop(state);
        for link in dirty {
            link.flush(now);
        }
    }

    /// Counts the bytes of the state, and plans what is due.
    fn settle(&self, state: &mut State) {
        if state.is_closed {
            return;
        }
        let bytes = state.mirror.bytes() + state.owed.bytes();
        if bytes > state.counted {
            self.state_bytes.fetch_add(bytes - state.counted, Relaxed);
        } else {
            self.state_bytes.fetch_sub(state.counted - bytes, Relaxed);
        }
        state.counted = bytes;
        let is_local = state.mirror.is_local();
        state.positions.set_local(is_local);
        self.plan_reading(state);
        self.plan_tick(state);
    }
}

/// Sizes of a room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Connections here.
    pub(super) here: usize,
    /// Members on all instances.
    pub(super) members: usize,
    /// Entities of all members.
    pub(super) entities: usize,
}

impl State {
    fn member_mut(&mut self, number: u64) -> Option<&mut MemberHere> {
        self.members.iter_mut().find(|member| member.number == number)
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if state.counted > 0 {
            warn!(room = self.id.as_str(), "A room was dropped while it was open.");
            self.state_bytes.fetch_sub(state.counted, Relaxed);
        }
    }
}

/// Functions for the mirror, which knows no message.
const MERGE: Merge = Merge { entity: snapshot::updated, presence: record::with_presence };

// Every member here has one.
const _: () = assert!(size_of::<MemberHere>() <= 64);
