//! Commands of the event endpoint's registry to Redis; knows no task.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::try_join_all;
use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    bus::redis::{RedisBus, milliseconds, resp::Reply},
    registry::{
        Presence, Record, Settings,
        commands::{Commands, integer, odd_reply, text},
        lease,
        local::Write,
        members::{Members, Ttls},
    },
    store::StoreError,
};

/// Commands of one instance.
pub(super) struct RedisRegistry {
    commands: Commands,
    members: Members,
    names: Names,
    server_id: Arc<str>,
    /// Key of all instances, by the end of their leases.
    servers: String,
    /// Key of this instance's connections.
    connections: String,
    ttls: Ttls,
}

impl RedisRegistry {
    pub(super) fn new(bus: RedisBus, settings: &Settings, lease: &lease::Settings) -> Self {
        let lease::Settings { names, server_id, pace, .. } = lease;
        let commands = Commands::new(bus, lease.response_timeout);
        let members = Members::new(commands.clone(), lease);
        // The connections of a lost instance must outlive its lease until another instance looks.
        let server_ttl = settings.ttl.max(pace.lease * 4);
        Self {
            connections: members.key(server_id),
            members,
            commands,
            servers: names.events("servers"),
            ttls: Ttls {
                users: milliseconds(settings.ttl).to_string(),
                server: milliseconds(server_ttl).to_string(),
            },
            names: names.clone(),
            server_id: Arc::clone(server_id),
        }
    }

    /// Number of connections that Redis holds for this instance, which it keeps from now on.
    pub(super) async fn count_own(&self) -> Result<u64, StoreError> {
        self.commands.keep_hash(&self.connections, &self.ttls.server).await
    }

    /// Writes changes. Answers how many Redis refused.
    pub(super) async fn write(&self, writes: &[Write]) -> Result<u64, StoreError> {
        self.members.write(&self.server_id, writes, &self.ttls).await
    }

    /// A piece of this instance's entries, and the cursor of the next one.
    pub(super) async fn scan_own(
        &self,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Uuid, Arc<str>)>), StoreError> {
        self.members.scan(&self.server_id, cursor).await
    }

    /// The connections of a user on instances that are alive.
    pub(super) async fn connections_of(&self, user: &str) -> Result<Vec<Presence>, StoreError> {
        let key = self.names.events_user_connections(user);
        let fields = [b"HGETALL", key.as_bytes()];
        let alive = self.commands.run(ALIVE, &self.servers, [""; 0]);
        let (fields, alive) = tokio::try_join!(self.commands.call(&fields), alive)?;
        let Reply::Array(alive) = alive else { return Err(odd_reply()) };
        let Reply::Array(fields) = fields else { return Err(odd_reply()) };
        let presence = |field: &[Reply]| {
            let [connection, record] = field else { return None };
            let connection_id = Uuid::try_parse(text(connection)?).ok()?;
            let record: Record = serde_json::from_str(text(record)?).ok()?;
            let is_alive = alive.iter().any(|server| text(server) == Some(&record.server_id));
            is_alive.then_some(Presence { connection_id, record })
        };
        let mut found: Vec<_> = fields.chunks_exact(2).filter_map(presence).collect();
        found.sort_unstable_by_key(|presence| presence.connection_id);
        Ok(found)
    }

    /// Connections of instances that are alive, and of those that are not.
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

    /// The values of keys, in their order.
    pub(super) async fn load_all(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
        let mut words: Vec<&[u8]> = vec![b"MGET"];
        words.extend(keys.iter().map(String::as_bytes));
        let Reply::Array(values) = self.commands.call(&words).await? else {
            return Err(odd_reply());
        };
        let value = |value| match value {
            Reply::Text(value) => Some(value),
            _ => None,
        };
        Ok(values.into_iter().map(value).collect())
    }

    /// The values of keys in slots of their own, in their order.
    pub(super) async fn load_each(
        &self,
        keys: &[String],
    ) -> Result<Vec<Option<Bytes>>, StoreError> {
        let values = keys.iter().map(async |key| {
            match self.commands.call(&[b"GET", key.as_bytes()]).await? {
                Reply::Text(value) => Ok(Some(value)),
                Reply::Null => Ok(None),
                _ => Err(odd_reply()),
            }
        });
        try_join_all(values).await
    }

    /// Sets a key to the present in seconds and publishes a message. A longer life that the key had is
    /// not cut short. Answers how many received the message.
    pub(super) async fn stamp(
        &self,
        key: &str,
        ttl: Duration,
        channel: &str,
        message: &[u8],
    ) -> Result<u64, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        let arguments = [ttl.as_bytes(), channel.as_bytes(), message];
        Ok(integer(&self.commands.run(STAMP, key, arguments).await?)?.unsigned_abs())
    }
}

/// Key: servers.
const ALIVE: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return redis.call('ZRANGEBYSCORE',KEYS[1],'('..now,'+inf')";

/// Key: servers.
const SERVERS: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return {redis.call('ZRANGEBYSCORE',KEYS[1],'('..now,'+inf'),redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',now)}";

/// Key: what is stamped. Arguments: TTL, channel, message.
const STAMP: &str = "\
local left=redis.call('PTTL',KEYS[1]) local now=redis.call('TIME')[1] \
if left==-1 then redis.call('SET',KEYS[1],now) else \
redis.call('SET',KEYS[1],now,'PX',string.format('%.0f',math.max(tonumber(ARGV[1]),left))) end \
return redis.call('PUBLISH',ARGV[2],ARGV[3])";
