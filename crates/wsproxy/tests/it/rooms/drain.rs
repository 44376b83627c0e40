//! Members of an instance that ends.

use std::time::Duration;

use crate::{
    rooms::room_client::{RoomClient, instance, instance_with},
    support::gateway::Backend,
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
        while !matches!(
            member.client.next().await,
            tokio_tungstenite::tungstenite::Message::Close(_)
        ) {}
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
