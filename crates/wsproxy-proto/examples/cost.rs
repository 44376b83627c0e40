//! Cost of the protocol core per message, without IO: `cargo run --release --example cost`.

#![expect(clippy::disallowed_methods, reason = "this measures time, and is no part of the core")]

use std::hint::black_box;
use std::time::Instant;

use wsproxy_proto::json;
use wsproxy_proto::rooms::{check, stamp, text};
use wsproxy_proto::ws::deflate::{Deflaters, Inflaters, Params};
use wsproxy_proto::ws::frame::{Opcode, Role, client_frame, server_frame};
use wsproxy_proto::ws::receiver::{Input, Limits, Receiver};

fn main() {
    println!("receiver: {} bytes, idle heap 0", size_of::<Receiver>());
    for length in [100, 1000, 16_000, 100_000] {
        let text = "a".repeat(length);
        receive(
            &format!("receive text {length} B"),
            &client_frame(Opcode::Text, text.as_bytes(), false, [1, 2, 3, 4]),
        );
        measure(&format!("build server frame {length} B"), || {
            black_box(server_frame(Opcode::Text, black_box(text.as_bytes()), false));
        });
    }
    let small = json_text(1);
    let large = json_text(28);
    for text in [&small, &large] {
        let length = text.len();
        measure(&format!("validate JSON {length} B"), || {
            assert!(json::validate(black_box(text.as_bytes()), 64).is_ok());
        });
        measure(&format!("serde_json IgnoredAny {length} B"), || {
            let text = black_box(text.as_bytes());
            let ignored = serde_json::from_slice::<serde::de::IgnoredAny>(text);
            assert!(ignored.is_ok());
        });
        let mut deflaters = Deflaters::new(1);
        measure(&format!("compress {length} B"), || {
            black_box(deflaters.compress(15, black_box(text.as_bytes())));
        });
        if let Some(payload) = deflaters.compress(15, text.as_bytes()) {
            println!("  {length} B become {} B", payload.len());
            receive(
                &format!("receive compressed {length} B"),
                &client_frame(Opcode::Text, payload, true, [1, 2, 3, 4]),
            );
        }
    }
    rooms();
}

/// Measures a position of a room: in the smallest envelope, and in one with a message id, a time and a type.
fn rooms() {
    let slim =
        br#"{"positionUpdate":{"entityId":"avatar-0190-0001","position":{"x":1.5,"y":2.5,"z":-3.5},
        "rotation":{"x":0.1,"y":0.2,"z":0.3,"w":0.9},"sequenceNumber":70000}}"#;
    let full = br#"{"messageId":"6fa459ea-ee8a-3ca4-894e-db77e160355e","timestamp":"1732190000000","type":"POSITION_UPDATE",
        "positionUpdate":{"entityId":"avatar-0190-0001","position":{"x":1.5,"y":2.5,"z":-3.5},
        "rotation":{"x":0.1,"y":0.2,"z":0.3,"w":0.9},"sequenceNumber":70000}}"#;
    for json in [&slim[..], full] {
        let Ok(envelope) = text::to_binary(json) else { return };
        let length = envelope.len();
        let mut out = Vec::with_capacity(256);
        measure(&format!("check position {length} B"), || {
            assert!(check::check(black_box(&envelope), "client-1").is_ok());
        });
        measure(&format!("check and stamp position {length} B"), || {
            out.clear();
            let envelope = black_box(&envelope);
            if let Ok(checked) = check::check(envelope, "client-1") {
                stamp::stamp(envelope, checked.stamp, "client-1", None, &mut out);
            }
            black_box(&out);
        });
        measure(&format!("position to binary {length} B"), || {
            assert!(text::to_binary(black_box(json)).is_ok());
        });
        measure(&format!("position to text {length} B"), || {
            assert!(text::to_text(black_box(&envelope)).is_some());
        });
    }
}

/// Makes a JSON array of chat messages.
fn json_text(items: usize) -> String {
    let items: Vec<String> = (0..items)
        .map(|i| format!(
            r#"{{"type":"token","event_id":"0190-{i:06}","timestamp":1760000000.25,"data":{{"text":"Grüße, \"world\"\n","index":{i},"done":false,"tags":["a","b"]}}}}"#
        ))
        .collect();
    format!("[{}]", items.join(","))
}

/// Receives the frame over and over, in reads of 16 KiB.
fn receive(what: &str, frame: &[u8]) {
    const READ: usize = 16 << 10;
    let messages = (4 << 20) / frame.len();
    let stream = frame.repeat(messages);
    let mut buffer = vec![0; READ];
    let mut inflaters = Inflaters::default();
    let mut best = f64::MAX;
    for _ in 0..15 {
        let mut receiver = Receiver::new(Role::Server, LIMITS, Some(PARAMS));
        let mut heard = 0;
        let start = Instant::now();
        for chunk in stream.chunks(READ) {
            buffer[..chunk.len()].copy_from_slice(chunk);
            let mut input = Input::new(&mut buffer[..chunk.len()]);
            while let Ok(Some(event)) = receiver.next(&mut input, &mut inflaters) {
                black_box(event);
                heard += 1;
            }
        }
        best = best.min(start.elapsed().as_nanos() as f64 / messages as f64);
        assert_eq!(heard, messages);
    }
    println!("{what:32} {best:10.1} ns");
}

fn measure(what: &str, mut run: impl FnMut()) {
    let mut best = f64::MAX;
    for _ in 0..15 {
        let start = Instant::now();
        let times = 2000;
        (0..times).for_each(|_| run());
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(times));
    }
    println!("{what:32} {best:10.1} ns");
}

const LIMITS: Limits = Limits { message_bytes_max: 1 << 20, fragments_max: 64 };

const PARAMS: Params = Params {
    server_no_context_takeover: true,
    client_no_context_takeover: true,
    server_max_window_bits: 15,
    client_max_window_bits: 15,
};
