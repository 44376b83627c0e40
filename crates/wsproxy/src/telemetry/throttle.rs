//! Keeps a line that strangers can cause from filling the log; knows no clock and no log.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Lets one line through per interval, and counts those that were held back.
#[derive(Debug, Default)]
pub struct Throttle {
    /// When the next line may come, in microseconds.
    next: AtomicU64,
    held_back: AtomicU64,
}

impl Throttle {
    /// Asks for a line at `now`, with `interval` after it, both in microseconds of a monotonic clock.
    /// The number of lines that were held back since the last one; `None` where this one is held back too.
    #[must_use]
    pub fn pass(&self, now: u64, interval: u64) -> Option<u64> {
        let due = |next| (now >= next).then_some(now.saturating_add(interval));
        if self.next.fetch_update(Relaxed, Relaxed, due).is_err() {
            self.held_back.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.held_back.swap(0, Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_passes_and_the_others_are_counted() {
        let throttle = Throttle::default();
        assert_eq!(throttle.pass(5, 100), Some(0));
        assert_eq!((throttle.pass(6, 100), throttle.pass(104, 100)), (None, None));
        assert_eq!(throttle.pass(105, 100), Some(2));
        assert_eq!(throttle.pass(106, 100), None);
    }
}
