//! The pace of something that a room tells its members: at once after a quiet tick, otherwise once per tick.

use wsproxy_conn::clock::Micros;

/// Pace of one kind of news.
#[derive(Debug)]
pub(super) struct Pace {
    /// Time at which news left last.
    left: Micros,
    /// Time at which the ticker sends the news that wait.
    pub(super) due: Micros,
}

impl Pace {
    /// Pace of which no news has left yet.
    pub(super) const NEW: Self = Self { left: Micros(0), due: Micros::NEVER };

    /// Returns whether news of `now` wait for the ticker; otherwise they leave now. Many writes `are_many`: they are left
    /// to the ticker even after a quiet tick, so that the caller goes on.
    pub(super) fn waits(&mut self, tick: Micros, are_many: bool, now: Micros) -> bool {
        let free = self.left.after(tick);
        if now >= free && !are_many {
            self.left = now;
            return false;
        }
        self.due = self.due.min(free.max(now));
        true
    }

    /// Returns whether news that wait leave now.
    pub(super) fn leaves(&mut self, now: Micros) -> bool {
        let is_due = self.due <= now;
        if is_due {
            *self = Self { left: now, due: Micros::NEVER };
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Micros = Micros(50_000);

    fn at(millis: u64) -> Micros {
        Micros(1_000_000 + millis * 1000)
    }

    #[test]
    fn news_after_a_quiet_tick_leave_at_once() {
        let mut pace = Pace::NEW;
        assert!(!pace.waits(TICK, false, at(0)));
        assert!(pace.waits(TICK, false, at(1)));
        assert!(pace.waits(TICK, false, at(49)));
        assert_eq!(pace.due, at(50));
        assert!(!pace.leaves(at(49)));
        assert!(pace.leaves(at(51)));
        assert_eq!(pace.due, Micros::NEVER);
        assert!(!pace.leaves(at(60)));
        assert!(pace.waits(TICK, false, at(100)));
        assert_eq!(pace.due, at(101));
        assert!(pace.leaves(at(101)));
        assert!(!pace.waits(TICK, false, at(151)));
    }

    #[test]
    fn news_for_many_are_due_at_once_after_a_quiet_tick() {
        let mut pace = Pace::NEW;
        assert!(pace.waits(TICK, true, at(0)));
        assert_eq!(pace.due, at(0));
        assert!(pace.leaves(at(0)));
        assert!(pace.waits(TICK, true, at(10)));
        assert_eq!(pace.due, at(50));
    }

    #[test]
    fn without_a_tick_news_leave_at_once() {
        let mut pace = Pace::NEW;
        assert!(!pace.waits(Micros(0), false, at(0)));
        assert!(!pace.waits(Micros(0), false, at(0)));
    }
}
