//! A message on its way to all sinks of its topic, encoded at most once for each form.

use std::fmt::Write;

use bytes::Bytes;
use tracing::debug;
use wsproxy_conn::{Link, Outgoing};
use wsproxy_proto::{history::Position, ws::frame::Kind};

use crate::{
    config::DownFrames,
    hub::{
        Form, Hub, Ids, Sink,
        gzip::{self, Deflation},
    },
};

/// A message of a topic.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Where it is in the topic's history; `None` for a plain one.
    pub id: Option<Position>,
    /// Whether the payload carries an id that clients can resume from.
    pub carries_id: bool,
    /// What the worker published.
    pub payload: &'a [u8],
}

/// The same, for when it has to wait.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) carries_id: bool,
    pub(super) payload: Bytes,
}

impl<'a> Message<'a> {
    /// A plain one.
    #[must_use]
    pub const fn plain(payload: &'a [u8]) -> Self {
        Self { id: None, carries_id: false, payload }
    }

    /// Copies what has to wait, and says what it weighs.
    pub(super) fn store(&self) -> (Stored, usize) {
        let payload = Bytes::copy_from_slice(self.payload);
        let bytes = payload.len() + STORED_BYTES;
        (Stored { carries_id: self.carries_id, payload }, bytes)
    }
}

impl Stored {
    pub(super) fn message(&self, id: Position) -> Message<'_> {
        Message { id: Some(id), carries_id: self.carries_id, payload: &self.payload }
    }
}

