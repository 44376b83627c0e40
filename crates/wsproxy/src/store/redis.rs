//! The store on Redis: a few commands; knows no connection.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    bus::redis::{RedisBus, milliseconds, resp::Reply},
    store::{LogEntry, StoreError},
};

mod history;

/// Commands on a connection beside the bus's. Clones share it.
#[derive(Clone)]
pub struct RedisStore(RedisBus);

impl RedisStore {
    pub(crate) fn new(bus: RedisBus) -> Self {
        Self(bus)
    }

    pub(super) async fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.0.command(&[b"GET", key.as_bytes()]).await? {
            Reply::Text(value) => Ok(Some(value)),
            Reply::Null => Ok(None),
            _ => Err(odd_reply()),
        }
    }

    pub(super) async fn save(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let ttl = milliseconds(ttl).to_string();
        self.0.command(&[b"SET", key.as_bytes(), value, b"PX", ttl.as_bytes()]).await?;
        Ok(())
    }

    pub(super) async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        count(&self.0.command(&[b"DEL", key.as_bytes()]).await?)
    }

    pub(super) async fn take_if_equal(
        &self,
        key: &str,
        expected: &[u8],
    ) -> Result<bool, StoreError> {
        let words = [b"EVAL", TAKE_IF_EQUAL.as_bytes(), b"1", key.as_bytes(), expected];
        count(&self.0.command(&words).await?)
    }

    pub(super) async fn read_log(
        &self,
        key: &str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let from = if after.is_empty() { "-".to_owned() } else { format!("({after}") };
        let limit = limit.to_string();
        let words: [&[u8]; 6] =
            [b"XRANGE", key.as_bytes(), from.as_bytes(), b"+", b"COUNT", limit.as_bytes()];
        match self.0.command(&words).await? {
            Reply::Array(entries) => entries.into_iter().map(log_entry).collect(),
            Reply::Null => Ok(Vec::new()),
            _ => Err(odd_reply()),
        }
    }

    pub(super) async fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
        let words: [&[u8]; 6] = [b"XREVRANGE", key.as_bytes(), b"+", b"-", b"COUNT", b"1"];
        match self.0.command(&words).await? {
            Reply::Array(entries) => {
                let end = entries.into_iter().next().map(log_entry).transpose()?;
                Ok(end.map(|entry| entry.id))
            }
            Reply::Null => Ok(None),
            _ => Err(odd_reply()),
        }
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.0.command(&[b"PING"]).await.map(drop)
    }
}

fn count(reply: &Reply) -> Result<bool, StoreError> {
    match reply {
        Reply::Integer(count) => Ok(*count > 0),
        _ => Err(odd_reply()),
    }
}

/// An entry is its id and its fields in turn; ours have one, `data`.
fn log_entry(reply: Reply) -> Result<LogEntry, StoreError> {
    let Reply::Array(parts) = reply else { return Err(odd_reply()) };
    let mut parts = parts.into_iter();
    let (Some(Reply::Text(id)), Some(Reply::Array(fields))) = (parts.next(), parts.next()) else {
        return Err(odd_reply());
    };
    let data = fields.chunks_exact(2).find_map(|field| match field {
        [Reply::Text(name), Reply::Text(data)] if name == "data" => Some(data.clone()),
        _ => None,
    });
    // An entry that somebody else wrote still moves the reader's position on.
    Ok(LogEntry { id: String::from_utf8_lossy(&id).into_owned(), data: data.unwrap_or_default() })
}

fn odd_reply() -> StoreError {
    StoreError::Refused("an odd reply".into())
}

/// Redis runs a script as one: of two callers with one token exactly one wins.
const TAKE_IF_EQUAL: &str = "\
if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) end \
return 0";
