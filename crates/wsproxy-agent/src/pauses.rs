//! Waits before a lane is dialled again; knows no source of randomness.

use std::time::Duration;

use tokio::time::Instant;

/// Lengths of the waits between two lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    /// Wait after the first failure. It doubles with each further one.
    pub first: Duration,
    /// Longest wait before the chance.
    pub max: Duration,
    /// Time from the first failure on in which no wait is longer than [`Self::soon_max`]. Requests wait at the gateway
    /// for this long, so that a short outage of the network fails none of them.
    pub soon: Duration,
    /// Longest wait before the chance within [`Self::soon`].
    pub soon_max: Duration,
    /// A lane that was ready for this long makes the next failure the first one again.
    pub reset_after: Duration,
    /// Wait after a refusal that only an operator can change, and after another process took the agent's id.
    pub refused: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(200),
            max: Duration::from_secs(30),
            soon: Duration::from_secs(10),
            soon_max: Duration::from_secs(1),
            reset_after: Duration::from_secs(30),
            refused: Duration::from_secs(60),
        }
    }
}

/// Failures since a lane was ready for long enough. A lane that is lost again and again makes them grow too, so that the
/// number of dials within any time is bounded.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    /// Time of the first failure; `None`: there was none.
    first_at: Option<Instant>,
    /// Number of doublings of the next wait.
    doublings: u32,
}

impl Failures {
    /// Returns whether there was none.
    pub(crate) const fn is_empty(&self) -> bool {
        self.first_at.is_none()
    }

    /// Notes a failure, and returns the wait behind it: half to one and a half of its length. Agents that lost their
    /// gateway together do not come back together. `random` is any random number.
    pub(crate) fn note(&mut self, pauses: &Pauses, now: Instant, random: u64) -> Duration {
        let first_at = *self.first_at.get_or_insert(now);
        let factor = 1_u32.checked_shl(self.doublings).unwrap_or(u32::MAX);
        let doubled = pauses.first.saturating_mul(factor).min(pauses.max);
        let is_soon = now - first_at < pauses.soon;
        let length = if is_soon { doubled.min(pauses.soon_max) } else { doubled };
        // Behind the first seconds the waits go on to double from where they were bounded.
        if length == doubled {
            self.doublings = self.doublings.saturating_add(1);
        }
        length.mul_f64(0.5 + random as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes failures, each behind the wait of the one before, and returns the lengths of the waits in milliseconds.
    fn waits(failures: usize) -> Vec<u128> {
        let (pauses, mut now, mut noted) = (Pauses::default(), Instant::now(), Failures::default());
        let mut wait = |_| {
            let length = noted.note(&pauses, now, u64::MAX / 2);
            now += length;
            length.as_millis()
        };
        (0..failures).map(&mut wait).collect()
    }

    #[test]
    fn waits_double_to_a_second_and_after_ten_seconds_to_the_longest() {
        let waits = waits(22);
        assert_eq!(waits[..4], [200, 400, 800, 1000]);
        let soon = waits.iter().take_while(|ms| **ms <= 1000).count();
        assert_eq!(soon, 12, "{waits:?}");
        assert_eq!(
            waits[soon..],
            [1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000, 30_000, 30_000, 30_000]
        );
    }

    #[test]
    fn waits_vary_by_half() {
        let (pauses, now) = (Pauses::default(), Instant::now());
        for (random, ms) in [(0, 100), (u64::MAX, 300)] {
            let wait = Failures::default().note(&pauses, now, random);
            assert_eq!(wait, Duration::from_millis(ms));
        }
    }
}
