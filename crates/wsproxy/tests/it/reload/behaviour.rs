//! Each kind of value that a reload replaces takes effect: for new connections, and for open ones where that is said.

use std::fs;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use super::{Reloading, Values, names};
use crate::support::{
    client::Client,
    eventually,
    gateway::API_KEY,
    http,
    issuer::now,
    tls::{Made, connect},
};

#[tokio::test]
async fn a_removed_api_key_is_refused_at_once() {
    let running = Reloading::start(&Values::new()).await;
    let info = async |key: &str| {
        let key = format!("Bearer {key}");
        let headers = [("authorization", key.as_str())];
        let address = running.instance.admin_address();
        http::request(address, "GET", "/api/v1/info", &headers, b"").await
    };
    let mut values = Values::new();
    values.set("api.keys", "[\"new-key-0123456789\"]");
    values.set(
        "api.key",
        "[{ name = \"chat\", secret = \"chat-key-0123456789\", scopes = [\"sessions\"] }]",
    );
    let answer = running.to(&values).await;
    assert_eq!(names(&answer, "changed"), ["api.keys", "api.key"]);
    info(API_KEY).await.assert_refused(403, "invalid_token");
    assert_eq!(info("new-key-0123456789").await.status, 200);
    info("chat-key-0123456789").await.assert_refused(403, "missing_scope_admin");
    let refused = "wsproxy_api_calls_total{key=\"chat\",outcome=\"missing_scope\"}";
    assert_eq!(running.instance.metric(refused), 1.0);
}

#[tokio::test]
async fn a_changed_file_of_an_api_key_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    fs::write(&path, "file-key-0123456789").unwrap();
    let table =
        format!("[{{ name = \"f\", secret_file = \"{}\", scopes = [\"admin\"] }}]", path.display());
    let values = Values::new().with("api.key", &table);
    let running = Reloading::start(&values).await;
    fs::write(&path, "other-key-0123456789").unwrap();
    let first = running.to(&values).await;
    // The file may have been read already: it is every few seconds.
    assert!(first["changed"] == json!([{ "key": "api.key" }]) || first["changed"] == json!([]));
    let headers = [("authorization", "Bearer other-key-0123456789")];
    let address = running.instance.admin_address();
    assert_eq!(http::request(address, "GET", "/api/v1/info", &headers, b"").await.status, 200);
    assert_eq!(running.to(&values).await["changed"], json!([]));
}

fn token(key: &EncodingKey, algorithm: Algorithm) -> String {
    let claims = json!({ "sub": "u-1", "exp": now() + 600 });
    jsonwebtoken::encode(&Header::new(algorithm), &claims, key).unwrap()
}

async fn events(running: &Reloading, token: &str) -> Result<Client, ::http::StatusCode> {
    Client::connect(running.instance.address(), &format!("/ws?token={token}"), &[]).await
}

#[tokio::test]
async fn a_removed_secret_opens_nothing_and_its_connections_stay() {
    let [old, new] = ["o", "n"].map(|letter| letter.repeat(32));
    let mut values = Values::new().with("endpoints.events", "true");
    values.set("jwt.secret_key", &format!("\"{old}\""));
    let running = Reloading::start(&values).await;
    let sign = |secret: &str| token(&EncodingKey::from_secret(secret.as_bytes()), Algorithm::HS256);
    let mut client = events(&running, &sign(&old)).await.unwrap();
    client.json().await;
    values.set("jwt.secret_key", &format!("\"{new}\""));
    let answer = running.to(&values).await;
    assert_eq!(answer["changed"], json!([{ "key": "jwt.secret_key" }]));
    assert_eq!(events(&running, &sign(&old)).await.err().unwrap(), 403);
    assert!(events(&running, &sign(&new)).await.is_ok());
    let event = json!({ "type": "note", "data": 1 }).to_string();
    let sent = running.instance.api("POST", "/api/v1/events/users/u-1", &event).await;
    assert_eq!(sent.status, 200, "{sent:?}");
    assert_eq!(client.json().await["type"], "note", "the connection of the old secret lives");
}

#[tokio::test]
async fn a_replaced_public_key_holds_for_the_next_handshake() {
    let [old, new] =
        ["old", "new"].map(|_| KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.pem");
    fs::write(&path, old.public_key_pem()).unwrap();
    let mut values = Values::new().with("endpoints.events", "true");
    values.set("jwt.algorithms", "[\"ES256\"]");
    values.set("jwt.public_key_file", &format!("\"{}\"", path.display()));
    let running = Reloading::start(&values).await;
    let sign = |key: &KeyPair| {
        let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).unwrap();
        token(&key, Algorithm::ES256)
    };
    assert!(events(&running, &sign(&old)).await.is_ok());
    fs::write(&path, new.public_key_pem()).unwrap();
    assert!(events(&running, &sign(&old)).await.is_ok(), "only a reload reads the file again");
    let answer = running.to(&values).await;
    assert_eq!(answer["changed"], json!([{ "key": "jwt.public_key_file" }]));
    assert_eq!(events(&running, &sign(&old)).await.err().unwrap(), 403);
    assert!(events(&running, &sign(&new)).await.is_ok());
}

