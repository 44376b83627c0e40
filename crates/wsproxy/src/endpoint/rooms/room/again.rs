//! State of members here that is published again, all of it: after a member has joined again, and where other instances may
//! lack a change.

use bytes::Bytes;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::rooms::{
    mirror::{Entity, Member, Origin},
    wire, write,
};

use crate::{
    bus::publish::RoomOp,
    endpoint::rooms::{
        member::Membership,
        room::{Room, State, say::StateReceipt},
    },
};

impl Room {
    /// Returns the entities of a member here with their snapshots, those among them that it lost when it was taken for dead.
    pub(in crate::endpoint::rooms) fn snapshots_of(
        &self,
        member: &Membership,
    ) -> Vec<(Box<str>, Bytes)> {
        let state = self.state.lock();
        let mut entities = state.snapshots_of(member.client.as_str());
        for lost in state.lost.get(&member.connection.number).into_iter().flatten() {
            if let Some(snapshot) = lost.snapshot()
                && !entities.iter().any(|(id, _)| **id == *lost.id())
            {
                entities.push((lost.id().into(), Bytes::copy_from_slice(snapshot)));
            }
        }
        entities
    }

    /// Notes that a member here has joined again with the entities `written`, which other instances have heard of. Those
    /// that were lost here come back. Publishes the entities whose snapshots differ from those that were written, and the
    /// end of those that are gone.
    pub(in crate::endpoint::rooms) fn joined_again(
        &self,
        member: &Membership,
        written: &[(Box<str>, Bytes)],
    ) {
        let (client, now) = (member.client.as_str(), clock::now());
        let mut state = self.state.lock();
        let lost = state.lost.remove(&member.connection.number).unwrap_or_default();
        let owner = (client, member.connection.number);
        lost.iter().for_each(|entity| self.restore(&mut state, owner, entity, now));
        for (entity, _) in written {
            state.mirror.confirm(client, entity);
        }
        let present = state.snapshots_of(client);
        let newer = present.iter().filter(|entity| !written.contains(entity));
        let is_gone =
            |(id, _): &&(Box<str>, Bytes)| !present.iter().any(|(present, _)| present == id);
        for (entity, _) in newer.chain(written.iter().filter(is_gone)) {
            self.publish_entity(&mut state, member, entity);
        }
        self.release(state, now);
    }

    /// Brings an entity of a member here back, and tells the others here, whom the leave has told of its end.
    fn restore(
        &self,
        state: &mut State,
        (client, number): (&str, u64),
        lost: &Entity,
        now: Micros,
    ) {
        let held = state.mirror.member(client).and_then(|member| member.entity(lost.id()));
        // The client may have changed it since.
        let has_snapshot = held.is_some_and(|held| held.snapshot().is_some());
        let has_position = held.is_some_and(|held| held.position().is_some());
        if let Some(snapshot) = lost.snapshot().filter(|_| !has_snapshot)
            && state.mirror.spawn(Origin::Here, client, lost.id(), snapshot).is_ok()
            && let Some(messages) = write::spawn(snapshot)
        {
            messages.for_each(|message| self.tell_of(state, client, &message, now));
        }
        if let Some(position) = lost.position().filter(|_| !has_position)
            && state.mirror.position(client, lost.id(), position).is_ok()
        {
            state.positions.put((client, number), lost.id(), position);
        }
    }

    /// Publishes an entity of a member again, as the mirror has it.
    pub(super) fn tell_again(&self, member: &Membership, entity: &str) {
        let mut state = self.state.lock();
        self.publish_entity(&mut state, member, entity);
        self.release(state, clock::now());
    }

    /// Publishes the presence data of a member again, as the mirror has them.
    pub(super) fn tell_presence_again(&self, member: &Membership) {
        let mut state = self.state.lock();
        let held = state.mirror.member(member.client.as_str());
        if let Some(json) = held.map(|held| held.record().json.to_owned()) {
            let stamped = self.presence_of(member, &json);
            let keep = self.keep(member, RoomOp::Presence { json });
            let publish = &mut |publish| member.rooms.hub.publish(publish);
            // Publishes that the bus does not take are owed again.
            drop(self.publish(&mut state, member, (stamped.into(), keep), publish));
        }
        self.release(state, clock::now());
    }

