//! Rooms against clients that do whatever the protocol lets them.

use std::time::Duration;

use futures_util::future::join_all;
use http::StatusCode;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    rooms::room_client::{RoomClient, instance, instance_with, position},
    support::{
        client::Client,
        gateway::{Backend, TestInstance, over_both},
        redis_server::Answer,
    },
};

over_both!(
    presence_data_of_a_member_are_bounded,
    malformed_messages_reach_nobody,
    a_despawned_entity_has_no_late_position,
    signs_of_life_count_as_messages,
    members_that_come_and_go_at_once_leave_nothing,
    half_of_those_who_join_at_once_find_the_room_full,
);

async fn presence_data_of_a_member_are_bounded(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let data = json!({ "avatarUrl": "x".repeat(5000) });
    let hello = json!({ "presence": data });
    let mut eve = RoomClient::join_as(&instance, "lobby", "eve", "eve", hello).await;
    assert_eq!(ann.told().await, "join eve");
    assert_eq!(eve.told().await, "error too_large");
    eve.send(json!({ "presenceEvent": { "eventType": "UPDATE", "data": data } })).await;
    assert_eq!(eve.told().await, "error too_large");
    let data = json!({ "avatarUrl": "x".repeat(4000) });
    eve.send(json!({ "presenceEvent": { "eventType": "UPDATE", "data": data } })).await;
    assert_eq!(ann.told().await, "update eve");
    let cat = RoomClient::join(&instance, "cat").await;
    let players = cat.hello["initialState"]["players"].as_array().unwrap();
    let of_eve = players.iter().find(|player| player["clientId"] == "eve").unwrap();
    assert_eq!(of_eve["avatarUrl"].as_str().unwrap().len(), 4000);
}

async fn malformed_messages_reach_nobody(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut eve = RoomClient::join(&instance, "eve").await;
    assert_eq!(ann.told().await, "join eve");
    // Field 20, with an entity and a place whose x is not a number.
    let nan = b"\xa2\x01\x0a\x0a\x01e\x12\x05\x0d\0\0\xc0\x7f".to_vec();
    eve.client.send_message(Message::binary(nan)).await;
    assert_eq!(eve.told().await, "error invalid_message");
    eve.send(json!({ "positionUpdate": { "entityId": "e", "position": { "x": 1e300 } } })).await;
    assert_eq!(eve.told().await, "error invalid_message");
    let many: serde_json::Map<_, _> = (0..10_000).map(|n| (n.to_string(), json!("x"))).collect();
    eve.send(json!({ "entitySpawn": { "entityId": "e", "components": many } })).await;
    assert_eq!(eve.told().await, "error invalid_message");
    let large = json!({ "entityId": "e", "components": { "c": "x".repeat(5000) } });
    eve.send(json!({ "entitySpawn": large })).await;
    assert_eq!(eve.told().await, "error too_large");
    // A spoofed sender: first, last and twice, around a chat message.
    let chat = b"\xc2\x02\x04\x12\x02hi";
    let stamp = b"\xe2\x03\x03ann";
    for parts in [[&stamp[..], chat, b""], [b"", chat, stamp], [stamp, chat, stamp]] {
        eve.client.send_message(Message::binary(parts.concat())).await;
        assert_eq!(ann.told().await, "eve: hi");
    }
    eve.send(json!({ "positionUpdate": { "entityId": "e", "position": { "x": 1e38 } } })).await;
    assert!(ann.told().await.starts_with("move e of eve to "));
    let chat = "x".repeat(500_000);
    eve.say(&chat).await;
    assert_eq!(ann.told().await, format!("eve: {chat}"));
}

