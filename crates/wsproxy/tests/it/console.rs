//! The console of operators: its page, its numbers, and a client that is found, told and sent away, on any instance.

use std::net::SocketAddr;

use jsonwebtoken::{EncodingKey, Header};
use rustix::process::Signal;
use serde_json::{Value, json};
use wsproxy::config::Config;
use wsproxy_proto::names::Id;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually_yes,
    gateway::{API_KEY, Backend, TestInstance, over_both},
    http::{self, Response},
    issuer::now,
    redis_server::RedisServer,
};

over_both!(
    a_user_that_was_cut_off_is_found_with_the_reason,
    a_session_is_found_told_and_ended,
    a_member_of_a_room_is_found_told_and_ended,
    a_refused_client_is_found_with_the_reason,
);

async fn call(address: SocketAddr, method: &str, path: &str, body: &str) -> Response {
    let key = format!("Bearer {API_KEY}");
    http::request(address, method, path, &[("authorization", &key)], body.as_bytes()).await
}

async fn get(instance: &TestInstance, path: &str) -> Value {
    let answer = call(instance.admin_address(), "GET", path, "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

async fn find(instance: &TestInstance, kind: &str, id: &str) -> Value {
    get(instance, &format!("/api/v1/console/find?kind={kind}&id={id}")).await
}

async fn post(instance: &TestInstance, what: &str, body: Value) -> Response {
    let path = format!("/api/v1/console/{what}");
    call(instance.admin_address(), "POST", &path, &body.to_string()).await
}

fn config(backend: &Backend, name: &str) -> Config {
    let mut config = backend.config();
    config.admin.port = Some(0);
    config.server.server_id = Some(name.to_owned());
    config.endpoints.events = true;
    config.endpoints.rooms = true;
    config.jwt.secret_key = Some(SECRET.into());
    config
}

/// An instance whose questions other instances hear.
async fn start(backend: &Backend, name: &str) -> TestInstance {
    let instance = TestInstance::start(config(backend, name)).await;
    if matches!(backend, Backend::Redis(_)) {
        eventually_yes("it hears itself", async || {
            find(&instance, "user", "x").await["notes"].as_array().unwrap().is_empty()
        })
        .await;
    }
    instance
}

/// A token that is good for so many seconds.
fn token(user: &str, seconds: i64) -> String {
    let claims = json!({ "sub": user, "exp": now().saturating_add_signed(seconds) });
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap()
}

async fn user(instance: &TestInstance, user: &str) -> Client {
    let path = format!("/ws?token={}", token(user, 3600));
    let mut client = Client::connect(instance.address(), &path, &[]).await.unwrap();
    assert_eq!(client.json().await["type"], "connected");
    client
}

async fn a_user_that_was_cut_off_is_found_with_the_reason(backend: Backend) {
    let here = start(&backend, "here").await;
    let mut client = user(&here, "u-1").await;
    let found = find(&here, "user", "u-1").await;
    let connection = &found["connections"][0];
    assert_eq!(found["connections"].as_array().unwrap().len(), 1, "{found}");
    assert_eq!(
        (&connection["server_id"], &connection["endpoint"], &connection["waiting_bytes"]),
        (&json!("here"), &json!("events"), &json!(0))
    );
    assert!(connection["since"].is_string() && connection["address"] == "127.0.0.1", "{found}");
    let event = json!({ "type": "notice", "data": { "text": "hello" } });
    let sent = post(&here, "send", json!({ "kind": "user", "id": "u-1", "message": event })).await;
    assert_eq!(sent.json()["receivers"], 1, "{sent:?}");
    assert_eq!(client.json().await["type"], "notice");
    let ended = json!({ "kind": "user", "id": "u-1", "reason": "too loud" });
    assert_eq!(post(&here, "end", ended).await.status, 200);
    assert_eq!(client.closed().await, (4004, "too loud".into()));
    let end = end_of(&here, "user", "u-1").await;
    assert_eq!(
        (&end["reason"], &end["code"], &end["by"]),
        (&"backend".into(), &4004.into(), &"worker".into())
    );
    assert_eq!(end["connection_id"], connection["connection_id"]);
    let by_connection = find(&here, "connection", end["connection_id"].as_str().unwrap()).await;
    assert_eq!(by_connection["ends"][0], end);
    let latest = get(&here, "/api/v1/console/overview").await["latest"].clone();
    assert_eq!(latest[0]["user_id"], "u-1");
}

/// The newest end of a subject, once there is one.
async fn end_of(instance: &TestInstance, kind: &str, id: &str) -> Value {
    eventually_yes("the end is known", async || {
        !find(instance, kind, id).await["ends"].as_array().unwrap().is_empty()
    })
    .await;
    find(instance, kind, id).await["ends"][0].clone()
}

async fn a_session_is_found_told_and_ended(backend: Backend) {
    let here = start(&backend, "here").await;
    let mut client = here.client("s-1").await;
    let found = find(&here, "session", "s-1").await;
    assert_eq!(found["connections"][0]["transport"], "websocket", "{found}");
    let message = json!({ "kind": "session", "id": "s-1", "message": { "text": "<img>" } });
    assert_eq!(post(&here, "send", message).await.json()["receivers"], 1);
    assert_eq!(client.text().await, r#"{"text":"<img>"}"#);
    assert_eq!(post(&here, "end", json!({ "kind": "session", "id": "s-1" })).await.status, 200);
    assert_eq!(client.closed().await.0, 4004);
    assert_eq!(end_of(&here, "session", "s-1").await["agent_id"], "agent");
}

async fn a_member_of_a_room_is_found_told_and_ended(backend: Backend) {
    let here = start(&backend, "here").await;
    let path = format!("/ws/lobby?token={}&client_id=c-1", token("u-1", 3600));
    let mut client = Client::connect(here.address(), &path, &[]).await.unwrap();
    client.send(r#"{"clientHello":{}}"#).await;
    for (kind, id) in [("room", "lobby"), ("user", "u-1")] {
        let found = find(&here, kind, id).await;
        let member = &found["connections"][0];
        assert_eq!(found["connections"].as_array().unwrap().len(), 1, "{found}");
        assert_eq!((&member["client_id"], &member["room_id"]), (&"c-1".into(), &"lobby".into()));
    }
    let bad = json!({ "kind": "room", "id": "lobby", "message": { "nothing": 1 } });
    post(&here, "send", bad).await.assert_refused(400, "bad_request");
    let end = json!({ "kind": "room", "id": "lobby", "client_id": "c-1" });
    assert_eq!(post(&here, "end", end).await.json()["members"], 1);
    let end = end_of(&here, "room", "lobby").await;
    assert_eq!((&end["by"], &end["user_id"]), (&"worker".into(), &"u-1".into()));
}

async fn a_refused_client_is_found_with_the_reason(backend: Backend) {
    let here = start(&backend, "here").await;
    let refused = here.handshake(&format!("/ws?token={}", token("u-2", -3600)), &[]).await;
    refused.assert_refused(403, "invalid_token");
    here.handshake("/agent/ws/s-9?token=secret-of-a-client", &[]).await;
    let of_user = find(&here, "user", "u-2").await;
    let refusal = &of_user["refusals"][0];
    assert_eq!((&refusal["status"], &refusal["error"]), (&403.into(), &"expired".into()));
    assert_eq!(refusal["what"], "The token has expired.");
    let of_session = find(&here, "session", "s-9").await;
    assert_eq!(of_session["refusals"][0]["code"], "invalid_token");
    let what = of_session["refusals"][0]["what"].as_str().unwrap();
    assert!(what.starts_with("The gateway has no token of this session"), "{what}");
    assert!(!of_session.to_string().contains("secret-of-a-client"));
}

#[tokio::test]
async fn a_large_room_is_shown_in_part() {
    let mut config = config(&Backend::Memory, "here");
    (config.rate_limit.max_requests, config.rate_limit.max_requests_is_set) = (0, true);
    let here = TestInstance::start(config).await;
    let mut clients = Vec::new();
    for n in 0..103 {
        let path = format!("/ws/lobby?token={}&client_id=c-{n}", token("u-1", 3600));
        let mut client = Client::connect(here.address(), &path, &[]).await.unwrap();
        client.send(r#"{"clientHello":{}}"#).await;
        clients.push(client);
    }
    for (kind, id) in [("room", "lobby"), ("user", "u-1")] {
        let found = find(&here, kind, id).await;
        assert_eq!(found["connections"].as_array().unwrap().len(), 100, "{kind}");
        assert!(found["notes"][0].as_str().unwrap().contains("more than 100"), "{found}");
    }
    // Members that are not shown cost nothing: a room may have 100,000.
    let (room, user) = (Id::parse("lobby").unwrap(), Id::parse("u-1").unwrap());
    let rooms = &here.families().rooms;
    assert_eq!((rooms.here(&room, 2).len(), rooms.here_of(&user, 2).len()), (2, 2));
}

#[tokio::test]
async fn refusals_of_one_reason_are_one_row_of_the_overview() {
    let here = start(&Backend::Memory, "here").await;
    for user in ["u-1", "u-2", "u-1", "u-3"] {
        here.handshake(&format!("/ws?token={}", token(user, -3600)), &[]).await;
    }
    here.handshake("/agent/ws/s-1?token=wrong", &[]).await;
    let latest = get(&here, "/api/v1/console/overview").await["latest"].clone();
    let rows = latest.as_array().unwrap();
    assert_eq!(rows.len(), 2, "{latest}");
    assert_eq!((&rows[0]["session_id"], &rows[0]["more"]), (&"s-1".into(), &Value::Null));
    assert_eq!((&rows[1]["user_id"], &rows[1]["more"]["count"]), (&"u-3".into(), &3.into()));
    let clients = rows[1]["more"]["clients"].as_array().unwrap();
    let users: Vec<_> = clients.iter().map(|client| client["user_id"].as_str().unwrap()).collect();
    assert_eq!(users, ["u-1", "u-2"]);
}

#[tokio::test]
async fn an_end_by_a_worker_is_logged_with_its_key() {
    let keys = r#"[{"name":"chat","secret":"chat-key-0123456789","scopes":["events","sessions"]}]"#;
    let binary = Binary::start(&[
        ("SECRET_KEY", SECRET),
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
        ("WSPROXY_API__KEY", keys),
    ])
    .await;
    let path = format!("/ws?token={}", token("u-1", 3600));
    let mut client = Client::connect(binary.address, &path, &[]).await.unwrap();
    assert_eq!(client.json().await["type"], "connected");
    let post = async |path: &str, body: &str| {
        let key = [("authorization", "Bearer chat-key-0123456789")];
        http::request(binary.address, "POST", path, &key, body.as_bytes()).await.status
    };
    let command = r#"{"user_id":"u-1","reason":"too loud"}"#;
    assert_eq!(post("/api/v1/events/disconnect", command).await, 200);
    assert_eq!(client.closed().await, (4004, "too loud".into()));
    let line = binary.line("A worker ends connections.").await;
    assert_eq!((&line["key"], &line["user_id"]), (&"chat".into(), &"u-1".into()));
    let line = binary.line("Connections are closed by a command.").await;
    assert_eq!((&line["user_id"], &line["reason"]), (&"u-1".into(), &"too loud".into()));
    assert_eq!(post("/api/v1/sessions/s-1/close", "{}").await, 200);
    let line = binary.line("A worker ends a session.").await;
    assert_eq!((&line["key"], &line["session_id"]), (&"chat".into(), &"s-1".into()));
}

#[tokio::test]
async fn a_call_for_events_that_are_off_ends_nothing() {
    let binary = Binary::start(&[]).await;
    let refused = binary.api("POST", "/api/v1/events/disconnect", r#"{"user_id":"u-1"}"#).await;
    refused.assert_refused(404, "not_found");
    assert!(refused.body.contains("endpoints.events is off"), "{}", refused.body);
    assert_eq!(binary.api("POST", "/api/v1/sessions/s-1/close", "{}").await.status, 200);
    binary.line("A worker ends a session.").await;
    assert!(binary.lines("A worker ends connections.").is_empty(), "{}", binary.log());
}

#[tokio::test]
async fn another_instance_tells_what_it_knows() {
    let backend = Backend::redis();
    let (here, there) = (start(&backend, "here").await, start(&backend, "there").await);
    let mut client = there.client("s-1").await;
    let found = find(&here, "session", "s-1").await;
    assert_eq!(found["instances"].as_array().unwrap().len(), 2, "{found}");
    assert_eq!(found["connections"][0]["server_id"], "there");
    assert_eq!(post(&here, "end", json!({ "kind": "session", "id": "s-1" })).await.status, 200);
    assert_eq!(client.closed().await.0, 4004);
    assert_eq!(end_of(&here, "session", "s-1").await["server_id"], "there");
}

#[tokio::test]
async fn an_instance_that_does_not_answer_is_missed() {
    let server = RedisServer::start();
    let url = server.url();
    let backend = Backend::Redis(server);
    let here = start(&backend, "here").await;
    let there = Binary::start(&[
        ("REDIS_URL", &url),
        ("SECRET_KEY", SECRET),
        ("SERVER_ID", "there"),
        ("METRICS_PORT", "0"),
        ("WSPROXY_ENDPOINTS__EVENTS", "true"),
    ])
    .await;
    there.line("Listening.").await;
    eventually_yes("both answer", async || {
        find(&here, "user", "u").await["instances"].as_array().unwrap().len() == 2
    })
    .await;
    there.signal(Signal::STOP);
    let found = find(&here, "user", "u").await;
    there.signal(Signal::CONT);
    assert!(found["notes"][0].as_str().unwrap().contains("did not answer"), "{found}");
}

#[tokio::test]
async fn the_overview_says_what_is_wrong() {
    let server = RedisServer::start();
    let backend = Backend::Redis(server);
    let here = start(&backend, "here").await;
    let overview = async || get(&here, "/api/v1/console/overview").await;
    eventually_yes("a sample is taken", async || {
        overview().await["samples"]["at"].as_array().unwrap().len() == 1
    })
    .await;
    let overview = overview().await;
    assert_eq!(overview["troubles"], json!([]), "{overview}");
    assert_eq!(overview["samples"]["connections"]["events"], json!([0]));
    assert_eq!((&overview["key"], &overview["server_id"]), (&"api.keys[1]".into(), &"here".into()));
    let Backend::Redis(server) = &backend else { unreachable!() };
    server.stop();
    eventually_yes("Redis is missed", async || {
        let troubles = get(&here, "/api/v1/console/overview").await["troubles"].clone();
        troubles[0]["weight"] == "now" && troubles[0]["what"] == "Redis is away."
    })
    .await;
    // Its own ends are known without Redis.
    let found = find(&here, "user", "u-1").await;
    assert!(!found["notes"].as_array().unwrap().is_empty(), "{found}");
}

#[tokio::test]
async fn the_page_is_on_the_admin_port_only_and_holds_no_data() {
    let backend = Backend::Memory;
    let here = start(&backend, "here").await;
    for (path, kind) in [
        ("/console", "text/html"),
        ("/console/page.js", "text/javascript"),
        ("/console/page.css", "text/css"),
    ] {
        let page = http::request(here.admin_address(), "GET", path, &[], b"").await;
        assert_eq!(page.status, 200, "{path}");
        assert!(page.header("content-type").starts_with(kind), "{path}");
        let policy = page.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'; script-src 'self'"), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"));
        assert_eq!(page.header("x-content-type-options"), "nosniff");
        assert!(!page.body.contains("here-"));
    }
    let post = http::request(here.admin_address(), "POST", "/console", &[], b"").await;
    post.assert_refused(405, "method_not_allowed");
    for path in ["/console", "/console/page.js"] {
        let data = http::request(here.address(), "GET", path, &[], b"").await;
        data.assert_refused(404, "not_found");
        let without = TestInstance::with(|_| ()).await;
        let none = http::request(without.address(), "GET", path, &[], b"").await;
        none.assert_refused(404, "not_found");
    }
}

#[tokio::test]
async fn bad_requests_of_the_console_are_named() {
    let here = start(&Backend::Memory, "here").await;
    let get = async |path: &str| call(here.admin_address(), "GET", path, "").await;
    for query in ["", "?kind=user", "?kind=cluster&id=x", "?kind=user&id=x&more=1"] {
        get(&format!("/api/v1/console/find{query}")).await.assert_refused(400, "bad_request");
    }
    for query in ["kind=user&id=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E", "kind=connection&id=x"] {
        get(&format!("/api/v1/console/find?{query}")).await.assert_refused(400, "bad_id");
    }
    for (what, body) in [
        ("end", json!({ "kind": "user" })),
        ("end", json!({ "kind": "user", "id": "u", "client_id": "c" })),
        ("end", json!({ "kind": "user", "id": "u", "reason": "x".repeat(124) })),
        ("send", json!({ "kind": "user", "id": "u" })),
        ("send", json!({ "kind": "user", "id": "u", "message": "no event" })),
        ("send", json!({ "kind": "room", "id": "r", "message": 1, "connection_id": UUID })),
        ("end", json!({ "kind": "connection", "id": UUID })),
        ("send", json!({ "kind": "session", "id": "s", "message": 1, "connection_id": UUID })),
    ] {
        post(&here, what, body).await.assert_refused(400, "bad_request");
    }
}

#[tokio::test]
async fn the_configuration_shows_origins_and_no_secret() {
    let mut binary = Binary::start(&[("SECRET_KEY", SECRET), ("METRICS_PORT", "0")]).await;
    let line = binary.line("Listening.").await;
    binary.address = line["admin_address"].as_str().unwrap().parse().unwrap();
    // An instance that has just begun to listen knows the values, and the origins a moment later.
    let config = async || binary.api("GET", "/api/v1/console/config", "").await;
    eventually_yes("origins are known", async || config().await.body.contains("METRICS_PORT"))
        .await;
    let config = config().await;
    let settings = config.json()["settings"].as_array().unwrap().clone();
    let of = |section: &str, name: &str| {
        let found = settings.iter().find(|one| one["section"] == section && one["name"] == name);
        found.unwrap().clone()
    };
    assert_eq!(of("jwt", "secret_key")["value"], "\"***\"");
    assert_eq!(of("jwt", "secret_key")["origin"], "env SECRET_KEY");
    assert_eq!(of("admin", "port")["origin"], "env METRICS_PORT");
    assert_eq!(of("heartbeat", "interval")["origin"], "default");
    assert!(!config.body.contains(SECRET) && !config.body.contains(API_KEY), "{}", config.body);
    let line = binary.line("An operator read the configuration.").await;
    assert!(line["key"].is_string(), "{line}");
}

const SECRET: &str = "a-secret-of-the-console-of-32-bytes";

const UUID: &str = "00000000-0000-7000-8000-000000000000";
