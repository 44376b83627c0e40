//! Messages from the room's channel: of other instances, of the scripts, and of workers.

use tracing::{debug, warn};
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::{
    rooms::{
        check::{self, Body, Event as PresenceKind},
        mirror::Origin,
        snapshot, stamp, text,
        wire::{Connection, Form as WireForm, Frame, Kind as FrameKind, WireError},
        write::{self, PublishedBatch, PublishedEntry},
    },
    ws::frame::Kind,
};

use crate::{
    config::rooms::Validate,
    endpoint::rooms::{
        Rooms,
        fanout::Fanout,
        room::{Room, State, tell::Audience},
    },
    hub::inbox::Inbox,
    telemetry::time,
};

impl Inbox for Room {
    fn message(&self, payload: &[u8]) {
        let Some(rooms) = self.rooms.upgrade() else { return };
        let now = clock::now();
        let mut state = self.state.lock();
        match Frame::parse(payload) {
            Ok(Some(frame)) => self.on_frame(&rooms, &mut state, &frame, now),
            Ok(None) => self.on_worker(&rooms, &mut state, payload, now),
            Err(error) => self.on_unreadable(&rooms, &error),
        }
        self.settle(&mut state);
    }

    fn flush(&self, now: Micros) {
        let state = self.state.lock();
        self.release(state, now);
    }

    fn lost(&self) {
        self.state.lock().mirror.lose_link();
    }

    fn recovered(&self) {
        let now = clock::now();
        let mut state = self.state.lock();
        state.mirror.want_reading(now.0);
        // Positions that were published meanwhile may be lost.
        state.positions.owe_all();
        self.release(state, now);
    }
}

impl Room {
    fn on_frame(&self, rooms: &Rooms, state: &mut State, frame: &Frame<'_>, now: Micros) {
        match frame.kind {
            FrameKind::Message { .. } | FrameKind::Batch(_) | FrameKind::Entity(_)
                if frame.from.server == self.server => {}
            FrameKind::Message { form: WireForm::Envelope, payload } => {
                self.on_message(state, payload, now);
            }
            FrameKind::Message { form, payload } => {
                let kind = match form {
                    WireForm::OpaqueText => Kind::Text,
                    _ => Kind::Binary,
                };
                self.fan_out(state, &mut Fanout::opaque(kind, payload), Audience::default(), now);
            }
            FrameKind::Batch(body) => match PublishedBatch::parse(body) {
                Some(batch) => self.on_batch(state, batch, frame.from.server, now),
                None => self.on_unreadable(rooms, &WireError::BadBody),
            },
            FrameKind::Entity(snapshot) => self.on_entity(state, snapshot, now),
            FrameKind::Join { .. } | FrameKind::Leave { .. } | FrameKind::Replaced { .. } => {
                let mut changes = Vec::new();
                state.mirror.apply(&frame.kind, now.0, &mut changes);
                self.tell_changes(state, changes, now);
            }
            FrameKind::Kick { client, reason } => {
                rooms.counters.kicked.add(1);
                self.end_members(state, Some(client), reason, now);
            }
            FrameKind::Close { reason } => self.end_members(state, None, reason, now),
        }
    }

    fn on_unreadable(&self, rooms: &Rooms, error: &WireError) {
        rooms.counters.bad_frames.add(1);
        if let Some(left_out) = rooms.counters.bad_frame_lines.pass() {
            warn!(room = self.id.as_str(), %error, left_out, "A message between instances cannot be read.");
        }
    }

    /// Takes positions of members at the instance `server`. An instance may have told them of members that are elsewhere by
    /// now, or have another connection: what is of these is old.
    fn on_batch(
        &self,
        state: &mut State,
        PublishedBatch { envelope, mut entries }: PublishedBatch<'_>,
        server: u64,
        now: Micros,
    ) {
        let count = entries.len();
        entries.retain(|PublishedEntry { connection, sender, update }| {
            let from = Connection { server, number: *connection };
            // A position of a member that is not known yet waits for the reading.
            check::entity_of(update)
                .is_some_and(|entity| state.mirror.hear_position(from, sender, entity, update))
        });
        if entries.len() == count {
            return self.pass_batch(state, envelope, now);
        }
        let kept: Vec<_> = entries.iter().map(|entry| (entry.sender, entry.update)).collect();
        if !kept.is_empty() {
            let timestamp_ms = time::since_epoch().as_millis() as i64;
            let envelope = write::position_batch(kept, timestamp_ms);
            self.pass_batch(state, &envelope, now);
        }
    }

