//! Members of rooms for workers and operators: lists, counts, and members who are sent away. Knows no mirror.

use futures_util::future::try_join_all;
use wsproxy_proto::{
    names::Id,
    rooms::wire::{Connection, Record},
};

use crate::{
    endpoint::rooms::{
        keeper::{Keeper, KeeperBackend, fields},
        record::MemberRecord,
    },
    store::command::StoreError,
};

/// A member as the store has it.
#[derive(Debug, Clone)]
pub(in crate::endpoint::rooms) struct Listed {
    /// The member's name in the room.
    pub(in crate::endpoint::rooms) client: Id,
    /// Connection that holds the member's place.
    pub(in crate::endpoint::rooms) connection: Connection,
    /// The member's user.
    pub(in crate::endpoint::rooms) user: Box<str>,
    /// Record of the member.
    pub(in crate::endpoint::rooms) record: MemberRecord,
}

impl Listed {
    /// Reads a client id and its record; `None` if no gateway wrote them.
    pub(in crate::endpoint::rooms) fn parse(client: &str, record: &str) -> Option<Self> {
        let record = Record::parse(record)?;
        Some(Self {
            client: Id::parse(client).ok()?,
            connection: record.connection()?,
            user: record.user.into(),
            record: MemberRecord::parse(record.json)?,
        })
    }
}

impl Keeper {
    /// Returns the members of a room.
    ///
    /// # Errors
    /// The store did not answer.
    pub(in crate::endpoint::rooms) async fn members(
        &self,
        room: &Id,
    ) -> Result<Vec<Listed>, StoreError> {
        let members = match &self.backend {
            KeeperBackend::Embedded(rooms, ..) => {
                let rooms = rooms.lock();
                let members = rooms.get(room).map(|state| state.members.iter());
                members.into_iter().flatten().map(|(client, held)| held.field(client)).collect()
            }
            KeeperBackend::Redis(commands) => {
                fields(commands, &self.names.room_members(room)).await?
            }
        };
        let text = |bytes| std::str::from_utf8(bytes).ok();
        let members = members.iter();
        Ok(members
            .filter_map(|(client, record)| Listed::parse(text(client)?, text(record)?))
            .collect())
    }

    /// Returns the numbers of members of rooms, in their order.
    ///
    /// # Errors
    /// The store did not answer.
    pub(in crate::endpoint::rooms) async fn counts(
        &self,
        rooms: &[Id],
    ) -> Result<Vec<u64>, StoreError> {
        match &self.backend {
            KeeperBackend::Embedded(all, ..) => {
                let all = all.lock();
                let count = |room| all.get(room).map_or(0, |state| state.members.len() as u64);
                Ok(rooms.iter().map(count).collect())
            }
            KeeperBackend::Redis(commands) => {
                let count = async |room| commands.hash_len(&self.names.room_members(room)).await;
                try_join_all(rooms.iter().map(count)).await
            }
        }
    }

    /// Returns the number of entities of a room that the store keeps.
    ///
    /// # Errors
    /// The store did not answer.
    pub(in crate::endpoint::rooms) async fn count_entities(
        &self,
        room: &Id,
    ) -> Result<u64, StoreError> {
        match &self.backend {
            // The mirror of a room has them all.
            KeeperBackend::Embedded(..) => Ok(0),
            KeeperBackend::Redis(commands) => {
                commands.hash_len(&self.names.room_entities(room)).await
            }
        }
    }

    /// Removes members that a worker sends away, with all that they left, and publishes their leaves. The later leaves of
    /// their connections find nothing.
    ///
    /// # Errors
    /// The store did not answer. Members may be gone, or go later.
    pub(in crate::endpoint::rooms) async fn expel(
        &self,
        room: &Id,
        members: &[(Id, Connection)],
    ) -> Result<(), StoreError> {
        let KeeperBackend::Redis(commands) = &self.backend else {
            return self.leave(room, members, &[]).await.map(drop);
        };
        for some in members.chunks(EXPELLED_AT_ONCE) {
            self.leave_in_redis(commands, room, (some, &[ALL_FIELDS.to_owned()])).await?;
        }
        Ok(())
    }
}

/// Most members that one script removes.
const EXPELLED_AT_ONCE: usize = 500;

/// Argument of the script for all fields of the members.
const ALL_FIELDS: &str = "*";
