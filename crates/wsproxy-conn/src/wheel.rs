//! One coarse timer for all connections: no timer per connection, no work for those not due.

use std::sync::{
    Weak,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use parking_lot::Mutex;

use crate::{clock::Micros, link::Link};

/// How coarse it is.
pub const TICK: Micros = Micros(100_000);

/// Deadlines beyond so many ticks are looked at once a turn.
const SLOTS: u32 = 512;

/// A connection is searched among so many: when very many end together, that must stay cheap.
const SEARCHED_MAX: usize = 4096;

/// Connections by the tick at which to look at them again.
///
/// Every connection is in a slot as long as it lives, but for the moment in which it is looked at,
/// which makes the wheel the list of all connections too.
/// Locks: a link's state may be locked when a slot is, never the other way round.
#[derive(Debug)]
pub struct Wheel {
    slots: Box<[Mutex<Vec<Weak<Link>>>]>,
    /// The tick that was last handled.
    ticked: AtomicU32,
}

impl Wheel {
    /// An empty wheel at `now`.
    #[must_use]
    pub fn new(now: Micros) -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Mutex::default()).collect(),
            ticked: AtomicU32::new(tick_of(now)),
        }
    }

    /// Puts a connection where it is looked at soon after `at`. Returns the tick.
    pub(crate) fn insert(&self, link: Weak<Link>, at: Micros) -> u32 {
        loop {
            let ticked = self.ticked.load(Relaxed);
            let tick = tick_after(at).clamp(ticked + 1, ticked + SLOTS - 1);
            let mut slot = self.slots[Self::slot(tick)].lock();
            // The slot may have been taken while we came for it. `due` says how far it is before
            // it takes a slot, so under the slot's lock that cannot be missed.
            if self.ticked.load(Relaxed) < tick {
                slot.push(link);
                return tick;
            }
        }
    }

    /// Takes a connection out of the slot of `tick`, if it is among the last there. Otherwise its
    /// memory is free when the slot is due, and whoever is looked at too early takes no notice.
    pub(crate) fn remove(&self, link: &Weak<Link>, tick: u32) {
        let mut slot = self.slots[Self::slot(tick)].lock();
        let from = slot.len().saturating_sub(SEARCHED_MAX);
        if let Some(at) = slot[from..].iter().position(|other| other.ptr_eq(link)) {
            slot.swap_remove(from + at);
        }
    }

    /// Everything that became due by `now`, with the tick at which it was, or a later one.
    pub(crate) fn due(&self, now: Micros) -> Vec<(u32, Vec<Weak<Link>>)> {
        let from = self.ticked.load(Relaxed) + 1;
        let to = tick_of(now);
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
        // One that was moved meanwhile may have been met twice.
        links.sort_unstable_by_key(|link| std::sync::Arc::as_ptr(link) as usize);
        links.dedup_by(|a, b| std::sync::Arc::ptr_eq(a, b));
        links
    }

    const fn slot(tick: u32) -> usize {
        (tick % SLOTS) as usize
    }
}

/// The first tick at which `time` is over.
pub(crate) fn tick_after(time: Micros) -> u32 {
    tick_of(time).saturating_add(1)
}

/// Enough for thirteen years.
fn tick_of(time: Micros) -> u32 {
    u32::try_from(time.0 / TICK.0).unwrap_or(u32::MAX)
}
