//! Positions: the newest of each entity, sent once in a tick.

use std::sync::Arc;

use wsproxy_conn::{
    clock::{self, Micros},
    link::Queued,
};
use wsproxy_proto::rooms::{
    check::Kind,
    positions::Position,
    wire::{self, Connection},
    write,
};

use crate::{
    bus::publish::{Counts, Keep, Outcome, Publish, Receipt},
    endpoint::rooms::{
        Rooms,
        fanout::Fanout,
        member::Membership,
        room::{MemberHere, NotSaid, Room, State, owed::OWE_AFTER},
    },
    telemetry::time,
};

impl Room {
    /// Takes the position of a member here. It is sent at once, or at the end of the tick.
    pub(super) fn moved(
        &self,
        state: &mut State,
        member: &Membership,
        (entity, update): (&str, &[u8]),
        now: Micros,
    ) -> Result<(), NotSaid> {
        let client = member.client.as_str();
        state.mirror.position(client, entity, update)?;
        let owner = (client, member.connection.number);
        let is_replaced = state.positions.put(owner, entity, update);
        if is_replaced && let Some(rooms) = self.rooms.upgrade() {
            rooms.counters.coalesced_tick.add(1);
        }
        if state.positions.due().is_some_and(|due| due <= now.0) {
            self.tick(state, now);
        }
        Ok(())
    }

    /// Sends the positions whose time has come, called by the ticker.
    pub(in crate::endpoint::rooms) fn on_tick(&self, at: Micros) {
        let now = clock::now();
        let mut state = self.state.lock();
        state.entries.retain(|entry| *entry != at);
        if state.ticks_at != at {
            // An earlier entry has been served instead.
            return;
        }
        if at > Micros(0) && now.since(at) >= LATE && !std::mem::replace(&mut state.is_late, true) {
            // This instance was frozen: which of its members are elsewhere by now is about to be heard. What it knows of
            // these must not overwrite what is newer.
            return self.enter_ticker(&mut state, now.after(HEAR_WAIT));
        }
        (state.ticks_at, state.is_late) = (Micros::NEVER, false);
        let is_owing = state.owes_at <= now;
        if is_owing {
            state.owes_at = Micros::NEVER;
            state.positions.owe_all();
        }
        if state.positions.due().is_some_and(|due| due <= now.0) {
            self.tick(&mut state, now);
        }
        if state.catch_up.leaves(now) {
            self.tell_all_positions(&mut state, now);
        }
        if state.presence.leaves(now) {
            state.flush_presence();
        }
        self.write_positions(&mut state, now);
        self.release(state, now);
        if is_owing {
            self.tell_owed();
        }
    }

    /// Enters the room at the ticker, where something waits and no earlier entry is there.
    pub(super) fn plan_tick(&self, state: &mut State) {
        let writes = state.positions.writes_due().filter(|_| state.writes_waiting == 0);
        let due = [state.positions.due(), writes];
        let due = due.into_iter().flatten().map(Micros);
        let at = due.fold(state.owes_at, Micros::min);
        let at = at.min(state.catch_up.due).min(state.presence.due);
        if at < state.ticks_at {
            self.enter_ticker(state, at);
        }
    }

    /// Has the ticker call at this time. An earlier entry may have been served since this one was made.
    fn enter_ticker(&self, state: &mut State, at: Micros) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        state.ticks_at = at;
        if !state.entries.contains(&at) {
            state.entries.push(at);
            rooms.ticker.add(at, self.me.clone());
        }
    }

    /// Sends one batch to the members here, and publishes one for other instances.
    fn tick(&self, state: &mut State, now: Micros) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        let begin = clock::now();
        let State { positions, members, dirty, .. } = state;
        let is_alone = positions.is_alone();
        let batch = positions.take(now.0);
        let timestamp_ms = time::since_epoch().as_millis() as i64;
        let mut envelope = None;
        if batch.local().len() > 0 {
            let entries = batch.local().map(pair);
            let whole = write::position_batch(entries.collect::<Vec<_>>(), timestamp_ms);
            let mut sender = PositionFanout::new(&whole);
            for member in members.iter_mut() {
                sender.send(member, &mut || batch.local().map(pair), dirty, &rooms, now);
            }
            sender.count(self, &rooms);
            rooms.counters.batch_entries.observe(batch.local().len() as u64);
            envelope = Some(whole);
        }
        if batch.published().len() > 0 {
            let whole = match envelope.filter(|_| batch.is_same()) {
                Some(whole) => whole,
                None => {
                    let entries = batch.published().map(pair);
                    write::position_batch(entries.collect::<Vec<_>>(), timestamp_ms)
                }
            };
            let from = Connection { server: self.server, number: 0 };
            let numbers = batch.published().map(|position| position.connection);
            let payload = wire::batch(from, &whole, &write::connections(numbers));
            match is_alone {
                true => rooms.counters.published_local.add(1),
                false => rooms.counters.published_shared.add(1),
            }
            let publish = Publish {
                channel: Arc::clone(&self.channel),
                payload,
                keep: Keep::Nothing,
                receipt: self.me.upgrade().map(|room| room as Arc<dyn Receipt>),
            };
            if rooms.hub.publish(publish).is_err() {
                // The queue is full.
                state.owes_at = now.after(OWE_AFTER);
            }
        }
        rooms.counters.tick.observe(clock::now().since(begin).0);
    }

    /// Sends the positions of another instance's members to the members here. `envelope` holds a batch.
    pub(super) fn pass_batch(&self, state: &mut State, envelope: &[u8], now: Micros) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        let State { members, dirty, .. } = state;
        let mut sender = PositionFanout::new(envelope);
        for member in members.iter_mut() {
            sender.send(member, &mut || write::batch_entries(envelope), dirty, &rooms, now);
        }
        sender.count(self, &rooms);
    }

    /// Sends a member that reads on all newest positions, as the only ones that it has missed; or has the ticker do so,
    /// where another member has had them within the tick.
    pub(in crate::endpoint::rooms) fn catch_up(&self, number: u64, now: Micros) {
        let mut state = self.state.lock();
        let Some(member) = state.member_mut(number) else { return };
        if !member.is_behind {
            return;
        }
        member.reads_on = true;
        if !state.catch_up.waits(self.tick, false, now) {
            self.tell_all_positions(&mut state, now);
        }
        self.release(state, now);
    }

    /// Sends all newest positions to the members that read on, encoded once for all of them.
    fn tell_all_positions(&self, state: &mut State, now: Micros) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        let State { mirror, members, dirty, .. } = state;
        let positions = mirror.members().flat_map(|(client, of)| {
            of.entities().filter_map(move |entity| Some((client, entity.position()?)))
        });
        let entries: Vec<(&str, &[u8])> = positions.collect();
        let timestamp_ms = time::since_epoch().as_millis() as i64;
        let envelope = write::position_batch(entries.iter().copied(), timestamp_ms);
        let mut sender = PositionFanout::new(&envelope);
        for member in members.iter_mut().filter(|member| member.reads_on) {
            (member.reads_on, member.is_behind) = (false, false);
            if !entries.is_empty() {
                sender.send(member, &mut || entries.iter().copied(), dirty, &rooms, now);
            }
        }
        sender.count(self, &rooms);
    }
}

