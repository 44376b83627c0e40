//! Server-sent events at the URL of the event endpoint, for clients that only listen.

use std::time::Duration;

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::{
    eventually,
    gateway::{Backend, TestInstance, over_both},
    issuer::now,
    sse::Events,
};

over_both!(
    one_last_id_resumes_all_channels,
    a_stream_ends_when_its_token_expires,
    a_user_who_is_sent_away_is_told_why,
);

fn token(user: &str, life: u64) -> String {
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let claims = json!({ "sub": user, "exp": now() + life });
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

async fn start(backend: &Backend) -> TestInstance {
    start_with(backend, Duration::from_secs(5)).await
}

async fn start_with(backend: &Backend, leeway: Duration) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.leeway = leeway;
    config.jwt.secret_key = Some(SECRET.into());
    TestInstance::start(config).await
}

/// A stream that has read its first message, and that message.
async fn open(instance: &TestInstance, user: &str, headers: &[(&str, &str)]) -> (Events, Value) {
    let path = format!("/ws?token={}", token(user, 600));
    let mut events = Events::open(instance.address(), &path, headers).await.unwrap();
    let hello = events.json().await;
    assert_eq!((&hello["type"], &hello["user_id"]), (&json!("connected"), &json!(user)));
    (events, hello)
}

/// Publishes an event with history; answers its id.
async fn send(instance: &TestInstance, to: &str, n: u32) -> String {
    let body = json!({ "type": "task_status_update", "data": { "n": n } }).to_string();
    let response = instance.api("POST", &format!("/api/v1/events/{to}"), &body).await;
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["event_id"].as_str().unwrap().to_owned()
}

/// The next event is this one.
async fn assert_event(events: &mut Events, id: Option<&str>, n: u32) {
    let event = events.event().await.unwrap();
    assert_eq!(event.id.as_deref(), id, "{event:?}");
    let data: Value = serde_json::from_str(&event.data.unwrap()).unwrap();
    assert_eq!((&data["type"], &data["data"]["n"]), (&json!("task_status_update"), &json!(n)));
}

async fn one_last_id_resumes_all_channels(backend: Backend) {
    let instance = start(&backend).await;
    let (mut events, hello) = open(&instance, "u-1", &[("Accept-Encoding", "gzip")]).await;
    let connection = hello["connection_id"].as_str().unwrap().to_owned();
    send(&instance, "users/u-2", 0).await;
    let ids = [send(&instance, "broadcast", 1).await, send(&instance, "users/u-1", 2).await];
    send(&instance, &format!("connections/{connection}"), 3).await;
    for (n, id) in (1..).zip(&ids) {
        assert_event(&mut events, Some(id), n).await;
    }
    // A client that comes back never has this channel again: an EventSource keeps the id before it.
    assert_event(&mut events, None, 3).await;
    assert_eq!(instance.metric("wsproxy_active_event_streams{endpoint=\"events\"}"), 1.0);
    drop(events);
    instance.wait_ended("events", "gone").await;
    let missed = [send(&instance, "users/u-1", 4).await, send(&instance, "broadcast", 5).await];
    let (mut events, _) = open(&instance, "u-1", &[("Last-Event-ID", &ids[1])]).await;
    let resumed = events.json().await;
    assert_eq!((&resumed["type"], &resumed["count"]), (&json!("resumed"), &json!(2)));
    for (n, id) in (4..).zip(&missed) {
        assert_event(&mut events, Some(id), n).await;
    }
    let live = send(&instance, "broadcast", 6).await;
    assert_event(&mut events, Some(&live), 6).await;
    let refused = Events::open(instance.address(), "/ws", &[]).await.err().unwrap();
    refused.assert_refused(401, "missing_credentials");
}

async fn a_stream_ends_when_its_token_expires(backend: Backend) {
    let instance = start_with(&backend, Duration::from_secs(2)).await;
    let path = format!("/ws?token={}", token("u-1", 2));
    let mut events = Events::open(instance.address(), &path, &[]).await.unwrap();
    let expires_at = events.json().await["expires_at"].as_u64().unwrap();
    assert_eq!(events.closed().await, (4401, "credential expired".into()));
    let over = now() - expires_at;
    assert!((2..=7).contains(&over), "closed {over} s after exp");
    instance.wait_ended("events", "expired").await;
}

async fn a_user_who_is_sent_away_is_told_why(backend: Backend) {
    let instance = start(&backend).await;
    let (mut events, hello) = open(&instance, "u-1", &[]).await;
    let (mut other, _) = open(&instance, "u-2", &[]).await;
    let presence = async || instance.api("GET", "/api/v1/events/users/u-1/presence", "").await;
    let mut known = Value::Null;
    tokio::time::timeout(Duration::from_secs(10), async {
        while known["connections"].as_array().is_none_or(Vec::is_empty) {
            known = presence().await.json();
        }
    })
    .await
    .unwrap();
    assert_eq!(known["connections"][0]["connection_id"], hello["connection_id"]);
    assert_eq!(known["connections"][0]["transport"], "sse");
    let body = json!({ "user_id": "u-1", "code": 4321, "reason": "signed out" }).to_string();
    let answer = instance.api("POST", "/api/v1/events/disconnect", &body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(events.closed().await, (4321, "signed out".into()));
    let id = send(&instance, "broadcast", 1).await;
    assert_event(&mut other, Some(&id), 1).await;
    eventually("one is left", || instance.gateway().event_streams.list().len() == 1).await;
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
