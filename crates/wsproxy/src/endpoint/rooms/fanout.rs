//! A message on its way to members: encoded at most once for each form.

use std::borrow::Cow;

use bytes::Bytes;
use wsproxy_conn::{Link, Outgoing};
use wsproxy_proto::{rooms::text, ws::frame::Kind};

/// Form of the messages to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Protobuf in binary frames.
    Binary,
    /// JSON in text frames.
    Text,
}

impl Form {
    /// Returns the frame of an envelope for one member alone; `None` if the envelope has no such form.
    pub(super) fn frame(self, envelope: Vec<u8>, link: &Link) -> Option<Bytes> {
        Some(self.frame_of(self.message(envelope.into())?, link))
    }

    /// Returns the frame of a message that is in this form already.
    pub(super) fn frame_of(self, message: Cow<'_, [u8]>, link: &Link) -> Bytes {
        Outgoing::new(self.kind(), message).frame(link.window_bits(), link.profile())
    }

    /// Returns the frame of a message that is in this form already, without compression.
    pub(super) fn plain_frame(self, message: &[u8], link: &Link) -> Bytes {
        Outgoing::new(self.kind(), message).frame(None, link.profile())
    }

    /// Returns the message of an envelope; `None` if the envelope has no such form.
    pub(super) fn message(self, envelope: Cow<'_, [u8]>) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Binary => Some(envelope),
            Self::Text => Some(text::to_text(&envelope)?.into_bytes().into()),
        }
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Binary => Kind::Binary,
            Self::Text => Kind::Text,
        }
    }

    fn outgoing(self, envelope: Cow<'_, [u8]>) -> Option<Outgoing<'_>> {
        Some(Outgoing::new(self.kind(), self.message(envelope)?))
    }
}

/// A message to members.
pub(super) struct Fanout<'a> {
    message: Cow<'a, [u8]>,
    /// Members that acknowledge messages acknowledge this one.
    pub(super) is_reliable: bool,
    as_it_came: Option<Outgoing<'a>>,
    /// `None` inside, as in `text`: the message has no such form.
    binary: Option<Option<Outgoing<'a>>>,
    text: Option<Option<Outgoing<'a>>>,
}

impl<'a> Fanout<'a> {
    /// Makes the fan-out of an envelope.
    pub(super) fn new(envelope: impl Into<Cow<'a, [u8]>>) -> Self {
        Self {
            message: envelope.into(),
            is_reliable: false,
            as_it_came: None,
            binary: None,
            text: None,
        }
    }

    /// Makes the fan-out of a message that is no envelope: every member gets it as it came.
    pub(super) fn opaque(kind: Kind, message: &'a [u8]) -> Self {
        let as_it_came = Some(Outgoing::new(kind, message));
        Self {
            message: Cow::Borrowed(message),
            is_reliable: false,
            as_it_came,
            binary: None,
            text: None,
        }
    }

    /// Makes the message one that members acknowledge, where `is_reliable`.
    pub(super) fn reliable(mut self, is_reliable: bool) -> Self {
        self.is_reliable = is_reliable;
        self
    }

    /// Returns the envelope.
    pub(super) fn envelope(&self) -> &[u8] {
        &self.message
    }

    /// Returns whether the message is no envelope.
    pub(super) const fn is_opaque(&self) -> bool {
        self.as_it_came.is_some()
    }

    /// Returns the bytes of the message.
    pub(super) fn len(&self) -> usize {
        self.message.len()
    }

    /// Returns the frame for a member; `None` if the message has no such form.
    pub(super) fn frame(&mut self, form: Form, link: &Link) -> Option<Bytes> {
        let (bits, profile) = (link.window_bits(), link.profile());
        if let Some(outgoing) = &mut self.as_it_came {
            return Some(outgoing.frame(bits, profile));
        }
        let encoded = match form {
            Form::Binary => &mut self.binary,
            Form::Text => &mut self.text,
        };
        let outgoing = encoded.get_or_insert_with(|| form.outgoing(self.message.clone()));
        Some(outgoing.as_mut()?.frame(bits, profile))
    }
}
