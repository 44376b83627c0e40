//! Presence and revocation with real clients of the event endpoint, and with a process that is killed.

use std::time::Duration;

use jsonwebtoken::{EncodingKey, Header};
use rustix::process::Signal;
use serde_json::{Value, json};
use wsproxy::registry::control::Target;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually, eventually_ok, eventually_yes,
    gateway::{Backend, TestInstance, id, over_both},
    issuer::now,
    redis_server::{Answer, RedisServer},
    soon,
};

over_both!(
    a_revoked_user_is_sent_away_and_kept_out,
    a_refreshed_connection_is_known_by_its_new_token,
);

/// A token that was made some seconds ago, or in as many seconds where that is negative.
fn token(user: &str, name: &str, age: i64) -> String {
    let iat = now().saturating_add_signed(-age);
    let claims = json!({ "sub": user, "jti": name, "iat": iat, "exp": iat + 7200 });
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

async fn start(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.secret_key = Some(SECRET.into());
    config.jwt.leeway = Duration::from_secs(1);
    TestInstance::start(config).await
}

async fn connect(address: std::net::SocketAddr, token: &str) -> Client {
    let mut client = Client::connect(address, &format!("/ws?token={token}"), &[]).await.unwrap();
    assert_eq!(client.json().await["type"], "connected");
    client
}

async fn disconnect(instance: &TestInstance, target: Target, revoke: Option<Duration>) {
    let registry = instance.families().events.registry.as_ref().unwrap();
    soon("a disconnect", registry.disconnect(target, None, None, revoke)).await.unwrap();
}

async fn a_revoked_user_is_sent_away_and_kept_out(backend: Backend) {
    let instance = start(&backend).await;
    let address = instance.address();
    let mut clients = [
        connect(address, &token("u", "t1", 5)).await,
        connect(address, &token("u", "t2", 5)).await,
    ];
    let mut other = connect(address, &token("v", "t3", 5)).await;
    disconnect(&instance, Target::User(id("u")), Some(HOUR)).await;
    for client in &mut clients {
        assert_eq!(client.closed().await, (4401, "credential revoked".into()));
    }
    let path = format!("/ws?token={}", token("u", "t1", 5));
    let refused = instance.handshake(&path, &[]).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (403, &"invalid_token".into()));
    // Who signs in again is welcome, when the leeway is over.
    let signing_in = async || {
        let path = format!("/ws?token={}", token("u", "t4", 0));
        Client::connect(address, &path, &[]).await.map(drop)
    };
    eventually_ok("a newer token is accepted", signing_in).await;
    instance.publish("ws:control", r#"{"op":"disconnect","user_id":"v","reason":"bye"}"#);
    assert_eq!(other.closed().await, (4004, "bye".into()));
    drop(connect(address, &token("v", "t3", 5)).await);
    instance.wait_empty().await;
    eventually("nobody is left", || {
        instance.families().events.registry.as_ref().unwrap().is_empty()
    })
    .await;
}

async fn a_refreshed_connection_is_known_by_its_new_token(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = connect(instance.address(), &token("u", "old", 5)).await;
    disconnect(&instance, Target::Token("bad".into()), Some(HOUR)).await;
    let refresh = |name| json!({"type": "refresh", "token": token("u", name, 5)}).to_string();
    client.send(&refresh("bad")).await;
    assert_eq!(client.json().await["code"], "invalid_token");
    client.send(&refresh("new")).await;
    assert_eq!(client.json().await["type"], "refreshed");
    disconnect(&instance, Target::Token("old".into()), Some(HOUR)).await;
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.json().await["type"], "pong");
    disconnect(&instance, Target::Token("new".into()), Some(HOUR)).await;
    assert_eq!(client.closed().await.0, 4401);
    instance.wait_empty().await;
}

#[tokio::test]
async fn presence_is_right_after_a_process_was_killed() {
    let server = RedisServer::start();
    let url = server.url();
    let mut killed = Binary::start(&[
        ("REDIS_URL", &url),
        ("SECRET_KEY", SECRET),
        ("SERVER_ID", "killed"),
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
    ])
    .await;
    killed.line("Listening.").await;
    let mut config = crate::support::gateway::config(Some(&url));
    config.endpoints.events = true;
    config.jwt.secret_key = Some(SECRET.into());
    let lives = TestInstance::start(config).await;
    let mut lost = lives.follow("ws:registry").await;
    let mut here = connect(lives.address(), &token("u", "t1", 5)).await;
    let mut there = Vec::new();
    for _ in 0..20 {
        there.push(connect(killed.address, &token("u", "t2", 5)).await);
    }
    wait_health(&lives, &json!({"total": 21, "local": 1, "alive": 21, "dead": 0})).await;
    killed.signal(Signal::KILL);
    killed.exited().await;
    // Until its lease ends no instance can know; then it is ignored, whether it was removed already or not.
    let registry = lives.families().events.registry.clone().unwrap();
    let present = async || registry.connections_of(&id("u")).await.unwrap().len();
    eventually_yes("the dead are ignored", async || present().await == 1).await;
    let event = lost.json().await;
    assert_eq!(event, json!({"event": "server_lost", "server_id": "killed"}));
    wait_health(&lives, &json!({"total": 1, "local": 1, "alive": 1, "dead": 0})).await;
    assert_eq!(server.call(&["HLEN", "ws:user:u:connections"]), Answer::Integer(1));
    here.send(r#"{"type":"ping"}"#).await;
    assert_eq!(here.json().await["type"], "pong");
}

async fn wait_health(instance: &TestInstance, wanted: &Value) {
    let health = eventually_ok("the counts are told", async || {
        let health = instance.get("/ws/health").await.json();
        if health["connections"] == *wanted { Ok(()) } else { Err(health) }
    });
    health.await;
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const HOUR: Duration = Duration::from_secs(3600);
