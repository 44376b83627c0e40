//! Rate limits as arithmetic on one number (GCRA); the clock is the caller's.

pub mod shared;

/// Limit of events: a burst at once, and a steady rate after that.
///
/// ```
/// use wsproxy_proto::rate::{Bucket, Rate};
///
/// // 10 events per second, of which 2 may come at once.
/// let rate = Rate::new(10, 1000, 2).unwrap();
/// let mut bucket = Bucket::default();
/// let now = 1_000_000_000;
/// assert!(bucket.take(rate, now).is_ok());
/// assert!(bucket.take(rate, now).is_ok());
/// assert_eq!(bucket.take(rate, now), Err(100_000_000));
/// assert!(bucket.take(rate, now + 100_000_000).is_ok());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds that one event costs.
    interval: u64,
    /// Nanoseconds that may be owed.
    tolerance: u64,
}

impl Rate {
    /// Creates a limit of `events` per `window_ms` milliseconds, of which `burst` may come at once. `None` where
    /// `events` is 0: no limit.
    #[must_use]
    pub fn new(events: u32, window_ms: u64, burst: u32) -> Option<Self> {
        if events == 0 {
            return None;
        }
        let interval = (window_ms.max(1) * 1_000_000) / u64::from(events);
        Some(Self { interval, tolerance: interval * u64::from(burst.max(1) - 1) })
    }
}

/// State of one party that a [`Rate`] limits: 8 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Theoretical arrival time of the next event, in nanoseconds of the caller's clock.
    next: u64,
}

impl Bucket {
    /// Takes one event at `now` (nanoseconds of any monotonic clock).
    ///
    /// # Errors
    /// Nanoseconds after which the event can be taken. Nothing is taken now.
    pub fn take(&mut self, rate: Rate, now: u64) -> Result<(), u64> {
        self.forgive(rate, now);
        let next = self.next.max(now);
        if next - now > rate.tolerance {
            return Err(next - now - rate.tolerance);
        }
        self.next = next + rate.interval;
        Ok(())
    }

    /// Takes one event that may have happened earlier than `now`, but not before the last event or [`Self::settle`].
    /// All the time since then counts as time in which events could happen.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_late(&mut self, rate: Rate, now: u64) -> Result<(), u64> {
        self.forgive(rate, now);
        if self.next > now.saturating_add(rate.tolerance) {
            return Err(self.next - now - rate.tolerance);
        }
        self.next += rate.interval;
        Ok(())
    }

    /// Forgives a debt that comes from another rate, since `rate` never lets it grow so far. Without this a party that
    /// has used up a slow rate would be refused for long after an operator has raised the rate.
    fn forgive(&mut self, rate: Rate, now: u64) {
        if self.next.saturating_sub(now) > rate.tolerance.saturating_add(rate.interval) {
            self.next = now.saturating_add(rate.tolerance);
        }
    }

    /// Forgets unused time until `now`, so that [`Self::take_late`] gives no credit for it.
    pub fn settle(&mut self, now: u64) {
        self.next = self.next.max(now);
    }

    /// Returns whether nothing is owed at `now`, so that the state may be forgotten.
    #[must_use]
    pub fn is_idle(&self, now: u64) -> bool {
        self.next <= now
    }
}

/// Limit of bytes: a burst at once, and `per_second` after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRate {
    per_second: u64,
    /// Microseconds that may be owed.
    tolerance: u32,
    /// Upper bound of the microseconds that are owed, whatever was taken at once.
    owed_max: u32,
}

impl ByteRate {
    /// Creates a limit; `None` where `per_second` is 0: no limit. `taken_max` is the upper bound of one
    /// [`ByteBucket::take`]. A debt beyond `burst` and `taken_max` is forgiven.
    ///
    /// A burst that takes longer to earn than [`EARNING_MICROS_MAX`] is cut to the bytes that this time earns.
    #[must_use]
    pub fn new(per_second: usize, burst: usize, taken_max: usize) -> Option<Self> {
        if per_second == 0 {
            return None;
        }
        let per_second = per_second as u64;
        let span = |bytes| cost(per_second, bytes).min(EARNING_MICROS_MAX);
        let tolerance = span(burst);
        Some(Self { per_second, tolerance, owed_max: tolerance + span(taken_max) })
    }
}

/// State of one party that a [`ByteRate`] limits: 4 bytes.
///
/// It keeps the low half of the caller's microseconds, which repeats after 71 minutes. A party that was silent for
/// exactly that time may wait once for as long as one read costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ByteBucket {
    /// Time at which nothing is owed any more, in microseconds of the caller's clock.
    clear: u32,
}

