//! Decides when to test a connection, and when it counts as dead. Clocks are arguments.

use std::time::Duration;

use tokio::time::Instant;

/// The watchdog of one connection. Its question is `ROLE`, whose answer also shows the role of the server.
pub(super) struct Watchdog {
    interval: Duration,
    timeout: Duration,
    asked: Option<Instant>,
    next_question: Instant,
    suspected: bool,
}

/// The next step after a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WatchdogStep {
    /// No step.
    Fine,
    /// Ask now; the question counts as asked.
    Ask,
    /// No bytes came for too long.
    Dead,
}

impl Watchdog {
    /// Creates the watchdog of a new connection.
    pub(super) fn new(interval: Duration, timeout: Duration, now: Instant) -> Self {
        Self { interval, timeout, asked: None, next_question: now, suspected: false }
    }

    /// Returns the interval between calls of [`Self::tick`].
    pub(super) fn period(interval: Duration, timeout: Duration) -> Duration {
        (interval.min(timeout) / 4).clamp(PERIOD_MIN, PERIOD_MAX)
    }

    /// Returns the next step. Bytes of any kind are a sign of life, unless a question has no answer for four times the
    /// timeout.
    pub(super) fn tick(&mut self, now: Instant, last_read: Instant) -> WatchdogStep {
        let Some(asked) = self.asked else {
            if now < self.next_question {
                return WatchdogStep::Fine;
            }
            self.asked = Some(now);
            self.next_question = now + self.interval;
            return WatchdogStep::Ask;
        };
        let silent = now.duration_since(asked.max(last_read)) > self.timeout;
        if !silent && now.duration_since(asked) <= self.timeout * 4 {
            self.suspected = false;
            return WatchdogStep::Fine;
        }
        // If this process stood still, the answer may be unread: one more tick decides.
        if std::mem::replace(&mut self.suspected, true) {
            WatchdogStep::Dead
        } else {
            WatchdogStep::Fine
        }
    }

    /// Notes the answer to the question.
    pub(super) fn answered(&mut self) {
        self.asked = None;
        self.suspected = false;
    }
}

const PERIOD_MIN: Duration = Duration::from_millis(5);

const PERIOD_MAX: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_after_a_question_is_death() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), WatchdogStep::Ask);
        assert_eq!(dog.tick(start + SECOND * 3, start), WatchdogStep::Fine);
        assert_eq!(dog.tick(start + SECOND * 5, start + SECOND * 4), WatchdogStep::Fine);
        assert_eq!(dog.tick(start + SECOND * 8, start + SECOND * 4), WatchdogStep::Fine);
        assert_eq!(dog.tick(start + SECOND * 9, start + SECOND * 4), WatchdogStep::Dead);
    }

    #[test]
    fn an_answered_question_is_asked_again_after_the_interval() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), WatchdogStep::Ask);
        dog.answered();
        assert_eq!(dog.tick(start + SECOND / 2, start), WatchdogStep::Fine);
        assert_eq!(dog.tick(start + SECOND, start), WatchdogStep::Ask);
    }

    #[test]
    fn an_unanswered_question_is_death_despite_other_bytes() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), WatchdogStep::Ask);
        let late = start + SECOND * 13;
        assert_eq!(dog.tick(late, late), WatchdogStep::Fine);
        assert_eq!(dog.tick(late, late), WatchdogStep::Dead);
    }
}