impl Receipt for Room {
    fn counts(&self) -> Counts {
        Counts::Exact
    }

    fn published(&self, outcome: Outcome) {
        let now = clock::now();
        let mut state = self.state.lock();
        match outcome {
            Outcome::Received(receivers) => state.positions.set_receivers(Some(receivers)),
            _ => {
                state.positions.set_receivers(None);
                state.owes_at = now.after(OWE_AFTER);
            }
        }
        self.release(state, now);
    }
}

/// A batch of positions on its way to members: one frame for those who read batches, a frame for each position for
/// others.
struct PositionFanout<'a> {
    batch: Fanout<'a>,
    batches_sent: usize,
    singles: Vec<(Box<str>, Fanout<'a>)>,
    singles_sent: usize,
    /// Bytes of the single positions that were sent.
    single_bytes: usize,
}

impl<'a> PositionFanout<'a> {
    fn new(envelope: &'a [u8]) -> Self {
        Self {
            batch: Fanout::new(envelope),
            batches_sent: 0,
            singles: Vec::new(),
            singles_sent: 0,
            single_bytes: 0,
        }
    }

    /// Counts all that was sent.
    fn count(&self, room: &Room, rooms: &Rooms) {
        let bytes = self.batches_sent * self.batch.len();
        room.count_sent(rooms, Some(Kind::Batch), self.batches_sent, bytes);
        room.count_sent(rooms, Some(Kind::Position), self.singles_sent, self.single_bytes);
    }

    /// Sends a member what it needs, or notes that it is behind.
    fn send<'e, E: Iterator<Item = (&'e str, &'e [u8])>>(
        &mut self,
        member: &mut MemberHere,
        entries: &mut impl FnMut() -> E,
        dirty: &mut Vec<Arc<wsproxy_conn::Link>>,
        rooms: &Rooms,
        now: Micros,
    ) {
        let Some(form) = member.form else { return };
        if member.is_behind || !member.link.is_writable() {
            if !std::mem::replace(&mut member.is_behind, true) {
                // It has read on in between.
                if member.link.is_writable() {
                    member.link.notify(crate::client::event::Event::Writable.into());
                }
            }
            rooms.counters.coalesced_slow.add(1);
            return;
        }
        let mut is_dirty = false;
        if member.reads_batches {
            if let Some(frame) = self.batch.frame(form, &member.link) {
                self.batches_sent += 1;
                is_dirty = member.link.push(frame, now) == Queued::Flush;
            }
        } else {
            if self.singles.is_empty() {
                self.singles = entries()
                    .map(|(client, update)| {
                        (client.into(), Fanout::new(write::position(client, update).to_vec()))
                    })
                    .collect();
            }
            for (client, single) in &mut self.singles {
                if **client == *member.client.as_str() {
                    continue;
                }
                if let Some(frame) = single.frame(form, &member.link) {
                    self.singles_sent += 1;
                    self.single_bytes += single.len();
                    is_dirty |= member.link.push(frame, now) == Queued::Flush;
                }
            }
        }
        if is_dirty {
            dirty.push(Arc::clone(&member.link));
        }
    }
}

fn pair(position: Position<'_>) -> (&str, &[u8]) {
    (position.client, position.position)
}

/// Delay of a tick from which on the instance counts as one that was frozen.
const LATE: Micros = Micros(1_000_000);

/// Time for which an instance that was frozen hears before it tells.
const HEAR_WAIT: Micros = Micros(250_000);
