//! What all connections of a process share: the timer wheel and the budget.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use wsproxy_proto::disconnect::Disconnect;

use crate::{
    budget::Budget,
    clock::Micros,
    link::Link,
    wheel::{TICK, Wheel},
};

/// A tick that comes this much later than its predecessor means that the process stood still.
const STANDSTILL: Micros = Micros(2_000_000);

/// After a standstill clients get this long to be heard before they count as dead.
const GRACE: Micros = Micros(5_000_000);

/// Shared by all connections; [`Self::tick`] must be called every [`TICK`].
#[derive(Debug)]
pub struct Runtime {
    /// All connections, by when they must be looked at.
    pub(crate) wheel: Wheel,
    /// What they may hold together.
    pub budget: Budget,
    last_tick: AtomicU64,
    /// Nobody is declared dead before this time.
    grace_until: AtomicU64,
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
        })
    }

    /// Looks at every connection that is due: pings, timeouts, deadlines; and keeps the budget.
    pub fn tick(&self, now: Micros) {
        let last = Micros(self.last_tick.swap(now.0, Relaxed));
        if now.since(last) > STANDSTILL {
            // The process was stopped or starved: what clients sent meanwhile is unread, not unsent.
            self.grace_until.store(now.after(GRACE).0, Relaxed);
        }
        let grace_until = Micros(self.grace_until.load(Relaxed));
        for (tick, links) in self.wheel.due(now) {
            for link in links.iter().filter_map(std::sync::Weak::upgrade) {
                link.on_tick(tick, now, grace_until);
            }
        }
        if self.budget.is_exceeded() {
            self.relieve(now);
        }
    }

    /// Every connection.
    #[must_use]
    pub fn links(&self) -> Vec<Arc<Link>> {
        self.wheel.links()
    }

    fn relieve(&self, now: Micros) {
        let mut links = self.links();
        links.sort_unstable_by_key(|link| link.queued_bytes());
        while self.budget.is_exceeded() {
            let Some(worst) = links.pop() else { break };
            worst.disconnect(&Disconnect::SLOW, now);
        }
    }

    /// How often [`Self::tick`] wants to be called.
    #[must_use]
    pub fn tick_interval() -> std::time::Duration {
        TICK.into()
    }
}
