//! Histories of channels: positions, the envelope on the channel, and the rules by which no entry is skipped or
//! delivered twice without the client being told.
//!
//! A history is a log of entries with growing ids. Each entry names the one before it (`prev`). The entries of a
//! reader are a chain, or the reader is told that they are none.

use std::fmt;

use bytes::Bytes;

pub mod envelope;
pub mod fence;
pub mod limits;
pub mod pages;
pub mod position;
pub mod reader;
pub mod rule;

pub use envelope::Envelope;
pub use fence::Fence;
pub use limits::HistoryLimits;
pub use pages::Pages;
pub use position::Position;
pub use reader::Reader;

/// Place in a history behind which a client or a reader continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum After {
    /// Behind a position. [`Position::START`] stands for all entries that are held.
    Position(Position),
    /// Behind the entry to which a worker gave this event id.
    Event(Box<str>),
}

impl After {
    /// Reads the last event id that a client gave; `None` where it is empty.
    ///
    /// # Errors
    /// [`BadEventId`] where the text is longer than [`EVENT_ID_BYTES_MAX`] or holds spaces or control characters.
    pub fn parse(text: &str) -> Result<Option<Self>, BadEventId> {
        if text.is_empty() {
            return Ok(None);
        }
        if text == "0" {
            return Ok(Some(Self::Position(Position::START)));
        }
        match Position::parse(text.as_bytes()) {
            Some(position) if position != Position::START => Ok(Some(Self::Position(position))),
            // Positions of an earlier version come here too: no event has such an id, so none is found.
            _ if is_plain(text) => Ok(Some(Self::Event(text.into()))),
            _ => Err(BadEventId),
        }
    }
}

impl fmt::Display for After {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Position(Position::START) => f.write_str("0"),
            Self::Position(position) => position.fmt(f),
            Self::Event(id) => f.write_str(id),
        }
    }
}

/// Checks an event id that a worker gives. It must fit an envelope, a query and a line of an event stream, and must
/// not look like a position of this or an earlier version.
///
/// # Errors
/// [`BadEventId`].
pub fn check_event_id(text: &str) -> Result<(), BadEventId> {
    if !text.is_empty() && is_plain(text) && !looks_like_a_position(text) {
        Ok(())
    } else {
        Err(BadEventId)
    }
}

fn is_plain(text: &str) -> bool {
    // The script compares bytes of ASCII too.
    let is_plain = |byte: u8| byte > b' ' && byte != 0x7f;
    text.len() <= EVENT_ID_BYTES_MAX && text.bytes().all(is_plain)
}

fn looks_like_a_position(text: &str) -> bool {
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit());
    let is_tag = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_hexdigit());
    let words: Vec<_> = text.splitn(4, '-').collect();
    match words[..] {
        ["0"] => true,
        [milliseconds, sequence] => is_number(milliseconds) && is_number(sequence),
        [milliseconds, sequence, tag] => {
            is_number(milliseconds) && is_number(sequence) && is_tag(tag)
        }
        _ => false,
    }
}

/// Error of a text that is no event id of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "is empty, longer than {EVENT_ID_BYTES_MAX} bytes, holds spaces or control characters, or looks like a position"
)]
pub struct BadEventId;

/// Entry of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Id of the entry.
    pub id: Position,
    /// Id of the entry before it; [`Position::START`] for the first entry of a log's life.
    pub prev: Position,
    /// Event id that a worker gave the entry.
    pub event_id: Option<Box<str>>,
    /// Payload that was published.
    pub data: Bytes,
}

/// State of one log at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Log {
    /// End of the log: the last entry of its life, held or not, or the start of a life without entries. `None` where
    /// nothing is known of the log.
    pub head: Option<Position>,
    /// The head was made by this reading, since there was none.
    pub is_new: bool,
    /// Whether the entries begin where the life of the log does. It has a meaning only where all held entries were
    /// asked for.
    pub is_from_start: bool,
    /// The log belongs to one connection. A client that comes back has another one, so no position depends on this
    /// log.
    pub is_private: bool,
    /// Entries behind the place that was asked for, oldest first.
    pub entries: Vec<Entry>,
    /// Whether these are all entries; otherwise further ones follow.
    pub complete: bool,
}

