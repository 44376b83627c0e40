//! The connections of the event endpoint as Redis has them, by instance and by user, and the removal of those
//! of a lost instance.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    registry::{
        commands::{Commands, SCAN_START},
        lease::{self, LeasedState, LostInstance},
        local::Write,
    },
    store::command::StoreError,
};

/// Hashes of connections. An entry of a user names its instance; readers ignore those of lost instances.
pub(super) struct RegistryMembers {
    commands: Commands,
    names: Names,
}

/// Times to live in milliseconds, as words of commands.
pub(super) struct Ttls {
    /// Time to live of a user's connections.
    pub(super) users: String,
    /// Time to live of an instance's connections.
    pub(super) server: String,
}

impl RegistryMembers {
    pub(super) fn new(commands: Commands, settings: &lease::LeaseSettings) -> Self {
        Self { commands, names: settings.names.clone() }
    }

    /// Returns the key of the connections of an instance.
    pub(super) fn key(&self, server: &str) -> String {
        self.names.server_connections(server)
    }

    /// Writes changes of an instance. Returns the number of users' keys that Redis refused to write.
    ///
    /// A connection is first entered under its instance and last removed there: after a crash every entry of a
    /// user can be found by the instance's name.
    pub(super) async fn write(
        &self,
        server: &str,
        writes: &[Write],
        ttls: &Ttls,
    ) -> Result<u64, StoreError> {
        let key = self.key(server);
        let mut entered = vec![ttls.server.clone()];
        for Write { connection, user, .. } in writes.iter().filter(|write| write.record.is_some()) {
            entered.extend([connection.to_string(), (**user).to_owned()]);
        }
        if entered.len() > 1 {
            self.commands.run(ENTER, &key, &entered).await?;
        }
        let users = writes.iter().map(|write| self.write_user(write, &ttls.users));
        let refused = try_join_all(users).await?.into_iter().filter(|done| !done).count() as u64;
        let left = writes.iter().filter(|write| write.record.is_none());
        self.leave(&key, left.map(|write| write.connection.to_string().into())).await?;
        Ok(refused)
    }

    /// Returns whether Redis did it. A user whose key is of another type must not keep the others from being written.
    async fn write_user(&self, write: &Write, ttl: &str) -> Result<bool, StoreError> {
        let key = self.names.events_user_connections(&write.user);
        let connection = write.connection.to_string();
        let written = match &write.record {
            None => self.commands.call(&[b"HDEL", key.as_bytes(), connection.as_bytes()]).await,
            Some(record) => {
                let record = serde_json::to_string(record);
                let record = record.map_err(|error| StoreError::Refused(error.to_string()))?;
                self.commands.run(ENTER, &key, [ttl, &connection, &record]).await
            }
        };
        match written {
            Ok(_) => Ok(true),
            Err(error) if error.is_of_one_key() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a piece of the connections of an instance with their users, and the cursor of the next piece.
    pub(super) async fn scan(
        &self,
        server: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Uuid, Arc<str>)>), StoreError> {
        let (next, fields) = self.commands.scan(&self.key(server), cursor).await?;
        let entry = |(connection, user): (Bytes, Bytes)| {
            // No gateway wrote a field that is no id.
            let connection = Uuid::try_parse_ascii(&connection).ok()?;
            Some((connection, std::str::from_utf8(&user).ok()?.into()))
        };
        Ok((next, fields.into_iter().filter_map(entry).collect()))
    }

    async fn remove(&self, key: &str, entries: &[(Bytes, Bytes)]) -> Result<(), StoreError> {
        let removals = entries.iter().map(async |(connection, user)| {
            let Ok(user) = std::str::from_utf8(user) else { return Ok(()) };
            let key = self.names.events_user_connections(user);
            match self.commands.call(&[b"HDEL", key.as_bytes(), connection]).await {
                // A key of another type holds no connection.
                Err(error) if !error.is_of_one_key() => Err(error),
                Ok(_) | Err(_) => Ok(()),
            }
        });
        try_join_all(removals).await?;
        self.leave(key, entries.iter().map(|(connection, _)| connection.clone())).await
    }

    async fn leave(
        &self,
        key: &str,
        connections: impl Iterator<Item = Bytes>,
    ) -> Result<(), StoreError> {
        let mut words = vec![Bytes::from_static(b"HDEL"), Bytes::copy_from_slice(key.as_bytes())];
        words.extend(connections);
        match words.len() {
            2 => Ok(()),
            _ => self.commands.call(&words).await.map(drop),
        }
    }

    async fn clean_up(&self, lost: &LostInstance<'_>) -> Result<bool, StoreError> {
        let key = self.key(lost.server);
        for _ in 0..WALKS_MAX {
            let mut cursor = SCAN_START;
            loop {
                let (next, entries) = self.commands.scan(&key, &cursor).await?;
                if !entries.is_empty() {
                    if !lost.is_certain().await? {
                        return Ok(false);
                    }
                    // An instance that comes back right now finds fewer entries than it wrote, and writes all of
                    // them again.
                    self.remove(&key, &entries).await?;
                    lost.counters.connections_reaped.add(entries.len() as u64);
                }
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            if self.commands.hash_len(&key).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl LeasedState for RegistryMembers {
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.clean_up(lost).boxed()
    }

    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move { Ok(self.commands.hash_len(&self.key(server)).await? == 0) }.boxed()
    }
}

/// Upper bound of walks over the entries of one instance: a walk may miss entries that move.
const WALKS_MAX: usize = 10;

/// Key: a hash. Arguments: TTL, then fields and values.
const ENTER: &str = "\
redis.call('HSET',KEYS[1],unpack(ARGV,2)) \
return redis.call('PEXPIRE',KEYS[1],ARGV[1])";
