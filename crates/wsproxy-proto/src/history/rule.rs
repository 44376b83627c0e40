//! Rules that decide when a reader may go on, and when it is told that entries are missing.
//!
//! Every rule compares identities, never times. A log that cannot be shown to be complete counts as lost.

use crate::history::{Log, Lost, Position, Snapshot};

/// Relation of a message to a reader that has seen all up to a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The next message.
    Next,
    /// A message that the reader has seen.
    Duplicate,
    /// Messages between are missing, or the message is not what it says.
    Gap,
}

/// Judges a message that came over a connection which was not interrupted since `last` was seen. `latest_ms` is an
/// upper bound of the time by the store's clock.
///
/// Such a connection loses no message, so the first entry of a new life of the log is the next message if it is above
/// `last`. If it is not above `last` the reader may have seen it: only the log can tell.
#[must_use]
pub fn step(last: Option<Position>, id: Position, prev: Position, latest_ms: u64) -> Step {
    // Only a forged message names a time that has not come, or an entry behind itself.
    if id.milliseconds > latest_ms || !prev.is_before(id) {
        return Step::Gap;
    }
    let Some(last) = last else { return Step::Next };
    if id == last {
        Step::Duplicate
    } else if prev == last || (prev.is_beginning() && last.is_before(id)) {
        Step::Next
    } else if id.is_before(last) && !prev.is_beginning() {
        Step::Duplicate
    } else {
        Step::Gap
    }
}

/// Checks that a client that has seen all up to `after` misses nothing but the entries of `snapshot`.
///
/// The logs share one order, so one position stands for all of them. Entries are held for `ttl_ms`.
///
/// # Errors
/// The reason why entries may be missing.
pub fn resume(after: Position, ttl_ms: u64, snapshot: &Snapshot) -> Result<(), Lost> {
    if after == Position::START {
        let is_whole = snapshot.logs.iter().all(|log| log.is_from_start);
        return if is_whole { Ok(()) } else { Err(Lost::Trimmed) };
    }
    // The position belongs to one of the logs, or is known to belong to another log of the same order.
    let mut is_known = snapshot.known;
    for log in snapshot.logs.iter().filter(|log| !log.is_private) {
        let previous = log.previous();
        if log.is_new || log.head.is_none() {
            return Err(gone(after, ttl_ms, snapshot.now_ms));
        } else if previous == after {
            is_known = true;
        } else if after.is_before(previous) {
            return Err(trimmed(after, ttl_ms, snapshot.now_ms));
        } else if previous == Position::START {
            // The life of the log began behind the position, and the entries of an earlier life are not known.
            return Err(Lost::Unknown);
        }
    }
    // Of the logs that do not hold the position the client has seen all entries that are not above it.
    if is_known {
        Ok(())
    } else if snapshot.logs.iter().all(|log| log.previous().is_beginning()) {
        Err(Lost::Emptied)
    } else {
        Err(Lost::Unknown)
    }
}

/// Checks that an instance that has seen a log up to `last` misses nothing but the entries of `log`.
///
/// # Errors
/// The reason why entries may be missing.
pub fn heal(last: Position, ttl_ms: u64, now_ms: u64, log: &Log) -> Result<(), Lost> {
    let previous = log.previous();
    if previous == last {
        Ok(())
    } else if log.is_new || log.head.is_none() {
        Err(gone(last, ttl_ms, now_ms))
    } else if last.is_before(previous) {
        Err(trimmed(last, ttl_ms, now_ms))
    } else if previous.is_beginning() {
        Err(Lost::Emptied)
    } else {
        Err(Lost::Unknown)
    }
}

/// Reason why a log has no head: it expired unused, or was removed.
const fn gone(last: Position, ttl_ms: u64, now_ms: u64) -> Lost {
    if !last.is_beginning() && is_old(last, ttl_ms, now_ms) { Lost::Expired } else { Lost::Emptied }
}

/// Reason why entries behind a position are held no more.
const fn trimmed(last: Position, ttl_ms: u64, now_ms: u64) -> Lost {
    if !last.is_beginning() && is_old(last, ttl_ms, now_ms) { Lost::Expired } else { Lost::Trimmed }
}

const fn is_old(last: Position, ttl_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(last.milliseconds) >= ttl_ms
}
