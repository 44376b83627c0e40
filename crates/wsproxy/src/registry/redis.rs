//! The registry's keys in Redis and what is done with them; knows no task.
//!
//! Every time is Redis' own: the clocks of instances may differ by any amount.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::time::timeout;
use uuid::Uuid;
use wsproxy_proto::names::Names;

use crate::{
    bus::redis::{RedisBus, milliseconds, resp::Reply},
    registry::{Presence, Record, Settings, local::Write},
    store::StoreError,
};

/// Commands of one instance.
pub(super) struct RedisRegistry {
    bus: RedisBus,
    names: Names,
    server_id: Arc<str>,
    /// This run of the instance: another one may have had the same name.
    incarnation: String,
    /// Key of our lease.
    lease: String,
    /// Key of all instances, by the end of their leases.
    servers: String,
    /// Key of our connections.
    connections: String,
    /// Milliseconds, as words.
    lease_ms: String,
    user_ttl_ms: String,
    server_ttl_ms: String,
    response_timeout: Duration,
}

/// What the refreshing of a lease found.
pub(super) struct Lease {
    /// Whose it was.
    pub(super) before: Before,
    /// How many connections Redis holds for us.
    pub(super) entries: u64,
}

/// Whose a lease was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// There was none: we are new, or were taken for dead, or Redis is.
    Nobodys,
    Ours,
    /// Somebody else has our name.
    Anothers,
}

/// What a reaper found at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaped {
    /// The instance is alive again.
    Alive,
    /// Entries are left.
    Unfinished,
    /// Somebody else was faster.
    Gone,
    /// We removed it.
    Removed,
}

impl RedisRegistry {
    pub(super) fn new(bus: RedisBus, settings: &Settings) -> Self {
        let Settings { names, server_id, ttl, pace, .. } = settings;
        // What names a dead instance's connections must outlive its lease until somebody looked.
        let server_ttl = (*ttl).max(pace.lease * 4);
        Self {
            bus,
            incarnation: Uuid::new_v4().to_string(),
            lease: names.events_server(server_id, ""),
            servers: names.events("servers"),
            connections: names.events_server(server_id, ":connections"),
            lease_ms: milliseconds(pace.lease).to_string(),
            user_ttl_ms: milliseconds(*ttl).to_string(),
            server_ttl_ms: milliseconds(server_ttl).to_string(),
            response_timeout: settings.response_timeout,
            names: names.clone(),
            server_id: Arc::clone(server_id),
        }
    }

    /// We are alive, and hold so many connections.
    pub(super) async fn refresh(&self, connections: usize) -> Result<Lease, StoreError> {
        let Self { incarnation, .. } = self;
        let value = format!(r#"{{"connections":{connections},"incarnation":"{incarnation}"}}"#);
        let words = eval(
            REFRESH,
            [&self.lease, &self.servers, &self.connections],
            [&self.lease_ms, incarnation, &value, &*self.server_id, &self.server_ttl_ms],
        );
        match self.command(&words).await? {
            Reply::Array(parts) => match parts[..] {
                [Reply::Integer(before), Reply::Integer(entries)] => {
                    let before = match before {
                        0 => Before::Nobodys,
                        1 => Before::Ours,
                        _ => Before::Anothers,
                    };
                    Ok(Lease { before, entries: entries.unsigned_abs() })
                }
                _ => Err(odd_reply()),
            },
            _ => Err(odd_reply()),
        }
    }

    /// Writes changes. Answers how many Redis refused.
    pub(super) async fn write(&self, writes: &[Write]) -> Result<u64, StoreError> {
        let mut keys = vec![self.connections.clone()];
        let mut arguments = vec![self.user_ttl_ms.clone(), self.server_ttl_ms.clone()];
        for write in writes {
            keys.push(self.names.events_user_connections(&write.user));
            arguments.push(write.connection.to_string());
            arguments.push((*write.user).to_owned());
            let record = write.record.as_ref().map(serde_json::to_string).transpose();
            let record = record.map_err(|error| StoreError::Refused(error.to_string()))?;
            arguments.push(record.unwrap_or_default());
        }
        let words = eval(WRITE, keys.iter(), arguments.iter());
        Ok(integer(&self.command(&words).await?)?.unsigned_abs())
    }

    /// A piece of our own entries, or of another instance's, and where the next one begins.
    pub(super) async fn scan(
        &self,
        server: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Uuid, Arc<str>)>), StoreError> {
        let key = self.names.events_server(server, ":connections");
        let words: [&[u8]; 5] = [b"HSCAN", key.as_bytes(), cursor, b"COUNT", SCAN_COUNT];
        let Reply::Array(parts) = self.command(&words).await? else { return Err(odd_reply()) };
        let [Reply::Text(next), Reply::Array(fields)] = &parts[..] else {
            return Err(odd_reply());
        };
        let entry = |field: &[Reply]| {
            let [connection, user] = field else { return None };
            // A field that is no id is nobody's connection.
            Some((Uuid::try_parse(text(connection)?).ok()?, text(user)?.into()))
        };
        Ok((next.clone(), fields.chunks_exact(2).filter_map(entry).collect()))
    }

