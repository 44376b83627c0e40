//! Events from other tasks to the logic of a client's connection. The only file that knows their encoding for a link.

use std::any::Any;

use bytes::Bytes;
use tracing::trace;
use wsproxy_conn::{HandlerEvent, Link};

use crate::{
    bus::publish::{BusError, Counts, Outcome, Receipt},
    telemetry::log::MESSAGES,
};

/// Event from another task to the logic of a connection.
#[derive(Debug)]
pub enum Event {
    /// The timer that the logic asked for has fired.
    Timer,
    /// No worker got a message of this client.
    Unpublished(Unpublished),
    /// A message of a topic to which the logic itself is subscribed.
    Message {
        /// Tag of the subscription, which the family chose.
        tag: u8,
        /// Payload of the message.
        payload: Bytes,
    },
    /// A message that wants an `ack` is about to be sent to the client.
    AckWanted {
        /// Id in the client's `ack`.
        event_id: Bytes,
        /// Message as the client gets it.
        message: Bytes,
    },
    /// A request of the logic is served. The result has a type that the family knows.
    Done(Box<dyn Any + Send>),
    /// The bus has answered all messages of the connection's share of its queue. The handler does not pass this on to
    /// the logic.
    ShareFree,
    /// The queue that the family keeps for this connection has entries.
    Inbox,
    /// The client has read most of what waited for it.
    Writable,
}

impl Event {
    /// Returns the bytes that the event holds.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match self {
            Self::Message { payload, .. } => payload.len(),
            Self::AckWanted { event_id, message } => event_id.len() + message.len(),
            Self::Timer
            | Self::Unpublished(_)
            | Self::Done(_)
            | Self::ShareFree
            | Self::Inbox
            | Self::Writable => 0,
        }
    }
}

impl From<Event> for HandlerEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Timer => Self::Timer,
            Event::Unpublished(Unpublished::NoReceiver) => Self::Fact(NO_RECEIVER),
            Event::Unpublished(Unpublished::Lost) => Self::Fact(LOST),
            Event::Unpublished(Unpublished::Refused { passing: true }) => Self::Fact(REFUSED_NOW),
            Event::Unpublished(Unpublished::Refused { passing: false }) => Self::Fact(REFUSED),
            Event::ShareFree => Self::Fact(SHARE_FREE),
            Event::Inbox => Self::Fact(INBOX),
            Event::Writable => Self::Fact(WRITABLE),
            Event::Message { tag, payload } => {
                Self::Bytes { tag, head: Bytes::new(), body: payload }
            }
            Event::AckWanted { event_id, message } => {
                Self::Bytes { tag: ACK_WANTED, head: event_id, body: message }
            }
            Event::Done(result) => Self::Value(result),
        }
    }
}

impl From<HandlerEvent> for Event {
    fn from(event: HandlerEvent) -> Self {
        match event {
            HandlerEvent::Timer => Self::Timer,
            HandlerEvent::Fact(NO_RECEIVER) => Self::Unpublished(Unpublished::NoReceiver),
            HandlerEvent::Fact(REFUSED_NOW) => {
                Self::Unpublished(Unpublished::Refused { passing: true })
            }
            HandlerEvent::Fact(REFUSED) => {
                Self::Unpublished(Unpublished::Refused { passing: false })
            }
            HandlerEvent::Fact(SHARE_FREE) => Self::ShareFree,
            HandlerEvent::Fact(INBOX) => Self::Inbox,
            HandlerEvent::Fact(WRITABLE) => Self::Writable,
            HandlerEvent::Fact(_) => Self::Unpublished(Unpublished::Lost),
            HandlerEvent::Bytes { tag: ACK_WANTED, head, body } => {
                Self::AckWanted { event_id: head, message: body }
            }
            HandlerEvent::Bytes { tag, body, .. } => Self::Message { tag, payload: body },
            HandlerEvent::Value(result) => Self::Done(result),
        }
    }
}

/// Reason for which no worker got a client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpublished {
    /// No worker listens.
    NoReceiver,
    /// The connection to Redis broke before the answer: a worker may or may not have the message.
    Lost,
    /// The bus certainly did not publish the message.
    Refused {
        /// The message may be sent again later.
        passing: bool,
    },
}

impl Unpublished {
    /// Returns code and message for the client; `None` if no worker listens, which is no error.
    #[must_use]
    pub const fn error(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::NoReceiver => return None,
            Self::Lost => ("publish_lost", "The message may not have reached a worker."),
            Self::Refused { passing: true } => {
                ("publish_refused", "The message was not delivered. It may be sent again later.")
            }
            Self::Refused { passing: false } => (
                "publish_refused",
                "The message was not delivered, and sending it again will not help.",
            ),
        })
    }
}

impl From<&BusError> for Unpublished {
    fn from(error: &BusError) -> Self {
        match error {
            BusError::NotDone(refusal) => Self::Refused { passing: refusal.is_passing() },
            // The message is not in the queue.
            BusError::Full | BusError::Closed => Self::Refused { passing: true },
            BusError::Refused(_) => Self::Refused { passing: false },
            BusError::Unreachable(_) => Self::Lost,
        }
    }
}

/// Tells a connection of its messages that no worker got.
impl Receipt for Link {
    fn counts(&self) -> Counts {
        Counts::Any
    }

    fn published(&self, outcome: Outcome) {
        trace!(target: MESSAGES, connection_id = %self.id(), ?outcome, "The bus answered to a client's message.");
        let unpublished = match outcome {
            Outcome::Received(receivers) if receivers > 0 => return,
            Outcome::Kept | Outcome::Stored { .. } => return,
            Outcome::Received(_) => Unpublished::NoReceiver,
            Outcome::Refused(refusal) => Unpublished::Refused { passing: refusal.is_passing() },
            Outcome::Lost => Unpublished::Lost,
        };
        self.notify(Event::Unpublished(unpublished).into());
    }
}

// Facts that carry the events without content.
const NO_RECEIVER: u8 = 0;
const LOST: u8 = 1;
const REFUSED_NOW: u8 = 2;
const REFUSED: u8 = 3;
const SHARE_FREE: u8 = 4;
const INBOX: u8 = 5;
const WRITABLE: u8 = 6;

/// Tag of [`Event::AckWanted`]. Families choose lower tags for their subscriptions.
const ACK_WANTED: u8 = u8::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_arrives_as_it_was_sent() {
        let lost = Unpublished::Lost;
        let (passing, lasting) =
            (Unpublished::Refused { passing: true }, Unpublished::Refused { passing: false });
        let events = [Unpublished::NoReceiver, lost, passing, lasting].map(Event::Unpublished);
        let others = [
            Event::Timer,
            Event::ShareFree,
            Event::Inbox,
            Event::Message { tag: 1, payload: "p".into() },
            Event::AckWanted { event_id: "e".into(), message: "m".into() },
        ];
        for event in events.into_iter().chain(others) {
            let sent = format!("{event:?}");
            let arrived = Event::from(HandlerEvent::from(event));
            assert_eq!(format!("{arrived:?}"), sent);
        }
        let done = Event::Done(Box::new("result"));
        let Event::Done(result) = HandlerEvent::from(done).into() else { panic!("no result") };
        assert_eq!(result.downcast_ref(), Some(&"result"));
    }
}
