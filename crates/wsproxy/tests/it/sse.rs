//! Server-sent events at the URLs of sessions, the same over both buses.

use std::time::Duration;

use serde_json::{Value, json};
use wsproxy::config::OnBusLoss;

use crate::support::{
    client::Client,
    eventually,
    gateway::{API_KEY, Backend, TestInstance, config, over_both},
    http::{self, Response},
    raw::Raw,
    redis_server::RedisServer,
    sse::{Event, Events},
};

over_both!(
    messages_arrive_as_events_in_order,
    what_is_no_text_is_counted_and_not_sent,
    positions_come_with_events_and_resume,
    what_is_no_longer_held_is_told,
    a_worker_ends_streams_as_it_ends_connections,
    every_block_has_data,
    streams_are_announced_as_what_they_are,
    compressed_events_are_shared_and_whole,
);

async fn messages_arrive_as_events_in_order(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut events = Events::session(&instance, "s", &[]).await;
    assert!((500..1500).contains(&events.retry().await));
    for (payload, block) in [
        ("{\"a\":1}", "data: {\"a\":1}"),
        ("", "data: "),
        ("one\ntwo\r\n\nid: 1-1", "data: one\ndata: two\ndata: \ndata: id: 1-1"),
        ("\u{1f600}", "data: \u{1f600}"),
    ] {
        instance.publish("session:s:down", payload);
        assert_eq!(events.block().await.unwrap(), block);
    }
    let mut client = instance.client("s").await;
    (0..500).for_each(|n| instance.publish("session:s:down", n.to_string()));
    for n in 0..500 {
        assert_eq!(events.data().await, n.to_string());
        assert_eq!(client.text().await, n.to_string());
    }
    let large = "ä".repeat(300_000);
    instance.publish("session:s:down", large.clone());
    assert_eq!(events.data().await, large);
    drop(events);
    instance.wait_ended("sessions", "gone").await;
}

async fn what_is_no_text_is_counted_and_not_sent(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    let instance = TestInstance::start(config).await;
    let mut events = Events::session(&instance, "s", &[("Accept-Encoding", "gzip")]).await;
    instance.publish("session:s:down", vec![0xff, 0xfe]);
    instance.publish("session:s:down", "text");
    assert_eq!(events.data().await, "text");
    assert_eq!(instance.metric("wsproxy_messages_unframeable_total"), 1.0);
}

async fn positions_come_with_events_and_resume(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    let instance = TestInstance::start(config).await;
    let mut events = Events::session(&instance, "s", &[]).await;
    let begin = events.event().await.unwrap();
    assert!(begin.id.as_ref().unwrap().starts_with("1-0-"), "{begin:?}");
    let told: Value = serde_json::from_str(begin.data.as_ref().unwrap()).unwrap();
    assert_eq!(
        (&*begin.kind, told),
        ("position", json!({ "type": "position", "event_id": begin.id }))
    );
    let mut ids = Vec::new();
    for n in 0..6 {
        ids.push(instance.keep("s", &format!("[{n}]")).await);
        if n < 3 {
            let (id, kind) = (Some(ids[n].clone()), String::new());
            assert_eq!(
                events.event().await,
                Some(Event { id, kind, data: Some(format!("[{n}]")) })
            );
        }
    }
    drop(events);
    // The header of an EventSource that comes back is newer than the URL it was made with.
    let token = instance.stream_token("s").await;
    for (parameter, header, first) in [
        (begin.id.clone().unwrap(), Some(&ids[2]), 3),
        (ids[4].clone(), None, 5),
        (begin.id.clone().unwrap(), None, 0),
        ("0".into(), None, 0),
    ] {
        let path = format!("/agent/ws/s?token={token}&last_event_id={parameter}");
        let header = header.map(|id| ("Last-Event-ID", id.as_str()));
        let headers: Vec<_> = header.into_iter().collect();
        let mut events = Events::open(instance.address(), &path, &headers).await.unwrap();
        let notice = events.json().await;
        assert_eq!((&notice["type"], &notice["count"]), (&json!("resumed"), &json!(6 - first)));
        for (n, id) in ids.iter().enumerate().skip(first) {
            let event = events.event().await.unwrap();
            assert_eq!(event.id.as_ref(), Some(id));
            assert_eq!(event.data.unwrap(), format!("[{n}]"));
        }
        let live = instance.keep("other", "1").await;
        assert!(!live.is_empty());
        instance.publish("session:s:down", "live");
        assert_eq!(events.data().await, "live");
    }
    assert_eq!(instance.metric("wsproxy_resumed_total"), 4.0);
}

