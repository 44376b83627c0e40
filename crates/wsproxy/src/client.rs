//! The client at the other end of a connection, over either transport. Knows no endpoint.

use std::sync::Arc;

use uuid::Uuid;
use wsproxy_conn::{Link, clock::Micros};
use wsproxy_proto::disconnect::Disconnect;

use crate::client::{
    event::Event,
    event_stream_outbox::{EventStreamEnding, EventStreamOutbox},
};

pub mod event;
pub mod event_stream_outbox;
pub mod gzip;
pub mod open_streams;

/// Handle to a client's connection, for other tasks.
#[derive(Debug, Clone)]
pub enum Client {
    /// A client with a WebSocket.
    WebSocket(Arc<Link>),
    /// A client with a stream of server-sent events.
    EventStream(Arc<EventStreamOutbox>),
}

impl Client {
    /// Returns the connection's id.
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::WebSocket(link) => link.id(),
            Self::EventStream(outbox) => outbox.id(),
        }
    }

    /// Returns the number of bytes that wait for the client.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        match self {
            Self::WebSocket(link) => link.queued_bytes(),
            Self::EventStream(outbox) => outbox.waiting_bytes(),
        }
    }

    /// Returns the upper bound of the bytes that wait for the client.
    #[must_use]
    pub fn buffer_bytes_max(&self) -> usize {
        match self {
            Self::WebSocket(link) => link.profile().send_buffer_bytes,
            Self::EventStream(outbox) => outbox.bytes_max(),
        }
    }

    /// Returns whether the connection is about to end.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        match self {
            Self::WebSocket(link) => link.is_closing(),
            Self::EventStream(outbox) => outbox.is_closed(),
        }
    }

    /// Returns the handle's address in memory, which is unique as long as a handle exists.
    pub(crate) fn address(&self) -> usize {
        match self {
            Self::WebSocket(link) => Arc::as_ptr(link) as usize,
            Self::EventStream(outbox) => Arc::as_ptr(outbox) as usize,
        }
    }

    /// Hands an event to the logic of the connection.
    pub fn notify(&self, event: Event) {
        match self {
            Self::WebSocket(link) => link.notify(event.into()),
            Self::EventStream(outbox) => outbox.notify(event),
        }
    }

    /// Ends the connection after all waiting messages are written.
    pub fn finish(&self, why: &'static Disconnect, now: Micros) {
        self.finish_with(why, why.code, why.reason, now);
    }

    /// As [`Self::finish`], with a worker's code and reason.
    pub fn finish_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        match self {
            Self::WebSocket(link) => link.finish_with(why, code, reason, now),
            Self::EventStream(outbox) => outbox.finish(EventStreamEnding::new(why, code, reason)),
        }
    }

    /// Ends the connection at once and drops all waiting messages.
    pub fn disconnect(&self, why: &'static Disconnect, now: Micros) {
        self.disconnect_with(why, why.code, why.reason, now);
    }

    /// As [`Self::disconnect`], with a worker's code and reason.
    pub fn disconnect_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        match self {
            Self::WebSocket(link) => link.disconnect_with(why, code, reason, now),
            Self::EventStream(outbox) => {
                outbox.disconnect(EventStreamEnding::new(why, code, reason))
            }
        }
    }

    /// Closes the socket without telling the client.
    pub fn abort(&self) {
        match self {
            Self::WebSocket(link) => link.abort(),
            Self::EventStream(outbox) => outbox.abort(),
        }
    }
}
