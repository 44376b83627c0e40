//! Commands to the Redis of the registry: a deadline for each, and scripts of one key each.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::{
    bus::redis::{RedisBus, resp::Reply},
    store::StoreError,
};

/// Sends commands on the connection of the store. Cheap to clone.
#[derive(Clone)]
pub(super) struct Commands {
    bus: RedisBus,
    response_timeout: Duration,
}

impl Commands {
    pub(super) const fn new(bus: RedisBus, response_timeout: Duration) -> Self {
        Self { bus, response_timeout }
    }

    /// Sends a command. One without an answer in time counts as lost: it may take effect later.
    pub(super) async fn call(&self, words: &[impl AsRef<[u8]>]) -> Result<Reply, StoreError> {
        let words: Vec<&[u8]> = words.iter().map(AsRef::as_ref).collect();
        match timeout(self.response_timeout, self.bus.command(&words)).await {
            Ok(reply) => reply,
            Err(_) => Err(StoreError::Lost("no answer in time".into())),
        }
    }

    /// Runs a script that touches one key, so that it runs on a cluster too.
    pub(super) async fn run<A: AsRef<[u8]>>(
        &self,
        script: &str,
        key: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Reply, StoreError> {
        let fixed = [b"EVAL", script.as_bytes(), b"1", key.as_bytes()];
        let mut words: Vec<_> = fixed.into_iter().map(Bytes::copy_from_slice).collect();
        let arguments = arguments.into_iter();
        words.extend(arguments.map(|word| Bytes::copy_from_slice(word.as_ref())));
        self.call(&words).await
    }

    /// A piece of a hash, at most some hundred fields, and the cursor of the next piece.
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

    /// Number of fields of a hash, which lives for `ttl` milliseconds from now.
    pub(super) async fn keep_hash(&self, key: &str, ttl: &str) -> Result<u64, StoreError> {
        Ok(integer(&self.run(KEEP_HASH, key, [ttl]).await?)?.unsigned_abs())
    }

    /// Number of fields of a hash.
    pub(super) async fn hash_len(&self, key: &str) -> Result<u64, StoreError> {
        Ok(integer(&self.call(&[b"HLEN", key.as_bytes()]).await?)?.unsigned_abs())
    }

    /// Number of links for these commands so far. Another number says that Redis may be another one since.
    pub(super) fn links(&self) -> u64 {
        self.bus.command_links()
    }
}

pub(super) fn text(reply: &Reply) -> Option<&str> {
    match reply {
        Reply::Text(text) => std::str::from_utf8(text).ok(),
        _ => None,
    }
}

pub(super) fn integer(reply: &Reply) -> Result<i64, StoreError> {
    match reply {
        Reply::Integer(number) => Ok(*number),
        _ => Err(odd_reply()),
    }
}

pub(super) fn odd_reply() -> StoreError {
    StoreError::Refused("an odd reply".into())
}

/// Cursor of the first piece of a hash, and the one behind the last.
pub(super) const SCAN_START: Bytes = Bytes::from_static(b"0");

/// Fields that are read at a time.
const SCAN_COUNT: &[u8] = b"256";

/// Key: a hash. Argument: milliseconds to live.
const KEEP_HASH: &str = "\
redis.call('PEXPIRE',KEYS[1],ARGV[1]) \
return redis.call('HLEN',KEYS[1])";