/// Clients that take every empty line for the end of an event would show one that has no data.
async fn every_block_has_data(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    config.sse.keep_alive = Duration::from_millis(100);
    let instance = TestInstance::start(config).await;
    for encoding in ["identity", "gzip"] {
        let accepts = [("Accept-Encoding", encoding)];
        let mut events = Events::session(&instance, "s", &accepts).await;
        let first = events.block().await.unwrap();
        assert!(first.starts_with("retry: "), "{first}");
        assert!(
            first.contains("\nid: ") && first.contains("\nevent: position\ndata: {"),
            "{first}"
        );
        for _ in 0..2 {
            assert_eq!(events.line().await, ":");
        }
        // What is no text has a position only.
        let path = "/api/v1/sessions/s/messages?history=true";
        let key = format!("Bearer {API_KEY}");
        let headers = [("authorization", key.as_str())];
        let kept = http::request(instance.admin_address(), "POST", path, &headers, b"\xff").await;
        let id = kept.json()["event_id"].as_str().unwrap().to_owned();
        let position = events.block().await.unwrap();
        let data = format!(r#"{{"type":"position","event_id":"{id}"}}"#);
        let expected = format!("id: {id}\nevent: position\ndata: {data}");
        assert_eq!(position.trim_start_matches(":\n"), expected);
        let id = instance.keep("s", "text").await;
        let text = events.block().await.unwrap();
        assert_eq!(text.trim_start_matches(":\n"), format!("id: {id}\ndata: text"));
    }
}

async fn what_is_no_longer_held_is_told(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    config.history.entries_max = 3;
    let instance = TestInstance::start(config).await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(instance.keep("s", &n.to_string()).await);
    }
    let mut events = Events::session(&instance, "s", &[("Last-Event-ID", &ids[1])]).await;
    let event = events.event().await.unwrap();
    assert_eq!(event.id.as_ref(), Some(&ids[9]));
    let lost: Value = serde_json::from_str(&event.data.unwrap()).unwrap();
    assert_eq!((&lost["code"], &lost["reason"]), (&json!("history_lost"), &json!("trimmed")));
    let id = instance.keep("s", "live").await;
    assert_eq!(events.event().await.unwrap().id, Some(id));
    // Where there is no history at all, that is said too.
    let instance = TestInstance::with(|_| ()).await;
    let mut events = Events::session(&instance, "s", &[("Last-Event-ID", "5-5")]).await;
    assert_eq!(events.json().await["reason"], "disabled");
}

