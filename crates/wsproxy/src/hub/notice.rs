//! Notices of the gateway to a client about its history, as JSON.

use std::fmt::Write;

use serde_json::{json, value::RawValue};
use wsproxy_proto::history::{After, Lost, Position};

use crate::store::token_streams::StreamState;

/// Makes the notice that all missed messages follow.
#[must_use]
pub fn resumed(count: usize, after: &After) -> String {
    json!({ "type": "resumed", "count": count, "last_event_id": after.to_string() }).to_string()
}

/// Makes the notice that messages are missing. The client is at `position` then.
#[must_use]
pub fn history_lost(lost: Lost, position: Position) -> String {
    // Without a history there is no position.
    let event_id = if lost == Lost::Disabled { String::new() } else { position.to_string() };
    json!({
        "type": "error",
        "code": "history_lost",
        "reason": lost.label(),
        "message": format!("Load your state again: {lost}."),
        "event_id": event_id,
    })
    .to_string()
}

/// Makes the notice with a token stream's present state, for a client that has not seen its beginning.
#[must_use]
pub fn stream_snapshot(stream: &StreamState) -> String {
    // Remove the closing brace, so that members can be added byte for byte.
    let mut snapshot = json!({
        "type": "stream_snapshot",
        "stream": stream.stream,
        "state": stream.state,
        "seq": stream.seq,
        "text": String::from_utf8_lossy(&stream.text),
    })
    .to_string();
    snapshot.pop();
    for (name, json) in [("meta", &stream.meta), ("error", &stream.error)] {
        // The worker's JSON stays byte for byte; text that is not JSON is left out.
        if let Ok(value) = serde_json::from_slice::<&RawValue>(json) {
            // Writing into a String cannot fail.
            let _ = write!(snapshot, ",\"{name}\":{value}");
        }
    }
    snapshot.push('}');
    snapshot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_has_the_workers_json_as_it_was_written() {
        let meta = r#"{"wei":115792089237316195423570985008687907853269984665640564039457}"#;
        let mut stream = StreamState {
            stream: "a".into(),
            state: "open".into(),
            seq: 3,
            text: "x".into(),
            meta: meta.into(),
            error: "".into(),
        };
        let begin = r#"{"seq":3,"state":"open","stream":"a","text":"x","type":"stream_snapshot""#;
        assert_eq!(stream_snapshot(&stream), format!(r#"{begin},"meta":{meta}}}"#));
        stream.meta = "no json".into();
        stream.error = r#"{"code": 1.0}"#.into();
        assert_eq!(stream_snapshot(&stream), format!(r#"{begin},"error":{{"code": 1.0}}}}"#));
    }
}
