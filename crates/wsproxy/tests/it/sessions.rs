//! Messages, commands and announcements of sessions, the same over both buses.

use std::time::Duration;

use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use wsproxy::config::{DownFrames, NoReceiver};

use crate::support::{
    eventually,
    gateway::{Backend, TestInstance, over_both},
};

over_both!(
    worker_messages_reach_the_client_verbatim_in_order,
    what_a_client_sends_is_published_verbatim_and_in_order,
    every_connection_of_a_session_gets_every_message,
    a_worker_ends_a_session_or_one_connection_of_it,
    commands_that_make_no_sense_are_counted_and_change_nothing,
    sessions_are_announced_with_what_they_came_to,
    an_unheard_message_is_an_error_if_configured,
    a_message_that_nobody_hears_is_ignored_where_that_is_wanted,
    a_message_that_nobody_hears_is_kept_where_that_is_wanted,
    a_prefix_keeps_deployments_apart,
);

async fn worker_messages_reach_the_client_verbatim_in_order(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut client = instance.client("s").await;
    for payload in ["", "no JSON at all", "{\"a\": 1 }\r\n", "\u{1f600}\0"] {
        instance.publish("session:s:down", payload);
        assert_eq!(client.text().await, payload);
    }
    instance.publish("session:s:down", vec![0xff, 0x00, 0xfe]);
    assert_eq!(client.next().await, Message::binary(vec![0xff, 0x00, 0xfe]));
    (0..500).for_each(|n| instance.publish("session:s:down", n.to_string()));
    for n in 0..500 {
        assert_eq!(client.text().await, n.to_string());
    }
    let large = "ä".repeat(300_000);
    instance.publish("session:s:down", large.clone());
    assert_eq!(client.text().await, large);
}

async fn what_a_client_sends_is_published_verbatim_and_in_order(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    let texts = [
        "{ \"a\" : [1, 2.50, 1e400],\"a\":null}\n",
        "\"\\ud83d\\ude00 text\"",
        "-0",
        "null",
        "123456789012345678901234567890",
    ];
    for text in texts {
        client.send(text).await;
        assert_eq!(worker.next().await, text);
    }
    client.send_message(Message::binary(b"[true]".to_vec())).await;
    assert_eq!(worker.next().await, "[true]");
    for n in 0..100 {
        client.send(n.to_string()).await;
    }
    for n in 0..100 {
        assert_eq!(worker.next().await, n.to_string());
    }
}

async fn every_connection_of_a_session_gets_every_message(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(instance.client("s").await);
    }
    let mut other = instance.client("other").await;
    instance.publish("session:s:down", "to all");
    for client in &mut clients {
        assert_eq!(client.text().await, "to all");
    }
    clients.pop().unwrap().close().await;
    instance.publish("session:s:down", "to those who stayed");
    for client in &mut clients {
        assert_eq!(client.text().await, "to those who stayed");
    }
    instance.publish("session:other:down", "to the other");
    assert_eq!(other.text().await, "to the other");
}

