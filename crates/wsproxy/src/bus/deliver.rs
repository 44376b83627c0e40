//! The interface from a bus to the hub. Knows neither.

use std::time::Duration;

use wsproxy_proto::names;

/// Messages that may have been missed.
#[derive(Debug, Clone)]
pub enum Missed {
    /// Any.
    All,
    /// Plain ones, and those of histories whose keys have these slots of a Redis Cluster.
    Slots(Slots),
}

/// A set of slots of a Redis Cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots(Box<[u64; 256]>);

impl Missed {
    /// Returns whether messages of the history with this key may have been missed.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        match self {
            Self::All => true,
            Self::Slots(slots) => slots.has(names::slot(key.as_bytes())),
        }
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl Slots {
    /// Returns whether a slot is in the set.
    #[must_use]
    pub fn has(&self, slot: u16) -> bool {
        self.0[usize::from(slot / 64) % 256] & (1 << (slot % 64)) != 0
    }

    /// Adds a slot.
    pub fn insert(&mut self, slot: u16) {
        self.0[usize::from(slot / 64) % 256] |= 1 << (slot % 64);
    }
}

/// Receiver of the messages and states of a bus. Called by the one task that reads the bus, so it must never block.
pub trait Deliver: Send + 'static {
    /// Takes a message and fills outboxes. Writes to sockets only if `last` is set: no further message of the round
    /// follows.
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool);
    /// Writes the filled outboxes, at the end of a round: all messages that could be read at once are delivered. Of a
    /// message to many, most outboxes wait for [`Self::proceed`].
    fn flush(&mut self);
    /// Writes the outboxes of the next clients of a message to many. Returns whether others wait still. Call it between
    /// rounds until none waits, so that no client waits for a message to all others.
    fn proceed(&mut self) -> bool;
    /// Notes the loss of a connection, the first or a further one: these messages may have been missed.
    fn lost(&mut self, cause: &str, missed: &Missed);
    /// Notes that every subscription is confirmed again. Messages of the time `gap` may have been missed.
    fn recovered(&mut self, gap: Duration);
}
