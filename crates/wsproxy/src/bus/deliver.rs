//! The interface from a bus to the hub. Knows neither.

use std::time::Duration;

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
    /// Notes the loss of a connection, the first or a further one: messages may have been missed.
    fn lost(&mut self, cause: &str);
    /// Notes that every subscription is confirmed again. Messages of the time `gap` may have been missed.
    fn recovered(&mut self, gap: Duration);
}
