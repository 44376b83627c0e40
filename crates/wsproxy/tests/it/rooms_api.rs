//! Rooms for workers and operators: the API, stats and metrics.

use std::time::Duration;

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use wsproxy::config::{Config, rooms::Development};

use crate::support::{
    client::Client,
    eventually, eventually_yes,
    gateway::{API_KEY, Backend, TestInstance, bearer, over_both},
    http::{self, Response},
    issuer,
    redis_server::Answer,
};

over_both!(
    a_worker_speaks_to_a_room_and_to_one_member,
    messages_that_are_no_envelopes_are_refused,
    rooms_and_members_are_listed,
    a_kicked_member_is_gone_at_once,
    a_closed_room_loses_its_members_and_its_state,
    stats_have_the_shape_of_older_gateways,
    numbers_of_a_room_are_in_the_metrics,
    probes_answer_where_rooms_and_events_are_served,
);

/// An instance that serves rooms and believes its clients.
async fn start(backend: &Backend) -> TestInstance {
    start_with(backend, |config| config.rooms.development = Development::Loopback).await
}

async fn start_with(backend: &Backend, change: impl FnOnce(&mut Config)) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.rooms = true;
    config.rate_limit.max_requests_is_set = true;
    change(&mut config);
    TestInstance::start(config).await
}

/// A member of a room. The client's id begins with that of its user.
async fn join(instance: &TestInstance, room: &str, client: &str) -> Client {
    let user = client.split('-').next().unwrap();
    let path =
        format!("/ws/{room}?user_id={user}&client_id={client}&display_name=Name%20of%20{user}");
    let mut member = Client::connect(instance.address(), &path, &[]).await.unwrap();
    member.send(json!({ "clientHello": {} }).to_string()).await;
    assert!(member.json().await["serverHello"].is_object());
    member
}

/// The next message that is no presence event.
async fn said(member: &mut Client) -> Value {
    loop {
        let message = member.json().await;
        if message["presenceEvent"].is_null() {
            return message;
        }
    }
}

/// The next presence event, as its type and client.
async fn presence(member: &mut Client) -> (String, String) {
    let event = &member.json().await["presenceEvent"];
    let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
    (text("eventType"), text("clientId"))
}

/// The code and the reason of the close frame, behind all messages.
async fn ended(member: &mut Client) -> (u16, String) {
    loop {
        if let Message::Close(Some(frame)) = member.next().await {
            return (frame.code.into(), frame.reason.to_string());
        }
    }
}

async fn post_bytes(instance: &TestInstance, path: &str, body: &[u8]) -> Response {
    let key = format!("Bearer {API_KEY}");
    let headers = [("authorization", key.as_str()), ("content-type", "application/octet-stream")];
    http::request(instance.address(), "POST", path, &headers, body).await
}

async fn members(instance: &TestInstance, room: &str) -> Vec<String> {
    let listed = instance.api("GET", &format!("/api/v1/rooms/{room}/members"), "").await.json();
    let members = listed["members"].as_array().unwrap();
    members.iter().map(|member| member["client_id"].as_str().unwrap().to_owned()).collect()
}

async fn a_worker_speaks_to_a_room_and_to_one_member(backend: Backend) {
    let instance = start(&backend).await;
    let mut ann = join(&instance, "lobby", "ann").await;
    let mut bob = join(&instance, "lobby", "bob").await;
    let path = "/api/v1/rooms/lobby/messages";
    let told = |text: &str| json!({ "chatMessage": { "message": text } }).to_string();
    let sent = instance.api("POST", path, &told("all")).await;
    assert_eq!((sent.status, sent.json()), (200, json!({ "receivers": 1 })));
    for member in [&mut ann, &mut bob] {
        let message = said(member).await;
        assert_eq!(message["chatMessage"]["message"], "all");
        assert!(message["sender"].as_str().unwrap_or_default().is_empty(), "{message}");
    }
    // An own `to` and `sender` of the envelope do not count.
    let one = r#"{"to":"ann","sender":"ann","chatMessage":{"message":"one"}}"#;
    assert_eq!(instance.api("POST", &format!("{path}?to=bob"), one).await.status, 200);
    let message = said(&mut bob).await;
    assert_eq!(message["chatMessage"]["message"], "one");
    assert!(message["sender"].as_str().unwrap_or_default().is_empty(), "{message}");
    let binary = post_bytes(&instance, path, b"\xC2\x02\x04\x12\x02yo").await;
    assert_eq!(binary.status, 200, "{binary:?}");
    assert_eq!(said(&mut ann).await["chatMessage"]["message"], "yo", "not the one for bob");
    assert_eq!(said(&mut bob).await["chatMessage"]["message"], "yo");
    let unheard = instance.api("POST", "/api/v1/rooms/empty/messages", &told("x")).await;
    assert_eq!(unheard.json(), json!({ "receivers": 0 }));
}

