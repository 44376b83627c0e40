//! Many members and much state: joins within one tick, and newcomers that read slowly.

use std::{collections::HashMap, time::Duration};

use futures_util::future::join_all;
use serde_json::{Value, json};
use wsproxy::config::Config;

use crate::{
    rooms::room_client::{RoomClient, instance_with},
    support::{
        eventually,
        gateway::{Backend, TestInstance, over_both},
    },
};

over_both!(
    presence_within_a_tick_comes_before_later_chat,
    presence_within_a_tick_comes_at_its_end,
    many_joins_within_a_tick_are_told_once_each,
    an_unreading_member_hears_of_joins_in_their_order,
    a_slow_newcomer_gets_all_pages_then_messages,
    a_room_is_closed_while_a_newcomer_reads_its_state,
);

async fn presence_within_a_tick_comes_before_later_chat(backend: Backend) {
    // No test waits for the end of such a tick.
    let one = instance_with(&backend, |config| config.rooms.tick = LONG).await;
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&one, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    let mut cat = RoomClient::join(&one, "cat").await;
    let dan = RoomClient::join(&one, "dan").await;
    dan.client.close().await;
    leaves_told(&one, 1).await;
    cat.send(json!({ "presenceEvent": { "eventType": "UPDATE", "data": { "displayName": "C" } } }))
        .await;
    cat.say("hi").await;
    for member in [&mut ann, &mut bob] {
        for expected in ["join cat", "join dan", "leave dan", "update cat", "cat: hi"] {
            assert_eq!(member.told().await, expected);
        }
    }
    bob.say("you").await;
    for expected in ["join dan", "leave dan", "bob: you"] {
        assert_eq!(cat.told().await, expected);
    }
}

