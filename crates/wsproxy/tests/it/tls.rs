//! Listeners that speak TLS: every endpoint over it, the end of connections, and the other ports.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use rustls::version::{TLS12, TLS13};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    agents::stage::{Stage, TestAgent, call_with},
    rooms::room_client::{self, RoomClient},
    support::{
        client::Client,
        eventually,
        gateway::{API_KEY, Backend, TestInstance, bearer},
        http::{self, Response},
        raw::{Raw, UPGRADE, frame},
        soon,
        sse::Events,
        tls::{Files, Made, Tunnel, connect},
    },
};

mod faults;

/// An instance whose clients' port speaks TLS, with the files of its certificate.
struct Encrypted {
    instance: TestInstance,
    files: Files,
    made: Made,
}

impl Encrypted {
    async fn with(change: impl FnOnce(&mut wsproxy::config::Config)) -> Self {
        let made = Made::new();
        let files = Files::new(&made);
        let instance = TestInstance::with(|config| {
            files.put_into(config);
            config.limits.messages_per_second = 0;
            change(config);
        })
        .await;
        Self { instance, files, made }
    }

    async fn tunnel(&self) -> Tunnel {
        Tunnel::to(self.instance.address(), self.made.trust()).await
    }

    fn handshakes(&self, outcome: &str) -> f64 {
        handshakes(&self.instance, outcome)
    }
}

fn handshakes(instance: &TestInstance, outcome: &str) -> f64 {
    instance.metric(&format!("wsproxy_tls_handshakes_total{{outcome=\"{outcome}\"}}"))
}

async fn session(instance: &TestInstance, tunnel: &Tunnel, session: &str) -> Client {
    let token = instance.token(session).await;
    let path = format!("/agent/ws/{session}");
    Client::connect(tunnel.address, &path, &bearer(&token)).await.unwrap()
}

#[tokio::test]
async fn sessions_and_the_echo_work_over_both_versions() {
    let encrypted = Encrypted::with(|_| {}).await;
    let instance = &encrypted.instance;
    for version in [&TLS12, &TLS13] {
        let trust = encrypted.made.client(&[version]);
        let tunnel = Tunnel::to(instance.address(), trust).await;
        let mut client = session(instance, &tunnel, "s").await;
        instance.assert_serves(&mut client, "s").await;
        client.close().await;
        let mut echo = Client::connect(tunnel.address, "/echo", &[]).await.unwrap();
        for size in [1, 125, 16_383, 16_384, 16_385, 300_000] {
            // Random bytes do not shrink where the client compresses.
            let payload: Vec<u8> = (0..size).map(|_| rand::random()).collect();
            echo.send_message(Message::binary(payload.clone())).await;
            assert!(echo.next().await == Message::binary(payload), "{size} bytes");
        }
        echo.close().await;
        eventually("the ends are seen", || instance.gateway().seats.taken() == 0).await;
        assert_eq!(tunnel.cut_off.load(SeqCst), 0, "each end is told");
    }
    // The second connection of each version came with the ticket of the first.
    assert_eq!((encrypted.handshakes("full"), encrypted.handshakes("resumed")), (2.0, 2.0));
    instance.wait_empty().await;
}

