//! Credentials of sessions: where they are found, and that each works once, whatever else happens.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use http::StatusCode;
use wsproxy::auth::session::{TokenScope, issue};

use crate::support::{
    client::Client,
    fault_proxy::{FaultProxy, Faults},
    gateway::{Backend, TestInstance, bearer, id, over_both},
    raw::{Raw, UPGRADE},
    redis_server::{Answer, RedisServer},
    sse::Events,
};

over_both!(
    a_token_works_once,
    a_wrong_token_is_refused_and_burns_nothing,
    of_two_handshakes_with_one_token_exactly_one_wins,
    a_token_opens_one_connection_or_one_event_stream,
    of_many_handshakes_of_both_kinds_exactly_one_wins,
    an_event_stream_token_opens_event_streams_only,
    a_removed_event_stream_token_opens_nothing_more,
    a_bound_token_opens_its_agents_path_only,
);

async fn a_token_works_once(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let token = instance.token("s").await;
    let mut client = instance.connect("s", &token).await.unwrap();
    assert!(!instance.has_token("s").await);
    instance.refused("s", &token).await.assert_refused(403, "invalid_token");
    let token = instance.token("s").await;
    instance.refused("other", &token).await.assert_refused(403, "invalid_token");
    assert_eq!(instance.refusals("invalid_token"), 2.0);
    instance.assert_serves(&mut client, "s").await;
}

async fn a_wrong_token_is_refused_and_burns_nothing(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let token = instance.token("s").await;
    let shorter = &token[1..];
    let longer = format!("{token}x");
    for wrong in ["x", shorter, &longer, &token.to_lowercase()] {
        instance.refused("s", wrong).await.assert_refused(403, "invalid_token");
    }
    assert_eq!(instance.refusals("invalid_token"), 4.0);
    assert!(instance.connect("s", &token).await.is_ok());
    instance.refused("none-was-made", "x").await.assert_refused(403, "invalid_token");
}

async fn of_two_handshakes_with_one_token_exactly_one_wins(backend: Backend) {
    let first = TestInstance::start(backend.config()).await;
    // With the embedded bus there is one instance only.
    let second = match backend {
        Backend::Memory => None,
        _ => Some(TestInstance::start(backend.config()).await),
    };
    let second = second.as_ref().unwrap_or(&first);
    for _ in 0..50 {
        let token = first.token("s").await;
        let (one, other) = tokio::join!(first.connect("s", &token), second.connect("s", &token));
        let refused = match (one, other) {
            (Ok(_), Err(status)) | (Err(status), Ok(_)) => status,
            (one, other) => panic!("{:?} {:?}", one.err(), other.err()),
        };
        assert_eq!(refused, StatusCode::FORBIDDEN);
    }
    let total: f64 = [&first, second].iter().map(|i| i.refusals("invalid_token")).sum();
    assert_eq!(total, if std::ptr::eq(&first, second) { 100.0 } else { 50.0 });
    first.wait_empty().await;
    second.wait_empty().await;
}

async fn a_token_opens_one_connection_or_one_event_stream(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let token = instance.token("s").await;
    let wrong = Events::open(instance.address(), "/agent/ws/s?token=wrong", &[]).await;
    wrong.err().unwrap().assert_refused(403, "invalid_token");
    let path = format!("/agent/ws/s?token={token}");
    let mut events = Events::open(instance.address(), &path, &[]).await.unwrap();
    assert!(!instance.has_token("s").await, "it is used up when the answer begins");
    // Who reads the URL in a log can neither send nor listen.
    instance.refused("s", &token).await.assert_refused(403, "invalid_token");
    let again = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    again.assert_refused(403, "invalid_token");
    instance.publish("session:s:down", "1");
    assert_eq!(events.data().await, "1");

    let token = instance.token("s").await;
    let _client = instance.connect("s", &token).await.unwrap();
    let path = format!("/agent/ws/s?token={token}");
    let again = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    again.assert_refused(403, "invalid_token");
}

