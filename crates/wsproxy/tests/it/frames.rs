//! Frames that break the protocol or mean harm, and frames that are compressed.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use crate::support::{
    eventually,
    gateway::TestInstance,
    raw::{Raw, frame},
};

async fn echo(instance: &TestInstance, headers: &str) -> Raw {
    let mut raw = Raw::connect(instance.address()).await;
    raw.upgrade("/echo", headers).await;
    raw
}

/// Sends bytes that must end the connection, and only this one.
async fn assert_closes(instance: &TestInstance, bytes: &[u8], headers: &str, code: u16) {
    let mut raw = echo(instance, headers).await;
    raw.write(bytes).await;
    assert_eq!(raw.close_frame().await.0, code, "{bytes:02x?}");
    // The gateway has said all it will say, and ends the stream without a reset.
    assert_eq!(raw.next_frame().await, None);
}

#[tokio::test]
async fn frames_that_the_protocol_forbids_close_with_1002() {
    let instance = TestInstance::with(|_| ()).await;
    let mut other = instance.echo().await;
    let text = frame(0x81, b"x");
    let bad: Vec<Vec<u8>> = vec![
        vec![0x81, 1, b'x'], // not masked
        frame(0xc1, b"x"),   // RSV1 without compression
        frame(0xa1, b"x"),   // RSV2
        frame(0x91, b"x"),   // RSV3
        frame(0x83, b""),    // reserved data opcode
        frame(0x87, b""),
        frame(0x8b, b""), // reserved control opcode
        frame(0x8f, b""),
        frame(0x89, &[0; 126]), // control frame too long
        frame(0x88, &[3; 126]),
        frame(0x09, b""),  // control frame in fragments
        frame(0x80, b"x"), // continuation of nothing
        frame(0x00, b"x"),
        [frame(0x01, b"x"), text.clone()].concat(), // a message inside another
        vec![0x82, 0xfe, 0, 1, 0, 0, 0, 0, b'x'],   // length longer than needed
        vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, b'x'],
        vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, b'x'],
        frame(0x88, b"x"),                    // half a close code
        frame(0x88, &1005_u16.to_be_bytes()), // codes that are never sent
        frame(0x88, &999_u16.to_be_bytes()),
        frame(0x88, &5000_u16.to_be_bytes()),
    ];
    for bytes in &bad {
        assert_closes(&instance, bytes, "", 1002).await;
    }
    let count = bad.len() as f64;
    eventually("all are counted", || instance.ended("echo", "protocol_error") == count).await;
    other.send("undisturbed").await;
    assert_eq!(other.text().await, "undisturbed");
}

#[tokio::test]
async fn text_that_is_not_utf8_closes_with_1007_at_once() {
    let instance = TestInstance::with(|_| ()).await;
    for bytes in [
        frame(0x81, b"\xff"),
        frame(0x81, b"\xc0\xaf"),
        frame(0x81, b"\xed\xa0\x80"),
        frame(0x81, b"\xf4\x90\x80\x80"),
        frame(0x81, b"\xe2\x82"),
        // The first fragment already cannot become text.
        frame(0x01, b"\xf8"),
        [frame(0x01, b"\xe2\x82"), frame(0x80, b"x")].concat(),
        frame(0x88, b"\x03\xe8\xff"),
    ] {
        assert_closes(&instance, &bytes, "", 1007).await;
    }
    eventually("all are counted", || instance.ended("echo", "not_utf8") == 8.0).await;
    // A character may be cut by a fragment, and binary may hold anything.
    let mut raw = echo(&instance, "").await;
    raw.write(&[frame(0x01, b"\xe2\x82"), frame(0x80, b"\xac")].concat()).await;
    assert_eq!(raw.text().await, "\u{20ac}");
    raw.frame(0x82, b"\xff").await;
    assert_eq!(raw.next_frame().await.unwrap().payload, b"\xff");
}

