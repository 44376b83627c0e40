//! Members of a room: joins, leaves, reconnects, limits.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};
use wsproxy_proto::rooms::text;

use crate::{
    rooms::room_client::{RoomClient, instance, instance_with, position, words},
    support::{
        client::Client,
        eventually, eventually_yes,
        gateway::{Backend, TestInstance, over_both},
    },
};

over_both!(
    members_see_each_other_come_and_go,
    a_client_that_comes_back_in_time_has_never_left,
    a_second_connection_of_a_client_takes_its_place,
    a_full_room_takes_nobody_but_those_who_come_back,
    presence_is_told_and_kept,
);

async fn members_see_each_other_come_and_go(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    assert_eq!(ann.members(), ["ann"]);
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(bob.members(), ["ann", "bob"]);
    assert_eq!(ann.told().await, "join bob");
    bob.say("hi").await;
    assert_eq!(ann.told().await, "bob: hi");
    ann.say("hello").await;
    assert_eq!(bob.told().await, "ann: hello");
    bob.client.close().await;
    assert_eq!(ann.told().await, "leave bob");
    ann.client.close().await;
    is_empty(&instance).await;
}

async fn a_client_that_comes_back_in_time_has_never_left(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.leave_grace = Duration::from_secs(30);
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    // Without a close frame.
    drop(bob);
    let mut bob = RoomClient::join(&instance, "bob").await;
    bob.say("back").await;
    assert_eq!(ann.told().await, "bob: back");
}

async fn a_second_connection_of_a_client_takes_its_place(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut first = RoomClient::join_as(&instance, "lobby", "bob", "tab", json!({})).await;
    assert_eq!(ann.told().await, "join tab");
    let mut second = RoomClient::join_as(&instance, "lobby", "bob", "tab", json!({})).await;
    assert_eq!(first.client.closed().await.0, 4001);
    second.say("here").await;
    assert_eq!(ann.told().await, "tab: here");
    // The name belongs to its user.
    let path = "/ws/lobby?user_id=eve&client_id=tab";
    let refused = Client::connect(instance.address(), path, &[]).await;
    assert_eq!(refused.err(), Some(StatusCode::CONFLICT));
    second.say("still here").await;
    assert_eq!(ann.told().await, "tab: still here");
}

async fn a_full_room_takes_nobody_but_those_who_come_back(backend: Backend) {
    let instance = instance_with(&backend, |config| config.rooms.members_max = 2).await;
    let _ann = RoomClient::join(&instance, "ann").await;
    let bob = RoomClient::join(&instance, "bob").await;
    let refused = Client::connect(instance.address(), "/ws/lobby?user_id=c&client_id=c", &[]).await;
    assert_eq!(refused.err(), Some(StatusCode::SERVICE_UNAVAILABLE));
    let mut again = RoomClient::join(&instance, "bob").await;
    assert_eq!(again.members(), ["ann", "bob"]);
    drop(bob);
    again.say("x").await;
    again.client.close().await;
    eventually_yes("there is room", async || {
        let path = "/ws/lobby?user_id=c&client_id=c";
        Client::connect(instance.address(), path, &[]).await.is_ok()
    })
    .await;
}

async fn presence_is_told_and_kept(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let presence = json!({ "displayName": "Bob", "avatarUrl": "https://x/b.png" });
    let mut bob =
        RoomClient::join_as(&instance, "lobby", "bob", "bob", json!({ "presence": presence }))
            .await;
    assert_eq!(ann.told().await, "join bob");
    let update = ann.client.json().await;
    assert_eq!(update["presenceEvent"]["eventType"], "UPDATE");
    assert_eq!(update["presenceEvent"]["data"]["avatarUrl"], "https://x/b.png");
    let moved = json!({ "avatarUrl": "https://x/c.png" });
    bob.send(json!({ "presenceEvent": { "eventType": "UPDATE", "data": moved } })).await;
    let update = ann.client.json().await;
    assert_eq!(update["presenceEvent"]["data"]["avatarUrl"], "https://x/c.png");
    let cat = RoomClient::join(&instance, "cat").await;
    let players = cat.hello["initialState"]["players"].as_array().unwrap();
    let of_bob = players.iter().find(|player| player["clientId"] == "bob").unwrap();
    assert_eq!(of_bob["avatarUrl"], "https://x/c.png");
}

