//! Messages of members here: applied to the mirror, sent to the members here, and published for other instances.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::{
    rooms::{
        check::{Body, Checked, Event as PresenceKind},
        mirror::{Origin, Refused},
        snapshot,
        stamp::{self, Stamp},
        wire::{self, Form as WireForm},
        write,
    },
    ws::frame::Kind,
};

use crate::{
    bus::publish::{BusError, Keep, Outcome, Publish, Receipt, RoomOp, RoomWrite},
    endpoint::rooms::{
        fanout::Fanout,
        keeper::KEYS_TTL,
        member::Membership,
        record::MemberRecord,
        room::{Room, State, tell::Audience},
    },
};

/// A message of a member here.
pub(in crate::endpoint::rooms) struct Said<'a> {
    /// The sender.
    pub(in crate::endpoint::rooms) member: &'a Membership,
    /// The message.
    pub(in crate::endpoint::rooms) checked: &'a Checked<'a>,
    /// The bytes of the message.
    pub(in crate::endpoint::rooms) envelope: &'a [u8],
    /// Present time.
    pub(in crate::endpoint::rooms) now: Micros,
}

/// Publishes on the bus, within the share of the sender.
pub(in crate::endpoint::rooms) type PublishTo<'a> =
    &'a mut dyn FnMut(Publish) -> Result<(), BusError>;

/// The reason why a message was not passed on.
#[derive(Debug, thiserror::Error)]
pub(in crate::endpoint::rooms) enum NotSaid {
    /// The room does not take it.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// State is for all members.
    #[error("this kind of message is for all members: it has no to")]
    ForOne,
    /// The bus did not take it; the members here have it.
    #[error("the message may not have reached members at other instances")]
    Bus(#[from] BusError),
}

impl NotSaid {
    /// Returns the code of the Error for the sender.
    pub(in crate::endpoint::rooms) const fn code(&self) -> &'static str {
        match self {
            Self::Refused(Refused::Foreign) => "wrong_sender",
            Self::Refused(Refused::MemberFull | Refused::StateFull) => "room_state_full",
            Self::Refused(Refused::TooLarge) => "too_large",
            Self::Refused(Refused::Unknown) => "unknown_entity",
            Self::Refused(Refused::NotMember | Refused::Overtaken) => "not_member",
            Self::ForOne => "invalid_message",
            Self::Bus(_) => "bus_unavailable",
        }
    }

    /// Returns whether no well-meaning client causes it.
    pub(in crate::endpoint::rooms) const fn is_strike(&self) -> bool {
        matches!(self, Self::Refused(Refused::Foreign) | Self::ForOne)
    }
}

impl Room {
    /// Passes a message on to all other members.
    ///
    /// # Errors
    /// See [`NotSaid`].
    pub(in crate::endpoint::rooms) fn say(
        &self,
        said: Said<'_>,
        publish: PublishTo<'_>,
    ) -> Result<(), NotSaid> {
        let Said { member, checked, envelope, now } = said;
        let client = member.client.as_str();
        let is_state = !matches!(checked.body, Body::Chat { .. } | Body::Custom { .. });
        if is_state && checked.to.is_some() {
            return Err(NotSaid::ForOne);
        }
        let mut state = self.state.lock();
        let mut doubted = None;
        let op = match checked.body {
            Body::Position { entity, update } => {
                let moved = self.moved(&mut state, member, (entity, update), now);
                self.release(state, now);
                return moved;
            }
            Body::Spawn { entity, spawn, .. } => {
                let snapshot = snapshot::spawned(spawn, client).ok_or(Refused::Unknown)?;
                state.mirror.spawn(Origin::Here, client, entity, &snapshot)?;
                Some(RoomOp::Spawn { entity: entity.into(), snapshot: snapshot.into() })
            }
            Body::Update { entity, update } => {
                doubted = state.mirror.is_doubted(client, entity).then_some(entity);
                let snapshot = state.mirror.update(Origin::Here, client, entity, update)?;
                let snapshot = Bytes::copy_from_slice(snapshot);
                Some(RoomOp::Spawn { entity: entity.into(), snapshot })
            }
            Body::Despawn { entity } => {
                state.mirror.despawn(Origin::Here, client, entity)?;
                state.positions.forget_entity(client, entity);
                Some(RoomOp::Despawn { entity: entity.into() })
            }
            _ => None,
        };
        let stamped = self.stamped(member, checked.stamp, envelope);
        let except = Some(member.connection.number);
        let audience = Audience { except, to: checked.to, ..Audience::default() };
        let fanout = Fanout::new(&stamped[wire::HEAD_BYTES..]).reliable(checked.reliable);
        self.fan_out(&mut state, &mut { fanout }, audience, now);
        let keep = op.map_or(Keep::Nothing, |op| self.keep(member, op));
        // Under the lock: messages of one sender go to other instances in the order in which they came.
        let published = self.publish(&mut state, member, (stamped.into(), keep), publish);
        if let Some(entity) = doubted {
            // Other instances may not know the entity that was changed.
            self.publish_entity(&mut state, member, entity);
        }
        self.release(state, now);
        Ok(published?)
    }

