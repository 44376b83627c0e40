//! Keyed state that expires; knows keys and bytes, not what they mean.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wsproxy_proto::{
    history::{After, Position, Snapshot},
    names::Id,
};

use crate::{
    bus::{HistoryLimits, not_done::NotDone},
    store::{memory::MemoryStore, redis::RedisStore},
};

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

/// What [`Store::snapshot`] reads.
#[derive(Debug, Clone)]
pub struct SnapshotOf {
    /// Keys of the logs.
    pub logs: Vec<Arc<str>>,
    /// Key of the clock that they share.
    pub clock: Option<Arc<str>>,
    /// A log of which nothing is known gets a head that lives so long.
    pub head_ttl: Option<Duration>,
    /// The entries behind this are wanted; `None`: none.
    pub after: Option<After>,
    /// At most so many entries of each log; further ones with the next call.
    pub entries_max: usize,
    /// The log is that of a session, whose token streams are wanted too.
    pub streams_of: Option<Id>,
}

/// A token stream as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// Its id.
    pub stream: Box<str>,
    /// `open`, or the outcome: `finish`, `error`, `cancelled`.
    pub state: Box<str>,
    /// Number of the last append.
    pub seq: u64,
    /// All text so far.
    pub text: Bytes,
    /// The JSON object that the worker gave when it opened the stream.
    pub meta: Bytes,
    /// JSON of the error; empty: none.
    pub error: Bytes,
}

/// What is done with a token stream.
#[derive(Debug, Clone)]
pub struct StreamCommand {
    /// The session.
    pub session: Id,
    /// The stream.
    pub stream: Id,
    /// What to do.
    pub op: StreamOp,
    /// Bounds of the session's log; the state lives as long.
    pub limits: HistoryLimits,
}

/// What is done with a token stream.
#[derive(Debug, Clone)]
pub enum StreamOp {
    /// Begins it.
    Open {
        /// A JSON object that belongs to it; empty: `{}`.
        meta: Bytes,
        /// How long its worker may be silent.
        lease: Duration,
    },
    /// Appends text.
    Append {
        /// The text, UTF-8.
        text: Bytes,
        /// The number that this append must get; one that it has got already is not appended again.
        seq: Option<u64>,
        /// How long the worker may be silent from now on.
        lease: Duration,
    },
    /// Only renews the lease.
    Renew {
        /// How long the worker may be silent from now on.
        lease: Duration,
    },
    /// Ends it.
    End {
        /// How.
        outcome: StreamOutcome,
        /// A JSON object; empty: none.
        error: Bytes,
    },
    /// Ends it as `worker_lost` if its lease has run out.
    Lost,
}

impl StreamOp {
    /// What it weighs in a bounded queue.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Open { meta, .. } => meta.len(),
            Self::Append { text, .. } => text.len(),
            Self::End { error, .. } => error.len(),
            Self::Renew { .. } | Self::Lost => 0,
        }
    }

    /// Its name in the script.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Open { .. } => "open",
            Self::Append { .. } => "append",
            Self::Renew { .. } => "renew",
            Self::End { .. } => "end",
            Self::Lost => "lost",
        }
    }

    /// How long the worker may be silent from now on.
    pub(crate) const fn lease(&self) -> Option<Duration> {
        match self {
            Self::Open { lease, .. } | Self::Append { lease, .. } | Self::Renew { lease } => {
                Some(*lease)
            }
            Self::End { .. } | Self::Lost => None,
        }
    }
}

impl StreamOutcome {
    /// As clients and the store see it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::Error => "error",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How a token stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamOutcome {
    /// It is complete.
    Finish,
    /// It failed.
    Error,
    /// It was stopped.
    Cancelled,
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
    /// Nothing was done, for a reason that is known.
    #[error("{}: {error}", refusal.reason())]
    NotDone {
        /// The reason.
        refusal: NotDone,
        /// The store's own words, for logs.
        error: String,
    },
    /// The store answered with an error of another kind: a retry will not help.
    #[error("the store refused: {0}")]
    Refused(String),
    /// The instance is ending.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the store has answered: it is reached, and may take other requests.
    #[must_use]
    pub const fn is_answer(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::NotDone { .. })
    }

    /// Whether the store has refused for a reason of the key or the user: waiting does not help, and other keys may be
    /// taken.
    #[must_use]
    pub const fn is_of_one_key(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::NotDone { refusal, .. } => !refusal.is_passing(),
            Self::Lost(_) | Self::Full | Self::Closed => false,
        }
    }
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

    /// Logs, and a session's token streams, as they stand at one moment.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn snapshot(
        &self,
        of: SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        match self {
            Self::Memory(store) => store.snapshot(&of),
            Self::Redis(store) => store.snapshot(&of).await,
        }
    }

    /// Changes a token stream and publishes the change to the session's clients, atomically. Answers the
    /// number of its last append and the position of the message. What has taken effect already may be said
    /// again.
    ///
    /// # Errors
    /// [`StoreError::Refused`], beginning with: `NOSTREAM`, `EXISTS`, `ENDED <outcome>`, `SEQ <last seq>`,
    /// `TOOLARGE` (the text), `BADJSON`, or `ALIVE` for [`StreamOp::Lost`] while the lease runs.
    pub async fn stream(&self, command: StreamCommand) -> Result<(u64, Position), StoreError> {
        match self {
            Self::Memory(store) => store.stream(command).await,
            Self::Redis(store) => store.stream(&command).await,
        }
    }

    /// Lets the heads of logs live on for `ttl`. Answers which of them are there, in their order.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn keep_heads(
        &self,
        logs: &[Arc<str>],
        ttl: Duration,
    ) -> Result<Vec<bool>, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.keep_heads(logs, ttl)),
            Self::Redis(store) => store.keep_heads(logs, ttl).await,
        }
    }

    /// Open token streams whose lease has run out, at most `count`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn lapsed_streams(&self, count: usize) -> Result<Vec<(Id, Id)>, StoreError> {
        match self {
            Self::Memory(store) => store.lapsed_streams(count),
            Self::Redis(store) => store.lapsed_streams(count).await,
        }
    }

    /// Removes the lease of a stream that does not exist or has ended, so that it is not looked at again.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn forget_lease(&self, session: &Id, stream: &Id) -> Result<(), StoreError> {
        match self {
            // The embedded store keeps a lease with its stream.
            Self::Memory(_) => Ok(()),
            Self::Redis(store) => {
                store.forget_lease(format!("{session}/{stream}").as_bytes()).await
            }
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

    /// The id of the last entry of a log; `None`: there is no log, or it is empty.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
        match self {
            Self::Memory(store) => store.log_end(key),
            Self::Redis(store) => store.log_end(key).await,
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

/// Most bytes of one log that one snapshot reads, except for one entry that alone is larger.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// Most text of token streams that one snapshot reads: the newest streams, and at least one.
const STREAMS_BYTES_MAX: usize = 2 * 1024 * 1024;