#[tokio::test]
async fn control_frames_between_fragments_are_answered() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = echo(&instance, "").await;
    raw.frame(0x01, b"a").await;
    raw.frame(0x89, &[7; 125]).await;
    let pong = raw.next_frame().await.unwrap();
    assert_eq!((pong.first, pong.payload), (0x8a, vec![7; 125]));
    raw.frame(0x8a, b"unasked").await;
    raw.frame(0x80, b"b").await;
    assert_eq!(raw.text().await, "ab");
    raw.frame(0x88, b"\x0f\xa0bye").await;
    assert_eq!(raw.close_frame().await.0, 4000);
    assert_eq!(raw.next_frame().await, None);
    let mut raw = echo(&instance, "").await;
    raw.frame(0x88, b"").await;
    assert_eq!(raw.next_frame().await.unwrap().first, 0x88);
    assert_eq!(raw.next_frame().await, None);
    eventually("both are counted", || instance.ended("echo", "normal") == 2.0).await;
    instance.wait_empty().await;
}

/// A message as RFC 7692 section 7.2.1 wants it, compressed by another implementation's rules.
fn deflate(payload: &[u8]) -> Vec<u8> {
    let mut compress = Compress::new(Compression::best(), false);
    let mut out = Vec::with_capacity(payload.len() / 100 + 4096);
    compress.compress_vec(payload, &mut out, FlushCompress::Sync).unwrap();
    assert_eq!(compress.total_in(), payload.len() as u64);
    out.truncate(out.len() - 4);
    out
}

/// Inflates with a window of `bits`: a distance beyond it is an error.
fn inflate(payload: &[u8], bits: u8) -> Vec<u8> {
    let mut inflater = Decompress::new_with_window_bits(false, bits);
    let mut out = Vec::with_capacity(1 << 20);
    let input = [payload, &[0, 0, 0xff, 0xff]].concat();
    inflater.decompress_vec(&input, &mut out, FlushDecompress::Sync).unwrap();
    assert_eq!(inflater.total_in(), input.len() as u64);
    out
}

#[tokio::test]
async fn a_bomb_is_stopped_while_it_inflates() {
    let instance = TestInstance::with(|_| ()).await;
    let mut other = instance.echo().await;
    let bomb = deflate(&vec![0; 100 << 20]);
    assert!(bomb.len() < 200_000);
    assert_closes(&instance, &frame(0xc2, &bomb), DEFLATE, 1009).await;
    // The same in fragments.
    let (head, tail) = bomb.split_at(1000);
    let fragments = [frame(0x42, head), frame(0x80, tail)].concat();
    assert_closes(&instance, &fragments, DEFLATE, 1009).await;
    eventually("both are counted", || instance.ended("echo", "too_big") == 2.0).await;
    assert_closes(&instance, &frame(0xc1, &[0xff; 100]), DEFLATE, 1007).await;
    assert_closes(&instance, &frame(0xc1, &deflate(b"\xff")), DEFLATE, 1007).await;
    // RSV1 on a continuation, and on a control frame.
    let fragments = [frame(0x41, &[]), frame(0xc0, &[])].concat();
    assert_closes(&instance, &fragments, DEFLATE, 1002).await;
    assert_closes(&instance, &frame(0xc9, b""), DEFLATE, 1002).await;
    assert_eq!(instance.ended("echo", "bad_deflate"), 1.0);
    other.send("undisturbed").await;
    assert_eq!(other.text().await, "undisturbed");
}

#[tokio::test]
async fn compression_is_answered_with_what_was_asked_and_no_more() {
    let instance = TestInstance::with(|_| ()).await;
    for (offer, answer) in [
        ("permessage-deflate", Some("")),
        ("permessage-deflate; client_max_window_bits", Some("")),
        ("permessage-deflate; server_max_window_bits=10", Some("; server_max_window_bits=10")),
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=16, x", None),
        ("x-webkit-deflate-frame", None),
    ] {
        let mut raw = Raw::connect(instance.address()).await;
        let response =
            raw.upgrade("/echo", &format!("Sec-WebSocket-Extensions: {offer}\r\n")).await;
        let base = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        let expected = answer.map(|more| format!("{base}{more}"));
        assert_eq!(response.headers.get("sec-websocket-extensions"), expected.as_ref(), "{offer}");
    }
    let instance = TestInstance::with(|config| config.compression.enabled = false).await;
    let mut raw = Raw::connect(instance.address()).await;
    let response = raw.upgrade("/echo", DEFLATE).await;
    assert!(!response.headers.contains_key("sec-websocket-extensions"));
}

