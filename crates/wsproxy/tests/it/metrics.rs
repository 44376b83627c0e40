//! Metrics mean what their names promise, and neither they nor logs tell what is secret.

use std::time::Duration;

use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{TestInstance, bearer},
    http,
    raw::Raw,
    redis_server::RedisServer,
    soon,
    sse::Events,
};

#[tokio::test]
async fn traffic_is_counted_as_it_was() {
    let instance = TestInstance::with(|_| ()).await;
    let of = |name: &str| instance.metric(&format!("{name}{{endpoint=\"sessions\"}}"));
    let mut worker = instance.follow("session:s:up").await;
    let mut raw = Raw::connect(instance.address()).await;
    raw.open("s", &instance.token("s").await).await;
    let mut second = instance.client("s").await;
    instance.refused("s", "wrong").await.assert_refused(403, "invalid_token");
    assert_eq!(of("wsproxy_active_connections"), 2.0);
    assert_eq!(of("wsproxy_connections_total"), 2.0);
    assert_eq!(instance.refusals("accepted"), 2.0);
    assert_eq!(instance.refusals("invalid_token"), 1.0);
    assert_eq!(instance.metric("wsproxy_errors_total{kind=\"handshake\"}"), 1.0);
    assert_eq!(instance.metric("wsproxy_redis_pubsub_channels_active"), 3.0);

    // 6 bytes of header and mask, and the payload; a ping is no message.
    raw.frame(0x81, b"[1,2]").await;
    raw.frame(0x89, b"").await;
    assert_eq!(worker.next().await, "[1,2]");
    assert_eq!(raw.next_frame().await.unwrap().first, 0x8a);
    assert_eq!(of("wsproxy_messages_received_total"), 1.0);
    assert_eq!(of("wsproxy_bytes_received_total"), 17.0);
    assert_eq!((of("wsproxy_messages_sent_total"), of("wsproxy_bytes_sent_total")), (0.0, 2.0));

    // A message on the bus is delivered twice: two connections.
    let in_before = instance.metric("wsproxy_bus_messages_received_total");
    instance.publish("session:s:down", "0123456789");
    assert_eq!(raw.text().await, "0123456789");
    assert_eq!(second.text().await, "0123456789");
    assert_eq!(instance.metric("wsproxy_bus_messages_received_total"), in_before + 1.0);
    assert_eq!((of("wsproxy_messages_sent_total"), of("wsproxy_bytes_sent_total")), (2.0, 26.0));
    assert_eq!(of("wsproxy_message_latency_seconds_count"), 2.0);
    assert!(of("wsproxy_message_latency_seconds_sum") < 10.0);
    let bucket = "wsproxy_message_latency_seconds_bucket{le=\"+Inf\",endpoint=\"sessions\"}";
    assert_eq!(instance.metric(bucket), 2.0);

    // Three fragments are one message.
    raw.frame(0x01, b"[").await;
    raw.frame(0x00, b"3").await;
    raw.frame(0x80, b"]").await;
    assert_eq!(worker.next().await, "[3]");
    assert_eq!(of("wsproxy_messages_received_total"), 2.0);
    second.close().await;
    eventually("one is left", || of("wsproxy_active_connections") == 1.0).await;
    assert_eq!(of("wsproxy_connections_total"), 2.0);
    assert_eq!(instance.ended("sessions", "normal"), 1.0);
    assert_eq!(of("wsproxy_backpressure_events_total"), 0.0);
    assert_eq!(instance.metric("wsproxy_buffer_utilization_bytes"), 0.0);
    assert_eq!(instance.metric("wsproxy_active_connections{endpoint=\"echo\"}"), 0.0);
    assert!(instance.metric("wsproxy_process_resident_memory_bytes") > 1e6);
}

