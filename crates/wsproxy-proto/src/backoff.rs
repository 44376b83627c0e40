//! Waits between tries; knows neither a clock nor a source of randomness.

use std::time::Duration;

/// Exponential backoff with equal jitter: half of each wait is certain, half is chance, so that
/// many who failed together do not come back together, and nobody comes back at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Longest wait after the first failure.
    pub first: Duration,
    /// Longest wait of all.
    pub max: Duration,
}

impl Backoff {
    /// The wait before try number `attempt` (0 is the first retry); `random` is any number.
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
    fn doubles_up_to_the_maximum_and_stays_within_half_and_whole() {
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