#[tokio::test]
async fn a_name_of_the_hello_is_seen_by_late_joiners() {
    let instance = instance(&Backend::Memory).await;
    let hello = json!({ "displayName": "Bob" });
    let _bob = RoomClient::join_as(&instance, "lobby", "bob", "bob", hello).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    // The hello may have come before the name was written.
    let players = ann.hello["initialState"]["players"].as_array().unwrap().clone();
    let bob = players.iter().find(|player| player["clientId"] == "bob").unwrap();
    if bob["displayName"] != "Bob" {
        let update = ann.client.json().await;
        assert_eq!(update["presenceEvent"]["data"]["displayName"], "Bob");
    }
    assert_eq!(ann.hello["limits"]["membersMax"], 1000);
    assert_eq!(ann.hello["limits"]["tickMs"], 50);
    assert_eq!(ann.hello["limits"]["entityBytesMax"], 4096);
}

#[tokio::test]
async fn a_leave_waits_for_the_grace_unless_the_client_says_goodbye() {
    let instance = instance_with(&Backend::Memory, |config| {
        config.rooms.leave_grace = Duration::from_secs(60);
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    let goodbye = CloseFrame { code: CloseCode::Away, reason: "".into() };
    bob.client.send_message(Message::Close(Some(goodbye))).await;
    assert_eq!(ann.told().await, "leave bob");
    let cat = RoomClient::join(&instance, "cat").await;
    assert_eq!(ann.told().await, "join cat");
    drop(cat);
    let waiting = || instance.metric("wsproxy_room_leaves_waiting");
    eventually("the leave waits", || waiting() == 1.0).await;
    let dan = RoomClient::join(&instance, "dan").await;
    assert_eq!(dan.members(), ["ann", "cat", "dan"]);
    assert_eq!(ann.told().await, "join dan");
}

#[tokio::test]
async fn a_newcomer_gets_the_state_first_and_each_change_once() {
    let instance = instance(&Backend::Memory).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let path = "/ws/lobby?user_id=bob&client_id=bob";
    let mut bob = Client::connect(instance.address(), path, &[]).await.unwrap();
    assert_eq!(ann.told().await, "join bob");
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    ann.say("early").await;
    // It says nothing, and is greeted after a second.
    let hello = read_binary(&mut bob).await["serverHello"].take();
    assert!(hello.is_object());
    ann.send(json!({ "entitySpawn": { "entityId": "f" } })).await;
    ann.say("late").await;
    let entities = hello["initialState"]["entities"].as_array().cloned().unwrap_or_default();
    let mut seen: Vec<String> = entities
        .iter()
        .map(|one| format!("spawn {} of ann", one["id"].as_str().unwrap()))
        .collect();
    while seen.last().is_none_or(|last| last != "ann: late") {
        seen.push(words(&read_binary(&mut bob).await));
    }
    // A machine that is busy may greet it before ann spoke.
    seen.retain(|words| words != "ann: early");
    assert_eq!(seen, ["spawn e of ann", "spawn f of ann", "ann: late"]);
}

#[tokio::test]
async fn a_whisper_reaches_one_client_only() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    let mut cat = RoomClient::join(&two, "cat").await;
    for name in ["bob", "cat"] {
        assert_eq!(ann.told().await, format!("join {name}"));
    }
    assert_eq!(bob.told().await, "join cat");
    ann.send(json!({ "to": "bob", "chatMessage": { "message": "for bob" } })).await;
    ann.say("for all").await;
    assert_eq!(bob.told().await, "ann: for bob");
    for member in [&mut bob, &mut cat] {
        assert_eq!(member.told().await, "ann: for all");
    }
}

#[tokio::test]
async fn the_keys_of_an_empty_room_expire() {
    let backend = Backend::redis();
    let instance = instance_with(&backend, |config| {
        config.rooms.empty_ttl = Duration::from_secs(50);
    })
    .await;
    let Backend::Redis(server) = &backend else { unreachable!() };
    let ttl = || server.call(&["PTTL", "{room:lobby}:meta"]).integer();
    let mut ann = RoomClient::join(&instance, "ann").await;
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    let exists = |key: &str| server.call(&["EXISTS", &format!("{{room:lobby}}:{key}")]).integer();
    eventually("the entity is kept", || exists("entities") == 1).await;
    assert!(ttl() > 3_000_000, "an hour for a room with members");
    ann.client.close().await;
    eventually("the room is empty", || (1..=50_000).contains(&ttl())).await;
    assert_eq!((exists("members"), exists("entities"), exists("positions")), (0, 0, 0));
    // The next join keeps the room again.
    let _bob = RoomClient::join(&instance, "bob").await;
    assert!(ttl() > 3_000_000);
}

#[tokio::test]
async fn members_of_two_instances_are_in_one_room() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    assert_eq!(bob.members(), ["ann", "bob"]);
    assert_eq!(ann.told().await, "join bob");
    ann.say("hi").await;
    assert_eq!(bob.told().await, "ann: hi");
    // The client moves to the other instance.
    let mut again = RoomClient::join(&one, "bob").await;
    assert_eq!(bob.client.closed().await.0, 4001);
    again.say("moved").await;
    assert_eq!(ann.told().await, "bob: moved");
    again.client.close().await;
    assert_eq!(ann.told().await, "leave bob");
    drop(ann);
    is_empty(&one).await;
    is_empty(&two).await;
}

