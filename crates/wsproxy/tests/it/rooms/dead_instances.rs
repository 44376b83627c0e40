//! Members of instances that are killed, or frozen and woken.

use std::{collections::BTreeMap, time::Duration};

use rustix::process::Signal;
use serde_json::json;

use crate::{
    rooms::{
        hostile::assert_alternate,
        room_client::{RoomClient, binary, binary_with},
    },
    support::{binary::Binary, eventually_yes, redis_server::RedisServer},
};

async fn join(at: &Binary, client: &str) -> RoomClient {
    RoomClient::join_at(at.address, ("lobby", client, client), json!({})).await
}

/// Counts of what a listener was told up to now. `expected` is among them: what different members say has no
/// order.
async fn counts(
    listener: &mut RoomClient,
    speaker: &mut RoomClient,
    expected: &[String],
) -> BTreeMap<String, usize> {
    speaker.say("end").await;
    let name = speaker.hello["assignedClientId"].as_str().unwrap().to_owned();
    let mut told = listener.told_until(&format!("{name}: end")).await;
    while !expected.iter().all(|words| told.contains(words)) {
        told.push(listener.told().await);
    }
    assert_alternate(&told[..]);
    let mut counts = BTreeMap::new();
    told.into_iter().for_each(|words| *counts.entry(words).or_default() += 1);
    counts
}

async fn see_each_other(one: &Binary, names: &[String]) -> bool {
    let looks = join(one, "looks").await;
    let mut members = looks.members();
    looks.client.close().await;
    members.retain(|name| name.starts_with('c'));
    members == names
}

#[tokio::test]
async fn members_of_a_killed_instance_leave_once() {
    let redis = RedisServer::start();
    let (killed, one, two) = tokio::join!(binary(&redis), binary(&redis), binary(&redis));
    let (mut first, mut second) = (join(&one, "first").await, join(&two, "second").await);
    assert_eq!(first.told().await, "join second");
    let names: Vec<_> = (10..40).map(|number| format!("c{number}")).collect();
    let mut members = Vec::new();
    for name in &names {
        members.push(join(&killed, name).await);
    }
    killed.signal(Signal::KILL);
    // Some are back, and stay.
    let mut back = Vec::new();
    for name in &names[..10] {
        back.push(join(&one, name).await);
    }
    eventually_yes("the dead have left", async || see_each_other(&two, &names[..10]).await).await;
    for (listener, speaker) in [(&mut first, &mut second)] {
        let counts = counts(listener, speaker, &[]).await;
        for (at, name) in names.iter().enumerate() {
            assert_eq!(counts.get(&format!("join {name}")), Some(&1), "{counts:?}");
            let left = usize::from(at >= 10);
            assert_eq!(counts.get(&format!("leave {name}")).copied().unwrap_or(0), left, "{name}");
        }
    }
    let counts = counts(&mut second, &mut first, &[]).await;
    for name in &names[10..] {
        assert_eq!(counts.get(&format!("leave {name}")), Some(&1), "{counts:?}");
    }
}

#[tokio::test]
async fn members_of_a_frozen_instance_are_where_they_last_joined() {
    freeze(40).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the long form: a thousand members"]
async fn a_thousand_members_of_a_frozen_instance_are_where_they_last_joined() {
    freeze(1000).await;
}

/// An instance with so many members stands still for 22 s, and half of them come back elsewhere.
async fn freeze(count: usize) {
    let redis = RedisServer::start();
    // Clients that the test does not read answer no ping, and a thousand take a while to join.
    let patient = [("HEARTBEAT_TIMEOUT", "1h")];
    let start = || binary_with(&redis, &patient);
    let (frozen, one, two) = tokio::join!(start(), start(), start());
    let (mut first, mut second) = (join(&one, "first").await, join(&two, "second").await);
    assert_eq!(first.told().await, "join second");
    let names: Vec<_> = (0..count).map(|number| format!("c{number:04}")).collect();
    let mut members = Vec::new();
    for name in &names {
        members.push(join(&frozen, name).await);
    }
    frozen.signal(Signal::STOP);
    let start = std::time::Instant::now();
    let mut back = Vec::new();
    for (at, name) in names.iter().enumerate().filter(|(at, _)| at % 2 == 0) {
        back.push(join(if at % 4 == 0 { &one } else { &two }, name).await);
    }
    tokio::time::sleep(Duration::from_secs(22).saturating_sub(start.elapsed())).await;
    frozen.signal(Signal::CONT);
    // Clients that stayed answer the ping of the woken instance, as long as they are read.
    let stayed = members.into_iter().enumerate().map(|(at, mut member)| {
        tokio::spawn(async move {
            use tokio_tungstenite::tungstenite::Message;
            loop {
                match member.client.next().await {
                    Message::Close(frame) => {
                        return (at, frame.map(|frame| u16::from(frame.code)));
                    }
                    Message::Text(text) if text.contains("all back") => return (at, None),
                    _ => {}
                }
            }
        })
    });
    let stayed: Vec<_> = stayed.collect();
    eventually_yes("all are members at one", async || see_each_other(&one, &names).await).await;
    eventually_yes("all are members at two", async || see_each_other(&two, &names).await).await;
    // Those that moved were not disturbed, and those that stayed hear what is said. Of many some speak.
    let speaks = |at: &usize| at.is_multiple_of(count / 40 * 2);
    for (at, member) in (0..count).step_by(2).zip(&mut back) {
        if speaks(&at) {
            member.say("I am here").await;
        }
    }
    first.say("all back").await;
    for task in stayed {
        let (at, code) = crate::support::soon("the end of a member", task).await.unwrap();
        assert_eq!(code, (at % 2 == 0).then_some(4001), "{at}");
    }
    let said = (0..count).filter(speaks).map(|at| format!("{}: I am here", names[at]));
    let said: Vec<_> = said.collect();
    for listener in 0..2 {
        let counts = match listener {
            0 => counts(&mut first, &mut second, &said).await,
            _ => counts(&mut second, &mut first, &said).await,
        };
        let count = |words: String| counts.get(&words).copied().unwrap_or(0);
        for (at, name) in names.iter().enumerate() {
            let (joins, leaves) = (count(format!("join {name}")), count(format!("leave {name}")));
            assert_eq!(joins, leaves + 1, "{name}: {counts:?}");
            assert!(leaves <= if at % 2 == 0 { 0 } else { 1 }, "{name}: {counts:?}");
            if speaks(&at) {
                assert_eq!(count(format!("{name}: I am here")), 1, "{counts:?}");
            }
        }
    }
}