impl ByteBucket {
    /// Takes `bytes` at `now` (microseconds of any monotonic clock), even beyond the limit.
    pub fn take(&mut self, rate: ByteRate, bytes: usize, now: u64) {
        let owed = self.owed(rate, now).saturating_add(cost(rate.per_second, bytes));
        self.clear = (now as u32).wrapping_add(owed.min(rate.owed_max));
    }

    /// Returns the microseconds until bytes may be taken again; 0 where they may be taken now.
    #[must_use]
    pub fn wait(&self, rate: ByteRate, now: u64) -> u64 {
        u64::from(self.owed(rate, now).saturating_sub(rate.tolerance))
    }

    fn owed(&self, rate: ByteRate, now: u64) -> u32 {
        let owed = self.clear.wrapping_sub(now as u32);
        // More than can be owed: the time is in the past.
        if owed > rate.owed_max { 0 } else { owed }
    }
}

/// Returns the microseconds that bytes cost, rounded up, so that no byte is free.
fn cost(per_second: u64, bytes: usize) -> u32 {
    let micros = (bytes as u64).saturating_mul(1_000_000).div_ceil(per_second);
    u32::try_from(micros).unwrap_or(u32::MAX)
}

/// Upper bound of the time in which a burst of bytes is earned: 17 minutes.
pub const EARNING_MICROS_MAX: u32 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;
    const S: u64 = 1_000_000_000;

    #[test]
    fn bytes_pass_in_a_burst_and_then_at_their_rate() {
        let rate = ByteRate::new(1000, 4000, 500).unwrap();
        let mut bucket = ByteBucket::default();
        // The clock's low half comes round in the middle of it.
        let start = (7_u64 << 32) - 5_000_000;
        let mut taken = 0;
        for millis in 0..20_000 {
            let now = start + millis * 1000;
            while bucket.wait(rate, now) == 0 {
                bucket.take(rate, 100, now);
                taken += 100;
            }
            assert!(bucket.wait(rate, now) <= 100_000);
        }
        assert!((23_900..=24_200).contains(&taken), "{taken} bytes in 20 s");
    }

    #[test]
    fn no_silence_and_no_take_leads_to_a_long_wait() {
        let rate = ByteRate::new(1000, 4000, 500).unwrap();
        for minutes in 0..200 {
            for seconds in 0..60 {
                let mut bucket = ByteBucket::default();
                bucket.take(rate, usize::MAX, 1);
                let wait = bucket.wait(rate, 1 + (minutes * 60 + seconds) * 1_000_000);
                assert!(wait <= 500_000, "{wait} microseconds after {minutes}:{seconds}");
            }
        }
        assert_eq!(ByteRate::new(0, 4000, 500), None);
        assert_eq!(size_of::<ByteBucket>(), 4);
    }

    #[test]
    fn a_debt_of_a_slower_rate_is_forgiven() {
        let [slow, fast] =
            [(1, 60), (1000, 10)].map(|(n, burst)| Rate::new(n, 1000, burst).unwrap());
        for late in [false, true] {
            let (mut bucket, now) = (Bucket::default(), 50 * S);
            assert_eq!((0..99).filter(|_| bucket.take(slow, now).is_ok()).count(), 60);
            let mut take =
                |now| if late { bucket.take_late(fast, now) } else { bucket.take(fast, now) };
            assert!(take(now).is_ok(), "the slow rate would refuse for a second");
            assert_eq!(take(now), Err(1_000_000));
            assert!(take(now + 1_000_000).is_ok());
        }
    }

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
    fn events_that_are_seen_late_are_not_a_burst() {
        let rate = Rate::new(10, 1000, 5).unwrap();
        let mut bucket = Bucket::default();
        bucket.settle(50 * S);
        // Two seconds later: what the rate allows for them, and the burst.
        assert_eq!((0..100).filter(|_| bucket.take_late(rate, 52 * S).is_ok()).count(), 25);
        bucket.settle(100 * S);
        assert_eq!((0..100).filter(|_| bucket.take_late(rate, 100 * S).is_ok()).count(), 5);
    }

    #[test]
    fn zero_events_mean_no_limit_and_clock_may_stand_still() {
        assert_eq!(Rate::new(0, 1000, 5), None);
        let rate = Rate::new(1, 1000, 1).unwrap();
        let mut bucket = Bucket::default();
        assert!(bucket.take(rate, 0).is_ok());
        assert!(bucket.take(rate, 0).is_err());
        assert!(!bucket.is_idle(0));
        assert!(bucket.is_idle(S));
    }
}
