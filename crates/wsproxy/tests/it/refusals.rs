//! Refusals of Redis: the publish is certainly not done, and workers, clients and operators are told why.

use std::time::Duration;

use wsproxy::{
    bus::publish::Outcome,
    config::NoReceiver,
    store::{command::StoreError, not_done::NotDone},
};

use crate::support::{
    bus::{TestBus, config, kept_message},
    eventually,
    gateway::{self, TestInstance},
    redis_server::{Options, RedisServer},
};

fn set(server: &RedisServer, [name, value]: [&str; 2]) {
    server.call(&["CONFIG", "SET", name, value]);
}

#[tokio::test]
async fn refusals_are_known_without_traffic_and_end_without_it() {
    let bus = TestBus::redis();
    bus.ready().await;
    let server = bus.server.as_ref().unwrap();
    for (why, begin, end) in STATES {
        set(server, begin);
        eventually("the refusal is known", || bus.bus.status().refusal == Some(why)).await;
        set(server, end);
        eventually("its end is known", || bus.bus.status().refusal.is_none()).await;
    }
    assert_eq!(server.call(&["DBSIZE"]).integer(), 0, "the probe leaves nothing");
    assert_eq!(bus.bus.counters().links_lost.value(), 0);
}

#[tokio::test]
async fn what_is_refused_is_not_done_and_said_so() {
    let bus = TestBus::redis();
    bus.ready().await;
    let server = bus.server.as_ref().unwrap();
    for (n, (why, begin, end)) in STATES.into_iter().enumerate() {
        set(server, begin);
        let refused = bus.outcome(kept_message("up", "x", "log", 9)).await;
        assert_eq!(refused, Outcome::Refused(why));
        assert_eq!(bus.bus.status().refusal, Some(why));
        let saved = bus.store.save("key", b"x", Duration::from_secs(60)).await;
        assert!(matches!(saved, Err(StoreError::NotDone { refusal, .. }) if refusal == why));
        let taken = bus.store.take_if_equal("token", b"x").await;
        assert!(matches!(taken, Ok(false) | Err(StoreError::NotDone { .. })), "{taken:?}");
        set(server, end);
        assert_eq!(bus.outcome(kept_message("up", "x", "log", 9)).await, Outcome::Kept);
        let entries = bus.store.read_log("log", "", 9).await.unwrap().len();
        assert_eq!(entries, n + 1, "once for each that was kept");
        assert_eq!(bus.bus.counters().publish_refused[why as usize].value(), 1);
    }
    assert_eq!(bus.bus.counters().publish_lost.value(), 0);
}

#[tokio::test]
async fn a_denied_command_is_not_done() {
    let server = RedisServer::start();
    server.call(&["ACL", "SETUSER", "gateway", "on", ">pw", "~*", "&*", "+@all", "-eval"]);
    let url = format!("redis://gateway:pw@127.0.0.1:{}", server.port());
    let bus = TestBus::on(&config(Some(&url)));
    bus.ready().await;
    let refused = bus.outcome(kept_message("up", "x", "log", 9)).await;
    assert_eq!(refused, Outcome::Refused(NotDone::Permission));
    assert_eq!(bus.bus.status().refusal, None, "it says nothing about other writes");
}

#[tokio::test]
async fn workers_and_operators_are_told_why() {
    let server = RedisServer::start();
    let mut config = gateway::config(Some(&server.url()));
    config.sessions.history = true;
    let instance = TestInstance::start(config).await;
    let token = instance.token("s").await;
    for (why, begin, end) in STATES {
        set(&server, begin);
        for (path, body) in [
            ("/api/v1/sessions/s/messages?history=true", "1"),
            ("/api/v1/sessions/s/streams/a", r#"{"op":"open"}"#),
            ("/api/v1/sessions/t/token", ""),
        ] {
            let answer = instance.api("POST", path, body).await;
            answer.assert_refused(503, "not_done");
            let error = &answer.json()["error"];
            assert_eq!(error["retryable"], true, "{path}");
            assert_eq!(error["message"], format!("Not done: {}.", why.reason()));
        }
        if why == NotDone::Replicas {
            // A client is not told how the store is. (A full store still gives tokens away.)
            let refused = instance.refused("s", &token).await;
            refused.assert_refused(503, "not_done");
            assert!(!refused.body.contains(why.reason()), "{refused:?}");
        }
        let ready = instance.get("/ready").await;
        assert_eq!((ready.status, &ready.json()["reason"]), (503, &"bus_refuses_writes".into()));
        let health = instance.api("GET", "/health", "").await.json();
        assert_eq!(health["bus"]["error"], why.reason());
        assert_eq!(instance.metric("wsproxy_bus_writable"), 0.0);
        set(&server, end);
        eventually("it is ready again", || instance.metric("wsproxy_bus_writable") == 1.0).await;
        assert_eq!(instance.get("/ready").await.status, 200);
    }
    assert!(instance.connect("s", &token).await.is_ok(), "the token was not used up");
    // The log of this session is none: nothing to wait for.
    server.call(&["SET", "{session:odd:down}:log", "x"]);
    let answer = instance.api("POST", "/api/v1/sessions/odd/messages?history=true", "1").await;
    answer.assert_refused(409, "not_done");
}

#[tokio::test]
async fn a_publish_in_doubt_is_retryable_only_with_a_key() {
    let mut server = RedisServer::start();
    let mut config = gateway::config(Some(&server.url()));
    config.server.handshake_timeout = Duration::from_millis(500);
    let instance = TestInstance::start(config).await;
    server.kill();
    eventually("the loss is noticed", || !instance.gateway().bus.status().connected).await;
    for (path, body, retryable) in [
        ("/api/v1/sessions/s/messages", "1", false),
        ("/api/v1/sessions/s/close", "", true),
        ("/api/v1/sessions/s/streams/a", r#"{"op":"append","text":"x"}"#, false),
        ("/api/v1/sessions/s/streams/a", r#"{"op":"append","text":"x","seq":1}"#, true),
    ] {
        let answer = instance.api("POST", path, body).await;
        assert_eq!(answer.status, 503);
        assert_eq!(answer.json()["error"]["retryable"], retryable, "{path} {body}");
    }
}

#[tokio::test]
async fn a_client_is_told_that_its_message_was_not_delivered() {
    let server = RedisServer::start_with(Options::default());
    let mut config = gateway::config(Some(&server.url()));
    config.sessions.no_receiver = NoReceiver::Queue;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    set(&server, STATES[0].1);
    client.send("1").await;
    let told = client.json().await;
    assert_eq!((&told["type"], &told["code"]), (&"error".into(), &"publish_refused".into()));
    assert_eq!(
        instance.metric("wsproxy_message_errors_total{endpoint=\"sessions\",kind=\"refused\"}"),
        1.0
    );
    set(&server, STATES[0].2);
    client.send("2").await;
    eventually("the next one is kept", || {
        server.call(&["XLEN", "{session:s:up}:log"]).integer() == 1
    })
    .await;
}

/// Settings that make Redis refuse writes, and take them again.
const STATES: [(NotDone, [&str; 2], [&str; 2]); 2] = [
    (NotDone::Memory, ["maxmemory", "1000"], ["maxmemory", "0"]),
    (NotDone::Replicas, ["min-replicas-to-write", "1"], ["min-replicas-to-write", "0"]),
];