impl Log {
    /// Returns whether the entries follow each other without a hole, and end where the log does.
    #[must_use]
    pub fn is_chain(&self) -> bool {
        let is_whole = self.entries.windows(2).all(|pair| pair[1].prev == pair[0].id);
        let end = self.entries.last().map(|entry| entry.id);
        is_whole && (!self.complete || end.is_none() || end == self.head)
    }

    /// Returns the position before the entries: a reader that is there misses nothing but these entries.
    #[must_use]
    pub fn previous(&self) -> Position {
        let next = self.entries.first().map(|next| next.prev);
        next.unwrap_or_else(|| self.position())
    }

    /// Returns whether there are entries behind the place that was asked for.
    #[must_use]
    pub const fn has_entries(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Returns the position of a reader that has seen the whole log.
    #[must_use]
    pub fn position(&self) -> Position {
        self.head.unwrap_or(Position::START)
    }

    /// Removes the entries above `moment`. Logs with one order are not read at one moment; only entries up to the
    /// first of these moments are complete in all of the logs.
    pub fn cut(&mut self, moment: (u64, u64)) {
        self.entries.truncate(self.entries.partition_point(|entry| entry.id.id() <= moment));
    }
}

/// State of all logs of one reader at one moment, read atomically.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// Time by the store's clock, in milliseconds.
    pub now_ms: u64,
    /// Latest id of all logs that share one order. Entries that are written later are above it.
    pub moment: (u64, u64),
    /// Position that was asked for.
    pub after: Resolved,
    /// That position is of a message to one connection, with the same order. No log here holds it.
    pub known: bool,
    /// The logs, in the order in which they were asked for.
    pub logs: Vec<Log>,
}

/// Position that a client named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resolved {
    /// No position was asked for, or no entry has this event id.
    #[default]
    Nothing,
    /// The position is here.
    At(Position),
    /// Several entries have this event id, so the one that the client has seen is unknown.
    Ambiguous,
}

impl Resolved {
    /// Returns the position.
    ///
    /// # Errors
    /// [`Lost::Unknown`] where there is none, [`Lost::Ambiguous`] where there are several.
    pub const fn position(self) -> Result<Position, Lost> {
        match self {
            Self::At(position) => Ok(position),
            Self::Nothing => Err(Lost::Unknown),
            Self::Ambiguous => Err(Lost::Ambiguous),
        }
    }
}

impl Snapshot {
    /// Returns the position of a reader that has seen all of these logs.
    #[must_use]
    pub fn position(&self) -> Position {
        let heads = self.logs.iter().filter_map(|log| log.head);
        heads.fold(Position::START, Position::later)
    }
}

/// Reason why a history cannot be continued. The client must load its state anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The log is bounded, and entries behind the position were removed.
    #[error("entries behind this position are no longer held")]
    Trimmed,
    /// The store never held the position, or was rolled back to a time before it.
    #[error("this position is not held")]
    Unknown,
    /// The log was unused for so long that its head has expired.
    #[error("this position is older than what is known")]
    Expired,
    /// The store was emptied since.
    #[error("the history was emptied since")]
    Emptied,
    /// A worker gave this event id to several messages.
    #[error("several messages have this event id")]
    Ambiguous,
    /// More was missed, or came meanwhile, than may wait for one client.
    #[error("more was missed than may wait for one client")]
    Overflow,
    /// The endpoint keeps no history.
    #[error("this endpoint keeps no history")]
    Disabled,
}

impl Lost {
    /// All reasons, for metrics and documentation.
    pub const ALL: [Self; 7] = [
        Self::Trimmed,
        Self::Unknown,
        Self::Expired,
        Self::Emptied,
        Self::Ambiguous,
        Self::Overflow,
        Self::Disabled,
    ];

    /// Returns the word that clients and metrics see.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Emptied => "emptied",
            Self::Ambiguous => "ambiguous",
            Self::Overflow => "overflow",
            Self::Disabled => "disabled",
        }
    }
}

/// Upper bound of the length of an event id that a worker gives, in bytes.
pub const EVENT_ID_BYTES_MAX: usize = 128;
