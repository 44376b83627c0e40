//! One line on standard error while a scenario runs: each second on a terminal, every five elsewhere.

use std::io::IsTerminal;

use crate::clock::{NS_PER_SECOND, now_ns};
use crate::fleet::Counters;

/// Prints the state of a run, rarely enough to cost nothing.
#[derive(Debug)]
pub struct Progress {
    phase: String,
    started_ns: u64,
    next_ns: u64,
    interval_ns: u64,
    last: (u64, u64),
}

impl Progress {
    /// Begins the first phase.
    #[must_use]
    pub fn new(phase: &str) -> Self {
        let interval_ns =
            if std::io::stderr().is_terminal() { NS_PER_SECOND } else { 5 * NS_PER_SECOND };
        let now = now_ns();
        Self {
            phase: phase.to_owned(),
            started_ns: now,
            next_ns: now + interval_ns,
            interval_ns,
            last: (now, 0),
        }
    }

    /// Begins another phase.
    pub fn phase(&mut self, phase: &str) {
        phase.clone_into(&mut self.phase);
    }

    /// Prints a line when it is time for one.
    pub fn tick(&mut self, counters: &Counters) {
        let now = now_ns();
        if now < self.next_ns {
            return;
        }
        self.next_ns = now + self.interval_ns;
        let delivered = counters.delivered();
        let (last_ns, last_delivered) = self.last;
        self.last = (now, delivered);
        let seconds = (now - last_ns) as f64 / NS_PER_SECOND as f64;
        eprintln!(
            "{:4}s {}: {} open, {} failed, {} delivered ({:.0}/s)",
            (now - self.started_ns) / NS_PER_SECOND,
            self.phase,
            counters.open_now(),
            counters.failed(),
            delivered,
            (delivered - last_delivered) as f64 / seconds,
        );
    }
}
