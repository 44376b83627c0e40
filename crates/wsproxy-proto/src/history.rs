//! The history of channels: positions, the envelope on the channel, and the rules by which nothing is
//! ever skipped or delivered twice without saying so.
//!
//! A history is a log of entries with growing ids, each of which names the one before it (`prev`).
//! What a reader has is a chain, or it is told that it is none.

use std::fmt;

use bytes::Bytes;

pub mod envelope;
pub mod fence;
pub mod pages;
pub mod position;
pub mod reader;
pub mod rule;

pub use envelope::Envelope;
pub use fence::Fence;
pub use pages::Pages;
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
        match Position::parse(text.as_bytes()) {
            Some(position) if position != Position::START => Ok(Some(Self::Position(position))),
            // Also the form that positions once had: no event has such an id, so it is not held.
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

/// A worker's event id must fit into an envelope, a query and a line of an event stream, and must not look like a
/// position: neither as positions are written nor as they once were.
///
/// # Errors
/// It does not.
pub fn check_event_id(text: &str) -> Result<(), BadEventId> {
    if !text.is_empty() && is_plain(text) && !looks_like_a_position(text) {
        Ok(())
    } else {
        Err(BadEventId)
    }
}

fn is_plain(text: &str) -> bool {
    // As the script reads it: bytes of ASCII.
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

/// Why a text is no event id of a worker's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "is empty, longer than {EVENT_ID_BYTES_MAX} bytes, holds spaces or control characters, or looks like a position"
)]
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
    /// Where it ends: the last entry of its life, held or not, or where its life began without one. `None` where
    /// nothing is known of it.
    pub head: Option<Position>,
    /// The head was made when it was read, since there was none.
    pub is_new: bool,
    /// Whether its entries begin where its life does; meant only where all that are held were asked for.
    pub is_from_start: bool,
    /// Nobody who comes back has this log again, so nobody's position depends on it.
    pub is_private: bool,
    /// The entries behind what was asked for, oldest first.
    pub entries: Vec<Entry>,
    /// Whether these are all; otherwise further ones follow behind the last of them.
    pub complete: bool,
}

impl Log {
    /// Whether the entries follow each other without a hole, and end where the log does.
    #[must_use]
    pub fn is_chain(&self) -> bool {
        let is_whole = self.entries.windows(2).all(|pair| pair[1].prev == pair[0].id);
        let end = self.entries.last().map(|entry| entry.id);
        is_whole && (!self.complete || end.is_none() || end == self.head)
    }

    /// The position before its entries: whoever has seen it misses nothing but these.
    #[must_use]
    pub fn previous(&self) -> Position {
        let next = self.entries.first().map(|next| next.prev);
        next.unwrap_or_else(|| self.position())
    }

    /// Whether anything lies behind what was asked for.
    #[must_use]
    pub const fn has_entries(&self) -> bool {
        !self.entries.is_empty()
    }

    /// Where a reader is that has seen all of it.
    #[must_use]
    pub fn position(&self) -> Position {
        self.head.unwrap_or(Position::START)
    }

    /// Forgets the entries above `moment`. Logs with one order are not read at one moment; only what is not above
    /// the first of these moments is complete in all of them.
    pub fn cut(&mut self, moment: (u64, u64)) {
        self.entries.truncate(self.entries.partition_point(|entry| entry.id.id() <= moment));
    }
}

/// All logs of one reader at one moment, read atomically.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The store's clock, in milliseconds.
    pub now_ms: u64,
    /// The latest id of all logs that share an order; entries that are written later are above it.
    pub moment: (u64, u64),
    /// What was asked for as a position.
    pub after: Resolved,
    /// That position is of a message to one connection of the same order, which no log here holds.
    pub known: bool,
    /// In the order in which they were asked for.
    pub logs: Vec<Log>,
}

/// The position that a client named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resolved {
    /// Nothing was asked for, or no entry has this event id.
    #[default]
    Nothing,
    /// It is here.
    At(Position),
    /// Several entries have this event id: nobody knows which one the client has seen.
    Ambiguous,
}

impl Resolved {
    /// The position.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub const fn position(self) -> Result<Position, Lost> {
        match self {
            Self::At(position) => Ok(position),
            Self::Nothing => Err(Lost::Unknown),
            Self::Ambiguous => Err(Lost::Ambiguous),
        }
    }
}

impl Snapshot {
    /// Where a reader is that has seen all of this.
    #[must_use]
    pub fn position(&self) -> Position {
        let heads = self.logs.iter().filter_map(|log| log.head);
        heads.fold(Position::START, Position::later)
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
    /// Nothing has happened for so long that nothing is known any more.
    #[error("this position is older than what is known")]
    Expired,
    /// The store was emptied since.
    #[error("the history was emptied since")]
    Emptied,
    /// A worker gave this event id to several messages.
    #[error("several messages have this event id")]
    Ambiguous,
    /// More came meanwhile than may wait for one client.
    #[error("more was missed than may wait for one client")]
    Overflow,
    /// The endpoint keeps no history.
    #[error("this endpoint keeps no history")]
    Disabled,
}

impl Lost {
    /// All of them, for metrics and documentation.
    pub const ALL: [Self; 7] = [
        Self::Trimmed,
        Self::Unknown,
        Self::Expired,
        Self::Emptied,
        Self::Ambiguous,
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
            Self::Ambiguous => "ambiguous",
            Self::Overflow => "overflow",
            Self::Disabled => "disabled",
        }
    }
}