async fn a_worker_ends_a_session_or_one_connection_of_it(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut events = instance.follow("agent:agent:sessions").await;
    let mut first = instance.client("s").await;
    let first_id = events.json().await["connection_id"].as_str().unwrap().to_owned();
    let mut second = instance.client("s").await;
    let mut other = instance.client("other").await;
    let one = json!({ "op": "close", "code": 4321, "reason": "you", "connection_id": first_id });
    instance.publish("session:s:down", "before");
    instance.publish("session:s:control", one.to_string());
    assert_eq!(first.text().await, "before");
    assert_eq!(first.closed().await, (4321, "you".into()));
    assert_eq!(second.text().await, "before");
    instance.publish("session:s:control", r#"{"op":"close"}"#);
    assert_eq!(second.closed().await, (4004, "ended by the backend".into()));
    instance.assert_serves(&mut other, "other").await;
    eventually("both are counted", || instance.ended("sessions", "backend") == 2.0).await;
    let token = instance.token("s").await;
    assert!(instance.connect("s", &token).await.is_ok(), "a session that was ended may come back");
}

async fn commands_that_make_no_sense_are_counted_and_change_nothing(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut client = instance.client("s").await;
    let nonsense = [
        "no JSON",
        "{}",
        r#"{"op":"dance"}"#,
        r#"{"op":"close","code":1006}"#,
        r#"{"op":"close","code":70000}"#,
        r#"{"op":"close","cod":4000}"#,
        r#"{"op":"close","connection_id":"x"}"#,
    ];
    nonsense.iter().for_each(|text| instance.publish("session:s:control", *text));
    let unknown = r#"{"op":"close","connection_id":"00000000-0000-0000-0000-000000000000"}"#;
    instance.publish("session:s:control", unknown);
    eventually("nonsense is counted", || {
        instance.metric("wsproxy_message_errors_total{endpoint=\"sessions\",kind=\"bad_command\"}")
            == nonsense.len() as f64
    })
    .await;
    instance.assert_serves(&mut client, "s").await;
    let long = json!({ "op": "close", "reason": "ä".repeat(100) });
    instance.publish("session:s:control", long.to_string());
    let (code, reason) = client.closed().await;
    assert_eq!(code, 4004);
    assert!(reason.len() <= 123 && reason.chars().all(|c| c == 'ä'), "{reason}");
}

async fn sessions_are_announced_with_what_they_came_to(backend: Backend) {
    let mut config = backend.config();
    config.server.server_id = Some("instance-1".into());
    let instance = TestInstance::start(config).await;
    let mut events = instance.follow("agent:agent:sessions").await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    let opened = events.json().await;
    assert_eq!(opened["event"], "opened");
    for (key, value) in [("agent_id", "agent"), ("session_id", "s"), ("server_id", "instance-1")] {
        assert_eq!(opened[key], value);
    }
    assert!(opened["timestamp"].as_str().unwrap().contains('T'));
    client.send("[1]").await;
    client.send("[22]").await;
    assert_eq!((worker.next().await, worker.next().await), ("[1]".into(), "[22]".into()));
    instance.publish("session:s:down", "12345");
    assert_eq!(client.text().await, "12345");
    client.close().await;
    let closed = events.json().await;
    assert_eq!(closed["event"], "closed");
    for key in ["agent_id", "session_id", "server_id", "connection_id"] {
        assert_eq!(closed[key], opened[key]);
    }
    assert_eq!((&closed["reason"], &closed["code"]), (&json!("normal"), &json!(1005)));
    assert_eq!((&closed["messages_in"], &closed["bytes_in"]), (&json!(2), &json!(7)));
    assert_eq!(closed["messages_out"], 1);
    assert!(closed["bytes_out"].as_u64().unwrap() >= 5);
    assert!(closed["duration_ms"].is_u64());
    // One that leaves without a word is announced as well.
    let client = instance.client("gone").await;
    assert_eq!(events.json().await["event"], "opened");
    drop(client);
    let closed = events.json().await;
    assert_eq!((&closed["reason"], &closed["code"]), (&json!("gone"), &json!(1006)));
    instance.wait_ended("sessions", "gone").await;
}

async fn an_unheard_message_is_an_error_if_configured(backend: Backend) {
    let mut config = backend.config();
    config.sessions.no_receiver = NoReceiver::Error;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    client.send("1").await;
    let error = client.json().await;
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("no_receiver")));
    assert_eq!(instance.metric("wsproxy_messages_unheard_total{endpoint=\"sessions\"}"), 1.0);
    let mut worker = instance.follow("session:s:up").await;
    client.send("2").await;
    assert_eq!(worker.next().await, "2");
    instance.assert_serves(&mut client, "s").await;
}

async fn a_message_that_nobody_hears_is_ignored_where_that_is_wanted(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut client = instance.client("s").await;
    client.send("1").await;
    eventually("it is counted", || {
        instance.metric("wsproxy_messages_unheard_total{endpoint=\"sessions\"}") == 1.0
    })
    .await;
    // The next message that the client gets is not about it.
    instance.assert_serves(&mut client, "s").await;
}

