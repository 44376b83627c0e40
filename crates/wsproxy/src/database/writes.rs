//! Whether the database takes writes, by how the last ones went. Knows no statement.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The last writes.
#[derive(Debug, Default)]
pub(super) struct Writes(Mutex<Failures>);

/// Failures since the last write that succeeded.
#[derive(Debug, Default)]
struct Failures {
    times: u32,
    /// Time of the last write.
    last: Option<Instant>,
}

impl Writes {
    /// Notes how a write went.
    pub(super) fn note(&self, is_done: bool) {
        let mut failures = self.0.lock();
        let times = if is_done { 0 } else { failures.times.saturating_add(1) };
        *failures = Failures { times, last: Some(Instant::now()) };
    }

    /// Returns whether writes fail: more than once in a row, and not long ago. Where something waits it is tried again
    /// within seconds, so that an old failure says nothing.
    pub(super) fn fail(&self) -> bool {
        let failures = self.0.lock();
        failures.times > 1 && failures.last.is_some_and(|last| last.elapsed() < RECENT)
    }
}

/// Age from which on a failure says nothing.
const RECENT: Duration = Duration::from_secs(60);
