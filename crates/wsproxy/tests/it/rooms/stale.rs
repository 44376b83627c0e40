//! Positions after a pause: a member that reads on, a newcomer and a worker have the newest of every entity.

use std::time::Duration;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    rooms::room_client::{RoomClient, instance, instance_with, position},
    support::{
        eventually_yes,
        gateway::{Backend, TestInstance, over_both},
        soon,
    },
};

over_both!(
    a_member_that_reads_on_has_the_newest_positions,
    a_member_that_never_reads_slows_nobody_down,
);

async fn a_member_that_reads_on_has_the_newest_positions(backend: Backend) {
    for features in [json!({ "features": ["batch"] }), json!({})] {
        let one = instance_with(&backend, |config| {
            config.rooms.messages_per_second = 100_000;
            config.rooms.tick = Duration::from_millis(10);
        })
        .await;
        let mut ann = RoomClient::join(&one, "ann").await;
        let mut bob = RoomClient::join_narrow(&one, "bob", features).await;
        assert_eq!(ann.told().await, "join bob");
        ann.send(position("e", 1.0)).await;
        ann.send(position("f", 1.0)).await;
        fall_behind(&one, &mut ann).await;
        ann.send(position("f", 98.0)).await;
        ann.send(position("e", 99.0)).await;
        // Nothing moves any more. A member joins, at another instance where there is one.
        let two = match &backend {
            Backend::Memory => None,
            _ => Some(instance(&backend).await),
        };
        let mut cat = RoomClient::join(two.as_ref().unwrap_or(&one), "cat").await;
        for (entity, x) in [("e", 99.0), ("f", 98.0)] {
            assert_eq!(place(&mut cat, entity, x).await, x);
        }
        // The newest places come, and nothing older behind them.
        let mut told = Vec::new();
        let is_there = |told: &[String], one: &str| told.iter().any(|words| words.contains(one));
        while !is_there(&told, "e of ann to 99") || !is_there(&told, "f of ann to 98") {
            told.push(bob.told().await);
        }
        ann.say("end").await;
        told.extend(bob.told_until("ann: end").await);
        for (entity, x) in [("e of ann to", "99"), ("f of ann to", "98")] {
            let last = told.iter().rfind(|words| words.contains(entity)).unwrap();
            assert!(last.contains(&format!("{entity} {x}")), "{last}");
        }
        drop((ann, bob, cat));
        one.wait_empty().await;
        if let Some(two) = two {
            two.wait_empty().await;
        }
    }
}

async fn a_member_that_never_reads_slows_nobody_down(backend: Backend) {
    let one = instance_with(&backend, |config| {
        config.rooms.messages_per_second = 100_000;
        config.rooms.tick = Duration::ZERO;
    })
    .await;
    let mut ann = RoomClient::join(&one, "ann").await;
    let bob = RoomClient::join_narrow(&one, "bob", json!({})).await;
    assert_eq!(ann.told().await, "join bob");
    let mut cat = RoomClient::join(&one, "cat").await;
    assert_eq!(ann.told().await, "join cat");
    fall_behind(&one, &mut ann).await;
    let before = one.gateway().runtime.budget.used();
    for x in 0..5000 {
        ann.send(position("e", f64::from(x))).await;
    }
    ann.say("end").await;
    cat.told_until("ann: end").await;
    let grown = one.gateway().runtime.budget.used().saturating_sub(before);
    assert!(grown < 64 * 1024, "{grown}");
    drop((ann, bob, cat));
    one.wait_empty().await;
}