async fn messages_that_are_no_envelopes_are_refused(backend: Backend) {
    let instance = start(&backend).await;
    let path = "/api/v1/rooms/lobby/messages";
    for body in ["", "x", "{}", r#"{"chat":1}"#, r#"{"positionUpdate":{"position":{"x":"y"}}}"#] {
        instance.api("POST", path, body).await.assert_refused(400, "bad_request");
    }
    for body in [&b"\xffR\x01M"[..], b"\xff", b"\x08"] {
        post_bytes(&instance, path, body).await.assert_refused(400, "bad_request");
    }
    let good = r#"{"chatMessage":{"message":"x"}}"#;
    for path in [
        "rooms/stats/messages",
        "rooms/health/messages",
        "rooms/a%20b/messages",
        "rooms/a/messages?to=a%20b",
    ] {
        let refused = instance.api("POST", &format!("/api/v1/{path}"), good).await;
        refused.assert_refused(400, "bad_id");
    }
    let other = instance.api("POST", &format!("{path}?history=true"), good).await;
    other.assert_refused(400, "bad_request");
    let off = TestInstance::start(backend.config()).await;
    off.api("POST", path, good).await.assert_refused(404, "not_found");
    off.api("GET", "/api/v1/rooms", "").await.assert_refused(404, "not_found");
    assert_eq!(off.get("/ws/stats").await.status, 404);
}

async fn rooms_and_members_are_listed(backend: Backend) {
    let instance = start(&backend).await;
    let list = async |query: &str| instance.api("GET", &format!("/api/v1/rooms{query}"), "").await;
    assert_eq!(list("").await.json(), json!({ "rooms": [], "truncated": false }));
    let _ann = join(&instance, "lobby", "ann-phone").await;
    let _tab = join(&instance, "lobby", "ann-tab").await;
    let _bob = join(&instance, "other", "bob").await;
    let expected = json!({
        "rooms": [{ "room_id": "lobby", "members": 2 }, { "room_id": "other", "members": 1 }],
        "truncated": false,
    });
    assert_eq!(list("").await.json(), expected);
    let cut = list("?limit=1").await.json();
    assert_eq!((cut["rooms"].as_array().unwrap().len(), &cut["truncated"]), (1, &json!(true)));
    for query in ["?limit=0", "?limit=10001", "?limit=x", "?all=1"] {
        list(query).await.assert_refused(400, "bad_request");
    }
    let path = "/api/v1/rooms/lobby/members";
    let found = instance.api("GET", path, "").await.json();
    let phone = &found["members"][0];
    assert_eq!((&phone["client_id"], &phone["user_id"]), (&json!("ann-phone"), &json!("ann")));
    assert_eq!(phone["name"], "Name of ann");
    assert_eq!(phone["server_id"], *instance.gateway().server_id);
    assert!(phone["since"].as_str().unwrap().ends_with('Z'), "{phone}");
    assert_eq!(members(&instance, "lobby").await, ["ann-phone", "ann-tab"]);
    let cut = instance.api("GET", &format!("{path}?limit=1"), "").await.json();
    assert_eq!((cut["members"].as_array().unwrap().len(), &cut["truncated"]), (1, &json!(true)));
    assert!(members(&instance, "empty").await.is_empty());
}

