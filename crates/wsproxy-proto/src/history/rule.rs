//! When a reader may go on, and when it must be told that something is missing.
//!
//! Every rule fails closed: what cannot be shown to be complete counts as lost.

use crate::history::{Log, Lost, Position, Snapshot};

/// What a message is to a reader who has seen everything up to a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The next one.
    Next,
    /// One that was seen.
    Duplicate,
    /// Something between is missing.
    Gap,
}

/// Judges a message that came over a link which was not interrupted since `last` was seen.
///
/// Such a link itself loses nothing, so the first entry of a new log is the next message: the old log has
/// expired meanwhile. `last` is `None` as long as the reader has not begun.
#[must_use]
pub fn step(last: Option<Position>, id: Position, prev: Position) -> Step {
    let Some(last) = last else { return Step::Next };
    if prev == last {
        Step::Next
    } else if id <= last {
        Step::Duplicate
    } else if prev == Position::START {
        Step::Next
    } else if id.milliseconds < last.time_ms() {
        // It was on its way while its log expired.
        Step::Duplicate
    } else {
        Step::Gap
    }
}

/// Whether a client that saw everything up to `after` misses nothing but the entries of `snapshot`.
///
/// The logs share one order, so one position stands for all of them. `retention_ms`: how long an entry
/// is held at least, if no other bound removes it, less what the clocks of stores that replace each other
/// may differ by.
///
/// # Errors
/// Why something may be missing.
pub fn resume(after: Position, retention_ms: u64, snapshot: &Snapshot) -> Result<(), Lost> {
    if after == Position::START {
        let from_start = |log: &Log| log.first.is_none_or(|(_, prev)| prev == Position::START);
        return if snapshot.logs.iter().all(from_start) { Ok(()) } else { Err(Lost::Trimmed) };
    }
    let emptied = snapshot.epoch_ms > after.time_ms();
    let expired = snapshot.now_ms.saturating_sub(after.time_ms()) >= retention_ms;
    if !after.is_entry() {
        if emptied {
            return Err(Lost::Emptied);
        }
        if expired {
            return Err(Lost::Expired);
        }
        return snapshot.logs.iter().try_for_each(|log| resume_from_nothing(after, log));
    }
    let mut known = false;
    for log in &snapshot.logs {
        known |= resume_from_entry(after, expired, log)?;
    }
    // Where the position is still held, nothing was emptied since.
    if known {
        Ok(())
    } else if emptied {
        Err(Lost::Emptied)
    } else if expired {
        Err(Lost::Expired)
    } else {
        Err(Lost::Unknown)
    }
}

fn resume_from_nothing(after: Position, log: &Log) -> Result<(), Lost> {
    match log.first {
        None => Ok(()),
        Some((_, prev)) if prev != Position::START => Err(Lost::Trimmed),
        // Older than the moment at which there was none: a log of another time.
        Some((id, _)) if id.milliseconds < after.time_ms() => Err(Lost::Unknown),
        Some(_) => Ok(()),
    }
}

/// Says whether the position belongs to this log.
fn resume_from_entry(after: Position, expired: bool, log: &Log) -> Result<bool, Lost> {
    match (log.entries.first(), log.last) {
        (Some(next), _) if next.prev == after => Ok(true),
        (Some(next), _) if next.prev > after => Err(Lost::Trimmed),
        // A log that began later: an earlier one may have come and gone.
        (Some(next), _) if next.prev == Position::START && expired => Err(Lost::Expired),
        (Some(_), _) => Ok(false),
        (None, Some(last)) if last == after => Ok(true),
        (None, Some(last)) if last < after => Ok(false),
        (None, Some(_)) => Err(Lost::Unknown),
        (None, None) if expired => Err(Lost::Expired),
        (None, None) => Ok(false),
    }
}

/// Whether an instance that had seen everything of a log up to `last` when its link was lost, `gap_ms` ago,
/// misses nothing but the entries of `log`.
///
/// # Errors
/// Why something may be missing.
pub fn heal(
    last: Position,
    gap_ms: u64,
    retention_ms: u64,
    (now_ms, epoch_ms): (u64, u64),
    log: &Log,
) -> Result<(), Lost> {
    let next = log.entries.first();
    match next {
        Some(next) if next.prev == last => return Ok(()),
        None if log.last == Some(last) => return Ok(()),
        Some(next) if next.prev > last => return Err(Lost::Trimmed),
        _ => {}
    }
    // There is no log, or one that began after `last`. That is as it should be where the old one has
    // expired for want of entries, and nothing can have come and gone during the gap.
    let begins = match (log.first, next) {
        (None, _) => now_ms,
        (Some((id, prev)), Some(_)) if prev == Position::START && id > last => id.milliseconds,
        _ => return Err(Lost::Unknown),
    };
    if epoch_ms > last.time_ms().max(now_ms.saturating_sub(gap_ms)) {
        return Err(Lost::Emptied);
    }
    if gap_ms >= retention_ms {
        return Err(Lost::Expired);
    }
    // An older one than the moment at which there was none is a log of another time.
    let lived = if last.is_entry() { retention_ms } else { 0 };
    if last.time_ms().saturating_add(lived) > begins {
        return Err(Lost::Unknown);
    }
    Ok(())
}
