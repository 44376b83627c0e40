//! What the gateway itself tells a client about its history, as JSON.

use serde_json::{Value, json};
use wsproxy_proto::history::{After, Lost, Position};

use crate::store::StreamState;

/// Everything that was missed follows.
#[must_use]
pub fn resumed(count: usize, after: &After) -> String {
    json!({ "type": "resumed", "count": count, "last_event_id": after.to_string() }).to_string()
}

/// Something is missing; what follows is behind `position`.
#[must_use]
pub fn history_lost(lost: Lost, position: Position) -> String {
    // Where there is no history there is no position either.
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

/// A token stream as it stands, for a client that has not seen its beginning.
#[must_use]
pub fn stream_snapshot(stream: &StreamState) -> String {
    // What a worker stored is JSON, or it is left out.
    let parse = |json: &[u8]| serde_json::from_slice::<Value>(json).ok();
    let mut snapshot = json!({
        "type": "stream_snapshot",
        "stream": stream.stream,
        "state": stream.state,
        "seq": stream.seq,
        "text": String::from_utf8_lossy(&stream.text),
    });
    for (name, value) in [("meta", parse(&stream.meta)), ("error", parse(&stream.error))] {
        if let Some(value) = value {
            snapshot[name] = value;
        }
    }
    snapshot.to_string()
}
