//! The endpoint families: pure handlers on one connection runtime. None of them knows another.

use std::sync::Arc;

use bytes::Bytes;
use tracing::trace;
use wsproxy_conn::{End, Event, Link, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::{BusError, Outcome, Publish, Receipt},
    telemetry::log::MESSAGES,
};

pub mod caller;
pub mod echo;
pub mod events;
pub mod session;

/// [`Event::tag`]: what became of a message that this connection published.
pub const PUBLISHED: u8 = 0;

/// What became of a client's message that no worker has got, as far as its client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unpublished {
    /// No worker listens.
    Unheard,
    /// Nobody knows.
    Lost,
    /// The bus certainly did not publish it. Where it is `passing`, it may be sent again.
    Refused {
        /// Whether waiting can help.
        passing: bool,
    },
}

impl Unpublished {
    const ALL: [Self; 4] = [
        Self::Unheard,
        Self::Lost,
        Self::Refused { passing: true },
        Self::Refused { passing: false },
    ];

    /// [`Event::number`] of an event [`PUBLISHED`].
    #[must_use]
    pub fn from_number(number: u64) -> Self {
        let place = usize::try_from(number).ok();
        place.and_then(|place| Self::ALL.get(place).copied()).unwrap_or(Self::Lost)
    }

    fn number(self) -> u64 {
        Self::ALL.iter().position(|one| *one == self).map_or(1, |place| place as u64)
    }

    /// Code and message for the client; `None` where no worker listens, which is no error.
    #[must_use]
    pub const fn error(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Unheard => return None,
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
            // Nothing was put into the queue.
            BusError::Full | BusError::Closed => Self::Refused { passing: true },
            BusError::Refused(_) => Self::Refused { passing: false },
            BusError::Unreachable(_) => Self::Lost,
        }
    }
}

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
        trace!(target: MESSAGES, connection_id = %self.id(), ?outcome, "The bus answered to a client's message.");
        let unpublished = match outcome {
            Outcome::Received(receivers) if receivers > 0 => return,
            Outcome::Kept | Outcome::Stored { .. } => return,
            Outcome::Received(_) => Unpublished::Unheard,
            Outcome::Refused(refusal) => Unpublished::Refused { passing: refusal.is_passing() },
            Outcome::Lost => Unpublished::Lost,
        };
        let number = unpublished.number();
        self.notify(Event { tag: PUBLISHED, number, payload: Bytes::new() });
    }
}