    /// Takes our name out. Entries that are left are for others to remove.
    pub(super) async fn farewell(&self) -> Result<(), StoreError> {
        let keys = [&self.lease, &self.servers, &self.connections];
        self.command(&eval(FAREWELL, keys, [&*self.server_id])).await.map(drop)
    }

    /// Instances whose leases have run out.
    pub(super) async fn expired(&self) -> Result<Vec<String>, StoreError> {
        match self.command(&eval(EXPIRED, [&self.servers], [""; 0])).await? {
            Reply::Array(servers) => {
                Ok(servers.iter().filter_map(text).map(ToOwned::to_owned).collect())
            }
            _ => Err(odd_reply()),
        }
    }

    /// Whether it is we who remove a dead instance; the claim ends by itself.
    pub(super) async fn claim(&self, server: &str) -> Result<bool, StoreError> {
        let key = self.names.events_server(server, ":reaper");
        let me = self.server_id.as_bytes();
        let words = [b"SET", key.as_bytes(), me, b"NX", b"PX", CLAIM_MS];
        Ok(!matches!(self.command(&words).await?, Reply::Null))
    }

    /// Removes connections of a dead instance; `false`: it is alive again.
    pub(super) async fn remove(
        &self,
        server: &str,
        entries: &[(Uuid, Arc<str>)],
    ) -> Result<bool, StoreError> {
        let mut keys = vec![self.names.events_server(server, ":connections"), self.servers.clone()];
        let mut arguments = vec![server.to_owned()];
        for (connection, user) in entries {
            keys.push(self.names.events_user_connections(user));
            arguments.push(connection.to_string());
        }
        let words = eval(REMOVE, keys.iter(), arguments.iter());
        Ok(integer(&self.command(&words).await?)? >= 0)
    }

    /// Removes a dead instance without connections, and says so to whoever listens.
    pub(super) async fn bury(&self, server: &str) -> Result<Reaped, StoreError> {
        let connections = self.names.events_server(server, ":connections");
        let claim = self.names.events_server(server, ":reaper");
        let channel = self.names.events("registry");
        let message = serde_json::json!({ "event": "server_lost", "server_id": server });
        let message = message.to_string();
        let keys = [&connections, &self.servers, &claim];
        let words = eval(BURY, keys, [server, &channel, &message]);
        Ok(match integer(&self.command(&words).await?)? {
            -1 => Reaped::Alive,
            0 => Reaped::Unfinished,
            1 => Reaped::Removed,
            _ => Reaped::Gone,
        })
    }

    /// The connections of a user on instances that are alive.
    pub(super) async fn connections_of(&self, user: &str) -> Result<Vec<Presence>, StoreError> {
        let key = self.names.events_user_connections(user);
        let reply = self.command(&eval(PRESENCE, [&key, &self.servers], [""; 0])).await?;
        let Reply::Array(parts) = reply else { return Err(odd_reply()) };
        let [Reply::Array(fields), Reply::Array(alive)] = &parts[..] else {
            return Err(odd_reply());
        };
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
        let reply = self.command(&eval(SERVERS, [&self.servers], [""; 0])).await?;
        let Reply::Array(parts) = reply else { return Err(odd_reply()) };
        let [Reply::Array(alive), Reply::Array(dead)] = &parts[..] else {
            return Err(odd_reply());
        };
        tokio::try_join!(self.count(alive), self.count(dead))
    }

    async fn count(&self, servers: &[Reply]) -> Result<u64, StoreError> {
        let counts = servers.iter().filter_map(text).map(async |server| {
            let key = self.names.events_server(server, ":connections");
            integer(&self.command(&[b"HLEN", key.as_bytes()]).await?)
        });
        Ok(try_join_all(counts).await?.into_iter().map(i64::unsigned_abs).sum())
    }

