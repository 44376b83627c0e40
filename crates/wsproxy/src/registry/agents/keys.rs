//! The agents of instances as Redis has them: a hash for each instance, by user.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    redis::{
        reply::{odd_reply, text},
        resp::Reply,
        words::milliseconds,
    },
    registry::{
        agents::{AgentPage, AgentRecord, ConnectedAgent, local::Write},
        commands::{Commands, SCAN_START},
        lease::{HASH_TTL_MIN, LeaseSettings},
    },
    store::command::StoreError,
};

/// Commands on the hashes of agents.
#[derive(Clone)]
pub(super) struct AgentKeys {
    commands: Commands,
    names: Names,
    server_id: Arc<str>,
    /// Milliseconds for which the hash of an instance lives that does not renew it.
    ttl: String,
}

/// A field of an instance's hash: a user and a record.
pub(super) type Field = (Bytes, Bytes);

impl AgentKeys {
    pub(super) fn new(commands: Commands, settings: &LeaseSettings) -> Self {
        // The hash of a lost instance must live until another instance looks.
        let ttl = (settings.timing.lease * 4).max(HASH_TTL_MIN);
        Self {
            commands,
            names: settings.names.clone(),
            server_id: Arc::clone(&settings.server_id),
            ttl: milliseconds(ttl).to_string(),
        }
    }

    /// Returns the number of agents that Redis has of this instance, and renews their time to live.
    pub(super) async fn count_own(&self) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.key(&self.server_id), &self.ttl).await
    }

    /// Writes changes of this instance.
    pub(super) async fn write(&self, writes: &[Write]) -> Result<(), StoreError> {
        let name = |user: &Arc<str>| Bytes::copy_from_slice(user.as_bytes());
        let mut entered = Vec::with_capacity(writes.len());
        for Write { user, record } in writes {
            let Some(record) = record else { continue };
            let record = serde_json::to_vec(record);
            let record = record.map_err(|error| StoreError::Refused(error.to_string()))?;
            entered.push((name(user), Bytes::from(record)));
        }
        let left = writes.iter().filter(|write| write.record.is_none());
        let left = left.map(|write| name(&write.user));
        let key = self.key(&self.server_id);
        self.commands.change_hash(&key, &self.ttl, entered.into_iter(), left).await
    }

    /// Reads a piece of the agents of an instance, and the cursor of the next piece.
    pub(super) async fn scan(
        &self,
        server: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<Field>), StoreError> {
        self.commands.scan(&self.key(server), cursor).await
    }

    /// Returns the number of agents that Redis has of an instance.
    pub(super) async fn len(&self, server: &str) -> Result<u64, StoreError> {
        self.commands.hash_len(&self.key(server)).await
    }

    /// Removes agents of an instance whose records have not changed.
    pub(super) async fn remove_equal(
        &self,
        server: &str,
        fields: impl Iterator<Item = Field>,
    ) -> Result<(), StoreError> {
        self.commands.remove_equal(&self.key(server), fields).await
    }

    /// Returns the agent of a user. The key of the place says where it is, and the hash of that instance the rest.
    pub(super) async fn find(&self, user: &Id) -> Result<Option<ConnectedAgent>, StoreError> {
        let place = self.names.agent_owner(user);
        let words: [&[u8]; 4] = [b"HMGET", place.as_bytes(), b"connection", b"server"];
        let Reply::Array(holder) = self.commands.call(&words).await? else {
            return Err(odd_reply());
        };
        let [connection, server] = &holder[..] else { return Err(odd_reply()) };
        let (Some(connection), Some(server)) = (text(connection), text(server)) else {
            return Ok(None);
        };
        let connection = Uuid::try_parse(connection).unwrap_or_default();
        let key = self.key(server);
        let words: [&[u8]; 3] = [b"HGET", key.as_bytes(), user.as_str().as_bytes()];
        let record = match self.commands.call(&words).await? {
            Reply::Text(record) => read(&record).filter(|record| record.connection == connection),
            _ => None,
        };
        // A few milliseconds after the opening the hash does not have the agent yet.
        let (connected_at, platform, version) = (None, None, None);
        let unknown = AgentRecord { connection, connected_at, platform, version };
        let record = record.unwrap_or(unknown);
        Ok(Some(ConnectedAgent { user: user.clone(), server: server.into(), record }))
    }

    /// Returns a piece of the list. A cursor is one of a hash, a dot and the name of the instance.
    pub(super) async fn list(
        &self,
        cursor: Option<&str>,
        count: usize,
    ) -> Result<AgentPage, StoreError> {
        let bad = || StoreError::Refused("no gateway made this cursor".into());
        let (mut scanned, from) = match cursor {
            None => (SCAN_START, ""),
            Some(cursor) => {
                let (scanned, server) = cursor.split_once('.').ok_or_else(bad)?;
                if scanned.is_empty() || !scanned.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(bad());
                }
                (Bytes::copy_from_slice(scanned.as_bytes()), server)
            }
        };
        let mut agents = Vec::new();
        for server in self.commands.living_servers(&self.names).await? {
            if *server < *from {
                continue;
            }
            if *server > *from {
                scanned = SCAN_START;
            }
            loop {
                if agents.len() >= count {
                    let scanned = String::from_utf8_lossy(&scanned);
                    return Ok(AgentPage { agents, cursor: Some(format!("{scanned}.{server}")) });
                }
                let (next, fields) = self.scan(&server, &scanned).await?;
                agents.extend(fields.into_iter().filter_map(|(user, record)| {
                    let user = Id::parse(std::str::from_utf8(&user).ok()?).ok()?;
                    Some(ConnectedAgent { user, server: server.clone(), record: read(&record)? })
                }));
                scanned = next;
                if scanned == SCAN_START {
                    break;
                }
            }
        }
        Ok(AgentPage { agents, cursor: None })
    }

    /// Returns the number of agents of each living instance.
    pub(super) async fn counts(&self) -> Result<BTreeMap<Box<str>, u64>, StoreError> {
        let living = self.commands.living_servers(&self.names).await?;
        let counts = living.into_iter().map(async |server| {
            let count = self.len(&server).await?;
            Ok((server, count))
        });
        Ok(try_join_all(counts).await?.into_iter().collect())
    }

    fn key(&self, server: &str) -> String {
        self.names.server_agents(server)
    }
}

/// Reads a record; `None`: no gateway wrote it.
pub(super) fn read(record: &[u8]) -> Option<AgentRecord> {
    serde_json::from_slice(record).ok()
}
