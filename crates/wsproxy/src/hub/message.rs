//! A message on its way to all sinks of its topic, encoded at most once for each form.

use std::fmt::Write;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use tracing::debug;
use wsproxy_conn::{Event, Link, Outgoing};
use wsproxy_proto::{history::Position, json, ws::frame::Kind};

use crate::{
    config::DownFrames,
    hub::{
        Form, Hub, Ids, Sink, WANTS_ACK,
        gzip::{self, Deflation},
    },
};

/// A message of a topic.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Where it is in the topic's history; `None` for a plain one.
    pub id: Option<Position>,
    /// Where the entry before it is.
    pub prev: Position,
    /// Whether the payload carries an id that clients can resume from.
    pub carries_id: bool,
    /// Whether nobody can resume from its id, since whoever comes back has other topics.
    pub is_private: bool,
    /// What the worker published.
    pub payload: &'a [u8],
}

/// The same, for when it has to wait.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) prev: Position,
    pub(super) carries_id: bool,
    pub(super) is_private: bool,
    pub(super) payload: Bytes,
}

impl<'a> Message<'a> {
    /// A plain one.
    #[must_use]
    pub const fn plain(payload: &'a [u8]) -> Self {
        Self { id: None, prev: Position::START, carries_id: false, is_private: false, payload }
    }

