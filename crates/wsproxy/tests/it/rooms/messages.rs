//! Messages to members: chat, entities, positions, refusals, workers.

use std::time::Duration;

use futures_util::SinkExt;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use wsproxy::config::rooms::Validate;

use crate::{
    rooms::room_client::{RoomClient, instance, instance_with, position},
    support::{
        client::Client,
        gateway::{Backend, over_both},
        redis_server::{Answer, RedisServer},
    },
};

over_both!(
    a_late_joiner_gets_the_state_of_the_room,
    the_newest_position_wins_within_a_tick,
    members_cannot_speak_for_others,
    a_client_above_its_rate_is_told_and_keeps_its_newest_position,
    a_reliable_message_is_sent_until_it_is_acknowledged,
);

async fn a_late_joiner_gets_the_state_of_the_room(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    ann.send(json!({ "entitySpawn": { "entityId": "e", "templateId": "t", "components": { "color": "red" } } })).await;
    ann.send(json!({ "entityUpdate": { "entityId": "e", "components": { "size": "Mg==" } } }))
        .await;
    ann.send(json!({ "entitySpawn": { "entityId": "gone" } })).await;
    ann.send(json!({ "entityDespawn": { "entityId": "gone" } })).await;
    ann.send(position("e", 7.0)).await;
    ann.say("done").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    ann.say("ready").await;
    assert_eq!(bob.told().await, "ann: ready");
    let cat = RoomClient::join(&instance, "cat").await;
    let entities = cat.hello["initialState"]["entities"].as_array().unwrap();
    assert_eq!(entities.len(), 1, "{entities:?}");
    assert_eq!(entities[0]["id"], "e");
    assert_eq!(entities[0]["components"], json!({ "color": "red", "size": "2" }));
    assert_eq!(entities[0]["position"]["x"], 7.0);
    // Entities go with their member.
    ann.client.close().await;
    assert_eq!(bob.told().await, "join cat");
    assert_eq!(bob.told().await, "despawn e of ann");
    assert_eq!(bob.told().await, "leave ann");
}

async fn the_newest_position_wins_within_a_tick(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.tick = Duration::from_millis(300);
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let features = json!({ "features": ["batch"] });
    let mut bob = RoomClient::join_as(&instance, "lobby", "bob", "bob", features).await;
    let mut cat = RoomClient::join(&instance, "cat").await;
    assert_eq!(ann.told().await, "join bob");
    assert_eq!(ann.told().await, "join cat");
    assert_eq!(bob.told().await, "join cat");
    for x in 0..5 {
        ann.send(position("ann", f64::from(x))).await;
    }
    // The first leaves at once, and of those within the tick the newest.
    assert_eq!(bob.told().await, "moves ann of ann to 0");
    assert_eq!(bob.told().await, "moves ann of ann to 4");
    assert_eq!(cat.told().await, "move ann of ann to 0");
    assert_eq!(cat.told().await, "move ann of ann to 4");
}

async fn members_cannot_speak_for_others(backend: Backend) {
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut eve = RoomClient::join(&instance, "eve").await;
    assert_eq!(ann.told().await, "join eve");
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    assert_eq!(eve.told().await, "spawn e of ann");
    for (envelope, code) in [
        (json!({ "chatMessage": { "fromClientId": "ann", "message": "x" } }), "wrong_sender"),
        (json!({ "entitySpawn": { "entityId": "f", "ownerId": "ann" } }), "wrong_sender"),
        (json!({ "entityDespawn": { "entityId": "e" } }), "wrong_sender"),
        (position("e", 1.0), "wrong_sender"),
        (json!({ "presenceEvent": { "clientId": "ann", "eventType": "UPDATE" } }), "wrong_sender"),
        (json!({ "presenceEvent": { "eventType": "LEAVE" } }), "not_allowed"),
        (json!({ "serverHello": {} }), "not_allowed"),
        (json!({ "chatMessage": { "message": 7 } }), "invalid_message"),
    ] {
        eve.send(envelope).await;
        assert_eq!(eve.told().await, format!("error {code}"));
    }
    // Whatever a client writes into the stamp is overruled.
    eve.send(json!({ "sender": "ann", "chatMessage": { "message": "who am I" } })).await;
    assert_eq!(ann.told().await, "eve: who am I");
    eve.send(json!({ "serverHello": {} })).await;
    assert_eq!(eve.told().await, "error not_allowed");
    eve.send(json!({ "serverHello": {} })).await;
    assert_eq!(eve.client.closed().await.0, 1008);
}

async fn a_client_above_its_rate_is_told_and_keeps_its_newest_position(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.messages_per_second = 5;
        config.rooms.tick = Duration::ZERO;
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    for x in 0..30 {
        ann.send(position("ann", f64::from(x))).await;
    }
    ann.say("too much").await;
    assert_eq!(ann.told().await, "error rate_limited");
    let mut last = String::new();
    while last != "move ann of ann to 29" {
        last = bob.told().await;
    }
}

