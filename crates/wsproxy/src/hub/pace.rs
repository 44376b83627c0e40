//! The pace of a repeated step, so that many of them do not come at once. Knows no step.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// A pace that all who wait share.
#[derive(Debug)]
pub(super) struct Pace {
    /// Time between two steps.
    every: Duration,
    /// Steps that may be done at once after a pause.
    burst: u32,
    /// Time of the next step, if all steps were even.
    next: Mutex<Option<Instant>>,
}

impl Pace {
    /// Creates a pace of so many steps per second, at least 1.
    pub(super) fn new(steps_per_second: u32, burst: u32) -> Self {
        Self {
            every: Duration::from_secs(1) / steps_per_second.max(1),
            burst,
            next: Mutex::new(None),
        }
    }

    /// Waits until the caller may do a step.
    pub(super) async fn turn(&self) {
        let at = self.reserve(Instant::now());
        if at > Instant::now() {
            tokio::time::sleep_until(at).await;
        }
    }

    /// Reserves a step, and returns its time.
    fn reserve(&self, now: Instant) -> Instant {
        let mut next = self.next.lock();
        let earliest = now.checked_sub(self.every * self.burst).unwrap_or(now);
        let at = next.map_or(earliest, |next| next.max(earliest));
        *next = Some(at + self.every);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_behind_the_burst_are_even() {
        let pace = Pace::new(100, 10);
        let start = Instant::now() + Duration::from_secs(60);
        let waits = |count: u32, now: Instant| {
            let steps = (0..count).map(|_| pace.reserve(now).saturating_duration_since(now));
            steps.collect::<Vec<_>>()
        };
        let waits_of_first = waits(30, start);
        assert!(waits_of_first[..11].iter().all(Duration::is_zero));
        assert_eq!(waits_of_first[29], Duration::from_millis(190));
        // After a pause there is a burst again, no larger one.
        let later = waits(12, start + Duration::from_secs(60));
        assert_eq!((later[10], later[11]), (Duration::ZERO, Duration::from_millis(10)));
    }
}
