//! Token streams as the store keeps them: commands, outcomes, states. Knows no backend.

use std::time::Duration;

use bytes::Bytes;
use wsproxy_proto::{
    history::{HistoryLimits, Position},
    names::Id,
};

use crate::store::command::StoreError;

/// The state of a token stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// Id of the stream.
    pub stream: Box<str>,
    /// `open`, or the outcome: `finish`, `error`, `cancelled`.
    pub state: Box<str>,
    /// Number of the last append.
    pub seq: u64,
    /// The text so far.
    pub text: Bytes,
    /// The JSON object that the worker gave at the opening.
    pub meta: Bytes,
    /// JSON object of the error; empty: none.
    pub error: Bytes,
}

/// A change of a token stream.
#[derive(Debug, Clone)]
pub struct StreamCommand {
    /// The session.
    pub session: Id,
    /// The stream.
    pub stream: Id,
    /// The operation.
    pub op: StreamOp,
    /// Bounds of the session's log; the state of the stream has the same time to live.
    pub limits: HistoryLimits,
}

/// An operation on a token stream.
#[derive(Debug, Clone)]
pub enum StreamOp {
    /// Opens the stream.
    Open {
        /// A JSON object for the stream; empty: `{}`.
        meta: Bytes,
        /// Longest silence of the worker.
        lease: Duration,
    },
    /// Appends text.
    Append {
        /// The text, UTF-8.
        text: Bytes,
        /// The number that this append must get. An append with an earlier number is not repeated.
        seq: Option<u64>,
        /// Longest silence of the worker from now on.
        lease: Duration,
    },
    /// Renews the lease only.
    Renew {
        /// Longest silence of the worker from now on.
        lease: Duration,
    },
    /// Ends the stream.
    End {
        /// The outcome.
        outcome: StreamOutcome,
        /// A JSON object of the error; empty: none.
        error: Bytes,
    },
    /// Ends the stream as `worker_lost` if its lease has run out.
    Lost,
}

impl StreamOp {
    /// Returns the bytes of the command in a bounded queue.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Open { meta, .. } => meta.len(),
            Self::Append { text, .. } => text.len(),
            Self::End { error, .. } => error.len(),
            Self::Renew { .. } | Self::Lost => 0,
        }
    }

    /// Returns the name in the script.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Open { .. } => "open",
            Self::Append { .. } => "append",
            Self::Renew { .. } => "renew",
            Self::End { .. } => "end",
            Self::Lost => "lost",
        }
    }

    /// Returns the longest silence of the worker from now on; `None` if the operation has no lease.
    pub(crate) const fn lease(&self) -> Option<Duration> {
        match self {
            Self::Open { lease, .. } | Self::Append { lease, .. } | Self::Renew { lease } => {
                Some(*lease)
            }
            Self::End { .. } | Self::Lost => None,
        }
    }
}

/// The head of a token stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamHead {
    /// Number of the last append.
    pub seq: u64,
    /// Position of the last message in the session's log.
    pub id: Position,
}

/// The reason why a token stream was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// There is no stream with this id, or it has expired.
    #[error("there is no stream with this id")]
    NotFound,
    /// There is another stream with this id.
    #[error("there is a stream with this id")]
    Exists,
    /// The stream has ended.
    #[error("the stream has ended: {}", .0.label())]
    Ended(StreamOutcome),
    /// The append does not have the next number.
    #[error("the last append is number {last}")]
    WrongSeq {
        /// Number of the last append.
        last: u64,
    },
    /// The text would be too large.
    #[error("the text would be too large")]
    TooLarge,
    /// `meta` or `error` is no JSON object.
    #[error("meta or error is no JSON object")]
    BadJson,
    /// The worker has renewed the lease, so that the stream is not lost.
    #[error("the lease still runs")]
    LeaseRuns,
    /// The store did not do the command.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl StreamOutcome {
    /// All outcomes.
    const ALL: [Self; 3] = [Self::Finish, Self::Error, Self::Cancelled];

    /// Returns the outcome with this label.
    pub(crate) fn of(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.label() == label)
    }

    /// Returns the label for clients and the store.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::Error => "error",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Outcome of a token stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamOutcome {
    /// The stream is complete.
    Finish,
    /// The stream failed.
    Error,
    /// The stream was stopped.
    Cancelled,
}
