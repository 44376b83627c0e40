//! The transport between instances and workers: what carries messages, not who wants them.
//!
//! The hub above is known only through [`Deliver`]; which backend runs is decided in `server.rs`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

/// What the bus tells the hub. Called from the one task that reads the bus, so it must never block.
pub trait Deliver: Send + 'static {
    /// A message that was read. Fill outboxes; do not write to sockets yet.
    fn message(&mut self, channel: &[u8], payload: &[u8]);
    /// Everything that was there to read has been delivered: write what was filled.
    fn flush(&mut self);
    /// The bus was lost: messages from now on may be missed.
    fn lost(&mut self, cause: &str);
    /// Every subscription is confirmed again. `gap` is how long messages may have been missed.
    fn recovered(&mut self, gap: Duration);
}

/// A message on its way to the bus.
pub struct Publish {
    /// Full name of the channel.
    pub channel: Arc<str>,
    /// The payload, verbatim.
    pub payload: Bytes,
    /// What happens where nobody listens.
    pub unheard: Unheard,
    /// Told what became of it, where somebody wants to know.
    pub receipt: Option<Arc<dyn Receipt>>,
}

/// What happens to a message that reached no subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unheard {
    /// It is gone; the receipt says so.
    Gone,
    /// It is appended to a bounded, expiring stream under the field `data`, atomically with the publish.
    Kept {
        /// Key of the stream.
        log: Arc<str>,
        /// Most entries kept (approximately: Redis trims whole nodes).
        entries_max: u64,
        /// The stream expires this long after its last entry.
        ttl: Duration,
    },
}

/// What became of a published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// So many subscribers received it; 0 means that nobody listened.
    Received(u64),
    /// Nobody listened, and it was kept in the log.
    Kept,
    /// The bus refused it or was lost while it was on its way; it may or may not have arrived.
    Lost,
}

/// Somebody who waits for an [`Outcome`]. Called on the bus's task: must not block.
pub trait Receipt: Send + Sync {
    /// Called exactly once for every publish which was accepted into the queue.
    fn published(&self, outcome: Outcome);
}

/// Why the bus did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Not connected; a retry may help.
    #[error("the bus is unreachable: {0}")]
    Unreachable(String),
    /// The publish queue is full; wait until it is not.
    #[error("the publish queue is full")]
    Full,
    /// The bus answered with an error (an ACL, a full memory): a retry will not help.
    #[error("the bus refused: {0}")]
    Refused(String),
    /// The instance is ending.
    #[error("the bus is closed")]
    Closed,
}