#[tokio::test]
async fn contract_metrics_are_served_as_text_and_json() {
    let instance = TestInstance::with(|_| ()).await;
    let mut client = instance.echo().await;
    client.send("x").await;
    assert_eq!(client.text().await, "x");
    instance.refused("s", "wrong").await;
    let text = instance.get("/metrics").await;
    assert!(text.header("content-type").starts_with("application/openmetrics-text"));
    assert!(text.body.ends_with("# EOF\n"));
    for name in [
        "wsproxy_active_connections",
        "wsproxy_connections_total",
        "wsproxy_messages_received_total",
        "wsproxy_messages_sent_total",
        "wsproxy_message_latency_seconds_bucket",
        "wsproxy_errors_total",
        "wsproxy_buffer_utilization_bytes",
        "wsproxy_backpressure_events_total",
        "wsproxy_redis_pubsub_channels_active",
    ] {
        assert!(text.body.lines().any(|line| line.starts_with(name)), "{name}");
    }
    let accept = [("accept", "application/json")];
    let json = http::request(instance.address(), "GET", "/metrics", &accept, b"").await;
    assert_eq!(json.header("content-type"), "application/json");
    let json = json.json();
    let samples = json["metrics"].as_array().unwrap();
    let lines = text.body.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(samples.len(), lines);
    let sent = samples.iter().find(|sample| {
        sample["name"] == "wsproxy_messages_sent_total" && sample["labels"]["endpoint"] == "echo"
    });
    assert_eq!(sent.unwrap()["value"], 1.0);
}

