//! Requests that are no proper handshake: each gets an answer of its own, and no other client notices.

use std::time::Duration;

use crate::support::{
    eventually,
    gateway::TestInstance,
    http,
    raw::{Raw, UPGRADE},
};

/// Sends a whole request head and reads the answer.
async fn send(instance: &TestInstance, head: &str) -> http::Response {
    let mut raw = Raw::connect(instance.address()).await;
    raw.write(head.as_bytes()).await;
    raw.response().await
}

#[tokio::test]
async fn what_does_not_ask_for_an_upgrade_is_told_how_to() {
    let instance = TestInstance::with(|_| ()).await;
    for path in [PATH, "/echo"] {
        let response = http::request(instance.address(), "GET", path, &[], b"").await;
        response.assert_refused(426, "upgrade_required");
        assert_eq!(response.header("upgrade"), "websocket");
    }
    for version in ["12", "0", "x", "13, 8", ""] {
        let headers = UPGRADE.replace("Version: 13", &format!("Version: {version}"));
        let response = send(&instance, &format!("GET {PATH} HTTP/1.1\r\n{headers}\r\n")).await;
        response.assert_refused(426, "upgrade_required");
    }
    assert_eq!(instance.refusals("upgrade_required"), 6.0);
    instance.wait_empty().await;
}

#[tokio::test]
async fn keys_that_are_none_methods_bodies_and_old_http_are_refused() {
    let instance = TestInstance::with(|_| ()).await;
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for other in [
        "",
        "Sec-WebSocket-Key: \r\n",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ\r\n",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n",
        "Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!==\r\n",
        &key.repeat(2),
    ] {
        let headers = UPGRADE.replace(key, other);
        let response = send(&instance, &format!("GET {PATH} HTTP/1.1\r\n{headers}\r\n")).await;
        response.assert_refused(400, "bad_request");
    }
    let head = format!("GET {PATH} HTTP/1.1\r\n{UPGRADE}Content-Length: 2\r\n\r\n{{}}");
    send(&instance, &head).await.assert_refused(400, "bad_request");
    let head =
        format!("GET {PATH} HTTP/1.1\r\n{UPGRADE}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    send(&instance, &head).await.assert_refused(400, "bad_request");
    let head = format!("GET {PATH} HTTP/1.0\r\n{UPGRADE}\r\n");
    send(&instance, &head).await.assert_refused(426, "upgrade_required");
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let response = send(&instance, &format!("{method} {PATH} HTTP/1.1\r\n{UPGRADE}\r\n")).await;
        response.assert_refused(405, "method_not_allowed");
        assert_eq!(response.header("allow"), "GET");
    }
    assert_eq!(instance.refusals("bad_request"), 8.0);
    assert_eq!(instance.refusals("upgrade_required"), 1.0);
    assert_eq!(instance.refusals("method_not_allowed"), 4.0);
    instance.wait_empty().await;
}

#[tokio::test]
async fn ids_hold_safe_characters_only() {
    let instance = TestInstance::with(|_| ()).await;
    let long = "x".repeat(129);
    for bad in [
        "", "%20", "a%2Fb", "a:b", "a%3Ab", "%00", "%0d%0a", "%ff", "%C3%A4", "a*", "a%", "[a]",
        &long,
    ] {
        for path in [format!("/agent/ws/{bad}"), format!("/{bad}/ws/s")] {
            let response = instance.handshake(&path, &[("authorization", "Bearer x")]).await;
            response.assert_refused(400, "bad_id");
            assert!(!response.body.contains("\\u0000"), "{response:?}");
        }
    }
    assert_eq!(instance.refusals("bad_id"), 26.0);
    // A path may be written with more escapes than it needs.
    let token = instance.token("a-b.c~D@e+f=1").await;
    let mut client = instance.connect("%61-b.c~D%40e+f%3d1", &token).await.unwrap();
    instance.assert_serves(&mut client, "a-b.c~D@e+f=1").await;
    let id = "x".repeat(128);
    assert!(instance.connect(&id, &instance.token(&id).await).await.is_ok());
    for elsewhere in ["/agent/ws/s/", "/agent/ws", "/agent/wss/s", "//ws/s/x", "/a/b/ws/s"] {
        let response = instance.handshake(elsewhere, &[]).await;
        response.assert_refused(404, "not_found");
    }
}

#[tokio::test]
async fn heads_are_bounded_to_the_byte() {
    // Smaller and larger than the buffers of a connection.
    for limit in [2048, 100_000] {
        let instance = TestInstance::with(|config| config.server.header_bytes_max = limit).await;
        let head = |length: usize| {
            let start = "GET /ready HTTP/1.1\r\nHost: gateway\r\nX-Large: ";
            format!("{start}{}\r\n\r\n", "x".repeat(length - start.len() - 4))
        };
        assert_eq!(send(&instance, &head(limit)).await.status, 200, "{limit}");
        assert_eq!(send(&instance, &head(limit + 1)).await.status, 431, "{limit}");
        // A head without an end is refused as soon as it is too large.
        let endless = head(limit + 10);
        assert_eq!(send(&instance, &endless[..limit + 1]).await.status, 431, "{limit}");
    }
}

