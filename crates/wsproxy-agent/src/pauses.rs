//! Waits before a lane is dialled again; knows neither a clock nor a source of randomness.

use std::time::Duration;

/// Lengths of the waits between two lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    /// Wait after the first failure. It doubles with each further one.
    pub first: Duration,
    /// Longest wait before the chance.
    pub max: Duration,
    /// A lane that was ready for this long makes the next wait the first one again.
    pub reset_after: Duration,
    /// Wait after a refusal that only an operator can change, and after another process took the agent's id.
    pub refused: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(200),
            max: Duration::from_secs(30),
            reset_after: Duration::from_secs(30),
            refused: Duration::from_secs(60),
        }
    }
}

impl Pauses {
    /// Returns the wait before try number `attempt`, from 0 on: half to one and a half of its length. Agents that lost
    /// their gateway together do not come back together. `random` is any random number.
    pub(crate) fn delay(&self, attempt: u32, random: u64) -> Duration {
        let doubled = self.first.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
        let length = doubled.min(self.max);
        length.mul_f64(0.5 + random as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_longest_and_vary_by_half() {
        let pauses = Pauses::default();
        for (attempt, ms) in [(0, 200), (1, 400), (7, 25_600), (8, 30_000), (40, 30_000)] {
            let length = Duration::from_millis(ms);
            assert_eq!(pauses.delay(attempt, 0), length / 2);
            assert_eq!(pauses.delay(attempt, u64::MAX), length * 3 / 2);
        }
    }
}