#[tokio::test]
async fn an_event_stream_keeps_its_order_over_tls() {
    let encrypted = Encrypted::with(|_| {}).await;
    let instance = &encrypted.instance;
    let tunnel = encrypted.tunnel().await;
    for headers in [&[][..], &[("accept-encoding", "gzip")]] {
        let path = format!("/agent/ws/s?token={}", instance.token("s").await);
        let mut events = Events::open(tunnel.address, &path, headers).await.unwrap();
        for n in 0..200 {
            instance.publish("session:s:down", format!("{n} {}", "x".repeat(n * 97)));
        }
        for n in 0..200 {
            assert_eq!(events.data().await, format!("{n} {}", "x".repeat(n * 97)));
        }
        instance.publish("session:s:control", r#"{"op":"close","code":4321}"#);
        assert_eq!(events.closed().await.0, 4321);
    }
    eventually("both ends were seen", || instance.gateway().seats.taken() == 0).await;
    assert_eq!(tunnel.cut_off.load(SeqCst), 0, "each end is told");
    instance.wait_empty().await;
}

#[tokio::test]
async fn requests_follow_each_other_on_one_encrypted_connection() {
    let encrypted = Encrypted::with(|_| {}).await;
    let tunnel = encrypted.tunnel().await;
    let mut raw = Raw::connect(tunnel.address).await;
    let key = format!("Authorization: Bearer {API_KEY}");
    for n in 0..20 {
        let body = "x".repeat(n * 3000);
        let request = format!(
            "POST /api/v1/sessions/s/messages HTTP/1.1\r\nHost: x\r\n{key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        raw.write(request.as_bytes()).await;
        assert_eq!(raw.response().await.status, 200);
        raw.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(raw.response().await.body.ends_with("# EOF\n"));
    }
    assert_eq!(encrypted.handshakes("full"), 1.0);
}

#[tokio::test]
async fn agents_and_rooms_work_over_tls() {
    let made = Made::new();
    let files = Files::new(&made);
    let stage = Stage::with(Backend::Memory, |config| {
        files.put_into(config);
        config.admin.port = Some(0);
    })
    .await;
    let tunnel = Tunnel::to(stage.caller().address(), made.trust()).await;
    let secret = stage.add_user("ann").await;
    let mut agent = TestAgent::connect_to(tunnel.address, "ann", &secret, "").await;
    let body = json!({ "tool": "say", "params": { "word": "hello" } });
    let (answer, _) = tokio::join!(call_with(stage.caller(), "ann", &[], &body), agent.echo());
    assert_eq!(answer.json()["result"]["word"], "hello", "{answer:?}");

    let rooms = room_client::instance_with(&Backend::Memory, |config| files.put_into(config)).await;
    let tunnel = Tunnel::to(rooms.address(), made.trust()).await;
    let hello = json!({});
    let mut a = RoomClient::join_at(tunnel.address, ("lobby", "a", "a"), hello.clone()).await;
    let mut b = RoomClient::join_at(tunnel.address, ("lobby", "b", "b"), hello).await;
    assert_eq!(a.told().await, "join b");
    b.say("hi").await;
    assert_eq!(a.told().await, "b: hi");
}

#[tokio::test]
async fn a_client_without_tls_is_told_so() {
    let encrypted = Encrypted::with(|_| {}).await;
    let address = encrypted.instance.address();
    for (request, counted) in [
        ("GET /ready HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), 1.0),
        (format!("GET /echo HTTP/1.1\r\n{UPGRADE}\r\n"), 2.0),
    ] {
        let mut raw = Raw::connect(address).await;
        raw.write(request.as_bytes()).await;
        let answer = raw.response().await;
        answer.assert_refused(400, "tls_required");
        assert!(answer.body.contains("https://"));
        soon("the end of the stream", raw.end()).await;
        assert_eq!(encrypted.handshakes("not_tls"), counted);
    }
    // Bytes that are neither.
    let mut raw = Raw::connect(address).await;
    raw.write(b"\x80\x2e\x01\x00\x02 an old hello\r\n\r\n").await;
    assert_eq!(raw.response().await.status, 400);
    soon("the end of the stream", raw.end()).await;
    encrypted.instance.wait_empty().await;
}

#[tokio::test]
async fn tls_to_a_plain_port_fails_at_once() {
    let instance = TestInstance::with(|_| {}).await;
    let error = soon("an answer", connect(instance.address(), Made::new().trust())).await;
    let error = error.expect_err("there is no TLS");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "{error}");
    for greeting in [&[22][..], &[22, 3, 1, 2, 0, 1]] {
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(greeting).await;
        let answer = raw.response().await;
        answer.assert_refused(400, "bad_request");
        assert!(answer.body.contains("http://"), "{answer:?}");
        soon("the end of the stream", raw.end()).await;
    }
    let counted = |kind| instance.metric(&format!("wsproxy_errors_total{{kind=\"{kind}\"}}"));
    eventually("all are counted", || counted("tls_to_plain") == 3.0).await;
    assert_eq!(counted("bad_request"), 0.0);
    instance.wait_empty().await;
}

#[tokio::test]
async fn the_admin_port_encrypts_where_it_is_told_to() {
    for admin in [false, true] {
        let encrypted = Encrypted::with(|config| {
            config.admin.port = Some(0);
            config.tls.admin = admin;
        })
        .await;
        let instance = &encrypted.instance;
        let tunnel = Tunnel::to(instance.admin_address(), encrypted.made.trust()).await;
        let get = async |address| http::request(address, "GET", "/ready", &[], b"").await;
        let (plain, secret) = (instance.admin_address(), tunnel.address);
        if admin {
            get(plain).await.assert_refused(400, "tls_required");
            assert_eq!(get(secret).await.status, 200);
        } else {
            assert_eq!(get(plain).await.status, 200);
        }
        assert_eq!(get(encrypted.tunnel().await.address).await.status, 200);
    }
}

#[tokio::test]
async fn a_drain_closes_encrypted_connections_in_order() {
    let encrypted = Encrypted::with(|_| {}).await;
    let tunnel = encrypted.tunnel().await;
    let Encrypted { instance, files: _files, .. } = encrypted;
    let mut client = session(&instance, &tunnel, "s").await;
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    let mut events = Events::open(tunnel.address, &path, &[]).await.unwrap();
    let mut idle = Raw::connect(tunnel.address).await;
    idle.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(idle.response().await.status, 200);
    // Neither a client in the handshake nor a silent one holds up the end.
    let mut begun = Raw::connect(instance.address()).await;
    begun.write(&[22, 3, 1, 2, 0, 1]).await;
    let _silent = Raw::connect(instance.address()).await;
    for n in 0..50 {
        instance.publish("session:s:down", format!("{n}"));
    }
    let start = std::time::Instant::now();
    let drain = tokio::spawn(instance.drain());
    for n in 0..50 {
        assert_eq!(client.text().await, n.to_string());
        assert_eq!(events.data().await, n.to_string());
    }
    assert_eq!(client.closed().await.0, 1012);
    assert_eq!(events.closed().await.0, 1012);
    soon("the end of the idle one", idle.end()).await;
    drain.await.unwrap();
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    assert_eq!(tunnel.cut_off.load(SeqCst), 0, "each end is told");
}
