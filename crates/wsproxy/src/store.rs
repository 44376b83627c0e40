//! Keyed state that expires; knows keys and bytes, not what they mean.

use std::time::Duration;

use bytes::Bytes;

use crate::store::{memory::MemoryStore, redis::RedisStore};

pub mod memory;
pub mod redis;

/// The backend that runs; made by `Bus::store`. Cheap to clone: all clones are one store.
///
/// No operation has a deadline of its own: callers set one. A dropped future that was not yet sent
/// is never sent.
#[derive(Clone)]
pub enum Store {
    /// Inside this process; shares its state with the embedded bus.
    Memory(MemoryStore),
    /// Redis, on a connection beside the bus's.
    Redis(RedisStore),
}

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Its position: `milliseconds-sequence`.
    pub id: String,
    /// What was appended.
    pub data: Bytes,
}

/// Why the store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The link was lost while the command was on its way: it may or may not have taken effect.
    #[error("the store was lost: {0}")]
    Lost(String),
    /// Too much is waiting, or the embedded store holds as much as it may.
    #[error("the store is full")]
    Full,
    /// The store answered with an error: a retry will not help.
    #[error("the store refused: {0}")]
    Refused(String),
    /// The instance is ending.
    #[error("the store is closed")]
    Closed,
}

impl Store {
    /// The value of a key.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self {
            Self::Memory(store) => store.load(key),
            Self::Redis(store) => store.load(key).await,
        }
    }

    /// Sets a key that expires after `ttl` (at least a millisecond).
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        match self {
            Self::Memory(store) => store.save(key, value, ttl),
            Self::Redis(store) => store.save(key, value, ttl).await,
        }
    }

    /// Removes a key; says whether it was there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        match self {
            Self::Memory(store) => store.remove(key),
            Self::Redis(store) => store.remove(key).await,
        }
    }

    /// Removes a key if it has this value, atomically: of any number of callers at most one gets `true`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn take_if_equal(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        match self {
            Self::Memory(store) => store.take_if_equal(key, expected),
            Self::Redis(store) => store.take_if_equal(key, expected).await,
        }
    }

    /// At most `count` entries of a log after the id `after`; from its start where that is empty.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn read_log(
        &self,
        key: &str,
        after: &str,
        count: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        match self {
            Self::Memory(store) => store.read_log(key, after, count),
            Self::Redis(store) => store.read_log(key, after, count).await,
        }
    }

    /// Resolves when the store has answered.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::Redis(store) => store.ping().await,
        }
    }
}