async fn a_despawned_entity_has_no_late_position(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.messages_per_second = 2;
        config.rooms.tick = Duration::ZERO;
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    for x in 0..6 {
        ann.send(position("e", f64::from(x))).await;
    }
    // The despawn passes as soon as the rate allows it, before or behind the position that waits.
    let mut told = Vec::new();
    while !told.iter().any(|words| words == "despawn e of ann") {
        ann.send(json!({ "entityDespawn": { "entityId": "e" } })).await;
        let next = tokio::time::timeout(Duration::from_millis(300), bob.told()).await;
        told.extend(next.ok());
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    ann.say("end").await;
    assert_eq!(bob.told_until("ann: end").await, [""; 0], "{told:?}");
    if let Backend::Redis(server) = &backend {
        for key in ["{room:lobby}:entities", "{room:lobby}:positions"] {
            assert_eq!(server.call(&["HEXISTS", key, "ann e"]).integer(), 0, "{key}");
        }
    }
}

async fn signs_of_life_count_as_messages(backend: Backend) {
    let instance = instance_with(&backend, |config| config.rooms.messages_per_second = 5).await;
    let mut eve = RoomClient::join(&instance, "eve").await;
    let beat = r#"{"messageId":"ping-1","timestamp":1,"type":255,"payload":null}"#;
    for _ in 0..200 {
        eve.client.send(beat).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    eve.send(json!({ "chatMessage": { "fromClientId": "ann" } })).await;
    let mut answers = 0;
    while eve.client.text().await == beat {
        answers += 1;
    }
    assert!(answers < 50, "{answers}");
}

async fn members_that_come_and_go_at_once_leave_nothing(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.leave_grace = Duration::from_millis(1);
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let come_and_go = async |number: usize| {
        let path = format!("/ws/lobby?user_id=u&client_id=c{}", number % 5);
        // Some go before the answer.
        let opening = Client::connect(instance.address(), &path, &[]);
        let _ = tokio::time::timeout(Duration::from_millis((number % 4) as u64), opening).await;
    };
    join_all((0..60).map(come_and_go)).await;
    alone(&instance, "ann").await;
    ann.say("nobody").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    bob.say("end").await;
    let told = ann.told_until("bob: end").await;
    assert_alternate(&told);
    assert!(told.iter().any(|words| words == "join bob"), "{told:?}");
    assert!(bob.members().iter().all(|name| !name.starts_with('c')), "{:?}", bob.members());
    bob.client.close().await;
    ann.client.close().await;
    instance.wait_empty().await;
}

/// Waits until a client is the only member of the lobby.
async fn alone(instance: &TestInstance, client: &str) {
    crate::support::eventually_yes("all others have left", async || {
        let other = RoomClient::join(instance, "looks").await;
        let members = other.members();
        other.client.close().await;
        members == [client, "looks"]
    })
    .await;
}

/// Each client comes and goes in turn, as one listener was told.
pub fn assert_alternate(told: &[String]) {
    let mut here = std::collections::HashSet::new();
    for words in told {
        match words.split_once(' ') {
            Some(("join", client)) => assert!(here.insert(client), "{client} twice: {told:?}"),
            Some(("leave", client)) => assert!(here.remove(client), "{client} twice: {told:?}"),
            _ => {}
        }
    }
}

async fn half_of_those_who_join_at_once_find_the_room_full(backend: Backend) {
    let instance = instance_with(&backend, |config| config.rooms.members_max = 50).await;
    let join = async |number: usize| {
        let path = format!("/ws/lobby?user_id=u&client_id=c{number}");
        Client::connect(instance.address(), &path, &[]).await
    };
    let joined = join_all((0..100).map(join)).await;
    let refused = |one: &Result<Client, StatusCode>| {
        one.as_ref().err().is_some_and(|status| *status == StatusCode::SERVICE_UNAVAILABLE)
    };
    assert_eq!(joined.iter().filter(|one| one.is_ok()).count(), 50);
    assert_eq!(joined.iter().filter(|one| refused(one)).count(), 50);
    if let Backend::Redis(server) = &backend {
        assert_eq!(server.call(&["HLEN", "{room:lobby}:members"]), Answer::Integer(50));
    }
    drop(joined);
    instance.wait_empty().await;
}

#[tokio::test]
async fn ids_of_rooms_are_ids() {
    let instance = instance(&Backend::Memory).await;
    let status = async |room: &str| {
        let path = format!("/ws/{room}?user_id=ann&client_id=ann");
        Client::connect(instance.address(), &path, &[]).await.err()
    };
    for bad in ["%2F", "a%2Fb", "a%20b", "%ff", &"x".repeat(129)] {
        assert_eq!(status(bad).await, Some(StatusCode::BAD_REQUEST), "{bad}");
    }
    for probe in ["stats", "health", "%73tats"] {
        assert_eq!(status(probe).await, Some(StatusCode::BAD_REQUEST), "{probe}");
    }
    assert_eq!(status(&"x".repeat(128)).await, None);
}

#[tokio::test]
async fn members_that_are_kicked_while_they_join_leave_nothing() {
    let backend = Backend::redis();
    let instance = instance(&backend).await;
    let Backend::Redis(server) = &backend else { unreachable!() };
    let kick =
        r"return redis.call('PUBLISH','room:lobby','\255R\1K'..string.rep('\0',17)..'eve out')";
    let path = "/ws/lobby?user_id=eve&client_id=eve";
    let opening = join_all((0..20).map(|_| Client::connect(instance.address(), path, &[])));
    let kicking = async {
        for _ in 0..20 {
            server.call(&["EVAL", kick, "0"]);
            tokio::task::yield_now().await;
        }
    };
    let (opened, ()) = tokio::join!(opening, kicking);
    server.call(&["EVAL", kick, "0"]);
    for client in opened.into_iter().flatten() {
        let mut client = client;
        let code = loop {
            match client.next().await {
                Message::Close(Some(frame)) => break u16::from(frame.code),
                Message::Close(None) => panic!("a close frame without a code"),
                _ => {}
            }
        };
        assert!(matches!(code, 4001 | 4004), "{code}");
    }
    instance.wait_empty().await;
    assert_eq!(server.call(&["HLEN", "{room:lobby}:members"]), Answer::Integer(0));
}
