//! What all connections of a process share: the timer wheel and the budget.

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
    /// Held while connections are between two slots of the wheel, where nobody else would find them.
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

    /// Looks at every connection that is due: pings, timeouts, deadlines; and keeps the budget.
    pub fn tick(&self, now: Micros) {
        let last = Micros(self.last_tick.swap(now.0, Relaxed));
        if now.since(last) > STANDSTILL {
            // The process was stopped or starved: what clients sent meanwhile is unread, not unsent.
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

    /// Every connection that has a socket.
    #[must_use]
    pub fn links(&self) -> Vec<Arc<Link>> {
        let _turning = self.turning.lock();
        self.wheel.links()
    }

    /// Ends connections, the worst first, until what waits fits again. Those that would free
    /// nothing are left alone.
    fn relieve(&self, now: Micros) {
        // The figures change while we sort: each is asked for once.
        let links = self.links().into_iter().map(|link| (link.waiting_bytes(), link));
        let mut links: Vec<_> = links.filter(|(bytes, _)| *bytes > 0).collect();
        links.sort_unstable_by_key(|(bytes, _)| *bytes);
        while self.budget.is_exceeded() {
            let Some((_, worst)) = links.pop() else { break };
            worst.disconnect(&Disconnect::SLOW, now);
        }
    }

    /// How often [`Self::tick`] wants to be called.
    #[must_use]
    pub fn tick_interval() -> std::time::Duration {
        TICK.into()
    }
}