    /// The id that clients are shown. A private one only misleads them, unless they acknowledge by it.
    fn shown_id(&self) -> Option<Position> {
        let is_shown =
            !self.is_private || memchr::memmem::find(self.payload, br#""ack""#).is_some();
        self.id.filter(|_| is_shown)
    }

    /// Copies what has to wait, and says what it weighs.
    pub(super) fn store(&self) -> (Stored, usize) {
        let payload = Bytes::copy_from_slice(self.payload);
        let bytes = payload.len() + STORED_BYTES;
        let Self { prev, carries_id, is_private, .. } = *self;
        (Stored { prev, carries_id, is_private, payload }, bytes)
    }
}

impl Stored {
    pub(super) fn message(&self, id: Position) -> Message<'_> {
        let Self { prev, carries_id, is_private, ref payload } = *self;
        Message { id: Some(id), prev, carries_id, is_private, payload }
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
    /// By [`Ids`]: what handlers are told of a message that wants an `ack`.
    wants_ack: [Option<Option<WantsAck>>; 3],
}

/// A message that wants an `ack`: its id, and behind it the message as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
struct WantsAck {
    payload: Bytes,
    id_bytes: u64,
}

impl<'a> Fanout<'a> {
    pub(super) const fn new(message: Message<'a>) -> Self {
        let (plain, envelope) = ([const { None }; 2], [const { None }; 2]);
        let wants_ack = [const { None }; 3];
        let (json, event, gzip) = (None, None, None);
        Self { message, is_text: None, plain, json, envelope, event, gzip, wants_ack }
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

    /// Tells the handler of a client that the message wants an `ack`, if it does. To be called before the
    /// message is sent: the answer must not come first.
    pub(super) fn announce(&mut self, form: Form, link: &Link) {
        if !form.acks {
            return;
        }
        let message = self.message;
        let wants_ack = self.wants_ack[form.ids as usize]
            .get_or_insert_with(|| WantsAck::read(message, form.ids));
        if let Some(WantsAck { payload, id_bytes }) = wants_ack {
            link.notify(Event { tag: WANTS_ACK, number: *id_bytes, payload: payload.clone() });
        }
    }

    /// The same where the client is a sink.
    pub(super) fn announce_to(&mut self, client: &Sink) {
        if let Sink::Client { link, form, .. } = client {
            self.announce(*form, link);
        }
    }

    /// An event, or a part of a compressed stream that holds it. Events are text: of what is none, an event
    /// stream gets the id only.
    fn event(&mut self, deflation: Option<Deflation>, hub: &Hub) -> Option<Bytes> {
        let (id, payload) = (self.message.shown_id(), self.message.payload);
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
        let outgoing = match (form.ids, message.shown_id()) {
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

impl WantsAck {
    /// What a client sees decides: the payload's own id, else that of the history, where it is shown.
    fn read(message: Message<'_>, ids: Ids) -> Option<Self> {
        memchr::memmem::find(message.payload, br#""ack""#)?;
        let Marked { ack, event_id } = serde_json::from_slice(message.payload).ok()?;
        if ack != Value::Bool(true) {
            return None;
        }
        let own = event_id.as_str().filter(|id| !id.is_empty());
        let id = match (own, message.id) {
            (Some(own), _) => own.to_owned(),
            (None, Some(id)) if ids != Ids::Hidden => id.to_string(),
            _ => {
                debug!("A message wants an ack, but has no id by which it could be acknowledged.");
                return None;
            }
        };
        let mut payload = id.clone().into_bytes();
        match (ids, message.id) {
            (Ids::Envelope, at) => payload.extend(with_head(at, message.payload)),
            (Ids::Json, Some(at)) if !message.carries_id => {
                let spliced = with_event_id(at, message.payload);
                payload.extend(spliced.as_deref().unwrap_or(message.payload));
            }
            _ => payload.extend(message.payload),
        }
        Some(Self { payload: payload.into(), id_bytes: id.len() as u64 })
    }
}

/// What a message says about acknowledging it.
#[derive(Deserialize)]
struct Marked {
    #[serde(default)]
    ack: Value,
    #[serde(default)]
    event_id: Value,
}

/// Whether an object may have a member `event_id`: its name as such or with escapes in it.
fn may_have_event_id(payload: &[u8]) -> bool {
    memchr::memmem::find(payload, b"event_id").is_some()
        || memchr::memmem::find(payload, b"\\u00").is_some()
}

/// Whether an object has a member `event_id`, of any value and any number of times.
struct Members {
    has_event_id: bool,
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> serde::de::Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut has_event_id = false;
        while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            has_event_id |= name == "event_id";
            map.next_value::<serde::de::IgnoredAny>()?;
        }
        Ok(Members { has_event_id })
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

/// A JSON object with its id as first member; `None` where it is no object, or has such a member already, which
/// stays as it is: no object has two members of one name.
fn with_event_id(id: Position, payload: &[u8]) -> Option<Vec<u8>> {
    let rest = payload.trim_ascii().strip_prefix(b"{")?;
    let inner = rest.strip_suffix(b"}")?;
    // Text that only looks like an object, such as several of them, is nobody's to change.
    json::validate(payload.trim_ascii(), json::DEPTH_MAX).ok()?;
    if may_have_event_id(payload) {
        let Members { has_event_id } = serde_json::from_slice(payload).ok()?;
        if has_event_id {
            return None;
        }
    }
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
    push_data(&mut event, &text);
    Bytes::from(event)
}

/// Ends a server-sent event with its data, which cannot forge another one.
pub fn push_data(event: &mut String, text: &str) {
    // The format has three line breaks; of a payload with any of them each line is one of the event.
    for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
        event.push_str("data: ");
        event.push_str(line);
        event.push('\n');
    }
    event.push('\n');
}

/// Tells an event stream its position. It is an event of a kind of its own, which an `EventSource` shows to nobody who did
/// not ask for it. An id alone would do for an `EventSource`, but other clients make an ordinary event without data of it.
pub fn event_position(id: Position) -> String {
    let data = format!(r#"{{"type":"position","event_id":"{id}"}}"#);
    format!("id: {id}\nevent: position\ndata: {data}\n\n")
}

/// Proves to an event stream that the gateway lives. It is a line and no block: clients that take every empty line for the
/// end of an event would show one without data.
pub const COMMENT: Bytes = Bytes::from_static(b":\n");

/// What a waiting message costs beside its bytes, roughly.
const STORED_BYTES: usize = 96;

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Position = Position { milliseconds: 17, sequence: 2, tag: 9 };

    #[test]
    fn only_objects_get_an_id() {
        let spliced = |payload: &str| {
            with_event_id(ID, payload.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap())
        };
        assert_eq!(spliced(r#"{"a":1}"#).unwrap(), r#"{"event_id":"17-2-00000009","a":1}"#);
        assert_eq!(spliced(" {\n } ").unwrap(), "{\"event_id\":\"17-2-00000009\"\n }");
        let inner = r#"{"a":{"event_id":1},"b":"event_id"}"#;
        assert!(spliced(inner).unwrap().starts_with(r#"{"event_id":"17-2-00000009","a""#));
        let own = [r#"{"event_id":1}"#, r#"{"a":1,"event_id":"x"}"#, r#"{"\u0065vent_id":null}"#];
        let alike = ["{hello}", "{a}{b}", "{\"a\":1}\n{\"b\":2}", "{\"a\":1,}", "{\"a\":NaN}"];
        let others = ["", "{", "}", "[1]", "\"{}\"", "1", "text {}"];
        for other in others.into_iter().chain(alike).chain(own) {
            assert_eq!(spliced(other), None, "{other}");
        }
    }

    #[test]
    fn only_what_says_so_at_the_top_and_has_an_id_wants_an_ack() {
        let read = |id, carries_id, ids, payload: &str| {
            let message = Message {
                id,
                prev: Position::START,
                carries_id,
                is_private: false,
                payload: payload.as_bytes(),
            };
            WantsAck::read(message, ids).map(|WantsAck { payload, id_bytes }| {
                let (id, message) = payload.split_at(id_bytes as usize);
                [id, message].map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
            })
        };
        let own = r#"{"ack":true,"event_id":"e"}"#;
        let none = r#"{"ack":true}"#;
        let spliced = r#"{"event_id":"17-2-00000009","ack":true}"#;
        for (id, carries_id, ids, payload, expected) in [
            (None, false, Ids::Json, own, Some(["e", own])),
            (Some(ID), true, Ids::Json, own, Some(["e", own])),
            (Some(ID), false, Ids::Json, none, Some(["17-2-00000009", spliced])),
            (
                Some(ID),
                false,
                Ids::Envelope,
                none,
                Some(["17-2-00000009", "17-2-00000009\n{\"ack\":true}"]),
            ),
            (None, false, Ids::Envelope, own, Some(["e", "\n{\"ack\":true,\"event_id\":\"e\"}"])),
            (Some(ID), false, Ids::Hidden, none, None),
            (None, false, Ids::Json, none, None),
            (Some(ID), false, Ids::Json, r#"{"ack":1}"#, None),
            (Some(ID), false, Ids::Json, r#"{"ack":"true"}"#, None),
            (Some(ID), false, Ids::Json, r#"{"data":{"ack":true}}"#, None),
            (Some(ID), false, Ids::Json, r#"{"type":"ack"}"#, None),
            (Some(ID), false, Ids::Json, r#"[{"ack":true}]"#, None),
            (Some(ID), false, Ids::Json, "no json, \"ack\"", None),
        ] {
            let expected = expected.map(|both| both.map(str::to_owned));
            assert_eq!(read(id, carries_id, ids, payload), expected, "{payload}");
        }
    }

    #[test]
    fn a_payload_cannot_forge_an_event() {
        let text = event(None, b"{\"a\":1}\n\nid: 9-9\ndata: forged");
        assert_eq!(text, "data: {\"a\":1}\ndata: \ndata: id: 9-9\ndata: data: forged\n\n");
        assert_eq!(event(None, b"1\r\n2\r3"), "data: 1\ndata: 2\ndata: 3\n\n");
        assert_eq!(event(Some(ID), b"1"), "id: 17-2-00000009\ndata: 1\n\n");
    }
}