#[tokio::test]
async fn a_client_that_moves_to_another_instance_keeps_its_last_place() {
    let backend = Backend::redis();
    let grace = |config: &mut wsproxy::config::Config| {
        config.rooms.leave_grace = Duration::from_secs(20);
    };
    let (one, two) = (instance_with(&backend, grace).await, instance_with(&backend, grace).await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&one, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    // The first is written at once, and the next one would wait.
    for x in [1.0, 2.0] {
        ann.send(position("e", x)).await;
        assert_eq!(bob.told().await, format!("move e of ann to {x}"));
    }
    drop((ann, bob));
    eventually("both connections have ended", || one.metric("wsproxy_room_leaves_waiting") == 2.0)
        .await;
    let ann = RoomClient::join(&two, "ann").await;
    let entities = ann.hello["initialState"]["entities"].as_array().unwrap();
    assert_eq!((&entities[0]["id"], &entities[0]["position"]["x"]), (&json!("e"), &json!(2.0)));
}

#[tokio::test]
async fn one_user_with_two_tabs_hears_the_other_tab_only() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut left = RoomClient::join_as(&one, "lobby", "ann", "left", json!({})).await;
    let mut right = RoomClient::join_as(&two, "lobby", "ann", "right", json!({})).await;
    assert_eq!(left.told().await, "join right");
    left.say("from left").await;
    right.say("from right").await;
    assert_eq!(left.told().await, "right: from right");
    assert_eq!(right.told().await, "left: from left");
    left.say("end").await;
    assert_eq!(right.told().await, "left: end");
}

#[tokio::test]
async fn tabs_in_text_and_binary_hear_each_other_never_themselves() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut left = RoomClient::join_as(&one, "lobby", "ann", "left", json!({})).await;
    let path = "/ws/lobby?user_id=ann&client_id=right";
    let mut right = Client::connect(two.address(), path, &[]).await.unwrap();
    send_binary(&mut right, &json!({ "clientHello": {} })).await;
    let hello = read_binary(&mut right).await;
    assert_eq!(hello["serverHello"]["initialState"]["players"].as_array().unwrap().len(), 2);
    assert_eq!(left.told().await, "join right");
    let said = [
        json!({ "entitySpawn": { "entityId": "e" } }),
        json!({ "positionUpdate": { "entityId": "e", "position": { "x": 1 } } }),
        json!({ "presenceEvent": { "eventType": "UPDATE", "data": { "avatarUrl": "u" } } }),
        json!({ "chatMessage": { "message": "hi" } }),
    ];
    for (tab, entity) in [("left", "l"), ("right", "r")] {
        for mut envelope in said.clone() {
            // The ids of both are apart, since an entity belongs to one member.
            for kind in ["entitySpawn", "positionUpdate"] {
                if envelope[kind].is_object() {
                    envelope[kind]["entityId"] = entity.into();
                }
            }
            match tab {
                "left" => left.send(envelope).await,
                _ => send_binary(&mut right, &envelope).await,
            }
        }
    }
    let expected = |tab: &str, entity: &str| {
        vec![
            format!("spawn {entity} of {tab}"),
            format!("move {entity} of {tab} to 1"),
            format!("update {tab}"),
            format!("{tab}: hi"),
        ]
    };
    // A position may wait for the end of a tick.
    let (mut by_left, mut by_right) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        by_left.push(left.told().await);
        by_right.push(words(&read_binary(&mut right).await));
    }
    let sorted = |mut words: Vec<String>| {
        words.sort();
        words
    };
    assert_eq!(sorted(by_left), sorted(expected("right", "r")));
    assert_eq!(sorted(by_right), sorted(expected("left", "l")));
    // Nothing came back to the tab that said it.
    left.say("end").await;
    assert_eq!(words(&read_binary(&mut right).await), "left: end");
    send_binary(&mut right, &json!({ "chatMessage": { "message": "end" } })).await;
    assert_eq!(left.told().await, "right: end");
}

async fn send_binary(client: &mut Client, envelope: &Value) {
    let envelope = text::to_binary(envelope.to_string().as_bytes()).unwrap();
    client.send_message(Message::binary(envelope)).await;
}

async fn read_binary(client: &mut Client) -> Value {
    match client.next().await {
        Message::Binary(envelope) => {
            serde_json::from_str(&text::to_text(&envelope).unwrap()).unwrap()
        }
        other => panic!("no binary message: {other:?}"),
    }
}

/// Waits until nothing of a room is left at an instance.
pub async fn is_empty(instance: &TestInstance) {
    instance.wait_empty().await;
}
