//! Encoding of server-sent events.

use std::fmt::Write;

use bytes::Bytes;
use wsproxy_proto::history::Position;

/// Encodes a message as a server-sent event. Every line of the payload gets its own `data:`.
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

/// Ends a server-sent event with its data. The data cannot forge another event.
pub fn push_data(event: &mut String, text: &str) {
    // The format knows three line breaks, and all of them have to be split.
    for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
        event.push_str("data: ");
        event.push_str(line);
        event.push('\n');
    }
    event.push('\n');
}

/// Encodes an event that tells a client its position. The event has a type of its own, which an `EventSource` shows
/// only to listeners of that type. An id alone would be enough for an `EventSource`, but other clients would show an
/// event without data.
pub fn event_position(id: Position) -> String {
    let data = format!(r#"{{"type":"position","event_id":"{id}"}}"#);
    format!("id: {id}\nevent: position\ndata: {data}\n\n")
}

/// Comment that proves to a client that the gateway lives. No empty line follows: some clients would show an event
/// without data.
pub const COMMENT: Bytes = Bytes::from_static(b":\n");

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Position = Position { milliseconds: 17, sequence: 2, tag: 9 };

    #[test]
    fn a_payload_cannot_forge_an_event() {
        let text = event(None, b"{\"a\":1}\n\nid: 9-9\ndata: forged");
        assert_eq!(text, "data: {\"a\":1}\ndata: \ndata: id: 9-9\ndata: data: forged\n\n");
        assert_eq!(event(None, b"1\r\n2\r3"), "data: 1\ndata: 2\ndata: 3\n\n");
        assert_eq!(event(Some(ID), b"1"), "id: 17-2-00000009\ndata: 1\n\n");
    }
}