/// A message and what it looks like in the forms that were asked for.
pub(super) struct Fanout<'a> {
    pub(super) message: Message<'a>,
    is_text: Option<bool>,
    plain: [Option<Outgoing<'a>>; 2],
    json: Option<Outgoing<'a>>,
    envelope: [Option<Outgoing<'a>>; 2],
    event: Option<Bytes>,
    gzip: Option<Bytes>,
}

impl<'a> Fanout<'a> {
    pub(super) const fn new(message: Message<'a>) -> Self {
        let (plain, envelope) = ([const { None }; 2], [const { None }; 2]);
        Self { message, is_text: None, plain, json: None, envelope, event: None, gzip: None }
    }

    /// What goes to a sink that is a client; `None` where it is none, or where the payload cannot be framed
    /// as wanted, which is counted.
    pub(super) fn encode(&mut self, sink: &Sink, hub: &Hub) -> Option<Bytes> {
        match sink {
            Sink::Client { link, form, .. } => self.frame(*form, link, hub),
            Sink::EventStream { tap, .. } => self.event(tap.gzip(), hub),
            Sink::Gated(gate) => self.encode(&gate.target, hub),
            Sink::Handler { .. } | Sink::StreamHandler { .. } | Sink::Tap(_) => None,
        }
    }

    /// An event, or a part of a compressed stream that holds it. Events are text: of what is none, an event
    /// stream gets the id only.
    fn event(&mut self, deflation: Option<Deflation>, hub: &Hub) -> Option<Bytes> {
        let Message { id, payload, .. } = self.message;
        if !*self.is_text.get_or_insert_with(|| std::str::from_utf8(payload).is_ok()) {
            hub.counters.unframeable.add(1);
            debug!(
                bytes = payload.len(),
                "A message is not UTF-8, and an event stream has text only."
            );
            let position = event_position(id?);
            return Some(match deflation {
                None => Bytes::from(position),
                Some(how) => gzip::part(position.as_bytes(), how),
            });
        }
        let plain = self.event.get_or_insert_with(|| event(id, payload));
        Some(match deflation {
            None => plain.clone(),
            Some(how) => self.gzip.get_or_insert_with(|| gzip::part(plain, how)).clone(),
        })
    }

    /// A frame for a connection.
    pub(super) fn frame(&mut self, form: Form, link: &Link, hub: &Hub) -> Option<Bytes> {
        let message = self.message;
        let payload = message.payload;
        let mut is_text =
            || *self.is_text.get_or_insert_with(|| std::str::from_utf8(payload).is_ok());
        let kind = match form.frames {
            DownFrames::Binary => Kind::Binary,
            DownFrames::Auto | DownFrames::Text if is_text() => Kind::Text,
            DownFrames::Auto => Kind::Binary,
            DownFrames::Text => {
                hub.counters.unframeable.add(1);
                debug!(connection_id = %link.id(), bytes = payload.len(),
                    "A message is not UTF-8, and this endpoint sends text only.");
                return None;
            }
        };
        let outgoing = match (form.ids, message.id) {
            (Ids::Envelope, id) => self.envelope[kind as usize]
                .get_or_insert_with(|| Outgoing::new(kind, with_head(id, payload))),
            (Ids::Json, Some(id)) if !message.carries_id && kind == Kind::Text => {
                self.json.get_or_insert_with(|| match with_event_id(id, payload) {
                    Some(spliced) => Outgoing::new(kind, spliced),
                    None => Outgoing::new(kind, payload),
                })
            }
            _ => self.plain[kind as usize].get_or_insert_with(|| Outgoing::new(kind, payload)),
        };
        Some(outgoing.frame(link.window_bits(), link.profile()))
    }
}

/// The form of the subprotocol that carries ids beside opaque bytes.
fn with_head(id: Option<Position>, payload: &[u8]) -> Vec<u8> {
    let mut message = id.map_or_else(String::new, |id| id.to_string()).into_bytes();
    message.reserve_exact(1 + payload.len());
    message.push(b'\n');
    message.extend_from_slice(payload);
    message
}

/// A JSON object with its id as first member; `None` where it is no object. Looks at its ends only.
fn with_event_id(id: Position, payload: &[u8]) -> Option<Vec<u8>> {
    let rest = payload.trim_ascii().strip_prefix(b"{")?;
    let inner = rest.strip_suffix(b"}")?;
    let mut head = String::with_capacity(payload.len() + 64);
    // Writing into a String cannot fail.
    let _ = write!(head, r#"{{"event_id":"{id}""#);
    let mut message = head.into_bytes();
    if !inner.trim_ascii().is_empty() {
        message.push(b',');
    }
    message.extend_from_slice(rest);
    Some(message)
}

/// A message as a server-sent event: every line of the payload gets its own `data:`.
pub fn event(id: Option<Position>, payload: &[u8]) -> Bytes {
    let text = String::from_utf8_lossy(payload);
    let mut event = String::with_capacity(text.len() + 64);
    if let Some(id) = id {
        // Writing into a String cannot fail.
        let _ = writeln!(event, "id: {id}");
    }
    // The format has three line breaks; of a payload with any of them each line is one of the event.
    for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
        event.push_str("data: ");
        event.push_str(line);
        event.push('\n');
    }
    event.push('\n');
    Bytes::from(event)
}

/// Tells an event stream its position, without an event.
pub fn event_position(id: Position) -> String {
    format!("id: {id}\n\n")
}

/// What a waiting message costs beside its bytes, roughly.
const STORED_BYTES: usize = 96;

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Position = Position { milliseconds: 17, sequence: 2 };

    #[test]
    fn only_objects_get_an_id() {
        let spliced = |payload: &str| {
            with_event_id(ID, payload.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap())
        };
        assert_eq!(spliced(r#"{"a":1}"#).unwrap(), r#"{"event_id":"17-2","a":1}"#);
        assert_eq!(spliced(" {\n } ").unwrap(), "{\"event_id\":\"17-2\"\n }");
        for other in ["", "{", "}", "[1]", "\"{}\"", "1", "text {}"] {
            assert_eq!(spliced(other), None, "{other}");
        }
    }

    #[test]
    fn a_payload_cannot_forge_an_event() {
        let text = event(None, b"{\"a\":1}\n\nid: 9-9\ndata: forged");
        assert_eq!(text, "data: {\"a\":1}\ndata: \ndata: id: 9-9\ndata: data: forged\n\n");
        assert_eq!(event(None, b"1\r\n2\r3"), "data: 1\ndata: 2\ndata: 3\n\n");
        assert_eq!(event(Some(ID), b"1"), "id: 17-2\ndata: 1\n\n");
    }
}
