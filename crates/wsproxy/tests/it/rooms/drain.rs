//! Members of an instance that ends.

use std::time::Duration;

use futures_util::StreamExt;
use rustix::process::Signal;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    rooms::room_client::{RoomClient, binary_with, instance, instance_with},
    support::{PATIENCE, gateway::Backend, redis_server::RedisServer},
};

#[tokio::test]
async fn members_that_come_back_from_an_instance_that_ends_have_never_left() {
    let backend = Backend::redis();
    let one = instance_with(&backend, |config| {
        config.rooms.leave_grace = Duration::from_secs(4);
        config.server.shutdown_timeout = Duration::from_secs(20);
    })
    .await;
    let two = instance(&backend).await;
    let mut watcher = RoomClient::join(&two, "watcher").await;
    let mut members = Vec::new();
    for number in 0..6 {
        members.push(RoomClient::join(&one, &format!("c{number}")).await);
        assert_eq!(watcher.told().await, format!("join c{number}"));
    }
    let drain = tokio::spawn(one.drain());
    let mut back = Vec::new();
    for (number, member) in members.iter_mut().enumerate() {
        while !matches!(member.client.next().await, Message::Close(_)) {}
        // One stays away, and the others take their time.
        if number > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            back.push(RoomClient::join(&two, &format!("c{number}")).await);
        }
    }
    drop(members);
    drain.await.unwrap();
    watcher.say("end").await;
    assert_eq!(watcher.told().await, "leave c0");
    back[0].say("still here").await;
    assert_eq!(watcher.told().await, "c1: still here");
}

#[tokio::test]
async fn an_instance_ends_at_once_when_all_its_members_are_back_elsewhere() {
    let backend = Backend::redis();
    let one = instance_with(&backend, |config| {
        config.rooms.leave_grace = Duration::from_secs(60);
        config.server.shutdown_timeout = Duration::from_secs(25);
    })
    .await;
    let two = instance(&backend).await;
    let mut watcher = RoomClient::join(&two, "watcher").await;
    let member = RoomClient::join(&one, "ann").await;
    assert_eq!(watcher.told().await, "join ann");
    let start = std::time::Instant::now();
    let drain = tokio::spawn(one.drain());
    drop(member);
    let mut ann = RoomClient::join(&two, "ann").await;
    drain.await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    ann.say("here").await;
    assert_eq!(watcher.told().await, "ann: here");
}

#[tokio::test]
async fn hundreds_of_members_come_back_from_an_instance_that_ends() {
    come_back(5, 60).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the long form: ten thousand members"]
async fn ten_thousand_members_come_back_from_an_instance_that_ends() {
    come_back(100, 100).await;
}

/// An instance with so many rooms of so many members ends, and all members come back to another one: no leave is told.
///
/// The closes are spread over so long that a debug build on a busy machine greets those who come back: 100 in a second. The
/// grace is the same for any number of members.
async fn come_back(rooms: usize, members: usize) {
    let redis = RedisServer::start();
    let spread = Duration::from_secs((rooms * members / 100) as u64);
    let seconds = |duration: Duration| format!("{}s", duration.as_secs());
    let (spread_value, timeout) = (seconds(spread), seconds(spread + Duration::from_secs(60)));
    let variables = [
        ("WSPROXY_ROOMS__LEAVE_GRACE", "20s"),
        ("WSPROXY_SERVER__SHUTDOWN_TIMEOUT", &timeout),
        ("WSPROXY_SERVER__DRAIN_SPREAD", &spread_value),
        // Watchers and clients that are back answer no ping before all are back, since the test reads them then.
        ("HEARTBEAT_TIMEOUT", "1h"),
    ];
    let (mut one, two) =
        tokio::join!(binary_with(&redis, &variables), binary_with(&redis, &variables));
    let back_at = two.address;
    let (mut watchers, mut tasks) = (Vec::new(), Vec::new());
    for room in 0..rooms {
        let room = format!("room-{room}");
        watchers
            .push(RoomClient::join_at(two.address, (&room, "watcher", "watcher"), json!({})).await);
        for member in 0..members {
            let (room, name) = (room.clone(), format!("c{member}"));
            let joined = RoomClient::join_at(one.address, (&room, &name, &name), json!({})).await;
            tasks.push(tokio::spawn(async move {
                assert_eq!(closed(joined).await, 1012);
                RoomClient::join_at(back_at, (&room, &name, &name), json!({})).await
            }));
        }
    }
    one.signal(Signal::TERM);
    // They are read on, so that the last of them hears all the others.
    let mut back = Vec::new();
    let all = async {
        for task in tasks {
            back.push(task.await.unwrap());
        }
    };
    tokio::time::timeout(spread + PATIENCE, all).await.expect("all members are back in time");
    assert!(one.exited().await.success());
    for (room, watcher) in watchers.iter_mut().enumerate() {
        back[room * members].say("end").await;
        let told = watcher.told_until("c0: end").await;
        assert_eq!(told.len(), members, "each has joined once: {told:?}");
        assert!(told.iter().all(|words| words.starts_with("join c")), "{told:?}");
        let key = format!("{{room:room-{room}}}:members");
        assert_eq!(redis.call(&["HLEN", &key]).integer() as usize, members + 1);
    }
    assert_eq!(two.metric("wsproxy_room_presence_events_total{event=\"leave\"}").await, 0.0);
}

/// The close code of a member, however long it takes.
async fn closed(mut member: RoomClient) -> u16 {
    while let Some(message) = member.client.stream.next().await {
        if let Message::Close(Some(frame)) = message.unwrap() {
            return frame.code.into();
        }
    }
    panic!("the connection ended without a close frame")
}
