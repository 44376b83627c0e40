//! What the store's clock shows, as far as this instance has seen it, and when the store was away by it.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicI64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;

/// How far the store's clock is ahead of ours, at most, in milliseconds.
#[derive(Debug)]
pub(super) struct StoreClock(AtomicI64);

impl Default for StoreClock {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MIN))
    }
}

impl StoreClock {
    /// The store's clock showed `store_ms` at `now`.
    pub(super) fn seen(&self, store_ms: u64, now: Micros) {
        let ahead = i64::try_from(store_ms).unwrap_or(i64::MAX) - milliseconds(now);
        self.0.fetch_max(ahead, Relaxed);
    }

    /// What it shows about now, where that is known.
    pub(super) fn now_ms(&self, now: Micros) -> Option<u64> {
        match self.0.load(Relaxed) {
            i64::MIN => None,
            ahead => u64::try_from(milliseconds(now) + ahead).ok(),
        }
    }

    /// What it shows at most at `now`; everything where it was never seen. A clock that was set back counts as
    /// it was before: ids count on from there.
    pub(super) fn latest_ms(&self, now: Micros) -> u64 {
        match self.0.load(Relaxed) {
            i64::MIN => u64::MAX,
            ahead => u64::try_from(milliseconds(now) + ahead + MARGIN_MS).unwrap_or_default(),
        }
    }
}

/// The times in which a worker may have published once more what a store had forgotten.
///
/// A store that was lost may come back without its last messages. A worker that saw an error publishes again, with
/// the same event id, and behind other messages than before: who saw the first copy must not continue there.
#[derive(Debug, Default)]
pub(super) struct Doubts(Mutex<VecDeque<(u64, u64)>>);

impl Doubts {
    /// The store was lost at this time of its clock.
    pub(super) fn lost(&self, store_ms: u64) {
        let mut times = self.0.lock();
        let from = store_ms.saturating_sub(SKEW_MS);
        match times.back_mut() {
            Some((_, until)) if *until >= from => *until = store_ms + RETRIES_MS,
            _ => times.push_back((from, store_ms + RETRIES_MS)),
        }
        if times.len() > TIMES_MAX {
            times.pop_front();
        }
    }

    /// Whether a message of this time may be a repetition.
    pub(super) fn concern(&self, store_ms: u64) -> bool {
        self.0.lock().iter().any(|(from, until)| (*from..=*until).contains(&store_ms))
    }
}

fn milliseconds(now: Micros) -> i64 {
    i64::try_from(now.0 / 1000).unwrap_or(i64::MAX / 2)
}

/// The clocks of stores that replace each other differ.
const SKEW_MS: u64 = 5_000;

/// Workers repeat for so long at most: the API and the packages remember idempotency keys as long.
const RETRIES_MS: u64 = 600_000;

/// So many outages are remembered.
const TIMES_MAX: usize = 64;

/// Clocks drift, and are set.
const MARGIN_MS: i64 = 60_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_published_soon_after_an_outage_is_doubtful() {
        let doubts = Doubts::default();
        assert!(!doubts.concern(1_000_000));
        doubts.lost(1_000_000);
        doubts.lost(1_300_000);
        let concerned = [994_999, 995_000, 1_900_000, 1_900_001].map(|at| doubts.concern(at));
        assert_eq!(concerned, [false, true, true, false]);
        for outage in 2..200 {
            doubts.lost(outage * 1_000_000);
        }
        assert!(doubts.0.lock().len() <= TIMES_MAX);
    }

    #[test]
    fn a_clock_set_back_counts_as_it_was() {
        let clock = StoreClock::default();
        assert_eq!(clock.latest_ms(Micros(0)), u64::MAX);
        clock.seen(1_000_000, Micros(5_000_000));
        clock.seen(900_000, Micros(6_000_000));
        assert_eq!(clock.latest_ms(Micros(6_000_000)), 1_061_000);
    }
}
