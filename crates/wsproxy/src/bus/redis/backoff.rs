//! How long to wait before the next attempt; knows neither clock nor randomness.

use std::time::Duration;

/// Doubles from `first` to `max`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backoff {
    /// Before the second attempt.
    pub(super) first: Duration,
    /// Never longer than this.
    pub(super) max: Duration,
}

impl Backoff {
    /// The wait after `attempt` failures in a row, at least 1. `random`, from 0 to 1, spreads it over
    /// its upper half, so that many instances do not come back at once.
    pub(super) fn delay(&self, attempt: u32, random: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << attempt.saturating_sub(1).min(16));
        doubled.min(self.max).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_maximum_within_the_upper_half() {
        let backoff =
            Backoff { first: Duration::from_millis(20), max: Duration::from_millis(2000) };
        assert_eq!(backoff.delay(1, 1.0), Duration::from_millis(20));
        assert_eq!(backoff.delay(2, 1.0), Duration::from_millis(40));
        assert_eq!(backoff.delay(2, 0.0), Duration::from_millis(20));
        assert_eq!(backoff.delay(u32::MAX, 1.0), Duration::from_millis(2000));
    }
}
