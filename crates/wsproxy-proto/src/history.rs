//! The history of channels: positions, the envelope on the channel, and the rules by which nothing is
//! ever skipped or delivered twice without saying so.
//!
//! A history is a log of entries with growing ids, each of which names the one before it (`prev`).
//! What a reader has is a chain, or it is told that it is none.

use std::fmt;

use bytes::Bytes;

pub mod envelope;
pub mod fence;
pub mod position;
pub mod reader;
pub mod rule;

pub use envelope::Envelope;
pub use fence::Fence;
pub use position::Position;
pub use reader::Reader;

/// What a client or a reader wants to continue behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum After {
    /// Behind a position; [`Position::START`]: everything that is held.
    Position(Position),
    /// Behind the entry to which a worker gave this event id.
    Event(Box<str>),
}

/// Longest event id of a worker's own, in bytes.
pub const EVENT_ID_BYTES_MAX: usize = 128;

impl After {
    /// What a client gave as its last event id; `None` where it is empty.
    ///
    /// # Errors
    /// It is longer than [`EVENT_ID_BYTES_MAX`] or holds spaces or control characters.
    pub fn parse(text: &str) -> Result<Option<Self>, BadEventId> {
        if text.is_empty() {
            return Ok(None);
        }
        if text == "0" {
            return Ok(Some(Self::Position(Position::START)));
        }
        if let Some(position) = Position::parse(text.as_bytes()) {
            return Ok(Some(Self::Position(position)));
        }
        check_event_id(text)?;
        Ok(Some(Self::Event(text.into())))
    }
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Position(position) => position.fmt(f),
            Self::Event(id) => f.write_str(id),
        }
    }
}

/// A worker's event id must fit into an envelope, a query and a line of an event stream.
///
/// # Errors
/// It does not.
pub fn check_event_id(text: &str) -> Result<(), BadEventId> {
    let is_plain = |c: char| !c.is_whitespace() && !c.is_control();
    if text.len() <= EVENT_ID_BYTES_MAX && text.chars().all(is_plain) {
        Ok(())
    } else {
        Err(BadEventId)
    }
}

/// Why a text is no event id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("is longer than {EVENT_ID_BYTES_MAX} bytes or holds spaces or control characters")]
pub struct BadEventId;

/// An entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: Position,
    /// The id of the entry before it; [`Position::START`] for the first one of a log's life.
    pub prev: Position,
    /// The id that a worker gave it.
    pub event_id: Option<Box<str>>,
    /// What was published.
    pub data: Bytes,
}

/// One log at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Log {
    /// The last entry's id; `None` where there is no log.
    pub last: Option<Position>,
    /// Id and `prev` of the oldest entry that is held.
    pub first: Option<(Position, Position)>,
    /// The entries behind what was asked for, oldest first.
    pub entries: Vec<Entry>,
    /// Whether these are all; otherwise further ones follow behind the last of them.
    pub complete: bool,
}

impl Log {
    /// Whether the entries follow each other without a hole.
    #[must_use]
    pub fn is_chain(&self) -> bool {
        self.entries.windows(2).all(|pair| pair[1].prev == pair[0].id)
    }

    /// Where a reader is that has seen all of it at `now_ms`.
    #[must_use]
    pub fn position(&self, now_ms: u64) -> Position {
        self.last.unwrap_or_else(|| Position::nothing_at(now_ms))
    }

    /// Forgets the entries at or behind `limit`. Logs with one order are not read at one moment; only what is
    /// older than the first of these moments is complete in all of them.
    pub fn cut(&mut self, limit: Position) {
        self.entries.truncate(self.entries.partition_point(|entry| entry.id < limit));
    }
}

/// All logs of one reader at one moment, read atomically.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The store's clock, in milliseconds.
    pub now_ms: u64,
    /// When the store was first seen, by its own clock: anything older was emptied since.
    pub epoch_ms: u64,
    /// What was asked for as a position; `None` where nothing was asked or the event id is not held.
    pub after: Option<Position>,
    /// In the order in which they were asked for.
    pub logs: Vec<Log>,
}

impl Snapshot {
    /// Where a reader is that has seen all of this.
    #[must_use]
    pub fn position(&self) -> Position {
        let last = self.logs.iter().filter_map(|log| log.last).max();
        last.unwrap_or_else(|| Position::nothing_at(self.now_ms))
    }
}

/// Why a history cannot be continued: the client must load its state anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Entries behind the position were removed, since the log is bounded.
    #[error("entries behind this position are no longer held")]
    Trimmed,
    /// The position was never held here, or the store was rolled back to a time before it.
    #[error("this position is not held")]
    Unknown,
    /// The position is older than anything that is held.
    #[error("this position is older than what is held")]
    Expired,
    /// The store was emptied since.
    #[error("the history was emptied since")]
    Emptied,
    /// More came meanwhile than may wait for one client.
    #[error("more was missed than may wait for one client")]
    Overflow,
    /// The endpoint keeps no history.
    #[error("this endpoint keeps no history")]
    Disabled,
}

impl Lost {
    /// All of them, for metrics and documentation.
    pub const ALL: [Self; 6] = [
        Self::Trimmed,
        Self::Unknown,
        Self::Expired,
        Self::Emptied,
        Self::Overflow,
        Self::Disabled,
    ];

    /// As clients and metrics see it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Emptied => "emptied",
            Self::Overflow => "overflow",
            Self::Disabled => "disabled",
        }
    }
}