    /// Publishes an entity of a member, or its end, as the mirror has it. Called under the lock, so that later changes come
    /// behind it.
    pub(super) fn publish_entity(&self, state: &mut State, member: &Membership, entity: &str) {
        let client = member.client.as_str();
        let held = state.mirror.member(client).and_then(|of| of.entity(entity));
        let snapshot = held.and_then(|entity| entity.snapshot()).map(Bytes::copy_from_slice);
        let position = held.and_then(|entity| entity.position()).map(<[u8]>::to_vec);
        let (payload, op) = match snapshot {
            Some(snapshot) => {
                let payload = wire::entity(member.connection, &snapshot);
                (payload, RoomOp::Spawn { entity: entity.into(), snapshot })
            }
            None => {
                let despawn = write::despawn(entity, client);
                let payload = wire::message(member.connection, wire::Form::Envelope, &despawn);
                (payload, RoomOp::Despawn { entity: entity.into() })
            }
        };
        state.mirror.confirm(client, entity);
        let is_end = matches!(op, RoomOp::Despawn { .. });
        let keep = self.keep(member, op);
        let publish = &mut |publish| member.rooms.hub.publish(publish);
        // Publishes that the bus does not take are owed again.
        drop(self.publish(state, member, (payload, keep), publish));
        if let Some(position) = position.filter(|_| is_end) {
            // The entity is over, but the client has moved something of its name since. The end takes that position too.
            let owner = (client, member.connection.number);
            state.positions.put_for_others(owner, entity, &position);
        }
    }

    /// Notes that a change of an entity was refused, because the connection does not hold the member's place.
    pub(super) fn refused(&self, refused: &StateReceipt) {
        let StateReceipt { client, connection, joined, entity, .. } = refused;
        let Some(entity) = entity else { return };
        let now = clock::now();
        let mut state = self.state.lock();
        let is_again = state.mirror.doubt(client, entity, (connection, *joined), now.0);
        let holder = if is_again { state.holder(client) } else { None };
        self.release(state, now);
        // Outside the lock, which the last owner of a membership takes.
        if let Some(holder) = holder.and_then(|holder| holder.upgrade()) {
            self.tell_again(&holder, entity);
        }
    }
}

impl State {
    /// Returns the entities of a member with their snapshots.
    fn snapshots_of(&self, client: &str) -> Vec<(Box<str>, Bytes)> {
        let entities = self.mirror.member(client).map(|member| member.entities());
        let snapshots = entities.into_iter().flatten().filter_map(|entity| {
            Some((entity.id().into(), Bytes::copy_from_slice(entity.snapshot()?)))
        });
        snapshots.collect()
    }

    /// Has the positions of a member here sent to all, and written again.
    pub(super) fn put_positions_of(&mut self, client: &str) {
        let Self { mirror, positions, .. } = self;
        let Some((number, placed)) = positions_of(mirror.member(client)) else { return };
        for (entity, position) in placed {
            positions.put((client, number), entity, position);
        }
    }

    /// Has the positions of a member here published and written again, which the others here have.
    pub(super) fn share_positions_of(&mut self, client: &str) {
        let Self { mirror, positions, .. } = self;
        let Some((number, placed)) = positions_of(mirror.member(client)) else { return };
        for (entity, position) in placed {
            positions.put_for_others((client, number), entity, position);
        }
    }

    /// Has the positions of all members here published and written again.
    pub(super) fn share_positions(&mut self) {
        let Self { mirror, positions, .. } = self;
        for (client, member) in mirror.members() {
            let Some((number, placed)) = positions_of(Some(member)) else { continue };
            for (entity, position) in placed {
                positions.put_for_others((client, number), entity, position);
            }
        }
    }
}

/// Returns the entities of a member here that have a position, and the number of its connection.
fn positions_of(member: Option<&Member>) -> Option<(u64, impl Iterator<Item = (&str, &[u8])>)> {
    let member = member.filter(|member| member.is_here())?;
    let number = member.record().connection()?.number;
    let placed = member.entities().filter_map(|entity| Some((entity.id(), entity.position()?)));
    Some((number, placed))
}
