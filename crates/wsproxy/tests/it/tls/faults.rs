//! TLS under attack, and while its files change.

use std::time::Duration;

use super::*;

#[tokio::test]
async fn half_done_handshakes_keep_no_client_out() {
    let encrypted = Encrypted::with(|config| {
        config.limits.max_connections = 5000;
        config.server.header_timeout = Duration::from_secs(120);
    })
    .await;
    let instance = &encrypted.instance;
    let tunnel = encrypted.tunnel().await;
    let mut before = session(instance, &tunnel, "before").await;
    let mut half_done = Vec::new();
    for n in 0..2000 {
        let mut raw = Raw::connect(instance.address()).await;
        // Nothing, the first byte, or the head of a long record.
        raw.write(&[22, 3, 1, 0x3f, 0, 1][..n % 7]).await;
        half_done.push(raw);
        if n % 200 == 199 {
            let mut other = session(instance, &tunnel, "other").await;
            instance.assert_serves(&mut other, "other").await;
            instance.assert_serves(&mut before, "before").await;
            other.close().await;
        }
    }
    // One address holds a quarter of the places: those who came before were closed.
    eventually("the oldest went", || encrypted.handshakes("displaced") >= 2000.0 - 256.0).await;
    drop(half_done);
    eventually("the rest left", || {
        encrypted.handshakes("displaced") + encrypted.handshakes("left") == 2000.0
    })
    .await;
    before.close().await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_ends() {
    let encrypted =
        Encrypted::with(|config| config.server.header_timeout = Duration::from_millis(300)).await;
    let instance = &encrypted.instance;
    let mut slow = Raw::connect(instance.address()).await;
    slow.write(&[22, 3, 1]).await;
    soon("the end of the slow one", slow.end()).await;
    assert_eq!(encrypted.handshakes("timeout"), 1.0);
    // After the handshake the request has its own time.
    let mut silent = connect(instance.address(), encrypted.made.trust()).await.unwrap();
    assert_eq!(soon("the end", silent.read(&mut [0; 9])).await.unwrap_or(0), 0);
    let slow = || instance.metric("wsproxy_errors_total{kind=\"slow_request\"}");
    eventually("it is counted", || slow() == 1.0).await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_bad_record_ends_its_connection_alone() {
    let encrypted = Encrypted::with(|_| {}).await;
    let instance = &encrypted.instance;
    let tunnel = encrypted.tunnel().await;
    let mut other = session(instance, &tunnel, "other").await;
    // A record that no key of ours made, one that is too long, one of an unknown kind, and a second hello.
    let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    for bad in [
        &forged[..],
        &[23, 3, 3, 0xff, 0xff, 1],
        &[99, 3, 3, 0, 1, 0],
        &[22, 3, 3, 0, 4, 1, 0, 0, 0],
    ] {
        let trust = encrypted.made.trust();
        let mut tls = connect(instance.address(), trust).await.unwrap();
        tls.write_all(format!("GET /echo HTTP/1.1\r\n{UPGRADE}\r\n").as_bytes()).await.unwrap();
        let mut head = [0; 12];
        tls.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 101");
        let (mut socket, _) = tls.into_inner();
        socket.write_all(bad).await.unwrap();
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = soon("the end", socket.read_to_end(&mut rest)).await;
        instance.assert_serves(&mut other, "other").await;
    }
    eventually("all of them are gone", || instance.ended("echo", "gone") == 4.0).await;
    // A hello that is none.
    let mut raw = Raw::connect(instance.address()).await;
    raw.write(&[22, 3, 1, 0, 4, 9, 9, 9, 9]).await;
    soon("the end of the stream", raw.end()).await;
    assert_eq!(encrypted.handshakes("refused"), 1.0);
    instance.assert_serves(&mut other, "other").await;
    other.close().await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_stalled_client_is_cut_at_the_bound_of_plain_ones() {
    let encrypted = Encrypted::with(|config| {
        config.limits.send_buffer_bytes = SEND_BUFFER;
        config.compression.enabled = false;
    })
    .await;
    let instance = &encrypted.instance;
    let tunnel = encrypted.tunnel().await;
    let mut other = session(instance, &tunnel, "s").await;
    let mut slow = connect(instance.address(), encrypted.made.trust()).await.unwrap();
    let token = instance.token("s").await;
    let request = format!("GET /agent/ws/s?token={token} HTTP/1.1\r\n{UPGRADE}\r\n");
    slow.write_all(request.as_bytes()).await.unwrap();
    eventually("both are connected", || instance.gateway().seats.taken() == 2).await;
    let mut sent = 0;
    while !instance.gateway().runtime.links().iter().any(|link| link.is_closing()) {
        assert!(sent < 10_000, "it is never closed");
        // Sizes that fit no record.
        let payload = format!("{sent} {}", "x".repeat(11_111 + sent % 7));
        instance.publish("session:s:down", payload.clone());
        assert_eq!(other.text().await, payload);
        sent += 1;
        let used = instance.gateway().runtime.budget.used();
        assert!(used <= SEND_BUFFER + 2 * payload.len() + RECORD, "{used}");
    }
    // What the client finds when it reads again: whole messages in their order, then the reason.
    let mut seen = Vec::new();
    let end = [&[0x88, 15][..], &1008_u16.to_be_bytes(), b"slow consumer"].concat();
    while !seen.ends_with(&end) {
        let mut buffer = [0; 8192];
        let count = soon("bytes", slow.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "cut off after {} bytes", seen.len());
        seen.extend_from_slice(&buffer[..count]);
    }
    let (_, used) = Response::parse(&seen).unwrap();
    let mut frames = &seen[used..seen.len() - end.len()];
    let mut received = 0;
    while let [0x81, 126, high, low, rest @ ..] = frames {
        let (payload, rest) = rest.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        assert!(payload.starts_with(format!("{received} xxx").as_bytes()), "{received}");
        (frames, received) = (rest, received + 1);
    }
    assert!(frames.is_empty() && received > 0 && received < sent);
    slow.write_all(&frame(0x88, &1008_u16.to_be_bytes())).await.unwrap();
    assert_eq!(soon("the end", slow.read(&mut [0; 9])).await.unwrap(), 0, "the end is told");
    instance.wait_ended("sessions", "slow_consumer").await;
    instance.assert_serves(&mut other, "s").await;
    other.close().await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_stalled_event_stream_keeps_its_order() {
    let encrypted = Encrypted::with(|config| {
        config.limits.send_buffer_bytes = 4 << 20;
        config.sse.compression = false;
    })
    .await;
    let instance = &encrypted.instance;
    let mut slow = connect(instance.address(), encrypted.made.trust()).await.unwrap();
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n");
    slow.write_all(request.as_bytes()).await.unwrap();
    let blocked = "wsproxy_backpressure_events_total{endpoint=\"sessions\"}";
    let (mut sent, mut seen) = (0, vec![0; 12]);
    slow.read_exact(&mut seen).await.unwrap();
    assert_eq!(seen, b"HTTP/1.1 200");
    for round in 1..=5 {
        // Many sizes, so that the kernel stops in every part of a chunk.
        let stalls = instance.metric(blocked);
        while instance.metric(blocked) == stalls {
            instance
                .publish("session:s:down", format!("<{sent} {}>", "x".repeat(sent * 37 % 9000)));
            sent += 1;
            tokio::task::yield_now().await;
            assert!(sent < 10_000, "it never stalls");
        }
        let used = || instance.gateway().runtime.budget.used();
        eventually("what waits is counted", || used() > 0).await;
        // The client reads everything before the next round.
        let (last, mut looked_at) = (format!("<{} ", sent - 1), seen.len());
        while !seen[looked_at..].windows(last.len()).any(|part| part == last.as_bytes()) {
            looked_at = seen.len().saturating_sub(last.len()).max(looked_at);
            let mut buffer = vec![0; 64 * 1024];
            let count = soon("bytes", slow.read(&mut buffer)).await.unwrap();
            assert!(count > 0, "cut off in round {round}");
            seen.extend_from_slice(&buffer[..count]);
        }
    }
    eventually("nothing waits", || instance.gateway().runtime.budget.used() == 0).await;
    instance.publish("session:s:control", r#"{"op":"close","code":4321}"#);
    soon("the end", slow.read_to_end(&mut seen)).await.expect("the end is told");
    let text = String::from_utf8(seen).unwrap();
    let mut rest = &*text;
    for n in 0..sent {
        let message = format!("<{n} {}>", "x".repeat(n * 37 % 9000));
        let at = rest.find(&message).unwrap_or_else(|| panic!("{n} is missing"));
        assert!(!rest[..at].contains('<'), "before {n}");
        rest = &rest[at + message.len()..];
    }
    assert!(rest.contains("4321") && rest.ends_with("0\r\n\r\n"));
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_replaced_certificate_is_shown_and_a_bad_one_is_not() {
    let encrypted = Encrypted::with(|_| {}).await;
    let Encrypted { instance, files, made } = &encrypted;
    let (old, new) = (made.trust(), Made::new());
    let tunnel = encrypted.tunnel().await;
    let mut open = session(instance, &tunnel, "s").await;
    let troubles = || instance.metric("wsproxy_errors_total{kind=\"tls_files\"}");
    let half = &new.certificate[..new.certificate.len() / 2];
    for (count, (certificate, key)) in
        [(half, &*new.key), (&*new.certificate, &*made.key), ("", "")].into_iter().enumerate()
    {
        files.write(certificate, key);
        // Load: connections come all the time, and each is served with the old pair.
        while troubles() < (count + 1) as f64 {
            connect(instance.address(), Arc::clone(&old)).await.unwrap();
            instance.assert_serves(&mut open, "s").await;
        }
    }
    files.write(&new.certificate, &new.key);
    let trust = new.trust();
    let mut shown = false;
    soon("the new one is shown", async {
        while !shown {
            shown = connect(instance.address(), Arc::clone(&trust)).await.is_ok();
            // Each connection gets one pair or the other.
            let is_old = connect(instance.address(), made.trust()).await.is_ok();
            assert!(shown != is_old || !shown, "neither pair, or both");
        }
    })
    .await;
    assert_eq!(troubles(), 3.0, "a pair that is whole is no trouble");
    instance.assert_serves(&mut open, "s").await;
    let mut fresh = session(instance, &Tunnel::to(instance.address(), trust).await, "t").await;
    instance.assert_serves(&mut fresh, "t").await;
    fresh.close().await;
    open.close().await;
    instance.wait_empty().await;
}

const SEND_BUFFER: usize = 256 * 1024;

/// Bytes of a record that may wait beside the send buffer.
const RECORD: usize = 16 * 1024;
