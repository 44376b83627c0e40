//! Bounds of rooms: attempts, rooms of an instance, entities, rates, and messages that wait for an `ack`.

use std::time::{Duration, Instant};

use serde_json::json;
use wsproxy::config::{Config, rooms::Overflow};

use crate::{
    rooms::{
        room_client::{RoomClient, instance_with, position},
        tokens::{SECRET, open_with, token},
    },
    support::{
        binary::Binary,
        client::Client,
        eventually,
        gateway::{Backend, TestInstance},
    },
};

#[tokio::test]
async fn attempts_to_open_a_room_are_limited() {
    let instance = instance_with(&Backend::Memory, |config| {
        config.rate_limit.max_requests = 2;
        config.jwt.secret_key = Some(SECRET.into());
    })
    .await;
    let bearer = format!("Bearer {}", token(&json!({ "sub": "ann" })));
    for _ in 0..2 {
        open_with(&instance, "/ws/lobby", &json!({ "sub": "ann" })).await.unwrap();
    }
    let refused = instance.handshake("/ws/lobby", &[("authorization", &bearer)]).await;
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    let message = format!("Rate limit exceeded. Try again in {seconds} seconds.");
    let body = json!({ "error": "Rate limit exceeded", "message": message });
    assert_eq!((refused.status, refused.json()), (429, body));
    // Another user at the same address is not concerned.
    open_with(&instance, "/ws/lobby", &json!({ "sub": "bob" })).await.unwrap();
    // Without a token attempts count for the address, and then its tokens are not looked at any more.
    for user in ["eve", "mallory"] {
        let path = format!("/ws/lobby?user_id={user}&client_id={user}");
        Client::connect(instance.address(), &path, &[]).await.unwrap();
    }
    let bearer = format!("Bearer {}", token(&json!({ "sub": "bob" })));
    let refused = instance.handshake("/ws/lobby", &[("authorization", &bearer)]).await;
    assert_eq!(refused.status, 429);
}

#[tokio::test]
async fn a_room_too_many_for_an_instance_is_refused() {
    let changes: [fn(&mut Config); 2] =
        [|config| config.rooms.rooms_max = 1, |config| config.rooms.state_bytes = 1];
    for change in changes {
        let instance = instance_with(&Backend::Memory, change).await;
        let _ann = RoomClient::join(&instance, "ann").await;
        let refused = instance.handshake("/ws/other?user_id=bob&client_id=bob", &[]).await;
        refused.assert_refused(503, "room_full");
        assert_eq!(refused.header("retry-after"), "5");
        // The room that is there takes further members.
        RoomClient::join(&instance, "bob").await;
    }
}

#[tokio::test]
async fn entities_beyond_the_limits_reach_nobody() {
    let instance = instance_with(&Backend::Memory, |config| config.rooms.entities_max = 1).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    let large = json!({ "text": "x".repeat(5000) });
    for (envelope, code) in [
        (json!({ "entitySpawn": { "entityId": "e" } }), None),
        (json!({ "entitySpawn": { "entityId": "f" } }), Some("room_state_full")),
        (position("f", 1.0), Some("room_state_full")),
        (json!({ "entitySpawn": { "entityId": "e", "components": large } }), Some("too_large")),
        (json!({ "entityDespawn": { "entityId": "f" } }), Some("unknown_entity")),
        (json!({ "to": "bob", "entityDespawn": { "entityId": "e" } }), Some("invalid_message")),
    ] {
        ann.send(envelope).await;
        if let Some(code) = code {
            assert_eq!(ann.told().await, format!("error {code}"));
        }
    }
    ann.say("end").await;
    assert_eq!(bob.told().await, "spawn e of ann");
    assert_eq!(bob.told().await, "ann: end");
}

#[tokio::test]
async fn all_rooms_of_an_instance_share_a_rate() {
    let instance = instance_with(&Backend::Memory, |config| {
        config.rooms.messages_per_second_total = 5;
        config.rooms.tick = Duration::ZERO;
    })
    .await;
    let mut members = Vec::new();
    for room in ["one", "two"] {
        members.push(RoomClient::join_as(&instance, room, "ann", "ann", json!({})).await);
    }
    let mut bob = RoomClient::join_as(&instance, "one", "bob", "bob", json!({})).await;
    assert_eq!(members[0].told().await, "join bob");
    // Each of them alone is far below its own rate.
    for text in 0..30 {
        for member in &mut members {
            member.say(&text.to_string()).await;
        }
    }
    for member in &mut members {
        assert_eq!(member.told().await, "error rate_limited");
    }
    for x in 0..30 {
        members[0].send(position("e", f64::from(x))).await;
    }
    // Of the positions the newest waits.
    bob.told_until("move e of ann to 29").await;
}

/// Starts an instance whose members acknowledge, with `ann` and `bob` in the lobby.
async fn acknowledging(change: impl FnOnce(&mut Config)) -> (TestInstance, RoomClient, RoomClient) {
    let instance = instance_with(&Backend::Memory, change).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let features = json!({ "features": ["acks"] });
    let bob = RoomClient::join_as(&instance, "lobby", "bob", "bob", features).await;
    assert_eq!(ann.told().await, "join bob");
    (instance, ann, bob)
}