#[tokio::test]
async fn messages_are_compressed_from_the_threshold_on() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = echo(&instance, DEFLATE).await;
    raw.frame(0x81, &[b'a'; 1023]).await;
    assert_eq!(raw.text().await.len(), 1023);
    raw.frame(0x81, &[b'a'; 1024]).await;
    let reply = raw.next_frame().await.unwrap();
    assert_eq!(reply.first, 0xc1);
    assert!(reply.payload.len() < 100);
    assert_eq!(inflate(&reply.payload, 15), [b'a'; 1024]);
    // Small messages may come compressed, and more than once: no context is kept.
    for _ in 0..3 {
        raw.frame(0xc1, &deflate(b"abcabcabcabc")).await;
        assert_eq!(raw.text().await, "abcabcabcabc");
    }
}

/// A payload whose repetitions are further apart than a small window.
fn far_repetition() -> Vec<u8> {
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b'a' + (state >> 28) as u8
    };
    let block: Vec<u8> = (0..20_000).map(|_| noise()).collect();
    [&block[..], &block].concat()
}

#[tokio::test]
async fn a_fan_out_fits_every_compression_window() {
    let instance = TestInstance::with(|_| ()).await;
    let payload = far_repetition();
    let mut clients = Vec::new();
    for bits in [None, Some(15), Some(9), Some(12), Some(9), None, Some(15)] {
        let mut raw = Raw::connect(instance.address()).await;
        let token = instance.token("s").await;
        let extensions = bits.map_or_else(String::new, |bits| {
            let offer = format!("permessage-deflate; server_max_window_bits={bits}");
            format!("Sec-WebSocket-Extensions: {offer}\r\n")
        });
        let headers = format!("Authorization: Bearer {token}\r\n{extensions}");
        raw.upgrade("/agent/ws/s", &headers).await;
        clients.push((bits, raw));
    }
    for _ in 0..3 {
        instance.publish("session:s:down", payload.clone());
        for (bits, raw) in &mut clients {
            let frame = raw.next_frame().await.unwrap();
            match bits {
                None => assert_eq!((frame.first, frame.payload == payload), (0x81, true)),
                Some(bits) => {
                    assert_eq!(frame.first, 0xc1);
                    assert!(inflate(&frame.payload, *bits) == payload, "window of {bits} bits");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_client_may_keep_its_context_where_that_is_allowed() {
    let instance = TestInstance::with(|config| {
        config.compression.client_context_takeover = true;
    })
    .await;
    let mut raw = Raw::connect(instance.address()).await;
    let answer = raw.upgrade("/echo", DEFLATE).await;
    assert_eq!(
        answer.header("sec-websocket-extensions"),
        "permessage-deflate; server_no_context_takeover"
    );
    let mut compress = Compress::new(Compression::best(), false);
    let mut sizes = Vec::new();
    for _ in 0..3 {
        let text = b"the same words again, and again, and again: 0123456789";
        let mut payload = Vec::with_capacity(4096);
        compress.compress_vec(text, &mut payload, FlushCompress::Sync).unwrap();
        payload.truncate(payload.len() - 4);
        sizes.push(payload.len());
        raw.frame(0xc1, &payload).await;
        assert_eq!(raw.text().await.as_bytes(), text);
    }
    assert!(sizes[1] < sizes[0] / 2, "the second needs the first: {sizes:?}");
}

/// Whatever strangers write, before or after `101`: the instance serves on, and nothing is left.
#[tokio::test]
async fn noise_harms_nobody() {
    let instance = TestInstance::with(|_| ()).await;
    let mut other = instance.echo().await;
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for n in 0..200 {
        let mut raw = Raw::connect(instance.address()).await;
        if n % 4 != 0 {
            raw.upgrade("/echo", if n % 2 == 0 { DEFLATE } else { "" }).await;
        }
        let mut noise: Vec<u8> = (0..random() % 3000).map(|_| random() as u8).collect();
        if n % 3 == 0 {
            // The beginning of something sensible.
            noise = [frame(0x01 | (random() as u8 & 0xc0), &noise), noise].concat();
        }
        // It may be refused at any byte.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut raw.socket, &noise).await;
        raw.reset();
    }
    other.send("undisturbed").await;
    assert_eq!(other.text().await, "undisturbed");
    other.close().await;
    instance.wait_empty().await;
    eventually("no task is left", || instance.gateway().tasks.len() == 1).await;
}

const DEFLATE: &str = "Sec-WebSocket-Extensions: permessage-deflate\r\n";
