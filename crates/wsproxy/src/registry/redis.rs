//! Commands of the event endpoint's registry to Redis; knows no task.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    redis::{
        reply::{odd_reply, text},
        resp::Reply,
        words::milliseconds,
    },
    registry::{
        ConnectionRecord, Presence, RegistrySettings,
        commands::Commands,
        lease,
        local::Write,
        members::{RegistryMembers, Ttls},
    },
    store::command::StoreError,
};

/// Commands of one instance on the registry.
pub(super) struct RedisRegistry {
    commands: Commands,
    members: RegistryMembers,
    names: Names,
    server_id: Arc<str>,
    /// Key of the index of instances, by the end of their leases.
    servers: String,
    /// Key of this instance's connections.
    connections: String,
    ttls: Ttls,
}

impl RedisRegistry {
    pub(super) fn new(
        commands: Commands,
        settings: &RegistrySettings,
        lease: &lease::LeaseSettings,
    ) -> Self {
        let lease::LeaseSettings { names, server_id, timing, .. } = lease;
        let members = RegistryMembers::new(commands.clone(), lease);
        // The entries of a lost instance must outlive its lease until another instance removes them.
        let server_ttl = settings.ttl.max(timing.lease * 4);
        Self {
            connections: members.key(server_id),
            members,
            commands,
            servers: names.servers(),
            ttls: Ttls {
                users: milliseconds(settings.ttl).to_string(),
                server: milliseconds(server_ttl).to_string(),
            },
            names: names.clone(),
            server_id: Arc::clone(server_id),
        }
    }

    /// Returns the number of connections that Redis has of this instance, and renews their time to live.
    pub(super) async fn count_own(&self) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.connections, &self.ttls.server).await
    }

    /// Writes changes. Returns the number that Redis refused.
    pub(super) async fn write(&self, writes: &[Write]) -> Result<u64, StoreError> {
        self.members.write(&self.server_id, writes, &self.ttls).await
    }

    /// Reads a piece of this instance's entries, and the cursor of the next piece.
    pub(super) async fn scan_own(
        &self,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Uuid, Arc<str>)>), StoreError> {
        self.members.scan(&self.server_id, cursor).await
    }

    /// Returns the connections of a user on living instances.
    pub(super) async fn connections_of(&self, user: &str) -> Result<Vec<Presence>, StoreError> {
        let key = self.names.events_user_connections(user);
        let fields = [b"HGETALL", key.as_bytes()];
        let alive = self.commands.living(&self.servers);
        let (fields, alive) = tokio::try_join!(self.commands.call(&fields), alive)?;
        let Reply::Array(alive) = alive else { return Err(odd_reply()) };
        let Reply::Array(fields) = fields else { return Err(odd_reply()) };
        let presence = |field: &[Reply]| {
            let [connection, record] = field else { return None };
            let connection_id = Uuid::try_parse(text(connection)?).ok()?;
            let record: ConnectionRecord = serde_json::from_str(text(record)?).ok()?;
            let is_alive = alive.iter().any(|server| text(server) == Some(&record.server_id));
            is_alive.then_some(Presence { connection_id, record })
        };
        let mut found: Vec<_> = fields.chunks_exact(2).filter_map(presence).collect();
        found.sort_unstable_by_key(|presence| presence.connection_id);
        Ok(found)
    }

    /// Returns the number of connections of living instances, and of dead ones.
    pub(super) async fn totals(&self) -> Result<(u64, u64), StoreError> {
        let reply = self.commands.run(SERVERS, &self.servers, [""; 0]).await?;
        let Reply::Array(parts) = reply else { return Err(odd_reply()) };
        let [Reply::Array(alive), Reply::Array(dead)] = &parts[..] else {
            return Err(odd_reply());
        };
        tokio::try_join!(self.count(alive), self.count(dead))
    }

    async fn count(&self, servers: &[Reply]) -> Result<u64, StoreError> {
        let counts = servers
            .iter()
            .filter_map(text)
            .map(async |server| self.commands.hash_len(&self.members.key(server)).await);
        Ok(try_join_all(counts).await?.into_iter().sum())
    }
}

/// Key: servers.
const SERVERS: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return {redis.call('ZRANGEBYSCORE',KEYS[1],'('..now,'+inf'),redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',now)}";
