//! The store: state under keys that expires; knows keys and bytes, but not their meaning.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wsproxy_proto::{
    history::Snapshot,
    names::{Id, Names},
};

use crate::{
    embedded::store::EmbeddedStore,
    redis::store::RedisStore,
    store::{
        command::{LogEntry, SnapshotOf, StoreError},
        token_streams::{StreamCommand, StreamError, StreamHead, StreamState},
    },
};

pub mod command;
pub mod not_done;
pub mod token_streams;

/// The store, by backend; made by `Bus::store`. Cheap to clone: all clones are one store.
///
/// No operation has a deadline of its own: callers set one. If a future is dropped before its command was sent, the
/// command never is.
#[derive(Clone)]
pub enum Store {
    /// The embedded store inside this process; shares its state with the embedded bus.
    Embedded(EmbeddedStore),
    /// Redis, on a connection of its own beside the bus.
    Redis(RedisStore),
}

impl Store {
    /// Returns the value of a key.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self {
            Self::Embedded(store) => store.load(key),
            Self::Redis(store) => store.load(key).await,
        }
    }

    /// Sets a key that expires after `ttl` (at least a millisecond).
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.save(key, value, ttl),
            Self::Redis(store) => store.save(key, value, ttl).await,
        }
    }

    /// Sets keys as [`Self::save`] does, with one write. Returns a result for each.
    pub async fn save_each<'e>(
        &self,
        entries: impl ExactSizeIterator<Item = (&'e str, &'e [u8], Duration)>,
    ) -> Vec<Result<(), StoreError>> {
        match self {
            Self::Embedded(store) => {
                entries.map(|(key, value, ttl)| store.save(key, value, ttl)).collect()
            }
            Self::Redis(store) => store.save_each(entries).await,
        }
    }

    /// Returns the value of a key, and the time until it expires.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn load_expiring(&self, key: &str) -> Result<Option<(Bytes, Duration)>, StoreError> {
        match self {
            Self::Embedded(store) => store.load_expiring(key),
            Self::Redis(store) => store.load_expiring(key).await,
        }
    }

    /// Sets a key that expires after `ttl` unless it exists, atomically; returns the value of one that exists.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn add(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        match self {
            Self::Embedded(store) => store.add(key, value, ttl),
            Self::Redis(store) => store.add(key, value, ttl).await,
        }
    }

    /// Removes a key; returns whether it was there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        match self {
            Self::Embedded(store) => store.remove(key),
            Self::Redis(store) => store.remove(key).await,
        }
    }

    /// Removes a key if it has this value, atomically: at most one of many callers gets `true`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn take_if_equal(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        match self {
            Self::Embedded(store) => store.take_if_equal(key, expected),
            Self::Redis(store) => store.take_if_equal(key, expected).await,
        }
    }

    /// Sets a key that expires after `ttl`, and returns the value before, atomically: of several owners of a key the
    /// newest wins, and learns which one it replaced.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn replace(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        match self {
            Self::Embedded(store) => store.replace(key, value, ttl),
            Self::Redis(store) => store.replace(key, value, ttl).await,
        }
    }

    /// Sets a key that expires after `ttl` if it has the value `expected`, atomically; returns whether it had. With
    /// `expected` as the new value an owner renews its key.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn save_if_equal(
        &self,
        key: &str,
        expected: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        match self {
            Self::Embedded(store) => store.save_if_equal(key, expected, value, ttl),
            Self::Redis(store) => store.save_if_equal(key, expected, value, ttl).await,
        }
    }

    /// Reads logs, and a session's token streams, at one moment.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn snapshot(
        &self,
        of: SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        match self {
            Self::Embedded(store) => store.snapshot(&of),
            Self::Redis(store) => store.snapshot(&of).await,
        }
    }

    /// Changes a token stream and publishes the change to the session's clients, atomically. A change that
    /// has taken effect already may be sent again.
    ///
    /// # Errors
    /// See [`StreamError`]; [`StreamError::LeaseRuns`] only for the operation `Lost`.
    pub async fn stream(&self, command: StreamCommand) -> Result<StreamHead, StreamError> {
        match self {
            Self::Embedded(store) => store.stream(command).await,
            Self::Redis(store) => store.stream(&command).await,
        }
    }

    /// Sets the time to live of the heads of logs to `ttl`. Returns for each log, in order, whether it has a head.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn keep_heads(
        &self,
        logs: &[Arc<str>],
        ttl: Duration,
    ) -> Result<Vec<bool>, StoreError> {
        match self {
            Self::Embedded(store) => Ok(store.keep_heads(logs, ttl)),
            Self::Redis(store) => store.keep_heads(logs, ttl).await,
        }
    }

    /// Returns open token streams whose lease has run out, at most `count`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn lapsed_streams(&self, count: usize) -> Result<Vec<(Id, Id)>, StoreError> {
        match self {
            Self::Embedded(store) => store.lapsed_streams(count),
            Self::Redis(store) => store.lapsed_streams(count).await,
        }
    }

    /// Removes the lease of a stream that does not exist or has ended, so that the stream is not checked again.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn forget_lease(&self, session: &Id, stream: &Id) -> Result<(), StoreError> {
        match self {
            // The embedded store keeps a lease with its stream.
            Self::Embedded(_) => Ok(()),
            Self::Redis(store) => {
                store.forget_lease(Names::stream_lease(session, stream).as_bytes()).await
            }
        }
    }

    /// Returns at most `count` entries of a log after the id `after`; from the start of the log if that is empty.
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
            Self::Embedded(store) => store.read_log(key, after, count),
            Self::Redis(store) => store.read_log(key, after, count).await,
        }
    }

    /// Returns the id of the last entry of a log; `None` if there is no log, or it is empty.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
        match self {
            Self::Embedded(store) => store.log_end(key),
            Self::Redis(store) => store.log_end(key).await,
        }
    }

    /// Asks the store for an answer, to see that it is there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self {
            Self::Embedded(_) => Ok(()),
            Self::Redis(store) => store.ping().await,
        }
    }
}