#[tokio::test]
async fn a_message_rate_holds_for_open_connections() {
    let mut values = Values::new().with("limits.messages_per_second", "0");
    let running = Reloading::start(&values).await;
    let [mut one, mut other] = [running.instance.echo().await, running.instance.echo().await];
    for _ in 0..50 {
        one.send("x").await;
        one.text().await;
    }
    values.set("limits.messages_per_second", "1");
    values.set("limits.message_burst", "2");
    running.to(&values).await;
    let mut answered = 0;
    let code = loop {
        one.send("x").await;
        match one.next().await {
            Message::Close(Some(frame)) => break u16::from(frame.code),
            Message::Text(_) => answered += 1,
            other => panic!("{other:?}"),
        }
        assert!(answered < 20, "the new rate does not hold");
    };
    assert_eq!(code, 1008);
    values.set("limits.messages_per_second", "1000");
    values.set("limits.message_burst", "1000");
    running.to(&values).await;
    for _ in 0..50 {
        other.send("x").await;
        other.text().await;
    }
}

#[tokio::test]
async fn a_byte_rate_holds_for_open_connections() {
    let mut values = Values::new().with("limits.bytes_per_second", "0");
    values.set("limits.messages_per_second", "0");
    let running = Reloading::start(&values).await;
    let mut client = running.instance.echo().await;
    let throttled = || running.instance.metric("wsproxy_reads_throttled_total{endpoint=\"echo\"}");
    let text = "x".repeat(2000);
    for _ in 0..20 {
        client.send(text.clone()).await;
        client.text().await;
    }
    assert_eq!(throttled(), 0.0);
    values.set("limits.bytes_per_second", "10000");
    values.set("limits.bytes_burst", "0");
    running.to(&values).await;
    client.send(text.clone()).await;
    client.send(text).await;
    eventually("reading pauses", || throttled() > 0.0).await;
}

#[tokio::test]
async fn attempts_and_origins_are_those_of_the_reload() {
    let mut values = Values::new();
    let running = Reloading::start(&values).await;
    let origin = [("origin", "https://evil.example".to_owned())];
    let echo = async |headers: &[(&str, String)]| {
        Client::connect(running.instance.address(), "/echo", headers).await.map(drop)
    };
    assert_eq!(echo(&origin).await, Ok(()));
    values.set("server.allowed_origins", "[\"https://app.example\"]");
    running.to(&values).await;
    assert_eq!(echo(&origin).await.unwrap_err(), 403);
    assert_eq!(echo(&[]).await, Ok(()));
    values.set("rate_limit.max_requests", "1");
    values.set("rate_limit.window_seconds", "3600");
    running.to(&values).await;
    assert_eq!(echo(&[]).await, Ok(()));
    assert_eq!(echo(&[]).await.unwrap_err(), 429);
    values.set("rate_limit.max_requests", "0");
    running.to(&values).await;
    assert_eq!(echo(&[]).await, Ok(()));
}

#[tokio::test]
async fn a_new_certificate_is_shown_at_once_and_tls_stays_on() {
    let folder = tempfile::tempdir().unwrap();
    let [old, new] = [Made::new(), Made::new()];
    let path = |name: &str| folder.path().join(name);
    let write = |made: &Made, certificate: &str, key: &str| {
        fs::write(path(certificate), &made.certificate).unwrap();
        fs::write(path(key), &made.key).unwrap();
    };
    write(&old, "a.pem", "a.key");
    write(&new, "b.pem", "b.key");
    let quoted = |name: &str| format!("\"{}\"", path(name).display());
    let mut values = Values::new().with("tls.certificate", &quoted("a.pem"));
    values.set("tls.key", &quoted("a.key"));
    values.set("admin.port", "0");
    let running = Reloading::start(&values).await;
    let shows = async |made: &Made| connect(running.instance.address(), made.trust()).await.is_ok();
    assert!(shows(&old).await && !shows(&new).await);
    values.set("tls.certificate", &quoted("b.pem"));
    values.set("tls.key", &quoted("b.key"));
    assert_eq!(names(&running.to(&values).await, "changed"), ["tls.certificate", "tls.key"]);
    assert!(shows(&new).await && !shows(&old).await);
    // Other contents under the same names.
    write(&old, "b.pem", "b.key");
    assert_eq!(running.to(&values).await["changed"], json!([{ "key": "tls.certificate" }]));
    assert!(shows(&old).await);
    values.set("tls.certificate", "\"\"");
    values.set("tls.key", "\"\"");
    let answer = running.to(&values).await;
    assert_eq!(names(&answer, "needs_restart"), ["tls.certificate", "tls.key"]);
    assert_eq!(names(&answer, "changed"), [""; 0]);
    assert!(shows(&old).await, "only a restart switches TLS off");
}
