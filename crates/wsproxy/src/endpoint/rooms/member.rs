//! A connection's membership in a room, from before its join until its leave.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use wsproxy_conn::Link;
use wsproxy_proto::{names::Id, rooms::wire::Connection};

use crate::{
    endpoint::rooms::{
        Rooms,
        counters::JoinResult,
        keeper::{Entities, Join, Joined},
        leaving::{self, Leave},
        record::MemberRecord,
        table::RoomHold,
    },
    http::rejection::Rejection,
    registry::rooms::RoomMembership,
    store::command::StoreError,
};

/// Membership of a connection. Its last owner ends it by dropping it, so that no write comes behind the leave.
pub(super) struct Membership {
    pub(super) rooms: Arc<Rooms>,
    pub(super) room: RoomHold,
    /// The member's name in the room.
    pub(super) client: Id,
    pub(super) user: Id,
    pub(super) connection: Connection,
    /// JSON of the member's record, as it was written last. Most members never change it.
    record: Mutex<Box<str>>,
    ending: Arc<Ending>,
    /// The room in the registry; taken by the leave.
    entry: Option<RoomMembership>,
}

/// Effect of the end of a membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeaveKind {
    /// Nothing: the connection was never a member.
    Nothing = 0,
    /// The member leaves at once.
    AtOnce = 1,
    /// The member leaves after the grace, unless it is back.
    AfterGrace = 2,
    /// As [`Self::AtOnce`], while the join is not answered.
    InDoubt = 3,
    /// As [`Self::AtOnce`], for good: a worker has sent the member away, which never joins again.
    SentAway = 4,
    /// As [`Self::AtOnce`]: another connection has the member's place, so that this one must not join again.
    Replaced = 5,
}

/// A membership's [`LeaveKind`]. The room shares it: a room that is locked must not become the last owner of a
/// membership.
#[derive(Debug, Default)]
pub(super) struct Ending(AtomicU8);

impl Ending {
    /// Sets what the end of the membership does. A member that was sent away stays so.
    pub(super) fn set(&self, leave: LeaveKind) {
        let is_open = |now| (now != LeaveKind::SentAway as u8).then_some(leave as u8);
        let _ = self.0.fetch_update(Relaxed, Relaxed, is_open);
    }

    /// Notes that the join was answered. A newer connection may have taken the place since.
    fn joined(&self) {
        let (doubt, joined) = (LeaveKind::InDoubt as u8, LeaveKind::AtOnce as u8);
        let _ = self.0.compare_exchange(doubt, joined, Relaxed, Relaxed);
    }

    /// Returns whether the connection has joined, and may join again.
    pub(super) fn has_joined(&self) -> bool {
        let leave = self.0.load(Relaxed);
        leave == LeaveKind::AtOnce as u8 || leave == LeaveKind::AfterGrace as u8
    }

    fn is(&self, leave: LeaveKind) -> bool {
        self.0.load(Relaxed) == leave as u8
    }
}

impl Membership {
    /// Makes the membership of a connection that is about to join. From now on it hears wishes to end it.
    pub(super) fn new(
        rooms: &Arc<Rooms>,
        room: RoomHold,
        (client, user): (Id, Id),
        link: &Arc<Link>,
        record: MemberRecord,
    ) -> Result<Arc<Self>, Rejection> {
        let connection = rooms.next_connection();
        let registry = rooms.registry.as_ref();
        let registry = registry.ok_or_else(|| Rejection::internal("Rooms are not served."))?;
        let entry = Some(registry.enter(&room.id, connection.number));
        Ok(Arc::new_cyclic(|me| {
            let ending = Arc::default();
            room.add(connection.number, &client, link, (me, &ending));
            let record = Mutex::new(record.to_json().into());
            let rooms = Arc::clone(rooms);
            Self { rooms, room, client, user, connection, record, ending, entry }
        }))
    }

