//! Readers of a topic in this process that must act on each message, and know when messages may be missing. Knows no
//! family.

use std::fmt::Debug;

use wsproxy_conn::clock::Micros;

/// Reader of a topic's messages in this process, called on the task that reads the bus.
///
/// The hub calls it while it holds the lock of the topic's shard. So a reader must not block, and of the hub it may only
/// publish, which needs no such lock.
///
/// Calls come in the order of the topic: [`Self::lost`] behind the last message of a connection to the bus and before
/// the first message of the next connection; [`Self::recovered`] once the bus has confirmed all topics again, which
/// may be behind some messages of the new connection. Both may come more than once.
pub trait Inbox: Send + Sync + Debug {
    /// Takes a message.
    fn message(&self, payload: &[u8]);
    /// Ends a round of messages: [`Self::message`] was called since the last round. Holds no lock of the hub. A reader
    /// that writes to many clients writes to each once.
    fn flush(&self, now: Micros) {
        let _ = now;
    }
    /// Notes that the bus is lost: messages may be missing from here on.
    fn lost(&self);
    /// Notes that the bus delivers again.
    fn recovered(&self);
}
