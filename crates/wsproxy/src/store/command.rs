//! Arguments, answers and errors of the store's commands. Knows no backend.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use wsproxy_proto::{history::After, names::Id};

use crate::store::not_done::NotDone;

/// One entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Position of the entry: `milliseconds-sequence`.
    pub id: String,
    /// The data that was appended.
    pub data: Bytes,
}

/// A request to read logs, and a session's token streams, at one moment.
#[derive(Debug, Clone)]
pub struct SnapshotOf {
    /// Keys of the logs.
    pub logs: Vec<Arc<str>>,
    /// Key of the clock that the logs share.
    pub clock: Option<Arc<str>>,
    /// Time to live of the head that an unknown log gets.
    pub head_ttl: Option<Duration>,
    /// Position after which entries are read; `None`: no entries are read.
    pub after: Option<After>,
    /// Upper bound of the entries of each log; the next call reads further ones.
    pub entries_max: usize,
    /// The session whose token streams are read too.
    pub streams_of: Option<Id>,
}

/// The reason why the store did not do a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The connection was lost before the answer: the command may or may not have taken effect.
    #[error("the store was lost: {0}")]
    Lost(String),
    /// Too many commands wait, or the embedded store is full.
    #[error("the store is full")]
    Full,
    /// Nothing was done, for this reason.
    #[error("{}: {error}", refusal.reason())]
    NotDone {
        /// The reason.
        refusal: NotDone,
        /// The store's error, for logs.
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
    /// Returns whether the store has answered: it is reachable, and may do other requests.
    #[must_use]
    pub const fn is_answer(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::NotDone { .. })
    }

    /// Returns whether the reason is the key or the user: waiting does not help, and other keys may work.
    #[must_use]
    pub const fn is_of_one_key(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::NotDone { refusal, .. } => !refusal.is_passing(),
            Self::Lost(_) | Self::Full | Self::Closed => false,
        }
    }
}

/// Upper bound of bytes of one log in a snapshot, except for one entry that alone is larger.
pub(crate) const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// Upper bound of text of token streams in a snapshot: the newest streams, and at least one.
pub(crate) const STREAMS_BYTES_MAX: usize = 2 * 1024 * 1024;
