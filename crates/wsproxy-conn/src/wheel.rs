//! One coarse timer for all connections: no timer per connection, no work for those not due.

use std::sync::{
    Weak,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use parking_lot::Mutex;

use crate::{clock::Micros, link::Link};

/// How coarse it is.
pub const TICK: Micros = Micros(100_000);

/// Deadlines beyond so many ticks are looked at once a turn.
const SLOTS: u64 = 512;

/// Connections by the tick at which to look at them again.
///
/// Every connection is in exactly one slot as long as it lives, which makes the wheel the list
/// of all connections too. A connection that ended leaves its few hundred bytes until its slot is due.
#[derive(Debug)]
pub struct Wheel {
    slots: Box<[Mutex<Vec<Weak<Link>>>]>,
    /// The tick that was last handled.
    ticked: AtomicU64,
}

impl Wheel {
    /// An empty wheel at `now`.
    #[must_use]
    pub fn new(now: Micros) -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
            ticked: AtomicU64::new(now.0 / TICK.0),
        }
    }

    /// Puts a connection where it is looked at soon after `at`. Returns the tick.
    pub(crate) fn insert(&self, link: Weak<Link>, at: Micros) -> u64 {
        let ticked = self.ticked.load(Relaxed);
        let tick = (at.0 / TICK.0 + 1).clamp(ticked + 1, ticked + SLOTS - 1);
        self.slots[Self::slot(tick)].lock().push(link);
        tick
    }

    /// Everything that became due by `now`, with the tick under which it was inserted.
    pub(crate) fn due(&self, now: Micros) -> Vec<(u64, Vec<Weak<Link>>)> {
        let from = self.ticked.load(Relaxed) + 1;
        let to = now.0 / TICK.0;
        if to < from {
            return Vec::new();
        }
        // After a standstill longer than a turn every slot is due, once.
        let from = from.max(to.saturating_sub(SLOTS - 1));
        self.ticked.store(to, Relaxed);
        let take = |tick| (tick, std::mem::take(&mut *self.slots[Self::slot(tick)].lock()));
        (from..=to).map(take).filter(|(_, links)| !links.is_empty()).collect()
    }

    /// Every connection.
    #[must_use]
    pub fn links(&self) -> Vec<std::sync::Arc<Link>> {
        let mut links: Vec<_> = Vec::new();
        for slot in &self.slots {
            links.extend(slot.lock().iter().filter_map(Weak::upgrade));
        }
        // One that was pulled forward stands in two slots.
        links.sort_unstable_by_key(|link| std::sync::Arc::as_ptr(link) as usize);
        links.dedup_by(|a, b| std::sync::Arc::ptr_eq(a, b));
        links
    }

    fn slot(tick: u64) -> usize {
        usize::try_from(tick % SLOTS).unwrap_or(0)
    }
}
