//! The interface from a bus to the hub. Knows neither.

use std::time::Duration;

/// Receiver of the messages and states of a bus. Called by the one task that reads the bus, so it must never block.
pub trait Deliver: Send + 'static {
    /// Takes a message and fills outboxes. Writes to sockets only if `last` is set: no further message of the round
    /// follows.
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool);
    /// Writes the filled outboxes, at the end of a round: all messages that could be read at once are delivered.
    fn flush(&mut self);
    /// Notes the loss of a connection, the first or a further one: messages may have been missed.
    fn lost(&mut self, cause: &str);
    /// Notes that every subscription is confirmed again. Messages of the time `gap` may have been missed.
    fn recovered(&mut self, gap: Duration);
}
