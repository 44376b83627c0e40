//! Clients of the event endpoint: who they are, what reaches them, what they say, how long they stay.

use std::time::{Duration, Instant};

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use wsproxy::{config::Config, registry::control::Target};

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{Backend, TestInstance, bearer, id, over_both},
    issuer::now,
};

mod acks;
mod many;

use many::a_message_to_many_gives_way_and_keeps_its_place;

over_both!(
    the_first_message_says_who_is_connected_to_what,
    messages_reach_all_clients_a_user_or_a_connection,
    tokens_come_from_three_places_and_refusals_differ,
    a_client_whose_application_is_silent_is_closed,
    what_a_client_says_goes_up_verbatim,
    nonsense_is_answered_and_then_ends_the_connection,
    a_connection_ends_when_its_token_expires,
    a_newer_token_keeps_the_connection,
    one_last_id_resumes_all_channels_in_their_order,
    the_first_frame_may_say_where_to_resume,
    without_history_messages_are_live_only,
    connected_users_are_listed_and_can_be_disconnected,
    revoked_tokens_are_refused_at_the_door_and_later,
    a_token_from_a_clock_ahead_is_revoked,
    a_revocation_is_as_long_as_asked_or_refused,
    closed_connections_leave_nothing,
    a_message_to_many_gives_way_and_keeps_its_place,
);

fn token(user: &str, life: i64) -> String {
    sign(&json!({ "sub": user, "exp": now().saturating_add_signed(life) }), SECRET)
}

fn sign(claims: &Value, secret: &str) -> String {
    let key = EncodingKey::from_secret(secret.as_bytes());
    jsonwebtoken::encode(&Header::default(), claims, &key).unwrap()
}

async fn start(backend: &Backend) -> TestInstance {
    start_with(backend, |_| ()).await
}

async fn start_with(backend: &Backend, change: impl FnOnce(&mut Config)) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.secret_key = Some(SECRET.into());
    config.events.ack_interval = Duration::from_millis(300);
    // So that nothing is given up while a busy machine takes its time.
    config.events.ack_tries = 100;
    change(&mut config);
    TestInstance::start(config).await
}

/// A client that has read its first message.
struct Connected {
    client: Client,
    hello: Value,
}

async fn connect_with(instance: &TestInstance, user: &str, parameters: &str) -> Connected {
    let path = format!("/ws?token={}{parameters}", token(user, LIFE));
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    let hello = client.json().await;
    assert_eq!(hello["type"], "connected");
    Connected { client, hello }
}

async fn connect(instance: &TestInstance, user: &str) -> Client {
    connect_with(instance, user, "").await.client
}

/// Publishes an event with history; answers its id.
async fn send(instance: &TestInstance, to: &str, event: &Value) -> String {
    let path = format!("/api/v1/events/{to}");
    let response = instance.api("POST", &path, &event.to_string()).await;
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["event_id"].as_str().unwrap().to_owned()
}

fn event(n: u32) -> Value {
    json!({ "type": "task_status_update", "data": { "n": n } })
}

async fn the_first_message_says_who_is_connected_to_what(backend: Backend) {
    let instance = start(&backend).await;
    let before = now();
    let Connected { client: _client, hello } = connect_with(&instance, "u-1", "").await;
    assert_eq!(hello["user_id"], "u-1");
    assert_eq!(hello["server_id"], *instance.gateway().server_id);
    let connection = hello["connection_id"].as_str().unwrap();
    assert!(connection.parse::<uuid::Uuid>().is_ok(), "{hello}");
    assert_eq!(hello["heartbeat"], json!({ "interval": 30, "timeout": 60 }));
    let expires_at = hello["expires_at"].as_u64().unwrap();
    assert!((before + 600..before + 630).contains(&expires_at), "{hello}");
    let position = hello["event_id"].as_str().unwrap();
    assert!(position.contains('-') && hello["timestamp"].is_string(), "{hello}");
}

