//! Every vector of `spec/tunnel`, as the decoder reads and the encoder writes it.

use std::fmt::Write;

use serde_json::{Value, json};
use wsproxy_proto::tunnel::frame::{
    DataFlag, Frame, FrameError, Frames, Open, Source, StreamFrame,
};
use wsproxy_proto::tunnel::headers::Headers;

#[test]
fn every_message_holds_the_frames_of_the_vectors() {
    for case in cases(include_str!("../../../../../spec/tunnel/frames.json")) {
        let message = bytes(&case["message"]);
        let frames: Result<Vec<_>, _> = Frames::new(&message).unwrap().collect();
        let frames = frames.unwrap_or_else(|error| panic!("{}: {error}", case["name"]));
        let found: Vec<_> = frames.iter().map(as_json).collect();
        assert_eq!(json!(found), case["frames"], "{}", case["name"]);
        let mut written = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut written).unwrap());
        assert_eq!(case["canonical"], json!(written == message), "{}", case["name"]);
    }
}

#[test]
fn every_refused_message_has_the_error_of_the_vectors() {
    for case in cases(include_str!("../../../../../spec/tunnel/refused.json")) {
        let message = bytes(&case["message"]);
        let read = Frames::new(&message).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let found = match read {
            Ok(frames) => panic!("{}: {frames:?}", case["name"]),
            Err(FrameError::Message) => "message",
            Err(FrameError::Partial) => "partial",
            Err(FrameError::UnknownType(_)) => "unknown_type",
            Err(FrameError::StreamNumber(_)) => "stream_number",
            Err(FrameError::Flags(_)) => "flags",
            Err(FrameError::Payload(_)) => "payload",
        };
        assert_eq!(case["error"], found, "{}", case["name"]);
    }
}

fn cases(file: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(file).unwrap();
    file["cases"].as_array().unwrap().clone()
}

fn bytes(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn as_json(frame: &Frame<'_>) -> Value {
    match frame {
        Frame::Hello(hello) => json!({
            "frame": "hello",
            "versions": hello.versions,
            "instance": hello.instance,
            "capabilities": hello.capabilities,
            "streams_max": hello.streams_max,
            "window": hello.window,
            "head_bytes_max": hello.head_bytes_max,
            "ping_ms": hello.ping_ms,
            "drain_ms": hello.drain_ms,
            "build": hello.build,
        }),
        Frame::Ping(number) => json!({ "frame": "ping", "number": number }),
        Frame::Pong(pong) => {
            json!({ "frame": "pong", "number": pong.number, "waited_us": pong.waited_us })
        }
        Frame::GoAway(go_away) => json!({
            "frame": "goaway",
            "last_stream": go_away.last_stream,
            "code": go_away.code.label(),
            "drain_ms": go_away.drain_ms,
        }),
        Frame::Health(health) => json!({
            "frame": "health",
            "upstream_ok": health.upstream_ok,
            "upstream_round_trip_us": health.upstream_round_trip_us,
            "streams": health.streams,
            "memory_bytes": health.memory_bytes,
            "disk_free_bytes": health.disk_free_bytes,
            "text": health.text,
        }),
        Frame::Stream(stream, frame) => {
            let mut object = of_stream(frame);
            object["stream"] = json!(stream);
            object
        }
    }
}

fn of_stream(frame: &StreamFrame<'_>) -> Value {
    match frame {
        StreamFrame::Open(open) => open_as_json(open),
        StreamFrame::Head(head) => json!({
            "frame": "head",
            "end": head.end,
            "status": head.status,
            "source": if head.source == Source::Agent { "agent" } else { "upstream" },
            "headers": headers(head.headers),
        }),
        StreamFrame::Data(data) => json!({
            "frame": "data",
            "bytes": data.bytes.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            }),
            "end": data.flag == DataFlag::End,
            "blocked": data.flag == DataFlag::Blocked,
        }),
        StreamFrame::Trailers(block) => {
            json!({ "frame": "trailers", "headers": headers(*block) })
        }
        StreamFrame::Credit(bytes) => json!({ "frame": "credit", "bytes": bytes }),
        StreamFrame::Reset(reset) => json!({
            "frame": "reset",
            "code": reset.code.label(),
            "not_dispatched": reset.not_dispatched,
            "head_sent": reset.head_sent,
            "stop": reset.stop,
            "retry_after_ms": reset.retry_after_ms,
            "message": reset.message,
        }),
    }
}

fn open_as_json(open: &Open<'_>) -> Value {
    json!({
        "frame": "open",
        "end": open.end,
        "upgrade": open.upgrade,
        "long": open.long,
        "expect": open.expect,
        "retried": open.retried,
        "head_ms": open.head_ms,
        "method": text(open.method),
        "path": text(open.path),
        "headers": headers(open.headers),
    })
}

fn headers(block: Headers<'_>) -> Value {
    json!(block.iter().map(|(name, value)| [text(name), text(value)]).collect::<Vec<_>>())
}

/// Returns a text with one character for each byte.
fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}
