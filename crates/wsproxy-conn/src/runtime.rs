//! State that all connections of a process share: the timer wheel and the budget.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    budget::Budget,
    clock::Micros,
    link::Link,
    wheel::{TICK, Wheel},
};

/// The timer wheel and the budget of all connections. The owner calls [`Self::tick`] every [`TICK`].
#[derive(Debug)]
pub struct Runtime {
    /// All connections, by the time of their next deadline.
    pub(crate) wheel: Wheel,
    /// Bytes that all outboxes together may hold.
    pub budget: Budget,
    last_tick: AtomicU64,
    /// No client counts as dead before this time.
    grace_until: AtomicU64,
    /// Held while connections are in no slot of the wheel, so that [`Self::links`] misses none.
    turning: Mutex<()>,
}

impl Runtime {
    /// `send_buffers_total_bytes`: see [`Budget`].
    #[must_use]
    pub fn new(send_buffers_total_bytes: usize, now: Micros) -> Arc<Self> {
        Arc::new(Self {
            wheel: Wheel::new(now),
            budget: Budget::new(send_buffers_total_bytes),
            last_tick: AtomicU64::new(now.0),
            grace_until: AtomicU64::new(0),
            turning: Mutex::default(),
        })
    }

    /// Handles every connection whose deadline has passed (pings, timeouts, expiry), and keeps the budget.
    pub fn tick(&self, now: Micros) {
        let last = Micros(self.last_tick.swap(now.0, Relaxed));
        if now.since(last) > STANDSTILL {
            // The process was stopped or starved. Clients may have sent messages that are not read yet.
            self.grace_until.store(now.after(GRACE).0, Relaxed);
        }
        let grace_until = Micros(self.grace_until.load(Relaxed));
        let turning = self.turning.lock();
        for (tick, links) in self.wheel.due(now) {
            for link in links.iter().filter_map(Weak::upgrade) {
                link.on_tick(tick, now, grace_until);
            }
        }
        drop(turning);
        if self.budget.is_exceeded() {
            self.relieve(now);
        }
    }

    /// All connections that have a socket.
    #[must_use]
    pub fn links(&self) -> Vec<Arc<Link>> {
        let _turning = self.turning.lock();
        self.wheel.links()
    }

    /// Ends the connections with the most waiting bytes until the rest fits the budget. Each gets a close frame, while
    /// that frees enough. What is left then is partly written (a frame, or a record of TLS) and goes only with its
    /// connection.
    fn relieve(&self, now: Micros) {
        self.end_worst(Link::waiting_bytes, |link| link.disconnect(&Disconnect::SLOW, now));
        self.end_worst(Link::accounted_bytes, |link| {
            link.disconnect(&Disconnect::SLOW, now);
            link.abort();
        });
    }

    /// Ends connections until the budget is kept, those first that would free the most bytes.
    fn end_worst(&self, freed_bytes: impl Fn(&Link) -> usize, end: impl Fn(&Link)) {
        if !self.budget.is_exceeded() {
            return;
        }
        // The numbers change while they are sorted, so each is read once.
        let links = self.links().into_iter().map(|link| (freed_bytes(&link), link));
        let mut links: Vec<_> = links.filter(|(bytes, _)| *bytes > 0).collect();
        links.sort_unstable_by_key(|(bytes, _)| *bytes);
        while self.budget.is_exceeded() {
            let Some((_, worst)) = links.pop() else { break };
            end(&worst);
        }
    }

    /// Interval at which the owner calls [`Self::tick`].
    #[must_use]
    pub fn tick_interval() -> std::time::Duration {
        TICK.into()
    }
}

/// Time between two ticks from which the process counts as having stood still.
const STANDSTILL: Micros = Micros(2_000_000);

/// Time after a standstill in which no client counts as dead.
const GRACE: Micros = Micros(5_000_000);
