//! Publishes messages: at a steady rate on a schedule, or in rounds that wait for their arrival.

use std::time::Duration;

use anyhow::Result;

use crate::clock::{NS_PER_SECOND, now_ns, ns, sleep_until};
use crate::fleet::Counters;
use crate::progress::Progress;
use crate::publisher::Publisher;
use crate::stamp::Stamp;

/// Messages spread evenly over a range of sessions.
#[derive(Debug, Clone)]
pub struct Flow {
    first: u32,
    sessions: u32,
    bytes: usize,
    rate: f64,
    next: u64,
    to_all: bool,
    payload: Vec<u8>,
}

impl Flow {
    /// Sends `rate` messages per second of `bytes` bytes, in turn to sessions `first..first + sessions`.
    #[must_use]
    pub fn new(first: u32, sessions: u32, bytes: usize, rate: f64) -> Self {
        let sessions = sessions.max(1);
        Self { first, sessions, bytes, rate, next: 0, to_all: false, payload: Vec::new() }
    }

    /// Sends `rate` messages per second to all clients, numbered separately.
    #[must_use]
    pub fn to_all(bytes: usize, rate: f64) -> Self {
        Self { to_all: true, ..Self::new(0, 1, bytes, rate) }
    }

    /// Continues with the same sessions and numbers at another rate.
    pub fn set_rate(&mut self, rate: f64) {
        self.rate = rate;
    }

    /// Returns true where each message goes to all clients.
    #[must_use]
    pub fn is_to_all(&self) -> bool {
        self.to_all
    }

    /// Messages published so far.
    #[must_use]
    pub fn published(&self) -> u64 {
        self.next
    }

    /// Publishes one message as if it were sent at `sent_ns`.
    pub fn publish(&mut self, publisher: &mut Publisher, sent_ns: u64) {
        let sessions = u64::from(self.sessions);
        // Each session's messages are numbered from 0, since every session is visited once per turn.
        let number = (self.next / sessions) as u32;
        let stamp = Stamp { sent_ns, number, shared: self.to_all };
        let session = self.first + (self.next % sessions) as u32;
        self.payload.clear();
        stamp.write(self.bytes, &mut self.payload);
        match self.to_all {
            true => publisher.publish_to_all(&self.payload),
            false => publisher.publish(session, &self.payload),
        }
        self.next += 1;
    }
}

/// Counts of a steady phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Steady {
    /// Messages published, over all flows.
    pub published: u64,
    /// Messages that were due but could not be published in time.
    pub unsent: u64,
    /// Greatest delay of the publisher.
    pub late_ns_max: u64,
}

/// Publishes all flows at their rates for `duration`. Each message carries the time that the schedule gave it, so
/// that a publisher which is held up shows as latency and not as a lower load.
pub fn steady(
    publisher: &mut Publisher,
    flows: &mut [Flow],
    tick: Duration,
    duration: Duration,
    mut waiting: impl FnMut(),
) -> Result<Steady> {
    let (tick_ns, duration_ns) = (ns(tick), ns(duration));
    let start_ns = now_ns() + tick_ns;
    let give_up_ns = start_ns + duration_ns + NS_PER_SECOND;
    let before: Vec<u64> = flows.iter().map(|flow| flow.next).collect();
    let mut result = Steady::default();
    let ticks = duration_ns / tick_ns;
    for tick in 1..=ticks {
        let due_ns = start_ns + tick * tick_ns;
        sleep_until(due_ns);
        let now = now_ns();
        result.late_ns_max = result.late_ns_max.max(now.saturating_sub(due_ns));
        if now > give_up_ns {
            break;
        }
        for (flow, before) in flows.iter_mut().zip(&before) {
            let due = due(flow.rate, tick * tick_ns);
            while flow.next - before < due {
                flow.publish(publisher, due_ns);
            }
        }
        publisher.flush()?;
        waiting();
    }
    publisher.settle()?;
    for (flow, before) in flows.iter().zip(&before) {
        let published = flow.next - before;
        result.published += published;
        result.unsent += due(flow.rate, ticks * tick_ns).saturating_sub(published);
    }
    Ok(result)
}

/// Publishes `burst` messages at once, waits until each has reached `receivers` clients, and begins again, until
/// `duration` is over; returns the number of rounds, `None` when a round did not arrive whole.
pub fn rounds(
    publisher: &mut Publisher,
    counters: &Counters,
    progress: &mut Progress,
    flow: &mut Flow,
    plan: Rounds,
) -> Result<Option<u64>> {
    let end_ns = now_ns() + ns(plan.duration);
    let mut done = 0;
    while now_ns() < end_ns {
        let wanted = counters.delivered() + plan.burst * plan.receivers;
        let sent_ns = now_ns();
        for _ in 0..plan.burst {
            flow.publish(publisher, sent_ns);
        }
        publisher.flush()?;
        if !counters.wait_delivered(wanted, plan.timeout) {
            return Ok(None);
        }
        done += 1;
        progress.tick(counters);
    }
    publisher.settle()?;
    Ok(Some(done))
}

/// Parameters of [`rounds`].
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// Messages published at once.
    pub burst: u64,
    /// Clients that each message reaches.
    pub receivers: u64,
    /// Duration of all rounds.
    pub duration: Duration,
    /// Longest time without progress; after it a round has failed.
    pub timeout: Duration,
}

fn due(rate: f64, elapsed_ns: u64) -> u64 {
    (rate * elapsed_ns as f64 / NS_PER_SECOND as f64).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_gives_its_messages_over_a_second_whatever_the_tick() {
        for tick_ns in [250_000u64, 333_333, 1_000_000] {
            let ticks = NS_PER_SECOND / tick_ns;
            let mut sent = 0;
            for tick in 1..=ticks {
                let due = due(10_000.0, tick * tick_ns);
                assert!(due >= sent);
                sent = due;
            }
            assert!((9_997..=10_000).contains(&sent), "{sent} with a tick of {tick_ns}");
        }
    }
}
