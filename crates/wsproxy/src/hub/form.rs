//! Forms in which WebSockets get their messages. A further encoding is one more variant of [`Ids`], and its arm in
//! [`Ids::write`].

use std::borrow::Cow;

use wsproxy_proto::{history::Position, ws::frame::Kind};

use crate::{config::DownFrames, hub::message::Message};

pub(super) mod json;
pub mod sse;

/// Form of the messages that a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Text or binary.
    pub frames: DownFrames,
    /// Place of the ids.
    pub ids: Ids,
    /// The connection's logic learns of messages that want an `ack`.
    pub acks: bool,
}

/// Place of the id in a message that belongs to a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// No id: the payload is sent as it is.
    Hidden,
    /// First member `event_id` of a JSON object.
    Json,
    /// Line before every payload.
    Envelope,
}

impl Ids {
    /// Number of variants.
    pub(super) const COUNT: usize = 3;

    /// Returns the variant for a message: a payload that has an id already, or cannot have one, is sent as it is.
    pub(super) fn of(self, message: &Message<'_>, kind: Kind) -> Self {
        match self {
            Self::Json
                if kind != Kind::Text || message.carries_id || message.shown_id().is_none() =>
            {
                Self::Hidden
            }
            ids => ids,
        }
    }

    /// Writes the message as a client gets it.
    pub(super) fn write<'a>(self, message: &Message<'a>) -> Cow<'a, [u8]> {
        let payload = message.payload;
        match self {
            Self::Hidden => payload.into(),
            Self::Json => {
                let spliced = message.shown_id().and_then(|id| json::with_event_id(id, payload));
                spliced.map_or_else(|| payload.into(), Cow::Owned)
            }
            Self::Envelope => with_head(message.shown_id(), payload).into(),
        }
    }
}

/// Writes the id in a line of its own, which is empty for a plain message, and the payload.
fn with_head(id: Option<Position>, payload: &[u8]) -> Vec<u8> {
    let mut message = id.map_or_else(String::new, |id| id.to_string()).into_bytes();
    message.reserve_exact(1 + payload.len());
    message.push(b'\n');
    message.extend_from_slice(payload);
    message
}