    /// Passes a message on that is no envelope.
    ///
    /// # Errors
    /// The bus did not take it; the members here have it.
    pub(in crate::endpoint::rooms) fn say_opaque(
        &self,
        member: &Membership,
        kind: Kind,
        message: &[u8],
        now: Micros,
        publish: PublishTo<'_>,
    ) -> Result<(), BusError> {
        let form = match kind {
            Kind::Text => WireForm::OpaqueText,
            Kind::Binary => WireForm::Opaque,
        };
        let mut state = self.state.lock();
        let except = Some(member.connection.number);
        let audience = Audience { except, ..Audience::default() };
        self.fan_out(&mut state, &mut Fanout::opaque(kind, message), audience, now);
        let payload = wire::message(member.connection, form, message);
        let published = self.publish(&mut state, member, (payload, Keep::Nothing), publish);
        self.release(state, now);
        published
    }

    /// Sets the presence data of a member, and tells all other members.
    ///
    /// # Errors
    /// See [`NotSaid`].
    pub(in crate::endpoint::rooms) fn set_presence(
        &self,
        member: &Membership,
        presence: &[u8],
        now: Micros,
        publish: PublishTo<'_>,
    ) -> Result<(), NotSaid> {
        let client = member.client.as_str();
        let mut state = self.state.lock();
        // The room judges first: what it does not take must not come with a later join either.
        state.mirror.presence(Origin::Here, client, presence)?;
        let json = member.set_presence(presence);
        let stamped = self.presence_of(member, &json);
        let except = Some(member.connection.number);
        let audience = Audience { except, may_wait: true, ..Audience::default() };
        self.fan_out(&mut state, &mut Fanout::new(&stamped[wire::HEAD_BYTES..]), audience, now);
        let keep = self.keep(member, RoomOp::Presence { json });
        let published = self.publish(&mut state, member, (stamped.into(), keep), publish);
        self.release(state, now);
        Ok(published?)
    }

    /// Returns the message that tells of a member's presence data, behind the head of a message between instances.
    pub(super) fn presence_of(&self, member: &Membership, json: &str) -> Vec<u8> {
        let data = MemberRecord::parse(json).map(|record| record.presence_data());
        let client = member.client.as_str();
        let event = write::presence(PresenceKind::Update, client, data.as_ref(), 0);
        self.stamped(member, Stamp::default(), &event)
    }

    /// Returns an envelope with its stamp, behind the head of a message between instances.
    fn stamped(&self, member: &Membership, with: Stamp, envelope: &[u8]) -> Vec<u8> {
        let client = member.client.as_str();
        let capacity = wire::HEAD_BYTES + envelope.len() + client.len() + STAMP_BYTES;
        let mut head = bytes::BytesMut::with_capacity(capacity);
        wire::write_message_head(member.connection, WireForm::Envelope, &mut head);
        let mut stamped = Vec::from(head);
        stamp::stamp(envelope, with, client, None, &mut stamped);
        stamped
    }

    /// Returns the change of the member's state, to be made with the publish.
    pub(super) fn keep(&self, member: &Membership, op: RoomOp) -> Keep {
        Keep::Room(Box::new(RoomWrite {
            keys: member.rooms.keeper.keys(&self.id),
            client: member.client.as_str().into(),
            connection: member.connection.to_string(),
            ttl: KEYS_TTL,
            op,
        }))
    }

    /// Publishes a message for other instances. A change of state that the bus does not take is owed to them.
    pub(super) fn publish(
        &self,
        state: &mut State,
        member: &Membership,
        (payload, keep): (Bytes, Keep),
        publish: PublishTo<'_>,
    ) -> Result<(), BusError> {
        if !member.rooms.keeper.is_shared() {
            // There is no other instance.
            return Ok(());
        }
        member.rooms.counters.published_shared.add(1);
        let receipt = self.state_receipt(state, &keep);
        let told = receipt.clone().map(|receipt| receipt as Arc<dyn Receipt>);
        let published =
            publish(Publish { channel: Arc::clone(&self.channel), payload, keep, receipt: told });
        if published.is_err()
            && let Some(receipt) = receipt
        {
            state.owe(&receipt.client, receipt.entity.as_deref(), clock::now());
        }
        published
    }

    /// Returns the receipt of a change of state; `None` for all else.
    fn state_receipt(&self, state: &State, keep: &Keep) -> Option<Arc<StateReceipt>> {
        let Keep::Room(write) = keep else { return None };
        let entity = match &write.op {
            RoomOp::Spawn { entity, .. } | RoomOp::Despawn { entity } => Some(entity.clone()),
            RoomOp::Presence { .. } => None,
        };
        let (room, client) = (self.me.clone(), write.client.clone());
        let connection = write.connection.clone();
        let joined = state.mirror.member(&client).map_or(0, |member| member.joined());
        Some(Arc::new(StateReceipt { room, client, connection, joined, entity }))
    }
}

/// Receipt of a change of state.
pub(super) struct StateReceipt {
    room: Weak<Room>,
    pub(super) client: Box<str>,
    /// Connection that made the change, as records have it.
    pub(super) connection: String,
    /// Presence version at which the member had joined.
    pub(super) joined: u64,
    /// The entity; `None` for presence data.
    pub(super) entity: Option<Box<str>>,
}

impl Receipt for StateReceipt {
    fn published(&self, outcome: Outcome) {
        if let Outcome::Received(_) | Outcome::Stored { .. } = outcome {
            return;
        }
        let Some(room) = self.room.upgrade() else { return };
        if outcome == Outcome::Kept {
            return room.refused(self);
        }
        // The store may lack the change, and other instances with it.
        let now = clock::now();
        let mut state = room.state.lock();
        state.owe(&self.client, self.entity.as_deref(), now);
        room.release(state, now);
    }
}

/// Room for the stamp of an envelope, beside the client's id.
const STAMP_BYTES: usize = 32;