#[tokio::test]
async fn prometheus_text_is_served_on_request() {
    let instance = TestInstance::with(|_| ()).await;
    let accept = [("accept", "text/plain; version=0.0.4")];
    let text = http::request(instance.address(), "GET", "/metrics", &accept, b"").await;
    assert_eq!(text.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert!(text.body.contains("# TYPE wsproxy_connections_total counter\n"));
    assert!(!text.body.contains("# UNIT") && !text.body.contains("# EOF"));
}

#[tokio::test]
async fn series_begin_before_their_first_event() {
    let instance = TestInstance::with(|config| config.endpoints.echo = false).await;
    let text = instance.get("/metrics").await.body;
    for series in [
        "wsproxy_handshakes_total{endpoint=\"sessions\",outcome=\"accepted\"} 0",
        "wsproxy_handshakes_total{endpoint=\"sessions\",outcome=\"full\"} 0",
        "wsproxy_handshakes_total{endpoint=\"sessions\",outcome=\"bus_unavailable\"} 0",
        "wsproxy_handshakes_total{endpoint=\"none\",outcome=\"full\"} 0",
        "wsproxy_disconnects_total{endpoint=\"sessions\",reason=\"slow_consumer\"} 0",
        "wsproxy_disconnects_total{endpoint=\"sessions\",reason=\"internal\"} 0",
        "wsproxy_errors_total{kind=\"bad_request\"} 0",
        "wsproxy_messages_unheard_total{endpoint=\"events\"} 0",
        "wsproxy_message_errors_total{endpoint=\"events\",kind=\"lost\"} 0",
    ] {
        assert!(text.lines().any(|line| line == series), "{series}");
    }
    assert!(!text.contains("wsproxy_disconnects_total{endpoint=\"echo\""), "what is off has none");
}

/// Event streams, kept connections and probes that only connect end without anybody's fault.
#[tokio::test]
async fn only_bad_requests_count_as_such() {
    let instance = TestInstance::with(|config| {
        config.server.header_timeout = Duration::from_secs(1);
    })
    .await;
    let errors = || {
        ["bad_request", "slow_request", "handshake"]
            .map(|kind| instance.metric(&format!("wsproxy_errors_total{{kind=\"{kind}\"}}")))
    };
    for _ in 0..10 {
        let mut events = Events::session(&instance, "s", &[]).await;
        instance.publish("session:s:down", "1");
        assert_eq!(events.data().await, "1");
        drop(events);
        drop(Raw::connect(instance.address()).await);
        Raw::connect(instance.address()).await.reset();
    }
    eventually("all are gone", || instance.ended("sessions", "gone") == 10.0).await;
    let mut kept = Raw::connect(instance.address()).await;
    kept.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(kept.response().await.status, 200);
    kept.end().await;
    assert_eq!(errors(), [0.0; 3]);
    // One that has begun a request is at fault, its second one too.
    let mut slow = Raw::connect(instance.address()).await;
    slow.write(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(slow.response().await.status, 200);
    slow.write(b"GET /ready").await;
    slow.end().await;
    eventually("it is counted", || errors() == [0.0, 1.0, 0.0]).await;
}

/// Messages from the bus, over both transports; nothing that the gateway says itself.
#[tokio::test]
async fn latency_is_that_of_the_buses_messages() {
    let instance = TestInstance::with(|config| config.sessions.history = true).await;
    let of = |name: &str| instance.metric(&format!("{name}{{endpoint=\"sessions\"}}"));
    let timed = || of("wsproxy_message_latency_seconds_count");
    let mut events = Events::session(&instance, "s", &[]).await;
    events.block().await;
    let id = instance.keep("s", "[1]").await;
    assert_eq!(events.data().await, "[1]");
    eventually("the event is timed", || timed() == 1.0).await;
    assert_eq!(of("wsproxy_messages_sent_total"), 1.0);

    // Told by the gateway: what the client had missed, an error.
    instance.keep("s", "[2]").await;
    eventually("the event is timed", || timed() == 2.0).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={id}")).await;
    assert_eq!(client.json().await["type"], "resumed");
    assert_eq!(client.text().await, "[2]");
    client.send("no json").await;
    assert_eq!(client.json().await["code"], "invalid_json");
    assert_eq!((timed(), of("wsproxy_messages_sent_total")), (2.0, 5.0));
    instance.keep("s", "[3]").await;
    assert_eq!(client.text().await, "[3]");
    eventually("both are timed", || timed() == 4.0).await;
    assert!(of("wsproxy_message_latency_seconds_sum") < 10.0);
}

#[tokio::test]
async fn events_without_a_worker_count_as_sessions_do() {
    let instance = TestInstance::with(|config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some("0123456789abcdef0123456789abcdef".into());
    })
    .await;
    let claims = serde_json::json!({ "sub": "u", "exp": crate::support::issuer::now() + 600 });
    let key = jsonwebtoken::EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
    let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap();
    let mut client = Client::connect(instance.address(), "/ws", &bearer(&token)).await.unwrap();
    client.json().await;
    client.send(r#"{"type":"anything"}"#).await;
    let unheard = "wsproxy_messages_unheard_total{endpoint=\"events\"}";
    eventually("it is counted", || instance.metric(unheard) == 1.0).await;
    let mut client = instance.client("s").await;
    client.send("1").await;
    let unheard = "wsproxy_messages_unheard_total{endpoint=\"sessions\"}";
    eventually("it is counted", || instance.metric(unheard) == 1.0).await;
}

#[tokio::test]
async fn neither_metrics_nor_logs_tell_tokens_keys_or_passwords() {
    let password = Some("redis-password-secret".to_owned());
    let server = RedisServer::start_with(crate::support::redis_server::Options {
        password,
        ..Default::default()
    });
    let mut binary = Binary::start(&[("REDIS_URL", &server.url()), ("LOG_LEVEL", "trace")]).await;
    let ready = async || http::request(binary.address, "GET", "/ready", &[], b"").await.status;
    soon("it is ready", async { while ready().await != 200 {} }).await;
    let path = "/agent/ws/session-in-use";
    let mut tokens = Vec::new();
    for place in 0..3 {
        let token = binary.token("session-in-use").await;
        let protocol = format!("wsproxy.v1, bearer.{token}");
        let query = format!("{path}?token={token}");
        let mut client = match place {
            0 => Client::connect(binary.address, path, &bearer(&token)).await,
            1 => {
                Client::connect(binary.address, path, &[("sec-websocket-protocol", protocol)]).await
            }
            _ => Client::connect(binary.address, &query, &[]).await,
        }
        .unwrap();
        client.send("{\"secret\":\"words-of-one-client\"}").await;
        client.send_message(Message::Ping("words-of-one-client".into())).await;
        assert!(matches!(client.next().await, Message::Pong(_)));
        client.close().await;
        // The same again is refused, in every place.
        let used = http::handshake(binary.address, &query, &[]).await;
        used.assert_refused(403, "invalid_token");
        assert!(!used.body.contains(&token));
        tokens.push(token);
    }
    let wrong = [("authorization", "Bearer wrong-token-of-a-client")];
    http::handshake(binary.address, path, &wrong).await;
    http::request(binary.address, "GET", "/api/v1/info", &wrong, b"").await;
    let metrics = http::request(binary.address, "GET", "/metrics", &[], b"").await.body;
    assert!(!metrics.contains("session-in-use") && !metrics.contains("agent\""));
    binary.signal(rustix::process::Signal::TERM);
    assert_eq!(binary.exited().await.code(), Some(0));
    let log = binary.log();
    tokens.extend([
        crate::support::gateway::API_KEY.to_owned(),
        "redis-password-secret".into(),
        "wrong-token-of-a-client".into(),
        "words-of-one-client".into(),
    ]);
    for secret in &tokens {
        assert!(!log.contains(secret), "{secret}:\n{log}");
        assert!(!metrics.contains(secret), "{secret}");
    }
    // And yet the key events are there, as JSON with the fields of the contract.
    let opened = &binary.lines("Connection opened.")[0];
    assert_eq!(
        (&opened["session_id"], &opened["level"]),
        (&"session-in-use".into(), &"INFO".into())
    );
    let failed = &binary.lines("Handshake refused.")[0];
    assert_eq!(failed["code"], "invalid_token");
    let closed = binary.lines("Connection closed.");
    assert_eq!(closed.len(), 3);
    assert!(closed.iter().all(|line| line["timestamp"].is_string() && line["code"] == 1005));
}

/// Each fault leaves one line at the level at which operators run.
#[tokio::test]
async fn faults_are_logged_once() {
    let mut binary = Binary::start(&[
        ("LOG_LEVEL", "info"),
        ("WSPROXY_LIMITS__MAX_MESSAGE_BYTES", "1000"),
        ("WSPROXY_SESSIONS__STRIKES_MAX", "1"),
        ("WSPROXY_LIMITS__MESSAGES_PER_SECOND", "1"),
        ("WSPROXY_LIMITS__MESSAGE_BURST", "2"),
    ])
    .await;
    let faults: [(&[u8], u16, &str); 5] = [
        (b"no json", 1008, "strikes"),
        (&[b'1'; 1001], 1009, "too_big"),
        (b"\xff", 1007, "not_utf8"),
        (b"1", 1008, "rate_limited"),
        (b"", 1002, "protocol_error"),
    ];
    for (payload, code, _) in faults {
        let mut raw = Raw::connect(binary.address).await;
        raw.open("s", &binary.token("s").await).await;
        let frame =
            crate::support::raw::frame(if payload.is_empty() { 0x83 } else { 0x81 }, payload);
        raw.write(&frame.repeat(3)).await;
        assert_eq!(raw.close_frame().await.0, code);
        raw.end().await;
    }
    binary.signal(rustix::process::Signal::TERM);
    assert_eq!(binary.exited().await.code(), Some(0));
    let closed = binary.lines("Connection closed.");
    for (_, code, reason) in faults {
        let lines = closed.iter().filter(|line| line["reason"] == reason && line["code"] == code);
        assert_eq!(lines.count(), 1, "{reason}");
    }
}

#[tokio::test]
async fn a_slow_consumer_is_one_log_line() {
    let mut binary = Binary::start(&[("WSPROXY_LIMITS__SEND_BUFFER_BYTES", "2000000")]).await;
    let mut slow = Raw::narrow(binary.address).await;
    slow.open("s", &binary.token("s").await).await;
    let body = "x".repeat(200_000);
    let closed = "wsproxy_disconnects_total{endpoint=\"sessions\",reason=\"slow_consumer\"}";
    let publishing = async {
        while binary.metric(closed).await == 0.0 {
            binary.api("POST", "/api/v1/sessions/s/messages", &body).await;
        }
    };
    soon("it is closed", publishing).await;
    binary.signal(rustix::process::Signal::TERM);
    assert_eq!(binary.exited().await.code(), Some(0));
    let lines = binary.lines("Connection closed.");
    assert_eq!(lines.len(), 1);
    assert_eq!((&lines[0]["reason"], &lines[0]["code"]), (&"slow_consumer".into(), &1008.into()));
    assert_eq!(lines[0]["session_id"], "s");
}
