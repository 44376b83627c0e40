//! Commands to the Redis of the registry: a deadline for each, and scripts of one key each.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use tokio::time::timeout;
use wsproxy_proto::names::Names;

use crate::{
    redis::{
        client::RedisClient,
        reply::{integer, odd_reply, text},
        resp::Reply,
        script::Script,
    },
    store::command::StoreError,
};

/// Sends commands on the connection of the store. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Commands {
    client: RedisClient,
    response_timeout: Duration,
}

impl Commands {
    pub(crate) const fn new(client: RedisClient, response_timeout: Duration) -> Self {
        Self { client, response_timeout }
    }

    /// Sends a command. Without an answer in time it counts as lost, but may take effect later.
    pub(crate) async fn call(&self, words: &[impl AsRef<[u8]>]) -> Result<Reply, StoreError> {
        let words: Vec<&[u8]> = words.iter().map(AsRef::as_ref).collect();
        self.in_time(self.client.command(&words)).await
    }

    async fn in_time(
        &self,
        reply: impl Future<Output = Result<Reply, StoreError>>,
    ) -> Result<Reply, StoreError> {
        match timeout(self.response_timeout, reply).await {
            Ok(reply) => reply,
            Err(_) => Err(StoreError::Lost("no answer in time".into())),
        }
    }

    /// Runs a script; `words` are the number of keys, the keys and the arguments.
    pub(crate) async fn run_script(
        &self,
        script: &Script,
        words: &[impl AsRef<[u8]>],
    ) -> Result<Reply, StoreError> {
        let words: Vec<&[u8]> = words.iter().map(AsRef::as_ref).collect();
        self.in_time(self.client.run(script, &words)).await
    }

    /// Runs a script several times, with one write; `calls` are as in [`Self::run_script`]. Returns a reply for each.
    pub(crate) async fn run_each<const N: usize>(
        &self,
        script: &Script,
        calls: &[[Cow<'_, str>; N]],
    ) -> Vec<Result<Reply, StoreError>> {
        let calls: Vec<_> =
            calls.iter().map(|words| words.each_ref().map(|word| word.as_bytes())).collect();
        let replies = timeout(self.response_timeout, self.client.run_each(script, &calls)).await;
        replies.unwrap_or_else(|_| {
            vec![Err(StoreError::Lost("no answer in time".into())); calls.len()]
        })
    }

    /// Runs a script that touches one key, so that it runs on a cluster too.
    pub(super) async fn run<A: AsRef<[u8]>>(
        &self,
        script: &str,
        key: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Reply, StoreError> {
        self.in_time(self.client.eval(script, key, arguments)).await
    }

    /// Reads a piece of a hash, at most some hundred fields, and the cursor of the next piece.
    pub(super) async fn scan(
        &self,
        key: &str,
        cursor: &Bytes,
    ) -> Result<(Bytes, Vec<(Bytes, Bytes)>), StoreError> {
        let words: [&[u8]; 5] = [b"HSCAN", key.as_bytes(), cursor, b"COUNT", SCAN_COUNT];
        let Reply::Array(parts) = self.call(&words).await? else { return Err(odd_reply()) };
        let [Reply::Text(next), Reply::Array(fields)] = &parts[..] else {
            return Err(odd_reply());
        };
        let field = |field: &[Reply]| match field {
            [Reply::Text(name), Reply::Text(value)] => Some((name.clone(), value.clone())),
            _ => None,
        };
        Ok((next.clone(), fields.chunks_exact(2).filter_map(field).collect()))
    }

    /// Enters fields of a hash with their values and removes others, together; sets the hash's time to live to `ttl`
    /// milliseconds. Nothing to do costs nothing.
    pub(super) async fn change_hash(
        &self,
        key: &str,
        ttl: &str,
        entered: impl ExactSizeIterator<Item = (Bytes, Bytes)>,
        left: impl Iterator<Item = Bytes>,
    ) -> Result<(), StoreError> {
        let mut words =
            vec![Bytes::copy_from_slice(ttl.as_bytes()), entered.len().to_string().into()];
        words.extend(entered.flat_map(|(name, value)| [name, value]));
        words.extend(left);
        match words.len() {
            2 => Ok(()),
            _ => self.run(CHANGE_HASH, key, words).await.map(drop),
        }
    }

    /// Removes fields of a hash that still have these values.
    pub(super) async fn remove_equal(
        &self,
        key: &str,
        fields: impl Iterator<Item = (Bytes, Bytes)>,
    ) -> Result<(), StoreError> {
        let words: Vec<_> = fields.flat_map(|(name, value)| [name, value]).collect();
        match words.is_empty() {
            true => Ok(()),
            false => self.run(REMOVE_EQUAL, key, words).await.map(drop),
        }
    }

    /// Returns the number of fields of a hash, and sets its time to live to `ttl` milliseconds.
    pub(super) async fn keep_hash(&self, key: &str, ttl: &str) -> Result<u64, StoreError> {
        Ok(integer(&self.run(KEEP_HASH, key, [ttl]).await?)?.unsigned_abs())
    }

    /// Returns the instances whose leases run; `servers` is the key of their index.
    pub(super) async fn living(&self, servers: &str) -> Result<Reply, StoreError> {
        self.run(LIVING, servers, [""; 0]).await
    }

    /// Returns the instances whose leases run, in order.
    pub(super) async fn living_servers(&self, names: &Names) -> Result<Vec<Box<str>>, StoreError> {
        let reply = self.living(&names.servers()).await?;
        let Reply::Array(servers) = reply else { return Err(odd_reply()) };
        let mut servers: Vec<_> = servers.iter().filter_map(text).map(Into::into).collect();
        servers.sort_unstable();
        Ok(servers)
    }

    /// Returns the number of fields of a hash.
    pub(crate) async fn hash_len(&self, key: &str) -> Result<u64, StoreError> {
        Ok(integer(&self.call(&[b"HLEN", key.as_bytes()]).await?)?.unsigned_abs())
    }

    /// Returns the number of connections for these commands so far. When it changes, commands may reach another Redis.
    pub(super) fn connections_made(&self) -> u64 {
        self.client.command_connections()
    }
}

/// Cursor of the first piece of a hash, and the cursor behind the last piece.
pub(super) const SCAN_START: Bytes = Bytes::from_static(b"0");

/// Fields that are read at a time.
const SCAN_COUNT: &[u8] = b"256";

/// Key: servers.
const LIVING: &str = "\
local t=redis.call('TIME') local now=t[1]*1000+math.floor(t[2]/1000) \
return redis.call('ZRANGEBYSCORE',KEYS[1],'('..now,'+inf')";

/// Key: a hash. Arguments: milliseconds to live, number of fields to enter, these with their values, fields to remove.
const CHANGE_HASH: &str = "\
local n=2*ARGV[2]+2 \
if n>2 then redis.call('HSET',KEYS[1],unpack(ARGV,3,n)) end \
if n<#ARGV then redis.call('HDEL',KEYS[1],unpack(ARGV,n+1)) end \
return redis.call('PEXPIRE',KEYS[1],ARGV[1])";

/// Key: a hash. Arguments: fields and their values.
const REMOVE_EQUAL: &str = "\
for i=1,#ARGV,2 do \
if redis.call('HGET',KEYS[1],ARGV[i])==ARGV[i+1] then redis.call('HDEL',KEYS[1],ARGV[i]) end end \
return 1";

/// Key: a hash. Argument: milliseconds to live.
const KEEP_HASH: &str = "\
redis.call('PEXPIRE',KEYS[1],ARGV[1]) \
return redis.call('HLEN',KEYS[1])";
