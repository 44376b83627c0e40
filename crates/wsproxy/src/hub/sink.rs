//! Destinations of a topic's messages. Knows no topics.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    client::Client,
    config::OnBusLoss,
    hub::{follower::FollowerQueue, form::Form, gate::Gate, inbox::Inbox},
};

/// Destination of a topic's messages.
#[derive(Debug, Clone)]
pub enum Sink {
    /// A client.
    Client {
        /// Handle to the client.
        client: Client,
        /// Form of the messages in a WebSocket; an event stream has one form only.
        form: Form,
        /// Notice or close after a loss of the bus.
        on_loss: OnBusLoss,
    },
    /// The logic of a client's connection, which gets events.
    Handler {
        /// Handle to the client.
        client: Client,
        /// Tag of the events, chosen by the family.
        tag: u8,
    },
    /// A client whose missed messages come first.
    Gated(Arc<Gate>),
    /// A reader in this process.
    Follower(Arc<FollowerQueue>),
    /// A reader in this process that is called for each message.
    Inbox(Arc<dyn Inbox>),
}

/// Identity of a sink within its topic: the address of an object that the sink keeps alive. For a client's logic it is
/// one more, since the client itself is another sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SinkId(usize);

impl Sink {
    /// Returns the identity. Two sinks with the same id deliver to the same destination.
    pub(super) fn id(&self) -> SinkId {
        match self {
            Self::Client { client, .. } => SinkId(client.address()),
            Self::Handler { client, .. } => SinkId(client.address() + 1),
            Self::Gated(gate) => gate.target.id(),
            Self::Follower(queue) => SinkId(Arc::as_ptr(queue) as usize),
            Self::Inbox(inbox) => SinkId(Arc::as_ptr(inbox).cast::<()>() as usize),
        }
    }

    /// Returns whether the sink is a client, which is told if its history is lost. Logics, followers and inboxes are not told.
    pub(super) const fn has_history(&self) -> bool {
        matches!(self, Self::Client { .. } | Self::Gated(_))
    }

    /// Returns whether the sink is this connection or its logic.
    pub(super) fn is_of(&self, connection: Uuid) -> bool {
        match self {
            Self::Client { client, .. } | Self::Handler { client, .. } => client.id() == connection,
            Self::Gated(gate) => gate.target.is_of(connection),
            Self::Follower(_) | Self::Inbox(_) => false,
        }
    }

    /// Returns the upper bound of the bytes that may wait for the sink.
    pub(super) fn buffer_bytes(&self) -> usize {
        match self {
            Self::Client { client, .. } | Self::Handler { client, .. } => client.buffer_bytes_max(),
            Self::Gated(gate) => gate.target.buffer_bytes(),
            Self::Follower(queue) => queue.bytes_max(),
            // An inbox bounds itself, and never waits behind a gate.
            Self::Inbox(_) => usize::MAX,
        }
    }
}
