//! The endpoint families: pure handlers on one connection runtime. None of them knows another.

use std::sync::Arc;

use bytes::Bytes;
use wsproxy_conn::{End, Event, Link, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::bus::{BusError, Outcome, Publish, Receipt};

pub mod echo;
pub mod events;
pub mod session;

/// [`Event::tag`]: what became of a message that this connection published.
pub const PUBLISHED: u8 = 0;

/// The logic of one connection of an endpoint: it is told what happened and states consequences.
pub trait Logic: Send + Unpin + 'static {
    /// Messages may flow.
    fn on_open(&mut self, actions: &mut dyn Actions);
    /// A complete, valid data message from the client. Text is UTF-8.
    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions);
    /// Something from the hub or the bus.
    fn on_event(&mut self, event: Event, actions: &mut dyn Actions);
    /// The connection is over; `sent` counts messages and bytes that went to the client.
    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions);
}

/// The consequences that a [`Logic`] can state.
pub trait Actions {
    /// The present.
    fn now(&self) -> Micros;
    /// Answers something that the client said; one that does not read the answers is not read.
    fn reply(&mut self, kind: Kind, payload: &[u8]);
    /// Sends a message that the client did not cause.
    fn send(&mut self, kind: Kind, payload: &[u8]);
    /// Sends what was sent before, byte for byte.
    fn resend(&mut self, kind: Kind, message: &[u8]);
    /// Whether something waits which the client has not taken yet.
    fn is_backed_up(&self) -> bool;
    /// Publishes on the bus; the outcome comes back as an event where the message asks for it.
    ///
    /// # Errors
    /// It did not fit into the queue.
    fn publish(&mut self, publish: Publish) -> Result<(), BusError>;
    /// Ends the connection at once.
    fn disconnect(&mut self, why: &'static Disconnect);
    /// Ends the connection after all that waits for the client is written.
    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str);
    /// Asks for an event with the tag [`wsproxy_conn::link::TIMER`] soon after `at`, instead of any other time.
    fn wake_at(&mut self, at: Micros);
    /// Ends the connection as expired at this time (unix seconds), instead of any other; `None`: never.
    fn expire_at(&mut self, at: Option<u64>);
    /// Has a token looked at; the answer comes as an event with the tag [`events::VERIFIED`].
    fn verify(&mut self, token: &str);
    /// Who wants to know what becomes of a message of this connection.
    fn receipt(&self) -> Arc<dyn Receipt>;
}

impl Receipt for Link {
    fn published(&self, outcome: Outcome) {
        let number = match outcome {
            Outcome::Received(receivers) if receivers > 0 => return,
            Outcome::Kept | Outcome::Stored { .. } => return,
            Outcome::Received(_) => 0,
            Outcome::Lost => 1,
        };
        self.notify(Event { tag: PUBLISHED, number, payload: Bytes::new() });
    }
}