async fn a_reliable_message_is_sent_until_it_is_acknowledged(backend: Backend) {
    let instance = instance_with(&backend, |config| {
        config.rooms.ack_interval = Duration::from_millis(200);
        config.rooms.ack_tries = 50;
    })
    .await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let features = json!({ "features": ["acks"] });
    let mut bob = RoomClient::join_as(&instance, "lobby", "bob", "bob", features).await;
    assert_eq!(ann.told().await, "join bob");
    ann.send(json!({ "reliable": true, "chatMessage": { "message": "sure" } })).await;
    let first = bob.client.json().await;
    assert_eq!(first["seq"], "1");
    let again = bob.client.json().await;
    assert_eq!(again, first);
    bob.send(json!({ "ack": { "seq": "1" } })).await;
    ann.say("plain").await;
    let mut next = bob.client.json().await;
    // A copy may have been on its way.
    while next == first {
        next = bob.client.json().await;
    }
    assert_eq!(next["chatMessage"]["message"], "plain");
    assert!(next.get("seq").is_none());
}

#[tokio::test]
async fn entities_and_positions_reach_other_instances_and_late_joiners_there() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    ann.send(position("e", 3.0)).await;
    assert_eq!(bob.told().await, "spawn e of ann");
    assert_eq!(bob.told().await, "move e of ann to 3");
    let three = instance(&backend).await;
    let mut cat = RoomClient::join(&three, "cat").await;
    let entities = cat.hello["initialState"]["entities"].as_array().unwrap().clone();
    assert_eq!(entities[0]["id"], "e");
    // The position is in Redis after a second at the latest.
    if entities[0]["position"].is_null() {
        assert_eq!(cat.told().await, "move e of ann to 3");
    } else {
        assert_eq!(entities[0]["position"]["x"], 3.0);
    }
    ann.send(json!({ "entityDespawn": { "entityId": "e" } })).await;
    assert_eq!(bob.told().await, "join cat");
    assert_eq!(bob.told().await, "despawn e of ann");
    assert_eq!(cat.told().await, "despawn e of ann");
}

#[tokio::test]
async fn a_late_hello_is_answered_with_its_features() {
    let instance = instance(&Backend::Memory).await;
    let path = "/ws/lobby?user_id=ann&client_id=ann";
    let mut late = Client::connect(instance.address(), path, &[]).await.unwrap();
    // Without a hello the gateway greets after a second, in binary.
    assert!(matches!(late.next().await, Message::Binary(_)));
    late.send(json!({ "clientHello": { "features": ["batch"] } }).to_string()).await;
    let hello = late.json().await;
    assert_eq!(hello["serverHello"]["features"], json!(["batch"]));
    late.send(json!({ "clientHello": {} }).to_string()).await;
    assert_eq!(late.json().await["error"]["code"], "not_allowed");
}

#[tokio::test]
async fn a_worker_speaks_to_a_room_with_a_plain_publish() {
    let server = RedisServer::start();
    let backend = Backend::Redis(server);
    let instance = instance(&backend).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let Backend::Redis(server) = &backend else { unreachable!() };
    let published =
        server.call(&["PUBLISH", "room:lobby", r#"{"chatMessage":{"message":"from JSON"}}"#]);
    assert_eq!(published, Answer::Integer(1));
    assert_eq!(ann.told().await, ": from JSON");
    // Field 40 (chat) with field 2 (message).
    server.call(&["PUBLISH", "room:lobby", "\u{c2}\u{2}\u{4}\u{12}\u{2}ok"]);
    server.call(&["PUBLISH", "room:lobby", "no envelope"]);
    server.call(&["PUBLISH", "room:lobby", r#"{"to":"bob","chatMessage":{"message":"whisper"}}"#]);
    server.call(&["PUBLISH", "room:lobby", r#"{"to":"ann","chatMessage":{"message":"for ann"}}"#]);
    assert_eq!(ann.told().await, ": for ann");
}

#[tokio::test]
async fn other_dialects_are_relayed_byte_for_byte_where_the_operator_allows_it() {
    let backend = Backend::redis();
    let relay = |config: &mut wsproxy::config::Config| config.rooms.validate = Validate::Relay;
    let (one, two) = (instance_with(&backend, relay).await, instance_with(&backend, relay).await);
    let connect = async |instance: &crate::support::gateway::TestInstance, user: &str| {
        let path = format!("/ws/lobby?user_id={user}&client_id={user}");
        Client::connect(instance.address(), &path, &[]).await.unwrap()
    };
    let (mut ann, mut bob, mut cat) =
        (connect(&one, "ann").await, connect(&one, "bob").await, connect(&two, "cat").await);
    // The first message of each decides its form, and is answered by the state.
    let beat = r#"{"messageId":"ping-1","timestamp":1,"type":255,"payload":null}"#;
    for client in [&mut ann, &mut bob, &mut cat] {
        client.send(beat).await;
        assert!(client.json().await["serverHello"].is_object());
        assert_eq!(client.text().await, beat);
    }
    let frame = b"\x05abcde\0\0\0\0\0\0\0\x01\x1e{\"text\":\"hi\"}".to_vec();
    ann.stream.send(Message::binary(frame.clone())).await.unwrap();
    ann.send(r#"{"type":"CHAT_MESSAGE","text":"hello"}"#).await;
    for client in [&mut bob, &mut cat] {
        let mut heard = Vec::new();
        while heard.len() < 2 {
            match client.next().await {
                Message::Binary(bytes) => heard.push(bytes.to_vec()),
                Message::Text(text) if text.contains("presenceEvent") => {}
                Message::Text(text) => heard.push(text.as_bytes().to_vec()),
                _ => {}
            }
        }
        assert_eq!(heard[0], frame);
        assert_eq!(heard[1], br#"{"type":"CHAT_MESSAGE","text":"hello"}"#);
    }
}
