//! Tokens of members that a worker has revoked.

use http::StatusCode;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::{
    rooms::room_client::instance_with,
    support::{
        client::Client,
        gateway::{Backend, TestInstance, bearer, over_both},
        issuer::now,
    },
};

over_both!(a_revoked_token_opens_no_room, a_revoked_token_is_no_newer_token);

async fn start(backend: &Backend) -> TestInstance {
    instance_with(backend, |config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some(SECRET.into());
    })
    .await
}

/// A token of a user, issued a minute ago, with a name of its own.
fn token(user: &str, name: &str) -> String {
    let claims = json!({ "sub": user, "exp": now() + 600, "iat": now() - 60, "jti": name });
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

async fn open(instance: &TestInstance, user: &str, name: &str) -> Result<Client, StatusCode> {
    let headers = bearer(&token(user, name));
    Client::connect(instance.address(), &format!("/ws/lobby?client_id={user}"), &headers).await
}

async fn revoke(instance: &TestInstance, mut what: Value) {
    what["revoke_seconds"] = 60.into();
    let answer = instance.api("POST", "/api/v1/events/disconnect", &what.to_string()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

async fn a_revoked_token_opens_no_room(backend: Backend) {
    let instance = start(&backend).await;
    let status = async |user: &str, name: &str| open(&instance, user, name).await.err();
    revoke(&instance, json!({ "jti": "t-1" })).await;
    assert_eq!(status("ann", "t-1").await, Some(StatusCode::FORBIDDEN));
    assert_eq!(status("ann", "t-2").await, None);
    revoke(&instance, json!({ "user_id": "ann" })).await;
    assert_eq!(status("ann", "t-2").await, Some(StatusCode::FORBIDDEN));
    assert_eq!(status("bob", "t-3").await, None);
    let headers = [("authorization", format!("Bearer {}", token("ann", "t-2")))];
    let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
    let refused = instance.handshake("/ws/lobby", &headers).await;
    refused.assert_refused(403, "invalid_token");
}

async fn a_revoked_token_is_no_newer_token(backend: Backend) {
    let instance = start(&backend).await;
    let mut ann = open(&instance, "ann", "t-1").await.unwrap();
    ann.send(json!({ "clientHello": {} }).to_string()).await;
    assert!(ann.json().await["serverHello"].is_object());
    let refresh = |name: &str| json!({ "type": "refresh", "token": token("ann", name) });
    revoke(&instance, json!({ "jti": "t-2" })).await;
    ann.send(refresh("t-2").to_string()).await;
    assert_eq!(ann.json().await["error"]["code"], "invalid_token");
    // The member stays, and another token is as good as before.
    ann.send(refresh("t-3").to_string()).await;
    assert_eq!(ann.json().await["custom"]["name"], "refreshed");
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";
