//! Bounds the rate of each kind of log line. Knows no log.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_conn::clock::{self, Micros};

/// Throttle that lets one line of a kind through each second, and counts the others.
#[derive(Debug, Default)]
pub struct Throttle {
    /// Time of the next line, in microseconds of the process's clock.
    next: AtomicU64,
    left_out: AtomicU64,
}

impl Throttle {
    /// Creates a throttle that lets the first line through.
    #[must_use]
    pub const fn new() -> Self {
        Self { next: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// Returns the number of lines that were left out since the last one, if a line may be written now.
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(clock::now())
    }

    fn pass_at(&self, Micros(now): Micros) -> Option<u64> {
        let next = self.next.load(Relaxed);
        let is_mine = now >= next
            && self.next.compare_exchange(next, now + EVERY_MICROS, Relaxed, Relaxed).is_ok();
        if is_mine {
            return Some(self.left_out.swap(0, Relaxed));
        }
        self.left_out.fetch_add(1, Relaxed);
        None
    }
}

/// A [`Throttle`] for each kind of line. Kinds are words of the program, so there are few.
#[derive(Debug, Default)]
pub struct Throttles(Mutex<HashMap<&'static str, Throttle>>);

impl Throttles {
    /// Returns the number of lines of this kind that were left out since the last one, if one may be written now.
    pub fn pass(&self, kind: &'static str) -> Option<u64> {
        self.0.lock().entry(kind).or_default().pass()
    }
}

const EVERY_MICROS: u64 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_line_of_its_own() {
        let throttles = Throttles::default();
        assert_eq!(["a", "a", "b"].map(|kind| throttles.pass(kind)), [Some(0), None, Some(0)]);
    }

    #[test]
    fn one_line_a_second_passes_and_tells_how_many_did_not() {
        let throttle = Throttle::default();
        let passes = |at| throttle.pass_at(Micros(at));
        assert_eq!(passes(5), Some(0));
        assert_eq!([passes(6), passes(1_000_004)], [None, None]);
        assert_eq!(passes(1_000_005), Some(2));
        assert_eq!(passes(1_000_006), None);
        assert_eq!(passes(9_000_000), Some(1));
    }
}