async fn messages_reach_all_clients_a_user_or_a_connection(backend: Backend) {
    let instance = start(&backend).await;
    let mut one = connect_with(&instance, "u-1", "").await;
    let mut other = connect(&instance, "u-1").await;
    let mut stranger = connect(&instance, "u-2").await;
    let id = send(&instance, "broadcast", &event(1)).await;
    for client in [&mut one.client, &mut other, &mut stranger] {
        let message = client.json().await;
        assert_eq!((&message["event_id"], &message["data"]["n"]), (&json!(id), &json!(1)));
        assert_eq!(message["type"], "task_status_update");
        assert!(message["timestamp"].is_string(), "{message}");
    }
    send(&instance, "users/u-1", &event(2)).await;
    let connection = one.hello["connection_id"].as_str().unwrap();
    send(&instance, &format!("connections/{connection}"), &event(3)).await;
    // What workers publish by themselves is delivered as it is.
    instance.publish("ws:broadcast", r#"{"type":"plain" }"#);
    assert_eq!(one.client.json().await["data"]["n"], 2);
    assert_eq!(one.client.json().await["data"]["n"], 3);
    assert_eq!(one.client.text().await, r#"{"type":"plain" }"#);
    assert_eq!(other.json().await["data"]["n"], 2);
    assert_eq!(other.text().await, r#"{"type":"plain" }"#);
    assert_eq!(stranger.text().await, r#"{"type":"plain" }"#);
}

async fn tokens_come_from_three_places_and_refusals_differ(backend: Backend) {
    let instance = start(&backend).await;
    let good = token("u-1", LIFE);
    let protocols = [("sec-websocket-protocol", format!("wsproxy.v1, bearer.{good}"))];
    for (path, headers) in [
        ("/ws", bearer(&good)),
        ("/ws", protocols),
        (&*format!("/ws?token={good}"), [("x-none", String::new())]),
    ] {
        let mut client = Client::connect(instance.address(), path, &headers).await.unwrap();
        assert_eq!(client.json().await["user_id"], "u-1");
    }
    let refused = async |token: &str| {
        instance.handshake("/ws", &[("authorization", &format!("Bearer {token}"))]).await
    };
    let exp = now() + 60;
    refused("no.jwt").await.assert_refused(401, "malformed_credentials");
    instance.handshake("/ws", &[]).await.assert_refused(401, "missing_credentials");
    let forged = sign(&json!({ "sub": "u-1", "exp": exp }), "another secret of 32 bytes, or so");
    refused(&forged).await.assert_refused(403, "invalid_token");
    refused(&token("u-1", -60)).await.assert_refused(403, "invalid_token");
    for claims in [
        json!({ "sub": "u-1" }),
        json!({ "sub": "a:b", "exp": exp }),
        json!({ "sub": "u", "exp": exp, "nbf": exp }),
    ] {
        refused(&sign(&claims, SECRET)).await.assert_refused(403, "invalid_token");
    }
    instance.wait_empty().await;
    let refused = "wsproxy_handshakes_total{endpoint=\"events\",outcome=\"invalid_token\"}";
    assert_eq!(instance.metric(refused), 5.0);
}

async fn a_client_whose_application_is_silent_is_closed(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.heartbeat.interval = Duration::from_millis(500);
        config.heartbeat.timeout = Duration::from_millis(2500);
    })
    .await;
    let mut alive = connect(&instance, "u-1").await;
    let start = Instant::now();
    let mut silent = connect(&instance, "u-1").await;
    let reading = async {
        let mut pings = 0;
        loop {
            match silent.next().await {
                Message::Text(text) => {
                    let ping: Value = serde_json::from_str(&text).unwrap();
                    assert_eq!(ping["type"], "ping");
                    pings += 1;
                    // A frame, but no word of the application.
                    silent.send_message(Message::Ping("x".into())).await;
                }
                Message::Pong(_) => {}
                Message::Close(Some(close)) => break (u16::from(close.code), pings),
                other => panic!("{other:?}"),
            }
        }
    };
    let answering = async {
        loop {
            assert_eq!(alive.json().await["type"], "ping");
            alive.send(r#"{"type":"pong"}"#).await;
        }
    };
    let (code, pings) = tokio::select! { end = reading => end, () = answering => unreachable!() };
    assert_eq!(code, 4002);
    assert!(start.elapsed() >= Duration::from_millis(2400), "{:?}", start.elapsed());
    assert!((2..=5).contains(&pings), "{pings} pings");
    drop(silent);
    instance.wait_ended("events", "heartbeat_timeout").await;
    alive.send(r#"{"type":"ping"}"#).await;
    while alive.json().await["type"] != "pong" {}
}

/// A page with a bare `WebSocket` never answers pings: it is closed every minute, and the log says why.
#[tokio::test]
async fn the_log_says_that_no_ping_was_answered() {
    let binary = Binary::start(&[
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
        ("SECRET_KEY", SECRET),
        ("WSPROXY_HEARTBEAT__INTERVAL", "300ms"),
        ("WSPROXY_HEARTBEAT__TIMEOUT", "1s"),
    ])
    .await;
    let path = format!("/ws?token={}", token("u-1", LIFE));
    let mut page = Client::connect(binary.address, &path, &[]).await.unwrap();
    while !matches!(page.next().await, Message::Close(_)) {}
    let line = binary.line("Connection closed.").await;
    assert_eq!((&line["reason"], &line["code"]), (&"heartbeat_timeout".into(), &4002.into()));
    assert!((1000..10_000).contains(&line["duration_ms"].as_u64().unwrap()), "{line}");
    assert!(line["error"].as_str().unwrap().contains(r#"{"type":"pong"}"#), "{line}");
}

async fn what_a_client_says_goes_up_verbatim(backend: Backend) {
    let instance = start(&backend).await;
    let mut worker = instance.follow("ws:up").await;
    let Connected { mut client, hello } = connect_with(&instance, "u-1", "").await;
    let message = "{ \"type\" : \"x\",\n\"n\":1.50, \"t\":\"\\u00e9\u{e9}\" }";
    client.send(r#"{"type":"pong"}"#).await;
    client.send(message).await;
    let received = worker.next().await;
    assert!(received.contains(message), "{received}");
    let received: Value = serde_json::from_str(&received).unwrap();
    assert_eq!(received["user_id"], "u-1");
    assert_eq!(received["connection_id"], hello["connection_id"]);
    for n in 0..100 {
        client.send(format!(r#"{{"n":{n}}}"#)).await;
    }
    for n in 0..100 {
        assert_eq!(worker.json().await["message"]["n"], n);
    }
}

async fn nonsense_is_answered_and_then_ends_the_connection(backend: Backend) {
    let instance = start_with(&backend, |config| config.events.strikes_max = 3).await;
    let mut worker = instance.follow("ws:up").await;
    let mut client = connect(&instance, "u-1").await;
    for bad in ["[1]", "{\"a\""] {
        client.send(bad).await;
        assert_eq!(client.json().await["code"], "invalid_json");
    }
    client.send(r#"{"good":true}"#).await;
    assert_eq!(worker.json().await["message"], json!({ "good": true }));
    client.send("5").await;
    assert_eq!(client.closed().await.0, 1008);
}

async fn a_connection_ends_when_its_token_expires(backend: Backend) {
    let instance = start(&backend).await;
    let path = format!("/ws?token={}", token("u-1", 2));
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    let hello = client.json().await;
    eventually("the token has expired", || now() > hello["expires_at"].as_u64().unwrap()).await;
    let mut late = Client::connect(instance.address(), &path, &[]).await.unwrap();
    assert_eq!(late.json().await["type"], "connected");
    assert_eq!(client.closed().await, (4401, "credential expired".into()));
    // Not before the leeway of 5 s is over, for which a handshake takes the token too.
    let over = now() - hello["expires_at"].as_u64().unwrap();
    assert!((5..=12).contains(&over), "closed {over} s after exp");
    assert_eq!(late.closed().await, (4401, "credential expired".into()));
    instance.handshake(&path, &[]).await.assert_refused(403, "invalid_token");
    eventually("both ends are counted", || instance.ended("events", "expired") == 2.0).await;
}

async fn a_newer_token_keeps_the_connection(backend: Backend) {
    let instance = start(&backend).await;
    let path = format!("/ws?token={}", token("u-1", 5));
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    let end = client.json().await["expires_at"].as_u64().unwrap();
    let refresh = |token: &str| json!({ "type": "refresh", "token": token }).to_string();
    for bad in ["x", &token("u-1", -60), &sign(&json!({ "sub": "u-1" }), "no secret of ours")] {
        client.send(refresh(bad)).await;
        let error = client.json().await;
        assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!("invalid_token")));
        assert!(bad == "x" || !error.to_string().contains(bad));
    }
    client.send(refresh(&token("u-1", LIFE))).await;
    let refreshed = client.json().await;
    assert_eq!(refreshed["type"], "refreshed");
    assert!(refreshed["expires_at"].as_u64().unwrap() > end + 300, "{refreshed}");
    eventually("the old token has expired", || now() > end + 1).await;
    send(&instance, "users/u-1", &event(1)).await;
    assert_eq!(client.json().await["data"]["n"], 1);
    // A token of another user is no newer token of this user.
    client.send(refresh(&token("u-2", LIFE))).await;
    assert_eq!(client.closed().await.0, 4401);
}

async fn one_last_id_resumes_all_channels_in_their_order(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = connect(&instance, "u-1").await;
    let last = send(&instance, "users/u-1", &event(0)).await;
    assert_eq!(client.json().await["event_id"], last);
    client.close().await;
    for n in 1..=30 {
        let to = if n % 3 == 0 { "broadcast" } else { "users/u-1" };
        send(&instance, to, &event(n)).await;
        send(&instance, "users/u-2", &event(1000 + n)).await;
    }
    let parameters = format!("&last_event_id={last}");
    let Connected { mut client, hello } = connect_with(&instance, "u-1", &parameters).await;
    assert_eq!(hello.get("event_id"), None);
    let resumed = client.json().await;
    assert_eq!(resumed, json!({ "type": "resumed", "count": 30, "last_event_id": last }));
    for n in 1..=30 {
        assert_eq!(client.json().await["data"]["n"], n);
    }
    send(&instance, "broadcast", &event(31)).await;
    assert_eq!(client.json().await["data"]["n"], 31);
}

async fn the_first_frame_may_say_where_to_resume(backend: Backend) {
    let instance = start(&backend).await;
    let Connected { client, hello } = connect_with(&instance, "u-1", "").await;
    client.close().await;
    send(&instance, "users/u-1", &event(1)).await;
    let path = format!("/ws?token={}&resume=frame", token("u-1", LIFE));
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    let last = &hello["event_id"];
    client.send(json!({ "type": "resume", "last_event_id": last }).to_string()).await;
    assert_eq!(client.json().await["type"], "connected");
    assert_eq!(client.json().await["count"], 1);
    assert_eq!(client.json().await["data"]["n"], 1);
    client.send(r#"{"type":"resume","last_event_id":"0"}"#).await;
    assert_eq!(client.json().await["code"], "invalid_message");
}

async fn without_history_messages_are_live_only(backend: Backend) {
    let instance = start_with(&backend, |config| config.events.history = false).await;
    let Connected { mut client, hello } = connect_with(&instance, "u-1", "").await;
    assert_eq!(hello.get("event_id"), None);
    instance.publish("ws:user:u-1", r#"{"n":1}"#);
    assert_eq!(client.text().await, r#"{"n":1}"#);
    let mut second = connect_with(&instance, "u-1", "&last_event_id=0").await.client;
    let lost = second.json().await;
    assert_eq!((&lost["code"], &lost["reason"]), (&json!("history_lost"), &json!("disabled")));
    instance.publish("ws:user:u-1", r#"{"n":2}"#);
    assert_eq!(second.text().await, r#"{"n":2}"#);
}

async fn connected_users_are_listed_and_can_be_disconnected(backend: Backend) {
    let instance = start(&backend).await;
    let registry = instance.families().events.registry.as_ref().unwrap();
    let mut one = connect_with(&instance, "u-1", "").await;
    let mut other = connect(&instance, "u-2").await;
    eventually("it is written", || registry.is_written()).await;
    let present = registry.connections_of(&id("u-1")).await.unwrap();
    assert_eq!(present.len(), 1);
    assert_eq!(present[0].connection_id.to_string(), one.hello["connection_id"]);
    assert_eq!(present[0].record.address, Some([127, 0, 0, 1].into()));
    instance.publish("ws:control", r#"{"op":"disconnect","user_id":"u-1"}"#);
    assert_eq!(one.client.closed().await.0, 4004);
    eventually("it left", || registry.len() == 1).await;
    other.send(r#"{"type":"ping"}"#).await;
    assert_eq!(other.json().await["type"], "pong");
}

async fn revoked_tokens_are_refused_at_the_door_and_later(backend: Backend) {
    let instance = start(&backend).await;
    let registry = instance.families().events.registry.as_ref().unwrap();
    let named = |name: &str| {
        sign(&json!({ "sub": "u-1", "exp": now() + 600, "jti": name, "iat": now() }), SECRET)
    };
    let path = |name: &str| format!("/ws?token={}", named(name));
    let mut client = Client::connect(instance.address(), &path("old"), &[]).await.unwrap();
    client.json().await;
    let hour = Duration::from_secs(3600);
    let revoke = async |name: &str| {
        let target = Target::Token(name.into());
        registry.disconnect(target, None, None, Some(hour)).await.unwrap();
    };
    revoke("bad").await;
    instance.handshake(&path("bad"), &[]).await.assert_refused(403, "invalid_token");
    let refresh = |name: &str| json!({ "type": "refresh", "token": named(name) }).to_string();
    client.send(refresh("bad")).await;
    assert_eq!(client.json().await["code"], "invalid_token");
    client.send(refresh("new")).await;
    assert_eq!(client.json().await["type"], "refreshed");
    // It is known by its newest token only.
    revoke("old").await;
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.json().await["type"], "pong");
    revoke("new").await;
    assert_eq!(client.closed().await.0, 4401);
}

async fn a_token_from_a_clock_ahead_is_revoked(backend: Backend) {
    let instance = start(&backend).await;
    let made_at = |iat: u64| sign(&json!({ "sub": "u-1", "exp": now() + 600, "iat": iat }), SECRET);
    let path = |token: &str| format!("/ws?token={token}");
    // The leeway is 5 s.
    let far = made_at(now() + 30);
    instance.handshake(&path(&far), &[]).await.assert_refused(403, "invalid_token");
    let ahead = made_at(now() + 3);
    let mut client = Client::connect(instance.address(), &path(&ahead), &[]).await.unwrap();
    client.json().await;
    client.send(json!({ "type": "refresh", "token": far }).to_string()).await;
    assert_eq!(client.json().await["code"], "invalid_token");

    let body = r#"{"user_id":"u-1","revoke_seconds":60}"#;
    assert_eq!(instance.api("POST", "/api/v1/events/disconnect", body).await.status, 200);
    assert_eq!(client.closed().await.0, 4401);
    instance.handshake(&path(&ahead), &[]).await.assert_refused(403, "invalid_token");
    let mut other = connect(&instance, "u-2").await;
    other.send(r#"{"type":"ping"}"#).await;
    assert_eq!(other.json().await["type"], "pong");
}

async fn a_revocation_is_as_long_as_asked_or_refused(backend: Backend) {
    let day = Duration::from_secs(86_400);
    let instance = start_with(&backend, |config| config.events.revocation_ttl = day).await;
    let named = json!({ "sub": "u-1", "exp": now() + 600, "jti": "t-1", "iat": now() });
    let path = format!("/ws?token={}", sign(&named, SECRET));
    let disconnect = async |body: Value| {
        instance.api("POST", "/api/v1/events/disconnect", &body.to_string()).await
    };
    for seconds in [0, 86_401, u64::MAX] {
        let refused = disconnect(json!({ "jti": "t-1", "revoke_seconds": seconds })).await;
        refused.assert_refused(400, "bad_request");
        assert!(refused.body.contains("1 to 86400"), "{}", refused.body);
    }
    let connection = json!({ "connection_id": uuid::Uuid::nil(), "revoke_seconds": 60 });
    disconnect(connection).await.assert_refused(400, "bad_request");
    Client::connect(instance.address(), &path, &[]).await.unwrap();
    assert_eq!(disconnect(json!({ "jti": "t-1", "revoke_seconds": 86_400 })).await.status, 200);
    instance.handshake(&path, &[]).await.assert_refused(403, "invalid_token");
}

async fn closed_connections_leave_nothing(backend: Backend) {
    let instance = start(&backend).await;
    let clients = futures_util::future::join_all((0..20).map(|_| connect(&instance, "u-1"))).await;
    assert_eq!(instance.metric("wsproxy_active_connections{endpoint=\"events\"}"), 20.0);
    for client in clients {
        client.close().await;
    }
    instance.wait_empty().await;
    assert_eq!(instance.metric("wsproxy_active_connections{endpoint=\"events\"}"), 0.0);
}

#[tokio::test]
async fn the_endpoint_is_only_where_it_is_switched_on() {
    let instance = TestInstance::with(|_| ()).await;
    instance.handshake("/ws", &[]).await.assert_refused(404, "not_found");
    let on = start(&Backend::Memory).await;
    on.handshake("/ws/more", &[]).await.assert_refused(404, "not_found");
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// Long enough for every test.
const LIFE: i64 = 600;