async fn a_kicked_member_is_gone_at_once(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.rooms.development = Development::Loopback;
        config.rooms.leave_grace = Duration::from_secs(600);
    })
    .await;
    let mut ann = join(&instance, "lobby", "ann").await;
    let mut phone = join(&instance, "lobby", "bob-phone").await;
    let mut tab = join(&instance, "lobby", "bob-tab").await;
    let cat = join(&instance, "lobby", "cat").await;
    // A member whose connection is lost stays for the grace.
    drop(cat);
    eventually("the connection is gone", || {
        instance.metric("wsproxy_active_connections{endpoint=\"rooms\"}") == 3.0
    })
    .await;
    assert_eq!(members(&instance, "lobby").await, ["ann", "bob-phone", "bob-tab", "cat"]);
    let path = "/api/v1/rooms/lobby/kick";
    for body in ["", "{}", r#"{"client_id":"a","user_id":"b"}"#, r#"{"client":"a"}"#] {
        instance.api("POST", path, body).await.assert_refused(400, "bad_request");
    }
    instance.api("POST", path, r#"{"user_id":"a b"}"#).await.assert_refused(400, "bad_id");
    let long = json!({ "user_id": "bob", "reason": "x".repeat(124) }).to_string();
    instance.api("POST", path, &long).await.assert_refused(400, "bad_request");

    let kicked = instance.api("POST", path, r#"{"user_id":"bob","reason":"was rude"}"#).await;
    assert_eq!((kicked.status, kicked.json()), (200, json!({ "members": 2 })));
    assert_eq!(members(&instance, "lobby").await, ["ann", "cat"]);
    let gone = instance.api("POST", path, r#"{"client_id":"cat"}"#).await;
    assert_eq!(gone.json(), json!({ "members": 1 }));
    assert_eq!(members(&instance, "lobby").await, ["ann"]);
    for member in [&mut phone, &mut tab] {
        assert_eq!(ended(member).await, (4004, "was rude".into()));
    }
    let mut events: Vec<(String, String)> = Vec::new();
    while events.iter().filter(|(what, _)| what.contains("LEAVE")).count() < 3 {
        events.push(presence(&mut ann).await);
    }
    let mut left: Vec<_> =
        events.iter().filter(|(what, _)| what.contains("LEAVE")).map(|(_, who)| &**who).collect();
    left.sort_unstable();
    assert_eq!(left, ["bob-phone", "bob-tab", "cat"]);
    let nobody = instance.api("POST", path, r#"{"client_id":"cat"}"#).await;
    assert_eq!(nobody.json(), json!({ "members": 0 }));
    // A token is the ban: this user may come back.
    let _back = join(&instance, "lobby", "bob-tab").await;
    assert_eq!(members(&instance, "lobby").await, ["ann", "bob-tab"]);
}

async fn a_closed_room_loses_its_members_and_its_state(backend: Backend) {
    let instance = start(&backend).await;
    let mut ann = join(&instance, "lobby", "ann").await;
    let mut bob = join(&instance, "lobby", "bob").await;
    ann.send(json!({ "entitySpawn": { "entityId": "e" } }).to_string()).await;
    assert_eq!(said(&mut bob).await["entitySpawn"]["entityId"], "e");
    let path = "/api/v1/rooms/lobby/close";
    let closed = instance.api("POST", path, r#"{"reason":"over"}"#).await;
    assert_eq!((closed.status, closed.json()), (200, json!({ "members": 2 })));
    assert!(members(&instance, "lobby").await.is_empty());
    for member in [&mut ann, &mut bob] {
        assert_eq!(ended(member).await, (4004, "over".into()));
    }
    if let Backend::Redis(redis) = &backend {
        // The version stays for a while, so that the next life of the room goes on from it.
        let version = Answer::Array(vec![Answer::Text("{room:lobby}:meta".into())]);
        eventually_yes("the state is gone", async || redis.call(&["KEYS", "{room:*"]) == version)
            .await;
    }
    eventually("the room is gone", || instance.metric("wsproxy_rooms_active") == 0.0).await;
    assert_eq!(instance.metric("wsproxy_room_state_bytes"), 0.0);
    let again = instance.api("POST", path, "").await;
    assert_eq!(again.json(), json!({ "members": 0 }));
    let _new = join(&instance, "lobby", "ann").await;
    assert_eq!(members(&instance, "lobby").await, ["ann"]);
}

async fn stats_have_the_shape_of_older_gateways(backend: Backend) {
    let secret = "0123456789abcdef0123456789abcdef";
    let instance = start_with(&backend, |config| config.jwt.secret_key = Some(secret.into())).await;
    let claims = json!({ "sub": "ann", "exp": issuer::now() + 600 });
    let key = EncodingKey::from_secret(secret.as_bytes());
    let token = jsonwebtoken::encode(&Header::default(), &claims, &key).unwrap();
    let path = "/ws/lobby?client_id=phone";
    let mut ann = Client::connect(instance.address(), path, &bearer(&token)).await.unwrap();
    ann.send(json!({ "clientHello": {} }).to_string()).await;
    ann.json().await;
    ann.send(json!({ "entitySpawn": { "entityId": "e" } }).to_string()).await;
    let stats = async || instance.get("/ws/lobby/stats").await.json();
    eventually_yes("the entity is counted", async || stats().await["entities"] == 1).await;
    let told = stats().await;
    assert_eq!((&told["room_id"], &told["connection_count"]), (&json!("lobby"), &json!(1)));
    assert_eq!((&told["connections"], &told["truncated"]), (&json!([]), &json!(false)));
    assert_eq!((&told["members"], &told["messages_in"]), (&json!(1), &json!(2)));
    assert_eq!(told["messages_out"], 1, "the ServerHello");
    assert!(told["bytes_in"].as_u64().unwrap() > 4 && told["bytes_out"].as_u64().unwrap() > 10);

    let told = instance.api("GET", "/ws/lobby/stats", "").await.json();
    let connection = &told["connections"][0];
    assert_eq!(
        (&connection["user_id"], &connection["client_id"]),
        (&json!("ann"), &json!("phone"))
    );
    assert_eq!(connection["room_id"], "lobby");
    assert!(connection["id"].is_string() && connection["connected_at"].is_string());

    let all = instance.get("/ws/stats").await.json();
    assert_eq!((&all["total_connections"], &all["local_connections"]), (&json!(1), &json!(1)));
    assert_eq!(all["rooms"], 1);
    assert!(all["timestamp"].is_string());
    let empty = instance.get("/ws/empty/stats").await.json();
    assert_eq!((&empty["connection_count"], &empty["messages_in"]), (&json!(0), &json!(0)));
    for path in ["/ws/stats/stats", "/ws/health/stats"] {
        instance.get(path).await.assert_refused(400, "bad_id");
    }
    // Rooms are served, so `ws` is no agent of sessions.
    instance.get("/ws/ws/stats").await.assert_refused(400, "bad_id");
    instance.get("/ws/ws/s-1").await.assert_refused(400, "bad_id");
    let posted = http::request(instance.address(), "POST", "/ws/stats", &[], b"").await;
    posted.assert_refused(405, "method_not_allowed");
}

async fn probes_answer_where_rooms_and_events_are_served(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.endpoints.events = true;
        config.jwt.secret_key = Some("a secret of at least 32 characters".into());
    })
    .await;
    for path in ["/ws/stats", "/ws/health"] {
        assert_eq!(instance.get(path).await.status, 200, "{path}");
        // A client that would like HTTP/2, as Java's does, is not one that wants a WebSocket.
        let headers = [("connection", "upgrade"), ("upgrade", "h2c")];
        let answer = http::request(instance.address(), "GET", path, &headers, b"").await;
        assert_eq!(answer.status, 200, "{path}");
        let refused = http::handshake(instance.address(), path, &[]).await;
        refused.assert_refused(400, "bad_id");
    }
    let refused = http::handshake(instance.address(), "/ws/lobby?user_id=ann", &[]).await;
    assert!(refused.body.contains("rooms.development"), "{refused:?}");
}

async fn numbers_of_a_room_are_in_the_metrics(backend: Backend) {
    let instance = start(&backend).await;
    let messages = |kind: &str, direction: &str| {
        let labels = format!("{{kind=\"{kind}\",direction=\"{direction}\"}}");
        instance.metric(&format!("wsproxy_room_messages_total{labels}"))
    };
    let mut ann = join(&instance, "lobby", "ann").await;
    let mut bob = join(&instance, "lobby", "bob").await;
    ann.send(json!({ "chatMessage": { "message": "hi" } }).to_string()).await;
    assert_eq!(said(&mut bob).await["chatMessage"]["message"], "hi");
    ann.send(
        json!({ "positionUpdate": { "entityId": "ann", "position": { "x": 1 } } }).to_string(),
    )
    .await;
    assert_eq!(said(&mut bob).await["positionUpdate"]["entityId"], "ann");
    assert_eq!((messages("chat_message", "in"), messages("chat_message", "out")), (1.0, 1.0));
    assert_eq!((messages("position_update", "in"), messages("position_update", "out")), (1.0, 1.0));
    assert_eq!((messages("client_hello", "in"), messages("server_hello", "out")), (2.0, 2.0));
    assert_eq!(messages("presence_event", "out"), 1.0);
    ann.send("{}").await;
    eventually("the invalid message is counted", || messages("invalid", "in") == 1.0).await;
    let of = |series: &str| instance.metric(&format!("wsproxy_{series}"));
    assert_eq!(of("message_errors_total{endpoint=\"rooms\",kind=\"invalid\"}"), 1.0);
    assert_eq!(of("messages_received_total{endpoint=\"rooms\"}"), 5.0);
    assert_eq!((of("rooms_active"), of("room_development")), (1.0, 1.0));
    assert_eq!((of("room_members_count"), of("room_members_sum")), (1.0, 2.0));
    assert_eq!(of("room_members_bucket{le=\"1.0\"}"), 0.0);
    assert_eq!(of("room_members_bucket{le=\"2.0\"}"), 1.0);
    assert_eq!(of("room_join_total{result=\"joined\"}"), 2.0);
    assert_eq!(of("room_presence_events_total{event=\"join\"}"), 2.0);
    assert_eq!((of("room_snapshot_seconds_count"), of("room_snapshot_bytes_count")), (2.0, 2.0));
    assert!(of("room_snapshot_bytes_sum") > 50.0);
    assert_eq!((of("room_batch_entries_count"), of("room_tick_seconds_count")), (1.0, 1.0));
    assert!(of("room_state_bytes") > 0.0);
    let tab = Client::connect(instance.address(), "/ws/lobby?user_id=eve&client_id=ann", &[]).await;
    assert!(tab.is_err());
    assert_eq!(of("room_join_total{result=\"taken\"}"), 1.0);
}

#[tokio::test]
async fn members_of_other_instances_are_kicked_and_counted() {
    let backend = Backend::redis();
    let (one, two) = (start(&backend).await, start(&backend).await);
    let mut ann = join(&one, "lobby", "ann").await;
    let mut bob = join(&two, "lobby", "bob").await;
    let _cat = join(&two, "other", "cat").await;
    assert_eq!(members(&one, "lobby").await, ["ann", "bob"]);
    let stats = one.get("/ws/lobby/stats").await.json();
    assert_eq!(
        (&stats["members"], &stats["connections"][1]["client_id"]),
        (&json!(2), &json!("bob"))
    );
    let elsewhere = one.get("/ws/other/stats").await.json();
    assert_eq!(
        (&elsewhere["members"], elsewhere["connections"].as_array().unwrap().len()),
        (&json!(1), 1)
    );
    let all = one.get("/ws/stats").await.json();
    assert_eq!((&all["total_connections"], &all["local_connections"]), (&json!(3), &json!(1)));
    assert_eq!(all["rooms"], 2);
    let sent = json!({ "chatMessage": { "message": "x" } }).to_string();
    let sent = one.api("POST", "/api/v1/rooms/lobby/messages?to=bob", &sent).await;
    assert_eq!(sent.json(), json!({ "receivers": 2 }));
    assert_eq!(said(&mut bob).await["chatMessage"]["message"], "x");
    let kicked = one.api("POST", "/api/v1/rooms/lobby/kick", r#"{"client_id":"bob"}"#).await;
    assert_eq!(kicked.json(), json!({ "members": 1 }));
    assert_eq!(ended(&mut bob).await.0, 4004);
    while presence(&mut ann).await.1 != "bob" {}
    assert_eq!(members(&two, "lobby").await, ["ann"]);
    let closed = two.api("POST", "/api/v1/rooms/lobby/close", "").await;
    assert_eq!(closed.json(), json!({ "members": 1 }));
    assert_eq!(ended(&mut ann).await, (4004, "ended by the backend".into()));
}