async fn a_worker_ends_streams_as_it_ends_connections(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut announced = instance.follow("agent:agent:sessions").await;
    let mut first = Events::session(&instance, "s", &[]).await;
    let first_id = announced.json().await["connection_id"].as_str().unwrap().to_owned();
    let mut second = Events::session(&instance, "s", &[("Accept-Encoding", "gzip")]).await;
    let mut socket = instance.client("s").await;
    instance.publish("session:s:control", "{\"op\":\"dance\"}");
    let one =
        json!({ "op": "close", "code": 4321, "reason": "you\n\nid: 1", "connection_id": first_id });
    instance.publish("session:s:down", "before");
    instance.publish("session:s:control", one.to_string());
    instance.publish("session:s:down", "after");
    assert_eq!(first.data().await, "before");
    assert_eq!(first.closed().await, (4321, "you\n\nid: 1".into()));
    assert_eq!((second.data().await, second.data().await), ("before".into(), "after".into()));
    instance.publish("session:s:control", r#"{"op":"close"}"#);
    assert_eq!(second.closed().await, (4004, "ended by the backend".into()));
    assert_eq!((socket.text().await, socket.text().await), ("before".into(), "after".into()));
    assert_eq!(socket.closed().await.0, 4004);
    eventually("all are counted", || instance.ended("sessions", "backend") == 3.0).await;
    assert_eq!(
        instance.metric("wsproxy_message_errors_total{endpoint=\"sessions\",kind=\"bad_command\"}"),
        3.0
    );
    drop(announced);
    instance.wait_empty().await;
}

async fn streams_are_announced_as_what_they_are(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut announced = instance.follow("agent:agent:sessions").await;
    let mut events = Events::session(&instance, "s", &[]).await;
    let opened = announced.json().await;
    assert_eq!((&opened["event"], &opened["transport"]), (&json!("opened"), &json!("sse")));
    let active = || instance.metric("wsproxy_active_event_streams{endpoint=\"sessions\"}");
    assert_eq!(active(), 1.0);
    assert_eq!(instance.metric("wsproxy_active_connections{endpoint=\"sessions\"}"), 1.0);
    instance.publish("session:s:down", "12345");
    assert_eq!(events.data().await, "12345");
    let bytes = events.body_bytes;
    drop(events);
    let closed = announced.json().await;
    for key in ["agent_id", "session_id", "server_id", "connection_id", "transport"] {
        assert_eq!(closed[key], opened[key]);
    }
    assert_eq!((&closed["reason"], &closed["code"]), (&json!("gone"), &json!(1006)));
    assert_eq!((&closed["messages_out"], &closed["bytes_out"]), (&json!(1), &json!(bytes)));
    assert_eq!((&closed["messages_in"], &closed["bytes_in"]), (&json!(0), &json!(0)));
    assert_eq!(instance.metric("wsproxy_messages_sent_total{endpoint=\"sessions\"}"), 1.0);
    assert_eq!(instance.metric("wsproxy_event_streams_total{endpoint=\"sessions\"}"), 1.0);
    eventually("it is out of the gauge", || active() == 0.0).await;
    let client = instance.client("s").await;
    assert_eq!(announced.json().await["transport"], "websocket");
    client.close().await;
    assert_eq!(announced.json().await["transport"], "websocket");
}

async fn compressed_events_are_shared_and_whole(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    let instance = TestInstance::start(config).await;
    let big = json!({ "text": "all work and no play ".repeat(1000) }).to_string();
    let id = instance.keep("s", &big).await;
    let accepts = ("Accept-Encoding", "br, gzip;q=0.8");
    let mut early = Events::session(&instance, "s", &[accepts, ("Last-Event-ID", "0")]).await;
    assert_eq!(early.head.header("content-encoding"), "gzip");
    assert!(early.head.header("vary").contains("Accept-Encoding"));
    assert_eq!(early.json().await["type"], "resumed");
    assert_eq!(early.event().await.unwrap().id, Some(id));
    let mut late = Events::session(&instance, "s", &[accepts]).await;
    let mut plain = Events::session(&instance, "s", &[("Accept-Encoding", "gzip;q=0")]).await;
    assert_eq!(plain.head.header("content-encoding"), "");
    for n in 0..50 {
        let payload = if n % 2 == 0 { format!("small {n}") } else { big.clone() };
        instance.publish("session:s:down", payload.clone());
        for events in [&mut early, &mut late, &mut plain] {
            assert_eq!(events.data().await, payload);
        }
    }
    assert!(late.body_bytes * 20 < plain.body_bytes, "{} {}", late.body_bytes, plain.body_bytes);
    instance.publish("session:s:control", r#"{"op":"close"}"#);
    for events in [&mut early, &mut late, &mut plain] {
        assert_eq!(events.closed().await.0, 4004);
    }
}

#[tokio::test]
async fn other_requests_are_refused_as_before() {
    let instance = TestInstance::with(|_| ()).await;
    let token = instance.token("s").await;
    let path = format!("/agent/ws/s?token={token}");
    let ask = async |method: &str, path: &str, accept: &str| -> Response {
        let headers = [("Accept", accept)];
        http::request(instance.address(), method, path, &headers, b"").await
    };
    for accept in ["*/*", "text/*", "text/html,application/xhtml+xml"] {
        ask("GET", &path, accept).await.assert_refused(426, "upgrade_required");
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        ask(method, &path, "text/event-stream").await.assert_refused(405, "method_not_allowed");
    }
    // The answer to HEAD has the length of a body that it does not have.
    let mut raw = Raw::connect(instance.address()).await;
    let head = format!("HEAD {path} HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n");
    raw.write(head.as_bytes()).await;
    raw.read().await;
    assert!(raw.rest().starts_with(b"HTTP/1.1 405 "));
    ask("GET", "/agent/ws/s%20s?token=x", "text/event-stream").await.assert_refused(400, "bad_id");
    for parameter in ["resume=frame", "last_event_id=a%20b"] {
        let refused = ask("GET", &format!("{path}&{parameter}"), "text/event-stream").await;
        refused.assert_refused(400, "bad_request");
    }
    let body = http::request(
        instance.address(),
        "GET",
        &path,
        &[("Accept", "text/event-stream")],
        b"a body",
    )
    .await;
    body.assert_refused(400, "bad_request");
    instance.wait_empty().await;
    let instance = TestInstance::with(|config| config.sse.enabled = false).await;
    let answer =
        http::request(instance.address(), "GET", &path, &[("Accept", "text/event-stream")], b"")
            .await;
    answer.assert_refused(426, "upgrade_required");
}

/// Some proxies ask in the older version, which has no chunks: there the end of the connection is the end.
#[tokio::test]
async fn a_client_of_http_1_0_is_served_without_chunks() {
    let instance = TestInstance::with(|_| ()).await;
    let mut raw = Raw::connect(instance.address()).await;
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    raw.write(format!("GET {path} HTTP/1.0\r\nAccept: text/event-stream\r\n\r\n").as_bytes()).await;
    let head = raw.response().await;
    assert_eq!((head.status, head.header("transfer-encoding")), (200, ""));
    assert_eq!(head.header("connection"), "close");
    instance.publish("session:s:down", "1");
    instance.publish("session:s:control", r#"{"op":"close"}"#);
    while raw.read().await > 0 {}
    let expected = "data: 1\n\n\
        event: close\ndata: {\"code\":4004,\"reason\":\"ended by the backend\"}\n\n";
    let body = String::from_utf8_lossy(raw.rest()).into_owned();
    let (retry, rest) = body.split_once('\n').unwrap();
    assert_eq!((&retry[..7], rest), ("retry: ", expected));
}

#[tokio::test]
async fn limits_count_streams_and_connections_together() {
    let instance = TestInstance::with(|config| {
        config.limits.max_connections = 2;
        config.rate_limit.max_requests = 4;
    })
    .await;
    let path = format!("/agent/ws/s?token={}", instance.stream_token("s").await);
    let _first = Events::open(instance.address(), &path, &[]).await.unwrap();
    let _second = instance.client("other").await;
    let full = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    full.assert_refused(503, "full");
    Events::open(instance.address(), &path, &[]).await.err().unwrap();
    let often = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    often.assert_refused(429, "rate_limited");
}

#[tokio::test]
async fn pages_of_other_origins_are_told_what_they_may_do() {
    let instance = TestInstance::with(|config| {
        config.server.allowed_origins =
            vec!["https://app.example".parse().unwrap(), "https://*.example.org".parse().unwrap()];
    })
    .await;
    let token = instance.stream_token("s").await;
    let path = format!("/agent/ws/s?token={token}");
    for origin in ["https://app.example", "https://a.example.org"] {
        let headers = [("Origin", origin)];
        let events = Events::open(instance.address(), &path, &headers).await.unwrap();
        assert_eq!(events.head.header("access-control-allow-origin"), origin);
        assert_eq!(events.head.header("access-control-allow-credentials"), "true");
        assert!(events.head.header("vary").contains("Origin"));
        // A page can tell why it is refused.
        let refused = Events::open(instance.address(), "/agent/ws/s?token=x", &headers).await;
        let refused = refused.err().unwrap();
        refused.assert_refused(403, "invalid_token");
        assert_eq!(refused.header("access-control-allow-origin"), origin);
        assert_eq!(refused.header("access-control-expose-headers"), "Retry-After");
    }
    let other = [("Origin", "https://evil.example")];
    let refused = Events::open(instance.address(), &path, &other).await.err().unwrap();
    refused.assert_refused(403, "origin_not_allowed");
    assert_eq!(refused.header("access-control-allow-origin"), "");
    let preflight = async |instance: &TestInstance, origin| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "GET"),
            ("Access-Control-Request-Headers", "authorization,last-event-id,traceparent"),
        ];
        http::request(instance.address(), "OPTIONS", "/agent/ws/s", &headers, b"").await
    };
    let granted = preflight(&instance, "https://app.example").await;
    assert_eq!(granted.status, 204);
    assert_eq!(granted.header("access-control-allow-origin"), "https://app.example");
    assert_eq!(granted.header("access-control-allow-methods"), "GET");
    let headers = granted.header("access-control-allow-headers").to_ascii_lowercase();
    for name in ["authorization", "last-event-id", "traceparent", "tracestate", "baggage"] {
        assert!(headers.split(", ").any(|allowed| allowed == name), "{name}: {headers}");
    }
    let refused = preflight(&instance, "https://evil.example").await;
    refused.assert_refused(405, "method_not_allowed");
    assert_eq!(refused.header("access-control-allow-origin"), "");

    // Where any origin may come, none of them gets credentials.
    let instance = TestInstance::with(|_| ()).await;
    let granted = preflight(&instance, "https://any.example").await;
    assert_eq!(granted.header("access-control-allow-origin"), "https://any.example");
    assert_eq!(granted.header("access-control-allow-credentials"), "");
    let events = Events::session(&instance, "s", &[]).await;
    assert_eq!(events.head.header("access-control-allow-origin"), "");
}