#[tokio::test]
async fn oversized_and_invalid_heads_are_refused_and_counted() {
    let instance = TestInstance::with(|config| config.server.header_bytes_max = 8192).await;
    let mut other = instance.client("other").await;
    let large = format!("GET {PATH} HTTP/1.1\r\n{UPGRADE}X-Large: {}\r\n\r\n", "x".repeat(20_000));
    assert_eq!(send(&instance, &large).await.status, 431);
    let many = format!("GET {PATH} HTTP/1.1\r\n{UPGRADE}{}\r\n", "X-Many: x\r\n".repeat(200));
    assert_eq!(send(&instance, &many).await.status, 431);
    for garbage in
        ["\x16\x03\x01\x02", "GET / HTTP/9.9\r\n\r\n", "GET\r\n\r\n", "a b c d e\r\n\r\n"]
    {
        let mut raw = Raw::connect(instance.address()).await;
        raw.write(garbage.as_bytes()).await;
        if garbage.starts_with('\x16') {
            raw.write(b"\r\n\r\n").await;
        }
        assert_eq!(raw.response().await.status, 400, "{garbage:?}");
        raw.end().await;
    }
    let counted = |kind| instance.metric(&format!("wsproxy_errors_total{{kind=\"{kind}\"}}"));
    eventually("they are counted", || counted("bad_request") == 5.0).await;
    eventually("TLS is counted apart", || counted("tls_to_plain") == 1.0).await;
    instance.assert_serves(&mut other, "other").await;
}

#[tokio::test]
async fn a_client_that_dawdles_over_its_head_is_closed() {
    let instance = TestInstance::with(|config| {
        config.server.header_timeout = Duration::from_millis(1500);
    })
    .await;
    let mut other = instance.client("other").await;
    let mut silent = Raw::connect(instance.address()).await;
    let mut slow = Raw::connect(instance.address()).await;
    slow.write(format!("GET {PATH} HTTP/1.1\r\nHost:").as_bytes()).await;
    // A byte now and then does not extend its time.
    let dripping = async {
        while slow.socket.write_one().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    crate::support::soon("the end of the dripping", dripping).await;
    silent.end().await;
    let counted = || instance.metric("wsproxy_errors_total{kind=\"slow_request\"}");
    eventually("both are counted", || counted() == 2.0).await;
    instance.assert_serves(&mut other, "other").await;
}

/// One byte, as long as the peer takes it.
trait WriteOne {
    async fn write_one(&mut self) -> bool;
}

impl WriteOne for tokio::net::TcpStream {
    async fn write_one(&mut self) -> bool {
        tokio::io::AsyncWriteExt::write_all(self, b"x").await.is_ok()
    }
}

#[tokio::test]
async fn bytes_right_behind_the_handshake_belong_to_the_connection() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = Raw::connect(instance.address()).await;
    let head = format!("GET /echo HTTP/1.1\r\n{UPGRADE}\r\n");
    let frames = [head.as_bytes(), &crate::support::raw::frame(0x81, b"early")].concat();
    raw.write(&frames).await;
    assert_eq!(raw.response().await.status, 101);
    assert_eq!(raw.text().await, "early");
}

#[tokio::test]
async fn a_message_published_before_101_is_delivered_after_it() {
    // Subscribed before accepted: a message that is published on "opened" or later arrives.
    let instance = TestInstance::with(|_| ()).await;
    let mut events = instance.follow("agent:agent:sessions").await;
    for _ in 0..20 {
        let token = instance.token("s").await;
        let worker = async {
            while events.json().await["event"] != "opened" {}
            instance.publish("session:s:down", "welcome");
        };
        let client = async {
            let mut client = instance.connect("s", &token).await.unwrap();
            assert_eq!(client.text().await, "welcome");
            client.close().await;
        };
        tokio::join!(worker, client);
    }
}

#[tokio::test]
async fn origins_of_browsers_are_held_against_the_list() {
    let instance = TestInstance::with(|config| {
        config.server.allowed_origins = vec!["https://*.example.org".parse().unwrap()];
    })
    .await;
    for origin in ["https://evil.example", "null", "http://a.example.org"] {
        let headers = [("origin", origin), ("authorization", "Bearer x")];
        instance.handshake(PATH, &headers).await.assert_refused(403, "origin_not_allowed");
    }
    assert_eq!(instance.refusals("origin_not_allowed"), 3.0);
    instance
        .handshake(PATH, &[("origin", "https://a.example.org")])
        .await
        .assert_refused(401, "missing_credentials");
    // Programs send none.
    instance.client("s").await.close().await;
}

#[tokio::test]
async fn endpoints_can_be_switched_off() {
    let instance = TestInstance::with(|config| {
        config.endpoints.sessions = false;
        config.endpoints.echo = false;
    })
    .await;
    for path in [PATH, "/echo"] {
        instance.handshake(path, &[]).await.assert_refused(404, "not_found");
    }
}

const PATH: &str = "/agent/ws/s";
