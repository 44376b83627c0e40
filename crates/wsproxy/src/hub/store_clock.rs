//! An estimate of the store's clock, and the times at which the store was lost.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicI64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;

/// Largest known lead of the store's clock over this instance's, in milliseconds.
#[derive(Debug)]
pub(super) struct StoreClock(AtomicI64);

impl Default for StoreClock {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MIN))
    }
}

impl StoreClock {
    /// Notes that the store's clock showed `store_ms` at `now`.
    pub(super) fn seen(&self, store_ms: u64, now: Micros) {
        let ahead = i64::try_from(store_ms).unwrap_or(i64::MAX) - milliseconds(now);
        self.0.fetch_max(ahead, Relaxed);
    }

    /// Returns the store's time at `now`; `None` if the clock was never seen.
    pub(super) fn now_ms(&self, now: Micros) -> Option<u64> {
        match self.0.load(Relaxed) {
            i64::MIN => None,
            ahead => u64::try_from(milliseconds(now) + ahead).ok(),
        }
    }

    /// Returns an upper bound of the store's time at `now`; the maximum if the clock was never seen. A clock that was
    /// set back has no effect, since ids count on from the later time.
    pub(super) fn latest_ms(&self, now: Micros) -> u64 {
        match self.0.load(Relaxed) {
            i64::MIN => u64::MAX,
            ahead => u64::try_from(milliseconds(now) + ahead + MARGIN_MS).unwrap_or_default(),
        }
    }
}

/// Times in which a worker may have repeated a publish that the store had forgotten.
///
/// A lost store may come back without its last messages. A worker that saw an error publishes again, with the same
/// event id, but after other messages than before. So a client that saw the first copy must not resume from the second
/// one.
#[derive(Debug, Default)]
pub(super) struct Doubts(Mutex<VecDeque<(u64, u64)>>);

impl Doubts {
    /// Notes that the store was lost at this time of its clock.
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

    /// Returns whether a message of this time may be a repetition.
    pub(super) fn concern(&self, store_ms: u64) -> bool {
        self.0.lock().iter().any(|(from, until)| (*from..=*until).contains(&store_ms))
    }
}

fn milliseconds(now: Micros) -> i64 {
    i64::try_from(now.0 / 1000).unwrap_or(i64::MAX / 2)
}

/// Upper bound of the difference between the clocks of a store and its replacement.
const SKEW_MS: u64 = 5_000;

/// Upper bound of the time for which workers repeat a publish. The worker API and the client libraries remember
/// idempotency keys for this time.
const RETRIES_MS: u64 = 600_000;

/// Upper bound of the remembered outages.
const TIMES_MAX: usize = 64;

/// Margin for clocks that drift or are set.
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