/// Fills the way to the members that do not read, until positions are left out for one.
async fn fall_behind(one: &TestInstance, ann: &mut RoomClient) {
    let chat = "x".repeat(60_000);
    let mut x = 2.0;
    let slow = || one.families().rooms.counters.coalesced_slow.value();
    let before = slow();
    for _ in 0..110 {
        ann.say(&chat).await;
    }
    eventually_yes("a member is behind", async || {
        x += 1.0;
        ann.send(position("f", x)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        slow() > before
    })
    .await;
}

/// Waits until a member that has just joined knows this place of an entity; answers the one it knows.
async fn place(member: &mut RoomClient, entity: &str, expected: f64) -> f64 {
    let entities = member.hello["initialState"]["entities"].as_array().cloned().unwrap_or_default();
    let of_hello = entities.iter().find(|one| one["id"] == entity);
    let mut x = of_hello.and_then(|one| one["position"]["x"].as_f64()).unwrap_or_default();
    while x != expected {
        let words = member.told().await;
        if let Some((_, told)) = words.split_once(&format!("{entity} of ann to ")) {
            x = told.split(',').next().unwrap().parse().unwrap();
        }
    }
    x
}

#[tokio::test]
async fn a_room_that_stops_being_local_tells_of_its_last_positions() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    for pause in [0, 5, 60, 300] {
        let mut ann = RoomClient::join(&one, "ann").await;
        let mut bob = RoomClient::join(&one, "bob").await;
        assert_eq!(ann.told().await, "join bob");
        for x in 0..5 {
            ann.send(position("e", f64::from(x))).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        ann.send(position("e", 7.0)).await;
        while bob.told().await != "move e of ann to 7" {}
        tokio::time::sleep(Duration::from_millis(pause)).await;
        // Redis and the other instance have an older position.
        let mut cat = RoomClient::join(&two, "cat").await;
        assert_eq!(place(&mut cat, "e", 7.0).await, 7.0);
        ann.say("end").await;
        let late = cat.told_until("ann: end").await;
        assert!(late.iter().all(|words| !words.contains("e of ann")), "{late:?}");
        for member in [ann, bob, cat] {
            member.client.close().await;
        }
        one.wait_empty().await;
        two.wait_empty().await;
    }
}

#[tokio::test]
async fn a_worker_that_begins_to_listen_gets_all_positions_of_a_local_room() {
    let backend = Backend::redis();
    let one = instance(&backend).await;
    let Backend::Redis(server) = &backend else { unreachable!() };
    let mut ann = RoomClient::join(&one, "ann").await;
    ann.send(position("resting", 1.0)).await;
    let counters = &one.families().rooms.counters;
    let mut x = 0.0;
    eventually_yes("the room is local", async || {
        x += 1.0;
        ann.send(position("moving", x)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        counters.published_local.value() > 0
    })
    .await;
    let mut worker = TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    worker.write_all(b"SUBSCRIBE room:lobby\r\n").await.unwrap();
    let mut heard = Vec::new();
    let hears = |heard: &[u8], what: &[u8]| heard.windows(what.len()).any(|part| part == what);
    while !hears(&heard, b"resting") {
        x += 1.0;
        ann.send(position("moving", x)).await;
        let _ = tokio::time::timeout(Duration::from_millis(50), worker.read_buf(&mut heard)).await;
        assert!(x < 500.0, "the worker hears nothing of what rests");
    }
    // From now on every tick is published.
    let before = counters.published_shared.value();
    for _ in 0..20 {
        x += 1.0;
        ann.send(position("moving", x)).await;
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    let published = counters.published_shared.value() - before;
    assert!(published >= 10, "{published}");
    soon("the end", ann.client.close()).await;
}

#[tokio::test]
async fn a_woken_instance_does_not_move_members_that_are_elsewhere() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let Backend::Redis(server) = &backend else { unreachable!() };
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    ann.send(position("e", 5.0)).await;
    assert_eq!(bob.told().await, "move e of ann to 5");
    // A batch of another instance: e of ann is at 3, and f of a member that is unknown.
    let entry = |client: &str, entity: &str| {
        let update = format!(r"\10\1{entity}\18\5\13\0\0\64\64");
        format!(r"\10\17\10\3{client}\18\10{update}")
    };
    // The numbers of their connections follow.
    let batch = format!(r"\178\6\38{}{}\210\6\2\1\1", entry("ann", "e"), entry("zoe", "f"));
    let script = format!(
        r"return redis.call('PUBLISH','room:lobby','\255R\1B'..string.rep('\9',17)..'{batch}')"
    );
    assert!(server.call(&["EVAL", &script, "0"]).integer() >= 2);
    assert_eq!(bob.told().await, "move f of zoe to 3");
    let mut cat = RoomClient::join(&two, "cat").await;
    assert_eq!(place(&mut cat, "e", 5.0).await, 5.0);
}
