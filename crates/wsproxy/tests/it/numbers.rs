//! JSON of workers passes the HTTP API as it was written: numbers of any size, in every call that carries some.

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::{
    client::Client,
    gateway::{Backend, TestInstance, over_both},
    issuer::now,
};

over_both!(
    messages_and_events_pass_as_they_were_written,
    what_an_event_lacks_is_added_behind_its_members,
    a_token_stream_has_its_workers_json_as_it_was_written,
    json_that_clients_could_not_read_is_refused,
);

async fn start(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.sessions.history = true;
    config.jwt.secret_key = Some(SECRET.into());
    TestInstance::start(config).await
}

async fn user(instance: &TestInstance) -> Client {
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let claims = json!({ "sub": "u", "exp": now() + 600 });
    let token = jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap();
    let path = format!("/ws?token={token}");
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    assert_eq!(client.json().await["type"], "connected");
    client
}

async fn post(instance: &TestInstance, path: &str, body: &str) -> Value {
    let answer = instance.api("POST", &format!("/api/v1/{path}"), body).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = answer.json();
    for result in answer["results"].as_array().into_iter().flatten() {
        assert_eq!(result["receivers"], 1, "{result}");
    }
    answer
}

async fn messages_and_events_pass_as_they_were_written(backend: Backend) {
    let instance = start(&backend).await;
    let (mut user, mut session) = (user(&instance).await, instance.client("s").await);
    let event = format!(r#"{{"type":"t","data":{DATA}}}"#);
    let to = |to: &str| format!(r#"{{"messages":[{{"to":"{to}","message":{event}}}]}}"#);

    post(&instance, "sessions/s/messages", &event).await;
    assert_eq!(session.text().await, event);
    let id = instance.keep("s", &event).await;
    assert_eq!(session.text().await, format!(r#"{{"event_id":"{id}",{}"#, &event[1..]));
    post(&instance, "events/batch", &to("session:s")).await;
    assert_eq!(session.text().await, event);

    for (path, body) in [
        ("events/users/u", event.clone()),
        ("events/users/u?history=false", event.clone()),
        ("events/users/u?event_id=own", event.clone()),
        ("events/broadcast", event.clone()),
        ("events/batch", to("user:u")),
        ("events/batch", to("broadcast")),
    ] {
        post(&instance, path, &body).await;
        let text = user.text().await;
        assert!(text.contains(&format!(r#""type":"t","data":{DATA},"#)), "{path}: {text}");
    }
}

async fn what_an_event_lacks_is_added_behind_its_members(backend: Backend) {
    let instance = start(&backend).await;
    let mut user = user(&instance).await;
    let time = r#""timestamp":"2026-11-28T17:00:00Z""#;
    for (query, sent, expected) in [
        ("", "z", r#"{"event_id":"POSITION","z":1.0,"type":"t",TIME}"#),
        ("?event_id=mine", "z", r#"{"z":1.0,"type":"t",TIME,"event_id":"mine"}"#),
        ("?event_id=mine", "event_id", r#"{"type":"t",TIME,"event_id":"mine"}"#),
    ] {
        let sent = format!(r#"{{ "{sent}" : 1.0, "type":"t", {time} }}"#);
        let answer = post(&instance, &format!("events/users/u{query}"), &sent).await;
        let position = answer["event_id"].as_str().unwrap();
        let expected = expected.replace("TIME", time).replace("POSITION", position);
        assert_eq!(user.text().await, expected);
    }
    post(&instance, "events/users/u?history=false", r#"{"type":"t"}"#).await;
    let text = user.text().await;
    assert!(text.starts_with(r#"{"type":"t","timestamp":"20"#), "{text}");
}

async fn a_token_stream_has_its_workers_json_as_it_was_written(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = instance.client("s").await;
    let path = "sessions/s/streams/a";
    let open = format!(r#"{{"op":"open","meta":{DATA}}}"#);
    post(&instance, path, &open).await;
    // Said again, it is the same.
    post(&instance, path, &open).await;
    let text = client.text().await;
    assert!(text.contains(&format!(r#""meta":{DATA}"#)), "{text}");
    let mut late = instance.client("s").await;
    let text = late.text().await;
    assert!(text.contains(&format!(r#""meta":{DATA}"#)), "{text}");
    let end = format!(r#"{{"op":"end","outcome":"error","error":{DATA}}}"#);
    post(&instance, path, &end).await;
    let text = client.text().await;
    assert!(text.contains(&format!(r#""error":{DATA}"#)), "{text}");
    let mut late = instance.client("s").await;
    let text = late.text().await;
    assert!(text.ends_with(&format!(r#""meta":{DATA},"error":{DATA}}}"#)), "{text}");
}

async fn json_that_clients_could_not_read_is_refused(backend: Backend) {
    let instance = start(&backend).await;
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    for bad in [
        r#"{"data":1}"#,
        r#"{"type":1}"#,
        r#"{"type":"t","type":"u"}"#,
        r#"{"type":"t","event_id":1}"#,
        r#"{"type":"t","event_id":"a","event_id":"b"}"#,
        r#"{"type":"t","data":"\ud800"}"#,
        r#"{"type":"t","data":01}"#,
        &format!(r#"{{"type":"t","data":{deep}}}"#),
        "[]",
        "",
    ] {
        let refused = instance.api("POST", "/api/v1/events/users/u", bad).await;
        refused.assert_refused(400, "bad_request");
    }
    for (to, bad) in [("user:u", "1"), ("user:u", r#"{"data":1}"#), ("session:s", &deep)] {
        let batch = format!(r#"{{"messages":[{{"to":"{to}","message":{bad}}}]}}"#);
        let answer = instance.api("POST", "/api/v1/events/batch", &batch).await.json();
        assert_eq!(answer["results"][0]["error"]["code"], "bad_request", "{answer}");
    }
    for bad in [
        r#"{"op":"dance"}"#,
        r#"{"op":"open","text":"x"}"#,
        r#"{"op":"open","meta":[]}"#,
        r#"{"op":"append"}"#,
        r#"{"op":"end","outcome":"error","lease_ms":1}"#,
        r#"{"meta":{}}"#,
    ] {
        let refused = instance.api("POST", "/api/v1/sessions/s/streams/a", bad).await;
        refused.assert_refused(400, "bad_request");
    }
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// Numbers that no machine number holds: ids of 64 bits in a parser with doubles, amounts of 256 bits, decimals of 20 digits.
const DATA: &str = r#"{"id":9007199254740993,"wei":115792089237316195423570985008687907853269984665640564039457,"price":0.12345678901234567890,"far":1e400, "zero":-0.0}"#;
