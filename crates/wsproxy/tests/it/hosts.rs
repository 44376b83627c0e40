//! The host that a request names, and what every answer tells browsers.

use crate::support::{
    gateway::{API_KEY, TestInstance},
    http::{self, Response},
    raw::{Raw, UPGRADE},
};

async fn send(raw: &mut Raw, head: &str) -> Response {
    raw.write(head.as_bytes()).await;
    raw.response().await
}

/// An instance with every endpoint and two ports.
async fn instance() -> TestInstance {
    TestInstance::with(|config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some("0123456789abcdef0123456789abcdef".into());
        config.admin.port = Some(0);
    })
    .await
}

#[tokio::test]
async fn a_request_without_one_valid_host_is_refused_everywhere() {
    let instance = instance().await;
    let upgrade = UPGRADE.strip_prefix("Host: test\r\n").unwrap();
    for address in [instance.address(), instance.admin_address()] {
        for path in PATHS {
            for hosts in [
                "",
                "Host: a\r\nHost: a\r\n",
                "Host: a\r\nHost: b\r\n",
                "Host:\r\n",
                "Host: a b\r\n",
                "Host: a/b\r\n",
                "Host: user@a\r\n",
                "Host: a:port\r\n",
                "Host: a, b\r\n",
            ] {
                for further in ["", upgrade, "Accept: text/event-stream\r\n"] {
                    let head = format!("GET {path} HTTP/1.1\r\n{hosts}{further}\r\n");
                    let mut raw = Raw::connect(address).await;
                    send(&mut raw, &head).await.assert_refused(400, "bad_request");
                }
            }
            let head = format!("POST {path} HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
            let mut raw = Raw::connect(address).await;
            send(&mut raw, &head).await.assert_refused(400, "bad_request");
        }
    }
    // Nothing of this was an attempt that takes a place or says something of the bus.
    instance.wait_empty().await;
    let seen = instance.metric("wsproxy_errors_total{kind=\"bad_request\"}");
    assert!(seen > 0.0 && instance.refusals("bad_request") > 0.0);
}

#[tokio::test]
async fn probes_of_http_10_need_no_host() {
    let instance = instance().await;
    for address in [instance.address(), instance.admin_address()] {
        for path in ["/health", "/ready"] {
            for method in ["GET", "HEAD"] {
                let mut raw = Raw::connect(address).await;
                raw.write(format!("{method} {path} HTTP/1.0\r\n\r\n").as_bytes()).await;
                // A HEAD has a length and no body: only the head is looked at.
                while !raw.rest().windows(4).any(|end| end == b"\r\n\r\n") {
                    assert!(raw.read().await > 0);
                }
                assert!(raw.rest().starts_with(b"HTTP/1.0 200"), "{method} {path}");
            }
            let mut raw = Raw::connect(address).await;
            let two = format!("GET {path} HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n");
            send(&mut raw, &two).await.assert_refused(400, "bad_request");
        }
    }
}

#[tokio::test]
async fn an_instance_answers_to_any_host_unless_it_is_told_otherwise() {
    let instance = TestInstance::with(|_| ()).await;
    let local = TestInstance::with(|config| config.server.local_hosts_only = true).await;
    for (host, status) in
        [("localhost", 200), ("127.0.0.1:8080", 200), ("[::1]", 200), ("evil.example", 403)]
    {
        let head = format!("GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n");
        let mut raw = Raw::connect(instance.address()).await;
        assert_eq!(send(&mut raw, &head).await.status, 200);
        let mut raw = Raw::connect(local.address()).await;
        assert_eq!(send(&mut raw, &head).await.status, status, "{host}");
    }
    let mut raw = Raw::connect(local.address()).await;
    let elsewhere = "GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    send(&mut raw, elsewhere).await.assert_refused(403, "host_not_allowed");
}

#[tokio::test]
async fn every_answer_forbids_to_guess_its_type() {
    let instance = TestInstance::with(|config| {
        config.server.allowed_origins = vec!["https://app.example".parse().unwrap()];
    })
    .await;
    let token = instance.token("s").await;
    let (key, bearer) = (format!("Bearer {API_KEY}"), format!("Bearer {token}"));
    let key = ("authorization", key.as_str());
    let upgrade = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let origin = ("origin", "https://app.example");
    let preflight = [origin, ("access-control-request-method", "GET")];
    let events = ("accept", "text/event-stream");
    let reusable = instance.stream_token("e").await;
    let path = "/agent/ws/s";
    let socket = [&upgrade[..], &[("authorization", bearer.as_str())]].concat();
    for (method, path, headers, status) in [
        ("GET", "/health", &[][..], 200),
        ("GET", "/ready", &[], 200),
        ("GET", "/metrics", &[], 200),
        ("GET", "/api/v1/openapi.json", &[], 200),
        ("GET", "/api/v1/info", &[key], 200),
        ("POST", "/api/v1/sessions/other/token", &[key], 201),
        ("GET", "/api/v1/sessions/s/upstream", &[key], 200),
        ("GET", "/api/v1/info", &[], 401),
        ("GET", "/nothing", &[], 404),
        ("POST", "/health", &[], 405),
        ("GET", "/api/v1/sessions/a:b/history", &[key], 400),
        ("OPTIONS", path, &preflight, 204),
        ("GET", path, &[], 426),
        ("GET", path, &upgrade, 401),
        ("GET", path, &[events, ("authorization", "Bearer x")], 403),
        ("GET", &format!("/agent/ws/e?token={reusable}"), &[events, origin], 200),
        ("GET", path, &socket, 101),
    ] {
        let answer = http::request(instance.address(), method, path, headers, b"").await;
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{method} {path}");
    }
    let mut raw = Raw::connect(instance.address()).await;
    let refused = send(&mut raw, "GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!((refused.status, refused.header("x-content-type-options")), (400, "nosniff"));
}

/// A path of every kind; the last is served nowhere.
const PATHS: [&str; 9] = [
    "/agent/ws/s",
    "/echo",
    "/ws",
    "/ws/health",
    "/health",
    "/ready",
    "/metrics",
    "/api/v1/info",
    "/nothing",
];
