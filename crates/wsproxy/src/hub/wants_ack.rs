//! Messages that want an `ack`. A client's logic is told of them before they are sent.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use tracing::debug;
use wsproxy_proto::ws::frame::Kind;

use crate::hub::{form::Ids, message::Message};

/// A message that wants an `ack`: its id, and the message as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WantsAck {
    pub(super) event_id: Bytes,
    pub(super) message: Bytes,
}

impl WantsAck {
    /// Reads whether a message wants an `ack`. The id is the one that the client sees: the payload's own, or that of
    /// the history if the form shows it.
    pub(super) fn read(message: &Message<'_>, ids: Ids) -> Option<Self> {
        if !message.mentions_ack() {
            return None;
        }
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
        payload.extend_from_slice(&ids.of(message, Kind::Text).write(message));
        // Id and message share one allocation.
        let mut message = Bytes::from(payload);
        let event_id = message.split_to(id.len());
        Some(Self { event_id, message })
    }
}

/// Members of a message that decide about its `ack`.
#[derive(Deserialize)]
struct Marked {
    #[serde(default)]
    ack: Value,
    #[serde(default)]
    event_id: Value,
}

#[cfg(test)]
mod tests {
    use wsproxy_proto::history::Position;

    use super::*;

    const ID: Position = Position { milliseconds: 17, sequence: 2, tag: 9 };

    #[test]
    fn only_what_says_so_at_the_top_and_has_an_id_wants_an_ack() {
        let read = |id, carries_id, ids, payload: &str| {
            let message = Message { id, carries_id, ..Message::plain(payload.as_bytes()) };
            WantsAck::read(&message, ids).map(|WantsAck { event_id, message }| {
                [event_id, message].map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
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
}