    /// Takes a message of a member at another instance, which has checked it.
    fn on_message(&self, state: &mut State, envelope: &[u8], now: Micros) {
        let Ok(checked) = check::read(envelope) else {
            debug!(room = self.id.as_str(), "A message of another instance is invalid.");
            return;
        };
        let (mirror, sender) = (&mut state.mirror, checked.sender);
        // Messages that the mirror does not take are still for clients: the instance of its sender has judged it.
        match checked.body {
            Body::Spawn { entity, spawn, .. } => {
                if let Some(snapshot) = snapshot::spawned(spawn, sender) {
                    let _ = mirror.spawn(Origin::Channel, sender, entity, &snapshot);
                }
            }
            Body::Update { entity, update } => {
                let _ = mirror.update(Origin::Channel, sender, entity, update);
            }
            Body::Despawn { entity } => {
                let _ = mirror.despawn(Origin::Channel, sender, entity);
            }
            Body::Presence { event: PresenceKind::Update, data: Some(data), .. } => {
                let _ = mirror.presence(Origin::Channel, sender, data);
            }
            _ => {}
        }
        let may_wait = matches!(checked.body, Body::Presence { .. });
        let audience = Audience { to: checked.to, may_wait, ..Audience::default() };
        let fanout = Fanout::new(envelope).reliable(checked.reliable);
        self.fan_out(state, &mut { fanout }, audience, now);
    }

    /// Takes all of an entity of a member at another instance. Most are known, and no client is told of these.
    fn on_entity(&self, state: &mut State, snapshot: &[u8], now: Micros) {
        let (Some((owner, entity)), Some(messages)) =
            (snapshot::names(snapshot), write::spawn(snapshot))
        else {
            debug!(room = self.id.as_str(), "An entity of another instance is invalid.");
            return;
        };
        let held = state.mirror.member(&owner).and_then(|member| member.entity(&entity));
        let is_known = held.and_then(|held| held.snapshot()) == Some(snapshot);
        if state.mirror.spawn(Origin::Channel, &owner, &entity, snapshot).is_ok() && !is_known {
            messages.for_each(|message| {
                self.fan_out(state, &mut Fanout::new(&message[..]), Audience::default(), now);
            });
        }
    }

    /// Takes a message of a worker: an envelope without a sender, in protobuf or JSON. It is never state.
    fn on_worker(&self, rooms: &Rooms, state: &mut State, payload: &[u8], now: Micros) {
        let binary;
        let envelope = match check::read(payload) {
            Ok(_) => payload,
            Err(_) => match text::to_binary(payload) {
                Ok(translated) => {
                    binary = translated;
                    &binary
                }
                Err(_) => return self.on_opaque_worker(rooms, state, payload, now),
            },
        };
        let Ok(checked) = check::read(envelope) else {
            return self.on_opaque_worker(rooms, state, payload, now);
        };
        rooms.counters.from_workers.add(1);
        let mut stamped = Vec::new();
        stamp::stamp(envelope, checked.stamp, "", None, &mut stamped);
        let audience = Audience { to: checked.to, ..Audience::default() };
        let fanout = Fanout::new(&stamped[..]).reliable(checked.reliable);
        self.fan_out(state, &mut { fanout }, audience, now);
    }

    fn on_opaque_worker(&self, rooms: &Rooms, state: &mut State, payload: &[u8], now: Micros) {
        if rooms.config.validate == Validate::Strict {
            rooms.counters.bad_frames.add(1);
            if let Some(left_out) = rooms.counters.bad_frame_lines.pass() {
                warn!(
                    room = self.id.as_str(),
                    bytes = payload.len(),
                    left_out,
                    "A worker's message is no envelope."
                );
            }
            return;
        }
        let kind = if std::str::from_utf8(payload).is_ok() { Kind::Text } else { Kind::Binary };
        self.fan_out(state, &mut Fanout::opaque(kind, payload), Audience::default(), now);
    }
}
