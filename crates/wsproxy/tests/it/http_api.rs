//! Health, readiness and the worker API.

use serde_json::json;

use crate::support::{
    eventually,
    gateway::{API_KEY, Backend, TestInstance, over_both},
    http::{self, Stream},
    raw::Raw,
    soon,
    sse::Events,
};

over_both!(
    a_worker_serves_a_session_over_http_alone,
    tokens_are_made_for_event_streams_and_for_an_agent,
    upstream_is_followed_after_what_was_kept,
);

async fn tokens_are_made_for_event_streams_and_for_an_agent(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let make = async |body: &str| {
        let made = instance.api("POST", "/api/v1/sessions/s/token", body).await;
        assert_eq!(made.status, 201, "{made:?}");
        made.json()["token"].as_str().unwrap().to_owned()
    };
    let events = async |agent: &str, token: &str| {
        let path = format!("/{agent}/ws/s?token={token}");
        Events::open(instance.address(), &path, &[]).await.err().map(|refused| refused.status)
    };
    let token = make(r#"{"event_stream":true,"ttl_seconds":60}"#).await;
    assert!(token.starts_with("sse."), "{token}");
    assert_eq!(events("agent", &token).await, None);
    assert_eq!(events("other", &token).await, None);
    instance.refused("s", &token).await.assert_refused(403, "invalid_token");

    let token = make(r#"{"event_stream":true,"agent_id":"agent"}"#).await;
    assert_eq!(events("agent", &token).await, None);
    assert_eq!(events("other", &token).await, Some(403));
    let token = make(r#"{"event_stream":false,"agent_id":"agent"}"#).await;
    assert_eq!(events("other", &token).await, Some(403));
    assert!(instance.connect("s", &token).await.is_ok());
    assert_eq!(events("agent", &token).await, Some(403));
}

async fn a_worker_serves_a_session_over_http_alone(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let made = instance.api("POST", "/api/v1/sessions/s/token", "").await;
    assert_eq!((made.status, made.header("cache-control")), (201, "no-store"));
    let made = made.json();
    assert_eq!((&made["session_id"], &made["expires_in"]), (&json!("s"), &json!(60)));
    let mut client = instance.connect("s", made["token"].as_str().unwrap()).await.unwrap();

    let mut upstream = Stream::open(&instance, "/api/v1/sessions/s/upstream").await;
    client.send("{\"question\":\n1}").await;
    upstream.expect("event: message\ndata: {\"question\":\ndata: 1}\n\n").await;

    let sent = instance.api("POST", "/api/v1/sessions/s/messages", "an answer").await;
    assert_eq!((sent.status, sent.json()), (200, json!({ "receivers": 1 })));
    assert_eq!(client.text().await, "an answer");
    let sent = instance.api("POST", "/api/v1/sessions/nobody/messages", "x").await;
    assert_eq!((sent.status, sent.json()), (200, json!({ "receivers": 0 })));

    let body = r#"{"code":4200,"reason":"over"}"#;
    let ended = instance.api("POST", "/api/v1/sessions/s/close", body).await;
    assert_eq!((ended.status, ended.json()), (200, json!({ "receivers": 1 })));
    assert_eq!(client.closed().await, (4200, "over".into()));
    drop(upstream);
    instance.wait_empty().await;
}

async fn upstream_is_followed_after_what_was_kept(backend: Backend) {
    let mut config = backend.config();
    config.sessions.no_receiver = wsproxy::config::NoReceiver::Queue;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    client.send("\"kept 1\"").await;
    client.send("\"kept 2\"").await;
    let kept = "wsproxy_bus_publishes_kept_total";
    eventually("both are kept", || instance.metric(kept) == 2.0).await;
    let mut upstream = Stream::open(&instance, "/api/v1/sessions/s/upstream?log=true").await;
    upstream.expect("event: message\ndata: \"kept 1\"\n\n").await;
    upstream.expect("event: message\ndata: \"kept 2\"\n\n").await;
    assert!(upstream.seen.contains("id: "), "{}", upstream.seen);
    client.send("\"live\"").await;
    upstream.expect("event: message\ndata: \"live\"\n\n").await;
    assert_eq!(upstream.seen.matches("kept").count(), 2);
}

#[tokio::test]
async fn announcements_are_followed_per_agent() {
    let instance = TestInstance::with(|_| ()).await;
    let mut events = Stream::open(&instance, "/api/v1/agents/agent/sessions/events").await;
    let _other = Stream::open(&instance, "/api/v1/agents/other/sessions/events").await;
    instance.client("s").await.close().await;
    events.expect("\"event\":\"opened\"").await;
    events.expect("\"event\":\"closed\"").await;
}

#[tokio::test]
async fn a_follower_that_does_not_read_is_told_of_a_gap() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = Raw::narrow(instance.address()).await;
    let path = "/api/v1/sessions/s/upstream";
    let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n\r\n");
    raw.write(head.as_bytes()).await;
    assert_eq!(raw.response().await.status, 200);
    let payload = format!("\"{}\"", "x".repeat(512 * 1024));
    for _ in 0..60 {
        instance.publish("session:s:up", payload.clone());
        tokio::task::yield_now().await;
    }
    let mut client = instance.client("s").await;
    let reading = async {
        while !String::from_utf8_lossy(&raw.rest()[raw.rest().len().saturating_sub(200)..])
            .contains("event: overflow\n")
        {
            assert!(raw.read().await > 0, "it ends without a word");
        }
    };
    soon("the overflow is told", reading).await;
    instance.assert_serves(&mut client, "s").await;
    client.close().await;
    drop(raw);
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_stream_without_events_is_kept_open_by_comments() {
    let instance = TestInstance::with(|_| ()).await;
    let mut stream = Stream::open(&instance, "/api/v1/sessions/s/upstream").await;
    for _ in 0..2 {
        tokio::time::pause();
        tokio::time::advance(std::time::Duration::from_secs(16)).await;
        tokio::time::resume();
        instance.publish("session:s:up", "1");
        stream.expect(":\n").await;
    }
    stream.expect("data: 1\n\n").await;
}

#[tokio::test]
async fn followers_are_forgotten_when_they_leave_or_the_instance_ends() {
    let instance = TestInstance::with(|_| ()).await;
    let gone = Stream::open(&instance, "/api/v1/sessions/gone/upstream").await;
    let mut stays = Stream::open(&instance, "/api/v1/sessions/stays/upstream").await;
    drop(gone);
    eventually("it is forgotten", || instance.gateway().hub.topics() == 1).await;
    let ((), ()) = tokio::join!(instance.drain(), stays.raw.end());
}

#[tokio::test]
async fn the_api_wants_one_of_its_keys() {
    let instance = TestInstance::with(|_| ()).await;
    let routes = wsproxy::endpoint::api_routes().collect::<Vec<_>>();
    for (method, path) in &routes {
        let path = path.replace("{session_id}", "s").replace("{agent_id}", "a");
        let ask = async |headers: &[(&str, &str)]| {
            let method = method.to_ascii_uppercase();
            http::request(instance.address(), &method, &path, headers, b"").await
        };
        if path.ends_with("openapi.json") {
            assert_eq!(ask(&[]).await.status, 200);
            continue;
        }
        ask(&[]).await.assert_refused(401, "missing_credentials");
        ask(&[("authorization", "Basic x")]).await.assert_refused(401, "missing_credentials");
        ask(&[("authorization", "Bearer")]).await.assert_refused(401, "malformed_credentials");
        ask(&[("authorization", "Bearer wrong")]).await.assert_refused(403, "invalid_token");
    }
    let refused = (routes.len() - 1) as f64;
    assert_eq!(instance.metric("wsproxy_errors_total{kind=\"api_key\"}"), refused);
    let none = TestInstance::with(|config| config.api.keys.clear()).await;
    let answer = http::request(none.address(), "GET", "/api/v1/info", &[], b"").await;
    answer.assert_refused(401, "missing_credentials");
}

#[tokio::test]
async fn bad_requests_get_errors_of_the_contract() {
    let instance = TestInstance::with(|config| config.limits.max_message_bytes = 1000).await;
    let refused = async |method: &str, path: &str, body: &str, status: u16, code: &str| {
        instance.api(method, path, body).await.assert_refused(status, code);
    };
    refused("GET", "/", "", 404, "not_found").await;
    refused("GET", "/api/v1/nothing", "", 404, "not_found").await;
    refused("DELETE", "/api/v1/sessions/s/messages", "", 405, "method_not_allowed").await;
    refused("POST", "/api/v1/info", "", 405, "method_not_allowed").await;
    refused("POST", "/health", "", 405, "method_not_allowed").await;
    refused("POST", "/api/v1/sessions/a:b/token", "", 400, "bad_id").await;
    refused("POST", "/api/v1/sessions/a%2Fb/messages", "", 400, "bad_id").await;
    refused("POST", "/api/v1/sessions/%ff/messages", "", 400, "bad_id").await;
    let messages = "/api/v1/sessions/s/messages";
    refused("POST", messages, &"x".repeat(1001), 413, "too_large").await;
    assert_eq!(instance.api("POST", messages, &"x".repeat(1000)).await.status, 200);
    for body in [
        "x",
        "[]",
        r#"{"ttl":1}"#,
        r#"{"ttl_seconds":0}"#,
        r#"{"ttl_seconds":-1}"#,
        r#"{"event_stream":"yes"}"#,
        r#"{"agent_id":7}"#,
    ] {
        refused("POST", "/api/v1/sessions/s/token", body, 400, "bad_request").await;
    }
    let bad_agent = r#"{"agent_id":"a b"}"#;
    refused("POST", "/api/v1/sessions/s/token", bad_agent, 400, "bad_id").await;
    for body in [r#"{"code":1006}"#, r#"{"code":"x"}"#, r#"{"connection_id":"x"}"#, "{"] {
        refused("POST", "/api/v1/sessions/s/close", body, 400, "bad_request").await;
    }
    let reason = format!(r#"{{"reason":"{}"}}"#, "x".repeat(124));
    refused("POST", "/api/v1/sessions/s/close", &reason, 400, "bad_request").await;
    let key = "x".repeat(129);
    let batch =
        format!(r#"{{"messages":[{{"to":"session:s","message":1,"idempotency_key":"{key}"}}]}}"#);
    let results = instance.api("POST", "/api/v1/events/batch", &batch).await.json();
    assert_eq!(results["results"][0]["error"]["code"], "bad_request");
    refused("GET", "/api/v1/sessions/s/upstream?log=maybe", "", 400, "bad_request").await;
    refused("GET", "/api/v1/sessions/s/upstream?lgo=true", "", 400, "bad_request").await;
}

#[tokio::test]
async fn health_readiness_info_and_document_say_what_is() {
    let instance = TestInstance::with(|config| config.server.server_id = Some("one".into())).await;
    let _client = instance.client("s").await;
    let health = instance.get("/health").await;
    assert_eq!((health.status, health.json()), (200, json!({ "status": "healthy" })));
    let wrong = [("authorization", "Bearer wrong-key-0123456789")];
    let wrong = http::request(instance.address(), "GET", "/health", &wrong, b"").await;
    assert_eq!((wrong.status, wrong.json()), (200, json!({ "status": "healthy" })));
    let health = instance.api("GET", "/health", "").await.json();
    assert_eq!((&health["status"], &health["server_id"]), (&json!("healthy"), &json!("one")));
    assert_eq!((&health["bus"]["kind"], &health["bus"]["channels"]), (&json!("memory"), &json!(2)));
    assert!(health["version"].is_string() && health["bus"]["error"].is_null());
    assert_eq!(instance.get("/ready").await.json(), json!({ "ready": true }));
    let info = instance.api("GET", "/api/v1/info", "").await.json();
    assert_eq!(info["connections"], json!({ "active": 1, "max": 1000 }));
    let bus = json!({
        "kind": "memory", "connected": true, "subscribed": true, "channels": 2, "writable": true, "away": null,
        "error": null,
    });
    assert_eq!((&info["bus"], &health["bus"]), (&bus, &bus));
    let document = instance.get("/api/v1/openapi.json").await;
    assert_eq!(document.header("content-type"), "application/json");
    assert!(document.json()["openapi"].as_str().unwrap().starts_with("3."));
}

#[tokio::test]
async fn admin_routes_can_have_a_port_of_their_own() {
    let instance = TestInstance::with(|config| config.admin.port = Some(0)).await;
    assert_ne!(instance.address(), instance.admin_address());
    let mut client = instance.client("s").await;
    let key = format!("Bearer {API_KEY}");
    let headers = [("authorization", key.as_str())];
    let on_the_main_port =
        async |path: &str| http::request(instance.address(), "GET", path, &headers, b"").await;
    for path in ["/metrics", "/api/v1/info", "/api/v1/openapi.json", "/api/v1/sessions/s/history"] {
        on_the_main_port(path).await.assert_refused(404, "not_found");
        assert_eq!(instance.api("GET", path, "").await.status, 200, "{path}");
    }
    // Probes are answered on both, but strangers are told no more than they ask for.
    assert_eq!(on_the_main_port("/health").await.json(), json!({ "status": "healthy" }));
    assert_eq!(on_the_main_port("/ready").await.json(), json!({ "ready": true }));
    let health = instance.get("/health").await.json();
    assert!(health["version"].is_string() && health["bus"]["connected"] == true, "{health}");
    assert_eq!(instance.get("/ready").await.json(), json!({ "ready": true }));
    let response = http::handshake(instance.admin_address(), "/agent/ws/s", &[]).await;
    response.assert_refused(404, "not_found");
    instance.assert_serves(&mut client, "s").await;
    instance.gateway().draining.store(true, std::sync::atomic::Ordering::Relaxed);
    let ready = on_the_main_port("/ready").await;
    assert_eq!((ready.status, ready.json()), (503, json!({ "ready": false })));
    let ready = instance.get("/ready").await;
    assert_eq!((ready.status, &ready.json()["reason"]), (503, &json!("draining")));
}

#[tokio::test]
async fn a_connection_serves_many_requests_and_outlives_a_refusal() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = Raw::connect(instance.address()).await;
    for _ in 0..10 {
        raw.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(raw.response().await.status, 200);
    }
    // Several at once.
    raw.write(&b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n".repeat(5)).await;
    for _ in 0..5 {
        assert_eq!(raw.response().await.status, 200);
    }
    // Refused handshakes leave a connection that can be used again.
    raw.write(format!("GET /a/ws/s HTTP/1.1\r\n{}\r\n", crate::support::raw::UPGRADE).as_bytes())
        .await;
    raw.response().await.assert_refused(401, "missing_credentials");
    raw.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(raw.response().await.status, 200);
}

/// Its body may come later, or never: the connection is not used again, and the client is told so.
#[tokio::test]
async fn a_refused_call_with_a_body_ends_its_connection() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = Raw::connect(instance.admin_address()).await;
    let head = format!(
        "POST /api/v1/sessions/s/messages?history=perhaps HTTP/1.1\r\nHost: x\r\n\
         Authorization: Bearer {API_KEY}\r\nContent-Length: 5\r\n\r\n"
    );
    raw.write(head.as_bytes()).await;
    let refused = raw.response().await;
    assert_eq!((refused.status, refused.header("connection")), (400, "close"), "{refused:?}");
    raw.end().await;
}
