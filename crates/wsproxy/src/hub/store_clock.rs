//! An upper bound of what the store's clock shows, as far as this instance has seen it.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

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

    /// What it shows at most at `now`; everything where it was never seen. A clock that was set back counts as
    /// it was before: ids count on from there.
    pub(super) fn latest_ms(&self, now: Micros) -> u64 {
        match self.0.load(Relaxed) {
            i64::MIN => u64::MAX,
            ahead => u64::try_from(milliseconds(now) + ahead + MARGIN_MS).unwrap_or_default(),
        }
    }
}

fn milliseconds(now: Micros) -> i64 {
    i64::try_from(now.0 / 1000).unwrap_or(i64::MAX / 2)
}

/// Clocks drift, and are set.
const MARGIN_MS: i64 = 60_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_set_back_counts_as_it_was() {
        let clock = StoreClock::default();
        assert_eq!(clock.latest_ms(Micros(0)), u64::MAX);
        clock.seen(1_000_000, Micros(5_000_000));
        clock.seen(900_000, Micros(6_000_000));
        assert_eq!(clock.latest_ms(Micros(6_000_000)), 1_061_000);
    }
}