async fn of_many_handshakes_of_both_kinds_exactly_one_wins(backend: Backend) {
    let first = TestInstance::start(backend.config()).await;
    // With the embedded bus there is one instance only.
    let second = match backend {
        Backend::Memory => None,
        _ => Some(TestInstance::start(backend.config()).await),
    };
    let instances = [&first, second.as_ref().unwrap_or(&first)];
    for round in 0..20 {
        let scope =
            TokenScope { agent: (round % 2 == 0).then(|| id("agent")), event_stream: false };
        let token = first.token_for("s", &scope).await;
        let path = format!("/agent/ws/s?token={token}");
        let handshakes = (0..8).map(|n| {
            let (instance, token, path) = (instances[n % 2], &token, &path);
            async move {
                if n / 2 % 2 == 0 {
                    instance
                        .connect("s", token)
                        .await
                        .map_or_else(|status| status.as_u16(), |_| 101)
                } else {
                    let opened = Events::open(instance.address(), path, &[]).await;
                    opened.map_or_else(|refused| refused.status, |events| events.head.status)
                }
            }
        });
        let statuses = join_all(handshakes).await;
        let won = statuses.iter().filter(|status| matches!(status, 101 | 200)).count();
        let lost = statuses.iter().filter(|status| **status == 403).count();
        assert_eq!((won, lost), (1, 7), "{statuses:?}");
    }
}

async fn an_event_stream_token_opens_event_streams_only(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let token = instance.stream_token("s").await;
    let path = format!("/agent/ws/s?token={token}");
    for _ in 0..3 {
        Events::open(instance.address(), &path, &[]).await.unwrap();
        instance.refused("s", &token).await.assert_refused(403, "invalid_token");
    }
    let authorization = format!("Bearer {token}");
    let header = [("Authorization", authorization.as_str())];
    Events::open(instance.address(), "/agent/ws/s", &header).await.unwrap();
    let refused =
        async |path: &str| Events::open(instance.address(), path, &[]).await.err().unwrap();
    refused("/agent/ws/s").await.assert_refused(401, "missing_credentials");
    refused("/agent/ws/s?token=sse.wrong").await.assert_refused(403, "invalid_token");
    refused(&format!("/agent/ws/other?token={token}")).await.assert_refused(403, "invalid_token");
    assert!(instance.has_token("s").await);
    // No matter which worker made it, and also where the worker bound it.
    let key = instance.gateway().names.session_auth(&id("s"));
    let store = async |value: &str| {
        let ttl = Duration::from_secs(60);
        instance.gateway().store.save(&key, value.as_bytes(), ttl).await.unwrap();
    };
    for value in ["sse.of-a-worker", "agent/agent sse.of-a-worker"] {
        store(value).await;
        instance.refused("s", "sse.of-a-worker").await.assert_refused(403, "invalid_token");
        for _ in 0..2 {
            let path = "/agent/ws/s?token=sse.of-a-worker";
            Events::open(instance.address(), path, &[]).await.unwrap();
        }
    }
    instance.wait_empty().await;
}