    /// The values of keys, in their order.
    pub(super) async fn load_all(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
        let mut words: Vec<&[u8]> = vec![b"MGET"];
        words.extend(keys.iter().map(String::as_bytes));
        let Reply::Array(values) = self.command(&words).await? else { return Err(odd_reply()) };
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
        let values =
            keys.iter().map(async |key| match self.command(&[b"GET", key.as_bytes()]).await? {
                Reply::Text(value) => Ok(Some(value)),
                Reply::Null => Ok(None),
                _ => Err(odd_reply()),
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
        let mut words = eval(STAMP, [key], [&ttl, channel]);
        words.push(Bytes::copy_from_slice(message));
        Ok(integer(&self.command(&words).await?)?.unsigned_abs())
    }

    /// A command without an answer in time counts as lost: it may take effect later.
    async fn command(&self, words: &[impl AsRef<[u8]>]) -> Result<Reply, StoreError> {
        let words: Vec<&[u8]> = words.iter().map(AsRef::as_ref).collect();
        match timeout(self.response_timeout, self.bus.command(&words)).await {
            Ok(reply) => reply,
            Err(_) => Err(StoreError::Lost("no answer in time".into())),
        }
    }
}

/// The words of a script with its keys and arguments.
fn eval<K: AsRef<str>, A: AsRef<str>>(
    script: &str,
    keys: impl IntoIterator<Item = K>,
    arguments: impl IntoIterator<Item = A>,
) -> Vec<Bytes> {
    let mut words = vec![Bytes::from_static(b"EVAL"), Bytes::copy_from_slice(script.as_bytes())];
    words.push(Bytes::new());
    words.extend(keys.into_iter().map(|key| Bytes::copy_from_slice(key.as_ref().as_bytes())));
    words[2] = (words.len() - 3).to_string().into();
    words
        .extend(arguments.into_iter().map(|word| Bytes::copy_from_slice(word.as_ref().as_bytes())));
    words
}

fn text(reply: &Reply) -> Option<&str> {
    match reply {
        Reply::Text(text) => std::str::from_utf8(text).ok(),
        _ => None,
    }
}

fn integer(reply: &Reply) -> Result<i64, StoreError> {
    match reply {
        Reply::Integer(number) => Ok(*number),
        _ => Err(odd_reply()),
    }
}

fn odd_reply() -> StoreError {
    StoreError::Refused("an odd reply".into())
}

/// Entries that are read at a time.
const SCAN_COUNT: &[u8] = b"256";

/// A reaper that dies itself is followed by another one after this time.
const CLAIM_MS: &[u8] = b"30000";

/// Keys: lease, servers, connections. Arguments: length of the lease, incarnation, new value, server, TTL.
const REFRESH: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local held=redis.call('GET',KEYS[1]) local before=0 \
if held then before=2 if string.find(held,ARGV[2],1,true) then before=1 end end \
redis.call('SET',KEYS[1],ARGV[3],'PX',ARGV[1]) \
redis.call('ZADD',KEYS[2],now+ARGV[1],ARGV[4]) \
redis.call('PEXPIRE',KEYS[2],ARGV[5]) redis.call('PEXPIRE',KEYS[3],ARGV[5]) \
return {before,redis.call('HLEN',KEYS[3])}";

/// Keys: connections, then one of a user for each change. Arguments: TTL of users, TTL of connections, then
/// for each change the connection, the user and the record, which is empty where the connection left.
/// One user whose key is of another kind must not keep the others out.
const WRITE: &str = "\
local failed=0 \
local function try(...) local r=redis.pcall(...) if type(r)=='table' and r.err then failed=failed+1 end end \
for i=2,#KEYS do local a=3*i-3 local c,u,r=ARGV[a],ARGV[a+1],ARGV[a+2] \
if r=='' then try('HDEL',KEYS[1],c) try('HDEL',KEYS[i],c) \
else try('HSET',KEYS[1],c,u) try('HSET',KEYS[i],c,r) try('PEXPIRE',KEYS[i],ARGV[1]) end end \
try('PEXPIRE',KEYS[1],ARGV[2]) \
return failed";

/// Keys: lease, servers, connections. Argument: server.
const FAREWELL: &str = "\
redis.call('DEL',KEYS[1]) \
if redis.call('HLEN',KEYS[3])==0 then return redis.call('ZREM',KEYS[2],ARGV[1]) end \
return redis.call('ZADD',KEYS[2],'XX',0,ARGV[1])";

/// Key: servers.
const EXPIRED: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return redis.call('ZRANGEBYSCORE',KEYS[1],'-inf',now,'LIMIT',0,16)";

/// Keys: connections of the server, servers, then one of a user for each connection. Arguments: server,
/// connections. One that is alive again has written, or is going to write, what is true.
const REMOVE: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local ends=redis.call('ZSCORE',KEYS[2],ARGV[1]) \
if ends and tonumber(ends)>now then return -1 end \
for i=3,#KEYS do redis.pcall('HDEL',KEYS[i],ARGV[i-1]) redis.call('HDEL',KEYS[1],ARGV[i-1]) end \
return #KEYS-2";

/// Keys: connections of the server, servers, claim. Arguments: server, channel, message.
const BURY: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
local ends=redis.call('ZSCORE',KEYS[2],ARGV[1]) \
if ends and tonumber(ends)>now then redis.call('DEL',KEYS[3]) return -1 end \
if redis.call('HLEN',KEYS[1])>0 then return 0 end \
redis.call('DEL',KEYS[3]) \
if redis.call('ZREM',KEYS[2],ARGV[1])==0 then return 2 end \
redis.call('PUBLISH',ARGV[2],ARGV[3]) \
return 1";

/// Keys: connections of the user, servers.
const PRESENCE: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return {redis.call('HGETALL',KEYS[1]),redis.call('ZRANGEBYSCORE',KEYS[2],'('..now,'+inf')}";

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
