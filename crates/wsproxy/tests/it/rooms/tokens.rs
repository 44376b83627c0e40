//! Tokens of members: the rooms that they open, and their end.

use std::time::Duration;

use http::StatusCode;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::{
    rooms::room_client::{binary, instance_with},
    support::{
        client::Client,
        gateway::{Backend, TestInstance, bearer},
        issuer::now,
        redis_server::RedisServer,
    },
};

/// Returns a token with these claims. Where these have no `exp` it is good for ten minutes.
pub fn token(claims: &Value) -> String {
    let mut claims = claims.clone();
    if claims["exp"].is_null() {
        claims["exp"] = (now() + 600).into();
    }
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

/// Opens a room with a token of these claims.
pub async fn open_with(
    instance: &TestInstance,
    path: &str,
    claims: &Value,
) -> Result<Client, StatusCode> {
    Client::connect(instance.address(), path, &bearer(&token(claims))).await
}

async fn start() -> TestInstance {
    instance_with(&Backend::Memory, |config| {
        config.jwt.secret_key = Some(SECRET.into());
        config.jwt.leeway = Duration::ZERO;
    })
    .await
}

/// Opens a room, and says hello.
async fn enter(instance: &TestInstance, room: &str, claims: &Value) -> Client {
    let mut client = open_with(instance, &format!("/ws/{room}"), claims).await.unwrap();
    client.send(json!({ "clientHello": {} }).to_string()).await;
    assert!(client.json().await["serverHello"].is_object());
    client
}

#[tokio::test]
async fn a_token_opens_the_rooms_that_it_names() {
    let instance = start().await;
    let claims = json!({ "sub": "ann", "rooms": ["lobby", "team-*"] });
    for room in ["lobby", "team-1"] {
        open_with(&instance, &format!("/ws/{room}"), &claims).await.unwrap();
    }
    let token = token(&claims);
    let refused = instance.handshake(&format!("/ws/hall?auth_token={token}"), &[]).await;
    refused.assert_refused(403, "room_forbidden");
    let path = format!("/ws/lobby?token={token}&user_id=eve");
    instance.handshake(&path, &[]).await.assert_refused(403, "invalid_token");
}

#[tokio::test]
async fn a_member_goes_when_its_token_expires_unless_a_newer_one_came() {
    let instance = start().await;
    let claims = |user: &str| json!({ "sub": user, "exp": now() + 3 });
    let mut ann = enter(&instance, "one", &claims("ann")).await;
    let mut bob = enter(&instance, "two", &claims("bob")).await;
    let newer = token(&json!({ "sub": "bob" }));
    // A Custom message does what the text of the same name does.
    let data = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, newer);
    bob.send(json!({ "custom": { "name": "refresh", "data": data } }).to_string()).await;
    while bob.json().await["custom"]["name"] != "refreshed" {}
    assert_eq!(ann.closed().await, (4401, "credential expired".into()));
    bob.send(json!({ "type": "refresh", "token": token(&json!({ "sub": "eve" })) }).to_string())
        .await;
    assert_eq!(bob.closed().await, (4401, "token of another user".into()));
}

#[tokio::test]
async fn development_mode_is_warned_of_at_the_start() {
    let server = RedisServer::start();
    let program = binary(&server).await;
    let text = "rooms.development is on: clients without a token are whoever they say they are.";
    let line = program.line(text).await;
    assert_eq!((&line["level"], &line["bind"]), (&json!("WARN"), &json!("127.0.0.1")));
    assert_eq!(program.metric("wsproxy_room_development").await, 1.0);
}

/// Key of the tokens.
pub const SECRET: &str = "0123456789abcdef0123456789abcdef";