async fn say_reliably(member: &mut RoomClient, text: &str) {
    member.send(json!({ "reliable": true, "chatMessage": { "message": text } })).await;
}

#[tokio::test]
async fn an_ack_names_messages_beyond_the_cumulative_one() {
    let (instance, mut ann, mut bob) = acknowledging(|config| {
        config.rooms.ack_interval = Duration::from_millis(200);
        config.rooms.ack_tries = 100;
    })
    .await;
    for text in ["1", "2", "3"] {
        say_reliably(&mut ann, text).await;
        assert_eq!(bob.client.json().await["seq"], text);
    }
    bob.send(json!({ "ack": { "seq": "1", "more": ["3"] } })).await;
    let acks = |outcome: &str| {
        instance.metric(&format!("wsproxy_room_acks_total{{outcome=\"{outcome}\"}}"))
    };
    eventually("both are acknowledged", || acks("acknowledged") == 2.0).await;
    // Copies may have been on their way. From then on the second one comes alone.
    let mut in_a_row = 0;
    while in_a_row < 3 {
        in_a_row = if bob.client.json().await["seq"] == "2" { in_a_row + 1 } else { 0 };
    }
    bob.send(json!({ "ack": { "seq": "2" } })).await;
    eventually("all are acknowledged", || acks("acknowledged") == 3.0).await;
}

#[tokio::test]
async fn reliable_messages_without_an_ack_are_given_up_and_counted() {
    let acks = |instance: &TestInstance, outcome: &str| {
        instance.metric(&format!("wsproxy_room_acks_total{{outcome=\"{outcome}\"}}"))
    };
    let (instance, mut ann, mut bob) = acknowledging(|config| {
        config.rooms.ack_interval = Duration::from_millis(100);
        config.rooms.ack_tries = 2;
        config.rooms.ack_queue = 2;
    })
    .await;
    for text in ["1", "2", "3"] {
        say_reliably(&mut ann, text).await;
    }
    eventually("the oldest has given way", || acks(&instance, "overflow") == 1.0).await;
    eventually("the others were tried twice", || acks(&instance, "tries") == 2.0).await;
    ann.say("end").await;
    let told = bob.told_until("ann: end").await;
    assert_eq!(told.iter().filter(|words| *words == "ann: 1").count(), 1, "{told:?}");
    assert_eq!(told.len(), 5, "{told:?}");

    let (_instance, mut ann, mut bob) = acknowledging(|config| {
        (config.rooms.ack_queue, config.rooms.overflow) = (1, Overflow::Disconnect);
    })
    .await;
    for text in ["1", "2"] {
        say_reliably(&mut ann, text).await;
    }
    assert_eq!(bob.ended().await, 1008);
    assert_eq!(ann.told().await, "leave bob");
}

#[tokio::test]
async fn reliable_messages_given_up_are_logged_once_a_second() {
    let binary = Binary::start(&[
        ("WSPROXY_ENDPOINTS__ROOMS", "true"),
        ("WSPROXY_ROOMS__DEVELOPMENT", "true"),
        ("WSPROXY_ROOMS__ACK_INTERVAL", "100ms"),
        ("WSPROXY_ROOMS__ACK_TRIES", "2"),
        ("WSPROXY_ROOMS__ACK_QUEUE", "2"),
    ])
    .await;
    let mut ann = RoomClient::join_at(binary.address, ("lobby", "ann", "ann"), json!({})).await;
    let features = json!({ "features": ["acks"] });
    let _bob = RoomClient::join_at(binary.address, ("lobby", "bob", "bob"), features).await;
    let tries = "A member did not acknowledge a reliable message, which is given up.";
    let overflow = "Too many reliable messages wait for a member: one is given up.";
    let begin = Instant::now();
    // The second line of each kind tells how many the second before it had.
    for (message, outcome, burst, more, pause, at_least) in
        [(tries, "tries", 2, 1, 400, 3), (overflow, "overflow", 20, 3, 50, 19)]
    {
        for _ in 0..burst {
            say_reliably(&mut ann, outcome).await;
        }
        while binary.lines(message).len() < 2 {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            for _ in 0..more {
                say_reliably(&mut ann, outcome).await;
            }
        }
        let lines = binary.lines(message);
        let told = lines.iter().map(|line| 1 + line["left_out"].as_u64().unwrap()).sum::<u64>();
        let series = format!("wsproxy_room_acks_total{{outcome=\"{outcome}\"}}");
        let given_up = binary.metric(&series).await;
        assert!(at_least <= told && told as f64 <= given_up, "{told} of {given_up}");
        assert!(lines.len() as u64 <= begin.elapsed().as_secs() + 1, "{lines:?}");
        assert!(lines.iter().all(|line| line["client"] == "bob" && line["count"] == 1));
    }
}
