//! Encoding of a message, at most once per form for all sinks of its topic.

use bytes::Bytes;
use tracing::debug;
use wsproxy_conn::{Link, Outgoing};
use wsproxy_proto::ws::frame::Kind;

use crate::{
    client::{
        Client,
        event::Event,
        gzip::{self, Deflation},
    },
    config::DownFrames,
    hub::{
        Hub,
        form::{Form, Ids, sse},
        message::Message,
        sink::Sink,
        wants_ack::WantsAck,
    },
};

/// A message with its encoded forms. A form is encoded when a sink first needs it.
pub(super) struct Fanout<'a> {
    pub(super) message: Message<'a>,
    is_text: Option<bool>,
    /// Frames of WebSockets, by [`Ids`] and [`Kind`].
    frames: [[Option<Outgoing<'a>>; 2]; Ids::COUNT],
    event: Option<Bytes>,
    gzip: Option<Bytes>,
    /// The wish for an `ack`, by [`Ids`].
    wants_ack: [Option<Option<WantsAck>>; Ids::COUNT],
}

impl<'a> Fanout<'a> {
    pub(super) const fn new(message: Message<'a>) -> Self {
        Self {
            message,
            is_text: None,
            frames: [const { [const { None }; 2] }; Ids::COUNT],
            event: None,
            gzip: None,
            wants_ack: [const { None }; Ids::COUNT],
        }
    }

    /// Encodes the message for a sink. `None` if the sink is not a client, or gets text only and the payload is not
    /// UTF-8, which is counted.
    pub(super) fn encode(&mut self, sink: &Sink, hub: &Hub) -> Option<Bytes> {
        match sink {
            Sink::Client { client: Client::WebSocket(link), form, .. } => {
                self.frame(*form, link, hub)
            }
            Sink::Client { client: Client::EventStream(outbox), .. } => {
                self.event(outbox.gzip(), hub)
            }
            Sink::Gated(gate) => self.encode(&gate.target, hub),
            Sink::Handler { .. } | Sink::Follower(_) | Sink::Inbox(_) => None,
        }
    }

    /// Tells a client's logic if the message wants an `ack`. Call it before the message is sent, so that the
    /// `ack` cannot come first.
    pub(super) fn announce(&mut self, form: Form, link: &Link) {
        if !form.acks {
            return;
        }
        let message = self.message;
        let wants_ack = self.wants_ack[form.ids as usize]
            .get_or_insert_with(|| WantsAck::read(&message, form.ids));
        if let Some(WantsAck { event_id, message }) = wants_ack {
            let (event_id, message) = (event_id.clone(), message.clone());
            link.notify(Event::AckWanted { event_id, message }.into());
        }
    }

    /// As [`Self::announce`], for a client's sink.
    pub(super) fn announce_to(&mut self, client: &Sink) {
        if let Sink::Client { client: Client::WebSocket(link), form, .. } = client {
            self.announce(*form, link);
        }
    }

    /// Encodes the message as a server-sent event, compressed with `deflation`. Events are text: of a payload that is
    /// not UTF-8, an event stream gets the id only.
    pub(super) fn event(&mut self, deflation: Option<Deflation>, hub: &Hub) -> Option<Bytes> {
        let (id, payload) = (self.message.shown_id(), self.message.payload);
        if !self.is_text() {
            hub.counters.unframeable.add(1);
            debug!(
                bytes = payload.len(),
                "A message is not UTF-8, and an event stream has text only."
            );
            let position = sse::event_position(id?);
            return Some(match deflation {
                None => Bytes::from(position),
                Some(how) => gzip::part(position.as_bytes(), how),
            });
        }
        let plain = self.event.get_or_insert_with(|| sse::event(id, payload));
        Some(match deflation {
            None => plain.clone(),
            Some(how) => self.gzip.get_or_insert_with(|| gzip::part(plain, how)).clone(),
        })
    }

    /// Encodes the message as a frame. `None` if the endpoint sends text only and the payload is not UTF-8.
    pub(super) fn frame(&mut self, form: Form, link: &Link, hub: &Hub) -> Option<Bytes> {
        let kind = match form.frames {
            DownFrames::Binary => Kind::Binary,
            DownFrames::Auto | DownFrames::Text if self.is_text() => Kind::Text,
            DownFrames::Auto => Kind::Binary,
            DownFrames::Text => {
                hub.counters.unframeable.add(1);
                debug!(connection_id = %link.id(), bytes = self.message.payload.len(),
                    "A message is not UTF-8, and this endpoint sends text only.");
                return None;
            }
        };
        let Self { message, frames, .. } = self;
        let ids = form.ids.of(message, kind);
        let outgoing = frames[ids as usize][kind as usize]
            .get_or_insert_with(|| Outgoing::new(kind, ids.write(message)));
        Some(outgoing.frame(link.window_bits(), link.profile()))
    }

    fn is_text(&mut self) -> bool {
        let payload = self.message.payload;
        *self.is_text.get_or_insert_with(|| std::str::from_utf8(payload).is_ok())
    }
}
