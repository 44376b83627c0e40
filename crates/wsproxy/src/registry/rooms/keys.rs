//! The rooms of instances as Redis has them: a hash for each instance, by room.

use std::sync::Arc;

use bytes::Bytes;
use wsproxy_proto::names::Names;

use crate::{
    redis::words::milliseconds,
    registry::{
        commands::{Commands, SCAN_START},
        lease::{HASH_TTL_MIN, LeaseSettings},
        rooms::{RoomIds, local::Write},
    },
    store::command::StoreError,
};

/// Commands on the hashes of rooms.
pub(super) struct RoomKeys {
    commands: Commands,
    names: Names,
    server_id: Arc<str>,
    /// Number of this run of the instance, the value of its fields: so a reaper does not remove those of a later run.
    run: Bytes,
    /// Milliseconds for which the hash of an instance lives that does not renew it.
    ttl: String,
}

/// A field of an instance's hash: a room and the run of the instance.
pub(super) type Field = (Bytes, Bytes);

impl RoomKeys {
    pub(super) fn new(commands: Commands, settings: &LeaseSettings, server: u64) -> Self {
        // The hash of a lost instance must live until another instance looks.
        let ttl = (settings.timing.lease * 4).max(HASH_TTL_MIN);
        Self {
            commands,
            names: settings.names.clone(),
            server_id: Arc::clone(&settings.server_id),
            run: format!("{server:016x}").into(),
            ttl: milliseconds(ttl).to_string(),
        }
    }

    /// Returns the number of connections for commands so far.
    pub(super) fn connections_made(&self) -> u64 {
        self.commands.connections_made()
    }

    /// Returns the number of rooms that Redis has of this instance, and renews their time to live.
    pub(super) async fn count_own(&self) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.names.server_rooms(&self.server_id), &self.ttl).await
    }

    /// Writes changes of this instance.
    pub(super) async fn write(&self, writes: &[Write]) -> Result<(), StoreError> {
        let name = |write: &Write| Bytes::copy_from_slice(write.room.as_bytes());
        let entered = writes.iter().filter(|write| write.is_here);
        let entered: Vec<_> = entered.map(|write| (name(write), self.run.clone())).collect();
        let left = writes.iter().filter(|write| !write.is_here).map(name);
        let key = self.names.server_rooms(&self.server_id);
        self.commands.change_hash(&key, &self.ttl, entered.into_iter(), left).await
    }

    /// Reads a piece of this instance's rooms, and the cursor of the next piece.
    pub(super) async fn scan_own(&self, cursor: &Bytes) -> Result<(Bytes, Vec<Field>), StoreError> {
        self.commands.scan(&self.names.server_rooms(&self.server_id), cursor).await
    }

    /// Returns at most some `count` rooms of all living instances, or a few hundred more.
    pub(super) async fn rooms(&self, count: usize) -> Result<RoomIds, StoreError> {
        let mut found = RoomIds::new();
        for server in self.commands.living_servers(&self.names).await? {
            let (key, mut cursor) = (self.names.server_rooms(&server), SCAN_START);
            loop {
                if found.len() >= count {
                    return Ok(found);
                }
                let (next, fields) = self.commands.scan(&key, &cursor).await?;
                let rooms = fields.iter().filter_map(|(room, _)| std::str::from_utf8(room).ok());
                found.extend(rooms.map(Box::from));
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
        }
        Ok(found)
    }
}