    /// Joins the room.
    ///
    /// # Errors
    /// 409: another user has the name. 503: the room is full, or the store does not answer.
    pub(super) async fn join(&self) -> Result<(), Rejection> {
        // A join whose answer is lost may take effect, so the leave must run.
        self.set_leave(LeaveKind::InDoubt);
        let joined = self.write_counted(None).await;
        match joined? {
            Joined::Held { .. } => {
                self.ending.joined();
                Ok(())
            }
            Joined::Taken => {
                self.set_leave(LeaveKind::Nothing);
                Err(Rejection::taken("Another user has this client_id in the room."))
            }
            Joined::Replaced => {
                Err(Rejection::replaced("A newer connection of the client took its place."))
            }
            Joined::Full => {
                self.set_leave(LeaveKind::Nothing);
                Err(Rejection::room_full("The room has as many members as it may.")
                    .after(FULL_WAIT))
            }
        }
    }

    /// Sets presence data in the record. Returns the record's JSON, which is to be written.
    pub(super) fn set_presence(&self, presence: &[u8]) -> String {
        let mut held = self.record.lock();
        let Some(mut record) = MemberRecord::parse(&held) else { return held.to_string() };
        record.set_presence(presence);
        let json = record.to_json();
        *held = json.as_str().into();
        json
    }

    /// Notes that another connection has the member's place. The leave still runs: after Redis lost its data only the
    /// store knows who has the place.
    pub(super) fn replace(&self) {
        self.set_leave(LeaveKind::Replaced);
    }

    /// Writes the record of the member again with its entities, since Redis may have lost them.
    ///
    /// # Errors
    /// The store did not answer.
    pub(super) async fn join_again(&self, entities: Entities<'_>) -> Result<Joined, StoreError> {
        self.write_counted(Some(entities)).await
    }

    async fn write_counted(&self, again: Option<Entities<'_>>) -> Result<Joined, StoreError> {
        let joined = self.write(again).await;
        let result = match &joined {
            Ok(Joined::Held { .. }) if again.is_some() => JoinResult::Again,
            Ok(Joined::Held { before: None, .. }) => JoinResult::Joined,
            Ok(Joined::Held { .. }) => JoinResult::Replaced,
            Ok(Joined::Taken) => JoinResult::Taken,
            Ok(Joined::Full) => JoinResult::Full,
            Ok(Joined::Replaced) => JoinResult::Overtaken,
            Err(_) => JoinResult::Failed,
        };
        self.rooms.counters.joins[result as usize].add(1);
        joined
    }

    /// Writes the record of the member, and notes the change in the room here.
    async fn write(&self, again: Option<Entities<'_>>) -> Result<Joined, StoreError> {
        let registry = self.rooms.registry.as_ref().ok_or(StoreError::Closed)?;
        registry.entered(self.room.id.as_str()).await?;
        let json = self.record.lock().clone();
        let join = Join {
            room: &self.room.id,
            client: &self.client,
            connection: self.connection,
            user: &self.user,
            json: &json,
            again,
        };
        let joined = self.rooms.keeper.join(join).await?;
        if let Joined::Held { version, before } = joined
            && !self.room.joined(join, version, before)
        {
            return Ok(Joined::Replaced);
        }
        Ok(joined)
    }

    /// Returns whether the connection has joined.
    pub(super) fn has_joined(&self) -> bool {
        self.ending.has_joined()
    }

    /// Sets what the end of the membership does.
    pub(super) fn set_leave(&self, leave: LeaveKind) {
        self.ending.set(leave);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.room.remove(self.connection.number);
        if self.ending.is(LeaveKind::Nothing) {
            return;
        }
        let Some(entry) = self.entry.take() else { return };
        let leave = Leave {
            entry,
            room: self.room.clone(),
            client: self.client.clone(),
            connection: self.connection,
            is_back: false,
        };
        if self.ending.is(LeaveKind::AfterGrace) {
            self.rooms.leaving.wait(leave, self.rooms.config.leave_grace);
        } else {
            leaving::leave_all(&self.rooms, vec![leave]);
        }
    }
}

/// Wait that a client is told where a room is full.
pub(super) const FULL_WAIT: Duration = Duration::from_secs(5);