async fn a_message_that_nobody_hears_is_kept_where_that_is_wanted(backend: Backend) {
    let mut config = backend.config();
    config.sessions.no_receiver = NoReceiver::Queue;
    config.sessions.up_log_entries_max = 5;
    config.sessions.up_log_ttl = Duration::from_secs(100);
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    client.send(r#"{"n":1}"#).await;
    client.send(r#"{"n":2}"#).await;
    let kept = "wsproxy_bus_publishes_kept_total";
    eventually("both are kept", || instance.metric(kept) == 2.0).await;
    let log = instance.gateway().store.read_log("{session:s:up}:log", "", 10).await.unwrap();
    let data: Vec<_> = log.iter().map(|entry| entry.data.to_vec()).collect();
    assert_eq!(data, [br#"{"n":1}"#.to_vec(), br#"{"n":2}"#.to_vec()]);
    if let Backend::Redis(server) = &backend {
        let ttl = server.call(&["TTL", "{session:s:up}:log"]).integer();
        assert!((90..=100).contains(&ttl), "{ttl}");
    }
    let mut worker = instance.follow("session:s:up").await;
    client.send("3").await;
    assert_eq!(worker.next().await, "3");
    assert_eq!(instance.metric(kept), 2.0);
}

async fn a_prefix_keeps_deployments_apart(backend: Backend) {
    let mut config = backend.config();
    config.redis.channel_prefix = "prod".into();
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    instance.publish("session:s:down", "of another deployment");
    instance.publish("prod:session:s:down", "ours");
    assert_eq!(client.text().await, "ours");
    if let Backend::Redis(server) = &backend {
        let token = instance.token("s").await;
        let stored = server.call(&["GET", "prod:session:s:auth"]);
        assert_eq!(stored, crate::support::redis_server::Answer::Text(token));
    }
}

#[tokio::test]
async fn messages_are_framed_as_configured() {
    for (frames, text_is_text) in [(DownFrames::Text, true), (DownFrames::Binary, false)] {
        let instance = TestInstance::with(|config| config.sessions.down_frames = frames).await;
        let mut client = instance.client("s").await;
        instance.publish("session:s:down", vec![0xc3]);
        instance.publish("session:s:down", "text");
        if text_is_text {
            assert_eq!(client.next().await, Message::text("text"));
            assert_eq!(instance.metric("wsproxy_messages_unframeable_total"), 1.0);
        } else {
            assert_eq!(client.next().await, Message::binary(vec![0xc3]));
            assert_eq!(client.next().await, Message::binary(b"text".to_vec()));
        }
    }
}

#[tokio::test]
async fn invalid_json_is_answered_until_strikes_are_used_up() {
    let instance = TestInstance::with(|config| config.sessions.strikes_max = 5).await;
    let mut worker = instance.follow("session:s:up").await;
    let mut other = instance.client("other").await;
    let mut client = instance.client("s").await;
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    for text in ["", "{\"a\":}", "{} {}", deep.as_str()] {
        client.send(text).await;
        let error = client.json().await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("invalid_json")));
        client.send("\"valid\"").await;
        assert_eq!(worker.next().await, "\"valid\"");
    }
    client.send_message(Message::binary(b"\"\xff\"".to_vec())).await;
    assert_eq!(client.closed().await, (1008, "too many invalid messages".into()));
    assert_eq!(
        instance.metric("wsproxy_message_errors_total{endpoint=\"sessions\",kind=\"invalid\"}"),
        5.0
    );
    instance.wait_ended("sessions", "strikes").await;
    instance.assert_serves(&mut other, "other").await;
}

#[tokio::test]
async fn strikes_can_be_switched_off_and_depth_has_a_clear_limit() {
    let instance = TestInstance::with(|config| {
        config.sessions.strikes_max = 0;
        config.limits.messages_per_second = 0;
    })
    .await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    for _ in 0..50 {
        client.send("x").await;
        assert_eq!(client.json().await["code"], "invalid_json");
    }
    let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    client.send(nested(128)).await;
    assert_eq!(worker.next().await, nested(128));
    client.send(nested(129)).await;
    let error = client.json().await;
    assert!(error["message"].as_str().unwrap().contains("too deep"), "{error}");
    client.send(nested(500_000)).await;
    assert_eq!(client.json().await["code"], "invalid_json");
}
