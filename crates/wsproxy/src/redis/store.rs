//! The store on Redis: a few commands; knows no connection.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    redis::{
        client::RedisClient,
        reply::{integer, odd_reply},
        resp::Reply,
        words::milliseconds,
    },
    store::command::{LogEntry, StoreError},
};

/// Commands on a connection beside the bus's. Clones share it.
#[derive(Clone)]
pub struct RedisStore(pub(super) RedisClient);

impl RedisStore {
    /// Creates the store beside a bus on the same Redis.
    pub(crate) fn new(client: &RedisClient) -> Self {
        Self(client.clone())
    }

    pub(crate) async fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        value_or_null(self.0.command(&[b"GET", key.as_bytes()]).await?)
    }

    pub(crate) async fn save(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let ttl = milliseconds(ttl).to_string();
        self.0.command(&[b"SET", key.as_bytes(), value, b"PX", ttl.as_bytes()]).await?;
        Ok(())
    }

    pub(crate) async fn save_each<'e>(
        &self,
        entries: impl ExactSizeIterator<Item = (&'e str, &'e [u8], Duration)>,
    ) -> Vec<Result<(), StoreError>> {
        let ttls = entries.map(|(key, value, ttl)| (key, value, milliseconds(ttl).to_string()));
        let entries: Vec<_> = ttls.collect();
        let commands = entries.iter().map(|(key, value, ttl)| {
            [b"SET", key.as_bytes(), value, b"PX", ttl.as_bytes()].into_iter()
        });
        let replies = self.0.commands(commands).await;
        replies.into_iter().map(|reply| reply.map(drop)).collect()
    }

    pub(crate) async fn load_expiring(
        &self,
        key: &str,
    ) -> Result<Option<(Bytes, Duration)>, StoreError> {
        let none: [&[u8]; 0] = [];
        let Reply::Array(parts) = self.0.eval(LOAD_EXPIRING, key, none).await? else {
            return Err(odd_reply());
        };
        match &parts[..] {
            [Reply::Null, _] => Ok(None),
            [Reply::Text(value), ttl] => {
                // A key without an end has a negative time to live.
                let ttl = u64::try_from(integer(ttl)?).unwrap_or(u64::MAX);
                Ok(Some((value.clone(), Duration::from_millis(ttl))))
            }
            _ => Err(odd_reply()),
        }
    }

    pub(crate) async fn add(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        value_or_null(self.0.eval(ADD, key, [value, ttl.as_bytes()]).await?)
    }

    pub(crate) async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        is_positive(&self.0.command(&[b"DEL", key.as_bytes()]).await?)
    }

    pub(crate) async fn take_if_equal(
        &self,
        key: &str,
        expected: &[u8],
    ) -> Result<bool, StoreError> {
        is_positive(&self.0.eval(TAKE_IF_EQUAL, key, [expected]).await?)
    }

    pub(crate) async fn replace(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        value_or_null(self.0.eval(REPLACE, key, [value, ttl.as_bytes()]).await?)
    }

    pub(crate) async fn save_if_equal(
        &self,
        key: &str,
        expected: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        let ttl = milliseconds(ttl).to_string();
        let arguments = [expected, value, ttl.as_bytes()];
        is_positive(&self.0.eval(SAVE_IF_EQUAL, key, arguments).await?)
    }

    pub(crate) async fn read_log(
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

    pub(crate) async fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
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

    pub(crate) async fn ping(&self) -> Result<(), StoreError> {
        self.0.command(&[b"PING"]).await.map(drop)
    }
}

fn value_or_null(reply: Reply) -> Result<Option<Bytes>, StoreError> {
    match reply {
        Reply::Text(value) => Ok(Some(value)),
        Reply::Null => Ok(None),
        _ => Err(odd_reply()),
    }
}

fn is_positive(reply: &Reply) -> Result<bool, StoreError> {
    Ok(integer(reply)? > 0)
}

/// Reads an entry: its id, and its fields in turn, of which ours have one, `data`.
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
    // An entry that no gateway wrote still moves the reader's position on.
    Ok(LogEntry { id: String::from_utf8_lossy(&id).into_owned(), data: data.unwrap_or_default() })
}

/// Key: token. Argument: expected value. A script is atomic: of two callers with one token exactly one wins.
const TAKE_IF_EQUAL: &str = "\
if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) end \
return 0";

/// Arguments: value, milliseconds to live. Reads first, so that a key of another type stays.
const REPLACE: &str = "\
local held=redis.call('GET',KEYS[1]) \
redis.call('SET',KEYS[1],ARGV[1],'PX',ARGV[2]) \
return held";

/// A script, so that the value and its time to live are of one moment.
const LOAD_EXPIRING: &str = "\
return {redis.call('GET',KEYS[1]),redis.call('PTTL',KEYS[1])}";

/// Arguments: value, milliseconds to live. A script, since Redis 6 refuses SET with NX and GET together.
const ADD: &str = "\
local held=redis.call('GET',KEYS[1]) \
if held then return held end \
redis.call('SET',KEYS[1],ARGV[1],'PX',ARGV[2]) \
return false";

/// Arguments: expected value, value, milliseconds to live.
const SAVE_IF_EQUAL: &str = "\
if redis.call('GET',KEYS[1])~=ARGV[1] then return 0 end \
redis.call('SET',KEYS[1],ARGV[2],'PX',ARGV[3]) \
return 1";
