//! When a link must be asked whether it lives, and when it does not. Clocks are arguments.

use std::time::Duration;

use tokio::time::Instant;

/// Watches one connection. The question is `ROLE`, so that its answer also says who answers.
pub(super) struct Watchdog {
    interval: Duration,
    timeout: Duration,
    asked: Option<Instant>,
    next_question: Instant,
    suspected: bool,
}

/// What is to be done at a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// Ask now; the question counts as asked.
    Ask,
    /// Nothing came for too long.
    Dead,
}

impl Watchdog {
    /// For a connection that was just made.
    pub(super) fn new(interval: Duration, timeout: Duration, now: Instant) -> Self {
        Self { interval, timeout, asked: None, next_question: now, suspected: false }
    }

    /// How often [`Self::tick`] wants to be called.
    pub(super) fn period(interval: Duration, timeout: Duration) -> Duration {
        (interval.min(timeout) / 4).clamp(PERIOD_MIN, PERIOD_MAX)
    }

    /// Looks at the clock. Bytes of any kind are a sign of life, except that a question which is not
    /// answered for four times the timeout was not received.
    pub(super) fn tick(&mut self, now: Instant, last_read: Instant) -> Verdict {
        let Some(asked) = self.asked else {
            if now < self.next_question {
                return Verdict::Fine;
            }
            self.asked = Some(now);
            self.next_question = now + self.interval;
            return Verdict::Ask;
        };
        let silent = now.duration_since(asked.max(last_read)) > self.timeout;
        if !silent && now.duration_since(asked) <= self.timeout * 4 {
            self.suspected = false;
            return Verdict::Fine;
        }
        // If this very process stood still, the answer may lie there unread: one more tick tells.
        if std::mem::replace(&mut self.suspected, true) { Verdict::Dead } else { Verdict::Fine }
    }

    /// The question was answered.
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
    fn silence_after_a_question_is_death_and_any_byte_is_life() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), Verdict::Ask);
        assert_eq!(dog.tick(start + SECOND * 3, start), Verdict::Fine);
        assert_eq!(dog.tick(start + SECOND * 5, start + SECOND * 4), Verdict::Fine);
        assert_eq!(dog.tick(start + SECOND * 8, start + SECOND * 4), Verdict::Fine);
        assert_eq!(dog.tick(start + SECOND * 9, start + SECOND * 4), Verdict::Dead);
    }

    #[test]
    fn an_answered_question_is_asked_again_after_the_interval() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), Verdict::Ask);
        dog.answered();
        assert_eq!(dog.tick(start + SECOND / 2, start), Verdict::Fine);
        assert_eq!(dog.tick(start + SECOND, start), Verdict::Ask);
    }

    #[test]
    fn a_question_that_is_never_answered_among_other_bytes_is_death_too() {
        let start = Instant::now();
        let mut dog = Watchdog::new(SECOND, SECOND * 3, start);
        assert_eq!(dog.tick(start, start), Verdict::Ask);
        let late = start + SECOND * 13;
        assert_eq!(dog.tick(late, late), Verdict::Fine);
        assert_eq!(dog.tick(late, late), Verdict::Dead);
    }
}
