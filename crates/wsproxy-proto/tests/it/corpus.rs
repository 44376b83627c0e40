//! Seeds of the fuzz targets, and inputs that once failed, as plain tests.

use std::fs;
use std::path::Path;

use crate::bodies;

fn run(target: &str, body: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        body(&bytes);
        // Every prefix is an input, too.
        (0..bytes.len().min(300)).for_each(|end| body(&bytes[..end]));
        inputs += 1;
    }
    assert!(inputs > 0, "no seeds for {target}");
}

#[test]
fn receiver_seeds() {
    run("receiver", bodies::receiver);
}

#[test]
fn deflate_seeds() {
    run("deflate", bodies::deflate);
}

#[test]
fn handshake_seeds() {
    run("handshake", bodies::handshake);
}

#[test]
fn json_seeds() {
    run("json", bodies::json);
}

#[test]
fn history_seeds() {
    run("history", bodies::history);
}

#[test]
fn agent_command_seeds() {
    run("agent_command", bodies::agent_command);
}

#[test]
fn agent_message_seeds() {
    run("agent_message", bodies::agent_message);
}

#[test]
fn room_envelope_seeds() {
    run("room_envelope", bodies::room_envelope);
}

#[test]
fn room_text_seeds() {
    run("room_text", bodies::room_text);
}

#[test]
fn proxy_header_seeds() {
    run("proxy_header", bodies::proxy_header);
}

#[test]
fn tunnel_frames_seeds() {
    run("tunnel_frames", bodies::tunnel_frames);
}

#[test]
fn tunnel_lane_seeds() {
    run("tunnel_lane", bodies::tunnel_lane);
}