async fn presence_within_a_tick_comes_at_its_end(backend: Backend) {
    let tick = Duration::from_millis(300);
    let one = instance_with(&backend, |config| config.rooms.tick = tick).await;
    let mut ann = RoomClient::join(&one, "ann").await;
    let bob = RoomClient::join(&one, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    let mut cat = RoomClient::join(&one, "cat").await;
    assert_eq!(ann.told().await, "join cat");
    bob.client.close().await;
    assert_eq!(ann.told().await, "leave bob");
    assert_eq!(cat.told().await, "leave bob");
}

async fn many_joins_within_a_tick_are_told_once_each(backend: Backend) {
    let one = instance_with(&backend, |config| config.rooms.leave_grace = Duration::ZERO).await;
    let mut ann = RoomClient::join(&one, "ann").await;
    let names: Vec<_> = (0..CROWD).map(|number| format!("m{number}")).collect();
    let crowd = join_all(names.iter().map(|name| RoomClient::join(&one, name))).await;
    let told = told_of(&mut ann, "join", CROWD).await;
    assert!(names.iter().all(|name| told.get(name) == Some(&1)), "{told:?}");
    // Each has everyone, either in the state or as a join behind it.
    ann.say("all").await;
    let all_know = crowd.into_iter().map(async |mut member| {
        let mut known = member.members();
        let told = member.told_until("ann: all").await;
        known.extend(told.iter().map(|words| words.strip_prefix("join ").unwrap().to_owned()));
        known.sort();
        assert!(known.windows(2).all(|pair| pair[0] != pair[1]), "twice: {known:?}");
        assert_eq!(known.len(), CROWD + 1);
        member
    });
    let crowd = join_all(all_know).await;
    drop(crowd);
    let told = told_of(&mut ann, "leave", CROWD).await;
    assert!(names.iter().all(|name| told.get(name) == Some(&1)), "{told:?}");
    drop(ann);
    one.wait_empty().await;
}

async fn an_unreading_member_hears_of_joins_in_their_order(backend: Backend) {
    let one = instance_with(&backend, |config| config.rooms.messages_per_second = 100_000).await;
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut cat = RoomClient::join(&one, "cat").await;
    assert_eq!(ann.told().await, "join cat");
    let mut bob = RoomClient::join_narrow(&one, "bob", json!({})).await;
    assert_eq!((ann.told().await, cat.told().await), ("join bob".into(), "join bob".into()));
    let chat = "x".repeat(60_000);
    while one.gateway().runtime.budget.used() < 200_000 {
        ann.say(&chat).await;
        cat.told().await;
    }
    let mut expected = Vec::new();
    for number in 0..5 {
        let guest = RoomClient::join(&one, &format!("guest-{number}")).await;
        expected.push(format!("join guest-{number}"));
        assert_eq!(ann.told().await, expected[expected.len() - 1]);
        ann.say(&format!("hi {number}")).await;
        expected.push(format!("ann: hi {number}"));
        guest.client.close().await;
        expected.push(format!("leave guest-{number}"));
        assert_eq!(ann.told().await, expected[expected.len() - 1]);
    }
    ann.say("end").await;
    let mut told = bob.told_until("ann: end").await;
    told.retain(|words| !words.contains("xxx"));
    assert_eq!(told, expected);
}

async fn a_slow_newcomer_gets_all_pages_then_messages(backend: Backend) {
    let one = instance_with(&backend, with_small_buffers).await;
    let mut owners = fill(&one).await;
    let mut bob = RoomClient::join_narrow(&one, "bob", json!({ "features": ["batch"] })).await;
    let used = || one.gateway().runtime.budget.used();
    eventually("the state waits for its reader", || used() > 2 * SEND_BUFFER).await;
    let mut expected = Vec::new();
    for number in 0..3 {
        let guest = RoomClient::join_as(&one, "lobby", "guest", "guest", json!({})).await;
        expected.push("join guest".to_owned());
        owners[0].say(&number.to_string()).await;
        expected.push(format!("owner-0: {number}"));
        guest.client.close().await;
        leaves_told(&one, number + 1).await;
        expected.push("leave guest".to_owned());
    }
    owners[0].say("end").await;
    // The next pages: the first one was read when bob joined.
    let state = state_of(&mut bob).await;
    assert_eq!(state.pages.len(), PAGES);
    assert_eq!(state.entities.len(), OWNERS * ENTITIES);
    assert!(state.entities.values().all(|count| *count == 1));
    assert!(state.players.values().all(|count| *count == 1));
    assert_eq!(state.players.len(), OWNERS + 1);
    assert_eq!(bob.told_until("owner-0: end").await, expected);
    drop((owners, bob));
    one.wait_empty().await;
}

async fn a_room_is_closed_while_a_newcomer_reads_its_state(backend: Backend) {
    let one = instance_with(&backend, with_small_buffers).await;
    let owners = fill(&one).await;
    let mut bob = RoomClient::join_narrow(&one, "bob", json!({})).await;
    let cat = RoomClient::join_narrow(&one, "cat", json!({})).await;
    let used = || one.gateway().runtime.budget.used();
    eventually("the state waits for its readers", || used() > 4 * SEND_BUFFER).await;
    let closed = one.api("POST", "/api/v1/rooms/lobby/close", r#"{"reason":"over"}"#).await;
    assert_eq!(closed.json()["members"], OWNERS + 2);
    // The close frame comes behind all pages.
    assert_eq!(state_of(&mut bob).await.pages.len(), PAGES);
    assert_eq!(bob.told().await, "join cat");
    assert_eq!(bob.client.closed().await, (4004, "over".into()));
    // The other newcomer, which never reads, is gone with its state all the same.
    drop((owners, bob));
    one.wait_empty().await;
    eventually("no state waits", || used() == 0).await;
    drop(cat);
}

/// Configuration in which the state of a room is larger than the send buffer.
fn with_small_buffers(config: &mut Config) {
    config.limits.max_message_bytes = 32 * 1024;
    config.limits.send_buffer_bytes = SEND_BUFFER;
    config.rooms.messages_per_second = 100_000;
}

/// Has members spawn many large entities.
async fn fill(one: &TestInstance) -> Vec<RoomClient> {
    let mut owners: Vec<RoomClient> = Vec::new();
    for owner in 0..OWNERS {
        let name = format!("owner-{owner}");
        let newcomer = RoomClient::join(one, &name).await;
        for member in &mut owners {
            assert_eq!(member.told().await, format!("join {name}"));
        }
        owners.push(newcomer);
    }
    // Twice as long in JSON: more than the kernel keeps for a newcomer.
    let text = "\"".repeat(3_800);
    for owner in 0..OWNERS {
        for entity in 0..ENTITIES {
            let id = format!("e-{owner}-{entity}");
            let spawn = json!({ "entityId": id, "components": { "text": text } });
            owners[owner].send(json!({ "entitySpawn": spawn })).await;
            for (at, member) in owners.iter_mut().enumerate() {
                if at != owner {
                    assert_eq!(member.told().await, format!("spawn {id} of owner-{owner}"));
                }
            }
        }
    }
    owners
}

/// The state that a newcomer has got, of all pages.
struct PagedState {
    pages: Vec<Value>,
    /// Number of times that each came.
    entities: HashMap<String, usize>,
    players: HashMap<String, usize>,
}

/// Reads all pages behind the first one.
async fn state_of(member: &mut RoomClient) -> PagedState {
    let mut pages = vec![member.hello.clone()];
    while pages[pages.len() - 1]["more"] == true {
        let hello = member.client.json().await["serverHello"].take();
        assert!(hello.is_object(), "no page: {hello}");
        pages.push(hello);
    }
    let count = |list: &str, id: &str| {
        let mut counts = HashMap::new();
        for item in pages.iter().flat_map(|page| page["initialState"][list].as_array()).flatten() {
            *counts.entry(item[id].as_str().unwrap().to_owned()).or_insert(0) += 1;
        }
        counts
    };
    let (entities, players) = (count("entities", "id"), count("players", "clientId"));
    PagedState { pages, entities, players }
}

/// Reads events of a kind until `count` came, and counts them by client.
async fn told_of(member: &mut RoomClient, kind: &str, count: usize) -> HashMap<String, usize> {
    let mut told = HashMap::new();
    for _ in 0..count {
        let words = member.told().await;
        let client = words.strip_prefix(kind).unwrap_or_else(|| panic!("no {kind}: {words}"));
        *told.entry(client.trim().to_owned()).or_insert(0) += 1;
    }
    told
}

/// Waits until members were told of so many leaves.
async fn leaves_told(one: &TestInstance, count: u64) {
    let told = || one.families().rooms.counters.leaves_seen.value();
    eventually("a leave was told", || told() >= count).await;
}

/// Longer than any test.
const LONG: Duration = Duration::from_secs(10);

/// More members than a caller writes to itself.
const CROWD: usize = 100;

const SEND_BUFFER: usize = 128 * 1024;
const OWNERS: usize = 8;
const ENTITIES: usize = 100;

/// Pages of at most 1 MiB of JSON.
const PAGES: usize = 6;