#[tokio::test]
async fn silence_is_broken_by_comments_and_ends_where_that_is_wanted() {
    let instance = TestInstance::with(|config| {
        config.sse.keep_alive = Duration::from_millis(100);
        config.sse.retry = Duration::from_millis(2500);
        config.heartbeat.idle_timeout = Duration::from_millis(1000);
    })
    .await;
    let mut events = Events::session(&instance, "s", &[("Accept-Encoding", "gzip")]).await;
    assert!((1250..3750).contains(&events.retry().await));
    assert_eq!(events.line().await, ":");
    instance.publish("session:s:down", "1");
    assert_eq!(events.data().await, "1");
    let last = events.block().await.unwrap();
    let comments = last.matches(":\n").count();
    let last = last.trim_start_matches(":\n");
    assert_eq!(last, "event: close\ndata: {\"code\":4003,\"reason\":\"idle timeout\"}");
    assert!((3..=10).contains(&comments), "{comments}");
    assert_eq!(events.block().await, None);
    instance.wait_ended("sessions", "idle_timeout").await;
}

#[tokio::test]
async fn headers_of_others_are_passed_over() {
    let instance = TestInstance::with(|_| ()).await;
    for headers in [
        // A browser sends it with every request behind a proxy with a password.
        &[("Authorization", "Basic eDp5")][..],
        // Java's client would rather speak HTTP/2.
        &[
            ("Connection", "Upgrade, HTTP2-Settings"),
            ("Upgrade", "h2c"),
            ("HTTP2-Settings", "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"),
        ],
    ] {
        let mut events = Events::session(&instance, "s", headers).await;
        instance.publish("session:s:down", "1");
        assert_eq!(events.data().await, "1");
    }
    let path = format!("/agent/ws/s?token={}", instance.token("s").await);
    let headers = [("Authorization", "Basic eDp5".to_owned())];
    assert!(Client::connect(instance.address(), &path, &headers).await.is_ok());
    let websocket = [("Accept", "text/event-stream"), ("Upgrade", "h2c, WebSocket")];
    let answer = http::request(instance.address(), "GET", &path, &websocket, b"").await;
    answer.assert_refused(426, "upgrade_required");
}

