//! A message on its way to the sinks of its topic. Knows no forms.

use bytes::Bytes;
use uuid::Uuid;
use wsproxy_proto::history::{Entry, Envelope, Position};

/// A message of a topic.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Position in the topic's history; `None` for a plain message.
    pub id: Option<Position>,
    /// Position of the entry before this one.
    pub prev: Position,
    /// The payload carries an id from which clients can resume.
    pub carries_id: bool,
    /// The id must not be shown to clients: the topic belongs to one connection and cannot be resumed.
    pub is_unresumable: bool,
    /// Connection that must not get the message, since it sent it.
    pub origin: Option<Uuid>,
    /// Payload as the worker published it.
    pub payload: &'a [u8],
}

/// Copy of a message that has to wait.
#[derive(Debug)]
pub(super) struct Stored {
    prev: Position,
    carries_id: bool,
    is_unresumable: bool,
    origin: Option<Uuid>,
    payload: Bytes,
}

impl<'a> Message<'a> {
    /// Makes a message without a history.
    #[must_use]
    pub const fn plain(payload: &'a [u8]) -> Self {
        let (prev, carries_id, is_unresumable) = (Position::START, false, false);
        Self { id: None, prev, carries_id, is_unresumable, origin: None, payload }
    }

    /// Returns the id that clients see. An id that cannot be resumed is hidden, unless clients need it for an `ack`.
    pub(super) fn shown_id(&self) -> Option<Position> {
        let is_shown = !self.is_unresumable || self.mentions_ack();
        self.id.filter(|_| is_shown)
    }

    /// Returns whether the payload may want an `ack`.
    pub(super) fn mentions_ack(&self) -> bool {
        memchr::memmem::find(self.payload, br#""ack""#).is_some()
    }

    /// Copies a message that has to wait. Also returns the bytes that the copy counts.
    pub(super) fn store(&self) -> (Stored, usize) {
        let payload = Bytes::copy_from_slice(self.payload);
        let bytes = payload.len() + STORED_BYTES;
        let Self { prev, carries_id, is_unresumable, origin, .. } = *self;
        (Stored { prev, carries_id, is_unresumable, origin, payload }, bytes)
    }
}

impl<'a> From<&Envelope<'a>> for Message<'a> {
    fn from(envelope: &Envelope<'a>) -> Self {
        let carries_id = envelope.event_id.is_some();
        let Envelope { id, prev, payload, .. } = *envelope;
        Self { id: Some(id), prev, carries_id, ..Self::plain(payload) }
    }
}

impl<'a> From<&'a Entry> for Message<'a> {
    fn from(entry: &'a Entry) -> Self {
        let carries_id = entry.event_id.is_some();
        let Entry { id, prev, ref data, .. } = *entry;
        Self { id: Some(id), prev, carries_id, ..Self::plain(data) }
    }
}

impl Stored {
    /// Returns the message.
    pub(super) fn message(&self, id: Position) -> Message<'_> {
        let Self { prev, carries_id, is_unresumable, origin, ref payload } = *self;
        Message { id: Some(id), prev, carries_id, is_unresumable, origin, payload }
    }
}

/// Bytes that a waiting message counts in addition to its payload.
const STORED_BYTES: usize = 96;
