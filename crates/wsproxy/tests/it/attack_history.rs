//! Foreign data where histories should be: it harms its own topic at most.

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::{
    client::Client,
    gateway::{TestInstance, config},
    issuer::now,
    redis_server::RedisServer,
};

async fn connect(instance: &TestInstance, user: &str) -> (Client, Value) {
    let claims = json!({ "sub": user, "exp": now() + 600 });
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let token = jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap();
    let path = format!("/ws?token={token}");
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    let hello = client.json().await;
    (client, hello)
}

#[tokio::test]
async fn a_wrong_typed_log_holds_up_no_other_recovery() {
    let server = RedisServer::start();
    let mut config = config(Some(&server.url()));
    config.endpoints.events = true;
    config.jwt.secret_key = Some(SECRET.into());
    let instance = TestInstance::start(config).await;
    let (mut victim, _) = connect(&instance, "victim").await;
    server.call(&["DEL", "{ws}:user:victim:head"]);
    server.call(&["SET", "{ws}:user:victim:log", "no stream"]);
    server.call(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    let lost = victim.json().await;
    assert_eq!((&lost["code"], &lost["reason"]), (&json!("history_lost"), &json!("unknown")));
    let (_other, hello) = connect(&instance, "other").await;
    assert_eq!(hello["type"], "connected");
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