/// Else all those that lost their instance in one moment come back in one moment.
#[tokio::test]
async fn every_client_is_told_another_time_to_come_back() {
    let instance = TestInstance::with(|config| config.sse.retry = Duration::from_secs(10)).await;
    let mut told = Vec::new();
    for n in 0..20 {
        let mut events = Events::session(&instance, &format!("s{n}"), &[]).await;
        told.push(events.retry().await);
    }
    assert!(told.iter().all(|retry| (5000..15_000).contains(retry)), "{told:?}");
    let below = told.iter().filter(|retry| **retry < 10_000).count();
    assert!((1..20).contains(&below), "{told:?}");
    told.sort_unstable();
    told.dedup();
    assert!(told.len() > 15, "{told:?}");
}

#[tokio::test]
async fn streams_are_told_of_a_loss_of_the_bus_or_closed_for_it() {
    for on_loss in [OnBusLoss::Notice, OnBusLoss::Close] {
        let mut server = RedisServer::start();
        let mut config = config(Some(&server.url()));
        config.sessions.on_bus_loss = on_loss;
        let instance = TestInstance::start(config).await;
        let mut events = Events::session(&instance, "s", &[("Accept-Encoding", "gzip")]).await;
        server.kill();
        server.restart();
        match on_loss {
            OnBusLoss::Notice => assert_eq!(events.json().await["type"], "bus_recovered"),
            OnBusLoss::Close => assert_eq!(events.closed().await, (1012, "bus lost".into())),
        }
    }
}