async fn a_removed_event_stream_token_opens_nothing_more(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let token = instance.stream_token("s").await;
    let path = format!("/agent/ws/s?token={token}");
    let mut events = Events::open(instance.address(), &path, &[]).await.unwrap();
    let key = instance.gateway().names.session_auth(&id("s"));
    assert_eq!(instance.gateway().store.remove(&key).await, Ok(true));
    instance.publish("session:s:control", r#"{"op":"close"}"#);
    assert_eq!(events.closed().await.0, 4004);
    let again = Events::open(instance.address(), &path, &[]).await.err().unwrap();
    again.assert_refused(403, "invalid_token");
}

async fn a_bound_token_opens_its_agents_path_only(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let connect = async |agent: &str, token: &str| {
        let path = format!("/{agent}/ws/s");
        Client::connect(instance.address(), &path, &bearer(token)).await
    };
    let bound = TokenScope { agent: Some(id("a-1")), event_stream: false };
    let token = instance.token_for("s", &bound).await;
    for other in ["a-2", "a-", "a-1x"] {
        assert_eq!(connect(other, &token).await.err(), Some(StatusCode::FORBIDDEN), "{other}");
    }
    // What the store holds is not what a client shows.
    let stored = format!("agent/a-1 {token}");
    assert_eq!(connect("a-1", &stored).await.err(), Some(StatusCode::FORBIDDEN));
    assert!(instance.has_token("s").await, "nothing of this used the token");
    assert!(connect("a-1", &token).await.is_ok());
    assert_eq!(connect("a-1", &token).await.err(), Some(StatusCode::FORBIDDEN));

    let bound = TokenScope { agent: Some(id("a-1")), event_stream: true };
    let token = instance.token_for("s", &bound).await;
    for _ in 0..2 {
        let path = format!("/a-1/ws/s?token={token}");
        Events::open(instance.address(), &path, &[]).await.unwrap();
        let path = format!("/a-2/ws/s?token={token}");
        let other = Events::open(instance.address(), &path, &[]).await.err().unwrap();
        other.assert_refused(403, "invalid_token");
    }
    // One that is not bound opens the session under any agent.
    assert!(connect("a-2", &instance.token("s").await).await.is_ok());
}

#[tokio::test]
async fn the_command_line_makes_tokens_of_every_kind() {
    let server = RedisServer::start();
    let make = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_wsproxy"));
        let command = command.args(["token", "s"]).args(args).env_clear();
        let output = command.env("REDIS_URL", server.url()).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    for (args, prefix, binding) in [
        (&[][..], "", ""),
        (&["--event-stream"], "sse.", ""),
        (&["--agent", "a-1"], "", "agent/a-1 "),
        (&["--agent", "a-1", "--event-stream"], "sse.", "agent/a-1 "),
    ] {
        let token = make(args);
        assert_eq!((token.len(), token.starts_with(prefix)), (prefix.len() + 43, true), "{token}");
        let stored = server.call(&["GET", "session:s:auth"]);
        assert_eq!(stored, Answer::Text(format!("{binding}{token}")));
    }
    assert_eq!(make(&["--agent", "a b"]), "");
}

#[tokio::test]
async fn a_token_may_come_as_header_subprotocol_or_query() {
    let instance = TestInstance::with(|_| ()).await;
    let connect = async |path: &str, headers: &[(&str, String)]| {
        Client::connect(instance.address(), path, headers).await.expect("it is accepted")
    };
    let token = instance.token("s").await;
    let client = connect(PATH, &bearer(&token)).await;
    assert!(!client.headers.contains_key("sec-websocket-protocol"));

    let token = instance.token("s").await;
    let protocols = format!("wsproxy.v1, bearer.{token}");
    let client = connect(PATH, &[("sec-websocket-protocol", protocols)]).await;
    assert_eq!(client.headers["sec-websocket-protocol"], "wsproxy.v1");

    let key = instance.gateway().names.session_auth(&id("s"));
    let odd = "blanks, commas & ümlauts";
    let save = async || {
        let ttl = Duration::from_secs(60);
        instance.gateway().store.save(&key, odd.as_bytes(), ttl).await.unwrap();
    };
    save().await;
    let protocols = format!("bearer64.{}, wsproxy.v1", URL_SAFE_NO_PAD.encode(odd));
    let client = connect(PATH, &[("sec-websocket-protocol", protocols)]).await;
    assert_eq!(client.headers["sec-websocket-protocol"], "wsproxy.v1");

    save().await;
    let encoded = "blanks%2c%20commas%20%26%20%C3%BCmlauts";
    let client = connect(&format!("{PATH}?a=b&token={encoded}&c"), &[]).await;
    assert!(!client.headers.contains_key("sec-websocket-protocol"));

    let token = instance.token("s").await;
    let both = [bearer(&token), [("sec-websocket-protocol", "wsproxy.v1, bearer.wrong".into())]];
    let client = connect(&format!("{PATH}?token=wrong"), &both.concat()).await;
    assert_eq!(client.headers["sec-websocket-protocol"], "wsproxy.v1");
}

#[tokio::test]
async fn missing_and_malformed_credentials_are_401_with_a_challenge() {
    let instance = TestInstance::with(|_| ()).await;
    let token = instance.token("s").await;
    let refuse = async |path: &str, headers: &[(&str, &str)], code: &str| {
        instance.handshake(path, headers).await.assert_refused(401, code);
    };
    refuse(PATH, &[], "missing_credentials").await;
    refuse("/agent/ws/s?tokens=x", &[], "missing_credentials").await;
    refuse(PATH, &[("sec-websocket-protocol", "chat")], "missing_credentials").await;
    refuse(PATH, &[("authorization", "Basic eDp5")], "missing_credentials").await;
    let header = format!("Bearer {token}");
    let (protocol, query) = (format!("bearer.{token}"), format!("{PATH}?token={token}&token=x"));
    let twice = format!("wsproxy.v1, {protocol}, {protocol}");
    let long = format!("Bearer {}", "x".repeat(8193));
    for (path, headers) in [
        (PATH, &[("authorization", "Bearer")][..]),
        (PATH, &[("authorization", &long)]),
        (PATH, &[("authorization", &header), ("authorization", &header)]),
        (PATH, &[("sec-websocket-protocol", &protocol)]),
        (PATH, &[("sec-websocket-protocol", &twice)]),
        (PATH, &[("sec-websocket-protocol", "wsproxy.v1, bearer64.%%%")]),
        (PATH, &[("sec-websocket-protocol", "wsproxy.v1, bearer.")]),
        (&query, &[]),
        ("/agent/ws/s?token=", &[]),
        ("/agent/ws/s?token=%ff", &[]),
    ] {
        refuse(path, headers, "malformed_credentials").await;
    }
    assert_eq!(instance.refusals("missing_credentials"), 4.0);
    assert_eq!(instance.refusals("malformed_credentials"), 10.0);
    assert!(instance.connect("s", &token).await.is_ok(), "nothing of this used the token");
    instance.wait_empty().await;
}

#[tokio::test]
async fn a_token_survives_a_handshake_that_failed_for_another_reason() {
    let instance = TestInstance::with(|config| {
        config.server.allowed_origins = vec!["https://app.example".parse().unwrap()];
        config.limits.max_connections = 1;
    })
    .await;
    let token = instance.token("s").await;
    let credential = format!("Authorization: Bearer {token}");
    for (change, status) in [
        ("Upgrade: websocket", 426),
        ("Connection: Upgrade", 426),
        ("Sec-WebSocket-Version: 13", 426),
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", 400),
    ] {
        let mut raw = Raw::connect(instance.address()).await;
        let headers = UPGRADE.replace(change, "X-Other: x");
        let head = format!("GET {PATH} HTTP/1.1\r\n{headers}{credential}\r\n\r\n");
        raw.write(head.as_bytes()).await;
        assert_eq!(raw.response().await.status, status, "without {change}");
    }
    let header = format!("Bearer {token}");
    let origin = [("authorization", header.as_str()), ("origin", "https://evil.example")];
    instance.handshake(PATH, &origin).await.assert_refused(403, "origin_not_allowed");
    let occupant = instance.echo().await;
    instance.refused("s", &token).await.assert_refused(503, "full");
    occupant.close().await;
    instance.wait_empty().await;
    let origin = [("authorization", header), ("origin", "https://app.example".into())];
    assert!(Client::connect(instance.address(), PATH, &origin).await.is_ok());
    assert_eq!(instance.refusals("origin_not_allowed"), 1.0);
}

#[tokio::test]
async fn a_token_survives_a_bus_that_does_not_answer_in_time() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let mut config = crate::support::gateway::config(Some(&server.url_on(proxy.port())));
    config.server.handshake_timeout = Duration::from_millis(1500);
    config.redis.response_timeout = Duration::from_secs(20);
    config.redis.probe_interval = Duration::from_secs(60);
    let instance = TestInstance::start(config).await;
    let mut other = instance.client("other").await;
    let token = instance.token("s").await;
    proxy.set(Faults { stall_down: true, ..Faults::default() });
    instance.refused("s", &token).await.assert_refused(504, "deadline");
    assert_eq!(instance.refusals("deadline"), 1.0);
    proxy.set(Faults::default());
    assert!(instance.has_token("s").await);
    assert!(instance.connect("s", &token).await.is_ok());
    instance.assert_serves(&mut other, "other").await;
}

#[tokio::test]
async fn an_expired_token_is_refused() {
    let instance = TestInstance::with(|_| ()).await;
    let key = instance.gateway().names.session_auth(&id("s"));
    let (store, ttl) = (&instance.gateway().store, Duration::from_millis(1));
    let token = issue(store, &key, ttl, &TokenScope::default()).await.unwrap();
    while instance.has_token("s").await {
        tokio::task::yield_now().await;
    }
    instance.refused("s", &token).await.assert_refused(403, "invalid_token");
}

const PATH: &str = "/agent/ws/s";
