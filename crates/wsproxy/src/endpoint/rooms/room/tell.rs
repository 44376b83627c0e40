//! Messages to the members here: changes of the room, and what others say.

use std::sync::{Arc, Weak};

use wsproxy_conn::{
    clock::{self, Micros},
    link::Queued,
};
use wsproxy_proto::rooms::{
    check::{self, Event as PresenceKind},
    mirror::{Change, Entity},
    write,
};

use crate::{
    endpoint::rooms::{
        fanout::Fanout,
        member::Membership,
        record::{self, MemberRecord},
        rejoin,
        room::{MemberHere, Room, State},
    },
    telemetry::time,
};

/// The members here that get a message.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Audience<'a> {
    /// Number of the connection that has sent the message.
    pub(super) except: Option<u64>,
    /// The one client that the message is for.
    pub(super) to: Option<&'a str>,
    /// The message may wait for the end of the tick, unless another one comes behind it.
    pub(super) may_wait: bool,
}

impl Room {
    /// Sends a message to members here, and notes which connections are to be flushed.
    pub(super) fn fan_out(
        &self,
        state: &mut State,
        fanout: &mut Fanout<'_>,
        audience: Audience<'_>,
        since: Micros,
    ) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        let State { members, dirty, presence, .. } = state;
        let are_many = members.len() > FEW_WRITES;
        let (mut sent, mut waits) = (0, None);
        for member in members.iter_mut() {
            let Some(form) = member.form else { continue };
            let is_other = audience.to.is_some_and(|to| to != member.client.as_str());
            if audience.except == Some(member.number) || is_other {
                continue;
            }
            let frame = match fanout.is_reliable && member.reliable.is_some() {
                true => member.reliable_frame(form, fanout.envelope(), &rooms, clock::now()),
                false => fanout.frame(form, &member.link),
            };
            let Some(frame) = frame else { continue };
            sent += 1;
            let waits = audience.may_wait
                && *waits.get_or_insert_with(|| presence.waits(self.tick, are_many, since));
            if waits {
                let queued = member.link.push_later(frame, Micros::UNTIMED);
                member.is_unflushed |= queued == Queued::Flush;
            } else if member.link.push(frame, since) == Queued::Flush {
                dirty.push(member.link.clone());
            }
        }
        let kind = if fanout.is_opaque() { None } else { check::kind_of(fanout.envelope()) };
        self.count_sent(&rooms, kind, sent, sent * fanout.len());
    }

    /// Tells members here of changes, and ends connections that were replaced.
    pub(super) fn tell_changes(&self, state: &mut State, changes: Vec<Change>, now: Micros) {
        for change in &changes {
            self.tell_change(state, change, now);
        }
        self.tell_moves(state, &changes, now);
    }

    /// Tells of all positions of the changes at once, so that a client that reads slowly is left out until it reads on.
    fn tell_moves(&self, state: &mut State, changes: &[Change], now: Micros) {
        let moved = |change: &Change| match change {
            Change::Moved { client, entity } => {
                let update = state.mirror.member(client)?.entity(entity)?.position()?;
                Some((client.clone(), update.to_vec()))
            }
            _ => None,
        };
        let moves: Vec<(Box<str>, Vec<u8>)> = changes.iter().filter_map(moved).collect();
        if moves.is_empty() {
            return;
        }
        let entries: Vec<_> =
            moves.iter().map(|(client, update)| (&**client, &update[..])).collect();
        let timestamp_ms = time::since_epoch().as_millis() as i64;
        let envelope = write::position_batch(entries, timestamp_ms);
        self.pass_batch(state, &envelope, now);
    }

    fn tell_change(&self, state: &mut State, change: &Change, now: Micros) {
        match change {
            Change::Joined { client, record } => {
                if let Some(rooms) = self.rooms.upgrade() {
                    rooms.counters.joins_seen.add(1);
                }
                self.tell_presence(state, PresenceKind::Join, (client, record), now);
            }
            Change::Updated { client, record } => {
                self.tell_presence(state, PresenceKind::Update, (client, record), now);
            }
            Change::Left { client, entities } => {
                state.positions.forget_member(client);
                // A client that has joined here since still has its entities.
                state.put_positions_of(client);
                self.tell_leave(state, client, entities, now);
            }
            Change::Replaced { client, old_connection, record } => {
                self.end_replaced(state, old_connection, now);
                let is_ours = record::connection(record)
                    .is_some_and(|connection| connection.server == self.server);
                if !is_ours {
                    state.positions.forget_member(client);
                }
            }
            Change::Despawned { client, entity } => {
                self.tell_of(state, client, &write::despawn(entity, client), now);
            }
            Change::Spawned { client, entity } => {
                let member = state.mirror.member(client);
                let snapshot = member.and_then(|member| member.entity(entity)?.snapshot());
                let messages = snapshot.and_then(write::spawn).into_iter().flatten();
                messages.for_each(|message| self.tell_of(state, client, &message, now));
            }
            // Together, by the caller.
            Change::Moved { .. } => {}
        }
    }

    /// Tells all members here but `client` itself.
    pub(super) fn tell_of(&self, state: &mut State, client: &str, envelope: &[u8], now: Micros) {
        let except = state.number_of(client);
        let audience = Audience { except, may_wait: true, ..Audience::default() };
        self.fan_out(state, &mut Fanout::new(envelope), audience, now);
    }

    fn tell_presence(
        &self,
        state: &mut State,
        kind: PresenceKind,
        (client, record): (&str, &str),
        now: Micros,
    ) {
        let record = MemberRecord::of_line(record);
        let data = record.as_ref().map(MemberRecord::presence_data);
        let event = write::presence(kind, client, data.as_ref(), state.mirror.version());
        self.tell_of(state, client, &event, now);
    }

    /// Tells of a leave. A member that is still here was taken for dead by another instance: it joins again once it is
    /// heard, with its entities.
    fn tell_leave(&self, state: &mut State, client: &str, entities: &[Entity], now: Micros) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        rooms.counters.leaves_seen.add(1);
        let here = state.members.iter().filter(|member| member.client.as_str() == client);
        let here = here.filter(|member| member.ending.has_joined());
        let (numbers, living): (Vec<_>, Vec<_>) =
            here.map(|member| (member.number, member.membership.clone())).unzip();
        let except = numbers.first().copied();
        let audience = Audience { except, may_wait: true, ..Audience::default() };
        if let Some(number) = numbers.iter().max().filter(|_| state.mirror.member(client).is_none())
        {
            state.lost.insert(*number, entities.to_vec());
        }
        for entity in entities.iter().filter(|entity| entity.snapshot().is_some()) {
            let despawn = write::despawn(entity.id(), client);
            self.fan_out(state, &mut Fanout::new(&despawn[..]), audience, now);
        }
        let event = write::presence(PresenceKind::Leave, client, None, state.mirror.version());
        self.fan_out(state, &mut Fanout::new(&event[..]), audience, now);
        if !living.is_empty() {
            let tasks = rooms.tasks.clone();
            tasks.spawn(rejoin::join_living(rooms, living));
        }
    }
}

impl State {
    /// Has the presence events flushed that wait.
    pub(super) fn flush_presence(&mut self) {
        let unflushed = self.members.iter_mut().filter(|member| member.is_unflushed);
        self.dirty.extend(unflushed.map(|member| {
            member.is_unflushed = false;
            Arc::clone(&member.link)
        }));
    }

    /// Returns the membership of the connection here that has a member's place.
    pub(super) fn holder(&self, client: &str) -> Option<Weak<Membership>> {
        let number = self.number_of(client)?;
        let holder = self.members.iter().find(|here| here.number == number)?;
        Some(holder.membership.clone())
    }

    /// Returns the connection here that has a member's place.
    fn number_of(&self, client: &str) -> Option<u64> {
        let member = self.mirror.member(client)?;
        let number = member.record().connection()?.number;
        let is_it = |here: &&MemberHere| here.number == number && here.client.as_str() == client;
        self.members.iter().find(is_it).map(|here| here.number)
    }
}

/// Writes to members that a caller makes itself, before it goes on.
const FEW_WRITES: usize = 64;
