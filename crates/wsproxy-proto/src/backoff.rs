//! Waits between retries; knows neither a clock nor a source of randomness.

use std::time::Duration;

/// Exponential backoff with equal jitter: half of each wait is fixed, half is random. Clients that failed together do
/// not come back together, and none comes back at once.
///
/// ```
/// use std::time::Duration;
/// use wsproxy_proto::backoff::Backoff;
///
/// let backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(5) };
/// assert_eq!(backoff.delay(0, 0), Duration::from_millis(50));
/// assert_eq!(backoff.delay(9, u64::MAX), Duration::from_secs(5));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Upper bound of the wait after the first failure.
    pub first: Duration,
    /// Upper bound of all waits.
    pub max: Duration,
}

impl Backoff {
    /// Returns the wait before retry number `attempt`, from 0 on. `random` is any random number.
    #[must_use]
    pub fn delay(&self, attempt: u32, random: u64) -> Duration {
        let max = self.max.as_nanos().min(u128::from(u64::MAX)) as u64;
        let first = self.first.as_nanos().min(u128::from(max)) as u64;
        let wait = first.saturating_mul(1_u64.checked_shl(attempt).unwrap_or(u64::MAX)).min(max);
        let half = wait / 2;
        // 128 bits scale the random number to the range without the bias of a remainder.
        let chance = (u128::from(wait - half + 1) * u128::from(random)) >> 64;
        Duration::from_nanos(half + chance as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_maximum_between_half_and_whole() {
        let backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(5) };
        for (attempt, ms) in [(0, 100), (1, 200), (2, 400), (5, 3200), (6, 5000), (200, 5000)] {
            let whole = Duration::from_millis(ms);
            assert_eq!(backoff.delay(attempt, u64::MAX), whole);
            assert_eq!(backoff.delay(attempt, 0), whole / 2);
            let middle = backoff.delay(attempt, u64::MAX / 2);
            assert!(middle > whole / 2 && middle < whole);
        }
    }

    #[test]
    fn extremes_do_not_overflow() {
        let backoff = Backoff { first: Duration::MAX, max: Duration::MAX };
        assert!(backoff.delay(u32::MAX, u64::MAX) > Duration::from_secs(1));
        let none = Backoff { first: Duration::ZERO, max: Duration::ZERO };
        assert_eq!(none.delay(3, 7), Duration::ZERO);
    }
}
