//! One coarse timer for all connections: no timer per connection, and no work for a connection that is not due.

use std::sync::{
    Weak,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use parking_lot::Mutex;

use crate::{clock::Micros, link::Link};

/// All connections, by the tick at which each is looked at again.
///
/// Every living connection is in a slot, except at the moment in which it is looked at. So the wheel is the list of
/// all connections too.
///
/// Locks: a slot is locked while the state of a link is locked, never the other way round.
#[derive(Debug)]
pub struct Wheel {
    slots: Box<[Mutex<Vec<Weak<Link>>>]>,
    /// Tick that was handled last.
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

    /// Inserts a connection to be looked at soon after `at`. Returns the tick.
    pub(crate) fn insert(&self, link: Weak<Link>, at: Micros) -> u32 {
        loop {
            let ticked = self.ticked.load(Relaxed);
            let tick = tick_after(at).clamp(ticked + 1, ticked + SLOTS - 1);
            let mut slot = self.slots[Self::slot(tick)].lock();
            // `due` may have emptied the slot meanwhile. It stores its tick before it empties a slot, so that is seen
            // under the slot's lock.
            if self.ticked.load(Relaxed) < tick {
                slot.push(link);
                return tick;
            }
        }
    }

    /// Removes a connection from the slot of `tick`, if it is among the last ones there. Otherwise its memory is
    /// freed when the slot is due. A connection ignores a tick before its time.
    pub(crate) fn remove(&self, link: &Weak<Link>, tick: u32) {
        let mut slot = self.slots[Self::slot(tick)].lock();
        let from = slot.len().saturating_sub(SEARCHED_MAX);
        if let Some(at) = slot[from..].iter().position(|other| other.ptr_eq(link)) {
            slot.swap_remove(from + at);
        }
    }

    /// Removes and returns all connections that are due by `now`, with their tick or a later one.
    pub(crate) fn due(&self, now: Micros) -> Vec<(u32, Vec<Weak<Link>>)> {
        let from = self.ticked.load(Relaxed) + 1;
        let to = tick_of(now);
        if to < from {
            return Vec::new();
        }
        // After a standstill longer than a turn of the wheel every slot is due once.
        let from = from.max(to.saturating_sub(SLOTS - 1));
        self.ticked.store(to, Relaxed);
        let take = |tick| (tick, std::mem::take(&mut *self.slots[Self::slot(tick)].lock()));
        (from..=to).map(take).filter(|(_, links)| !links.is_empty()).collect()
    }

    /// All connections.
    #[must_use]
    pub fn links(&self) -> Vec<std::sync::Arc<Link>> {
        let mut links: Vec<_> = Vec::new();
        for slot in &self.slots {
            links.extend(slot.lock().iter().filter_map(Weak::upgrade));
        }
        // A connection that was moved meanwhile may have been found twice.
        links.sort_unstable_by_key(|link| std::sync::Arc::as_ptr(link) as usize);
        links.dedup_by(|a, b| std::sync::Arc::ptr_eq(a, b));
        links
    }

    const fn slot(tick: u32) -> usize {
        (tick % SLOTS) as usize
    }
}

/// First tick at which `time` is over.
pub(crate) fn tick_after(time: Micros) -> u32 {
    tick_of(time).saturating_add(1)
}

/// 32 bits of ticks last for thirteen years.
fn tick_of(time: Micros) -> u32 {
    u32::try_from(time.0 / TICK.0).unwrap_or(u32::MAX)
}

/// Length of a tick.
pub const TICK: Micros = Micros(100_000);

/// Number of slots. A deadline that is further away is looked at once per turn of the wheel.
const SLOTS: u32 = 512;

/// Number of connections of a slot among which [`Wheel::remove`] searches: it must stay cheap when very many end
/// together.
const SEARCHED_MAX: usize = 4096;
