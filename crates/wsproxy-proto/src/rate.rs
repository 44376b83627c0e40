//! Rate limits as arithmetic on one number (GCRA); the clock is the caller's.

/// A limit: `burst` events at once, and `per_second` of them for as long as one likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds that one event costs.
    interval: u64,
    /// Nanoseconds that may be owed.
    tolerance: u64,
}

impl Rate {
    /// `events` per `window_ms` milliseconds, of which `burst` may come at once.
    /// `None` where `events` is 0: no limit.
    #[must_use]
    pub fn new(events: u32, window_ms: u64, burst: u32) -> Option<Self> {
        if events == 0 {
            return None;
        }
        let interval = (window_ms.max(1) * 1_000_000) / u64::from(events);
        Some(Self { interval, tolerance: interval * u64::from(burst.max(1) - 1) })
    }
}

/// The state of one limited party: 8 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Theoretical arrival time of the next event, in nanoseconds of the caller's clock.
    next: u64,
}

impl Bucket {
    /// Takes one event at `now` (nanoseconds of any monotonic clock).
    ///
    /// # Errors
    /// The nanoseconds after which a further try can succeed; nothing is taken.
    pub fn take(&mut self, rate: Rate, now: u64) -> Result<(), u64> {
        let next = self.next.max(now);
        if next - now > rate.tolerance {
            return Err(next - now - rate.tolerance);
        }
        self.next = next + rate.interval;
        Ok(())
    }

    /// Whether nothing is owed at `now`, so that the state may be forgotten.
    #[must_use]
    pub fn is_idle(&self, now: u64) -> bool {
        self.next <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const S: u64 = 1_000_000_000;

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let rate = Rate::new(10, 1000, 5).unwrap();
        let mut bucket = Bucket::default();
        let now = 50 * S;
        assert_eq!((0..20).filter(|_| bucket.take(rate, now).is_ok()).count(), 5);
        assert_eq!(bucket.take(rate, now), Err(S / 10));
        assert!(bucket.take(rate, now + S / 10).is_ok());
        let passed = (1..=100).filter(|i| bucket.take(rate, now + S / 10 + i * S / 100).is_ok());
        assert_eq!(passed.count(), 10);
    }

    #[test]
    fn no_events_means_no_limit_and_a_clock_that_stands_still_is_safe() {
        assert_eq!(Rate::new(0, 1000, 5), None);
        let rate = Rate::new(1, 1000, 1).unwrap();
        let mut bucket = Bucket::default();
        assert!(bucket.take(rate, 0).is_ok());
        assert!(bucket.take(rate, 0).is_err());
        assert!(!bucket.is_idle(0));
        assert!(bucket.is_idle(S));
    }
}
