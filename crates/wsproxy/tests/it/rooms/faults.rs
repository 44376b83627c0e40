//! Rooms while Redis, the network and instances fail.

use std::time::Duration;

use serde_json::json;

use crate::{
    rooms::{
        hostile::assert_alternate,
        room_client::{RoomClient, instance, position},
    },
    support::{
        client::Client,
        eventually, eventually_yes,
        fault_proxy::{Cut, FaultProxy, Faults},
        gateway::{Backend, TestInstance},
        redis_server::RedisServer,
    },
};

#[tokio::test]
async fn an_emptied_redis_costs_nobody_their_place() {
    let backend = Backend::redis();
    let (one, two) = (instance(&backend).await, instance(&backend).await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    assert_eq!(bob.told().await, "spawn e of ann");
    let Backend::Redis(server) = &backend else { unreachable!() };
    server.call(&["FLUSHALL"]);
    eventually_yes("both are members again", async || members(server) == ["ann", "bob"]).await;
    // No client was told anything of it.
    ann.say("still here").await;
    assert_eq!(bob.told().await, "ann: still here");
    let mut cat = RoomClient::join(&two, "cat").await;
    assert_eq!(cat.members(), ["ann", "bob", "cat"]);
    assert_eq!(ann.told().await, "join cat");
    assert_eq!(bob.told().await, "join cat");
    let three: TestInstance = instance(&backend).await;
    let dan = RoomClient::join(&three, "dan").await;
    assert_eq!(dan.hello["initialState"]["entities"][0]["id"], "e");
    assert_eq!(cat.told().await, "join dan");
}

#[tokio::test]
async fn an_entity_that_an_emptied_redis_refused_is_told_to_others() {
    let server = RedisServer::start();
    let (one, two) = (start(server.url()).await, start(server.url()).await);
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    ann.send(json!({ "entitySpawn": { "entityId": "known" } })).await;
    for member in [&mut near, &mut far] {
        assert_eq!(member.told().await, "spawn known of ann");
    }
    // As in an emptied Redis, before the instance has noticed.
    server.call(&["HDEL", "{room:lobby}:members", "ann"]);
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    assert_eq!(near.told().await, "spawn e of ann");
    server.call(&["FLUSHALL"]);
    assert_eq!(far.told().await, "spawn e of ann");
    // All others are known.
    ann.say("end").await;
    for member in [&mut near, &mut far] {
        assert_eq!(member.told().await, "ann: end");
    }
}

#[tokio::test]
async fn a_member_that_was_taken_for_dead_comes_back_with_its_entities() {
    let server = RedisServer::start();
    let (one, two) = (start(server.url()).await, start(server.url()).await);
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    // Bytes that are no text, which no spawn has.
    let components = json!({ "b": "/w==" });
    ann.send(json!({ "entityUpdate": { "entityId": "e", "components": components } })).await;
    ann.send(position("e", 5.0)).await;
    for member in [&mut near, &mut far] {
        for words in ["spawn e of ann", "update e of ann", "move e of ann to 5"] {
            assert_eq!(member.told().await, words);
        }
    }
    take_for_dead(&server, "ann");
    // The client answers the ping of its instance while it reads.
    let reads = tokio::spawn(async move {
        while !matches!(ann.client.next().await, tokio_tungstenite::tungstenite::Message::Close(_))
        {
        }
    });
    let expected = ["despawn e of ann", "leave ann", "join ann", "spawn e of ann"];
    for member in [&mut near, &mut far] {
        for words in expected {
            assert_eq!(member.told().await, words);
        }
        let update = member.client.json().await;
        assert_eq!(update["entityUpdate"]["components"], components);
        assert_eq!(member.told().await, "move e of ann to 5");
    }
    let late = RoomClient::join(&two, "late").await;
    let entity = &late.hello["initialState"]["entities"][0];
    assert_eq!((&entity["id"], &entity["position"]["x"]), (&json!("e"), &json!(5.0)));
    reads.abort();
}

#[tokio::test]
async fn members_stay_while_redis_is_away_and_hear_each_other_at_one_instance() {
    let mut server = RedisServer::start();
    let url = server.url();
    let backend = Backend::Redis(RedisServer::start());
    let _ = backend;
    let mut config = crate::support::gateway::config(Some(&url));
    config.endpoints.rooms = true;
    config.rooms.development = wsproxy::config::rooms::Development::Loopback;
    config.rate_limit.max_requests_is_set = true;
    let instance = TestInstance::start(config).await;
    let mut ann = RoomClient::join(&instance, "ann").await;
    let mut bob = RoomClient::join(&instance, "bob").await;
    assert_eq!(ann.told().await, "join bob");
    server.kill();
    ann.say("can you hear me").await;
    assert_eq!(bob.told().await, "ann: can you hear me");
    server.restart();
    eventually_yes("both are members again", async || members(&server) == ["ann", "bob"]).await;
    bob.say("yes").await;
    // Whatever the bus did not take is told to the sender only.
    let mut heard = ann.told().await;
    while heard.starts_with("error") {
        heard = ann.told().await;
    }
    assert_eq!(heard, "bob: yes");
    tokio::time::sleep(Duration::from_millis(200)).await;
}

/// Trouble of a Redis while members come and go.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    Killed,
    Emptied,
    Frozen,
    RolledBack,
}

#[tokio::test]
async fn joins_and_leaves_while_redis_is_killed_are_told_once() {
    come_and_go_while(Trouble::Killed).await;
}

#[tokio::test]
async fn joins_and_leaves_while_redis_is_emptied_are_told_once() {
    come_and_go_while(Trouble::Emptied).await;
}

#[tokio::test]
async fn joins_and_leaves_while_redis_is_frozen_are_told_once() {
    come_and_go_while(Trouble::Frozen).await;
}

#[tokio::test]
async fn joins_and_leaves_while_redis_is_rolled_back_are_told_once() {
    come_and_go_while(Trouble::RolledBack).await;
}

/// Members come to two instances and go, Redis fails, and then all see the same members and were told of each join and
/// leave in turn.
async fn come_and_go_while(trouble: Trouble) {
    let mut server = RedisServer::start();
    let url = server.url();
    let start = async || {
        let mut config = crate::support::gateway::config(Some(&url));
        config.endpoints.rooms = true;
        config.rooms.development = wsproxy::config::rooms::Development::Loopback;
        config.rooms.leave_grace = Duration::from_millis(50);
        config.rate_limit.max_requests_is_set = true;
        TestInstance::start(config).await
    };
    let (one, two) = (start().await, start().await);
    let mut watchers = [RoomClient::join(&one, "w1").await, RoomClient::join(&two, "w2").await];
    let mut stay = Vec::new();
    for number in 0..6 {
        let at = if number % 2 == 0 { &one } else { &two };
        stay.push(RoomClient::join(at, &format!("stays{number}")).await);
    }
    let snapshot = server.snapshot();
    let ends = std::sync::atomic::AtomicBool::new(false);
    let come_and_go = async |number: usize| {
        let path = format!("/ws/lobby?user_id=c{number}&client_id=c{number}");
        for turn in 0.. {
            let at = if (number + turn).is_multiple_of(2) { &one } else { &two };
            let opened = Client::connect(at.address(), &path, &[]).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            if let Ok(client) = opened {
                // Some say goodbye, and others are lost.
                if turn % 3 == 0 {
                    let _ = tokio::time::timeout(Duration::from_secs(1), client.close()).await;
                }
            }
            if ends.load(std::sync::atomic::Ordering::Relaxed) {
                return;
            }
        }
    };
    let fail = async {
        let pause = async |ms| tokio::time::sleep(Duration::from_millis(ms)).await;
        pause(300).await;
        for _ in 0..2 {
            bring(trouble, &mut server, &snapshot).await;
            pause(700).await;
        }
        ends.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let moving = futures_util::future::join_all((0..4).map(come_and_go));
    tokio::join!(moving, fail);
    let mut expected: Vec<_> = (0..6).map(|number| format!("stays{number}")).collect();
    expected.extend(["w1".to_owned(), "w2".to_owned()]);
    eventually_yes("Redis has the right members", async || members(&server) == expected).await;
    all_see(&one, &expected).await;
    all_see(&two, &expected).await;
    for (at, watcher) in watchers.iter_mut().enumerate() {
        let speaker = &mut stay[at];
        speaker.say("end").await;
        let told = watcher.told_until(&format!("stays{at}: end")).await;
        assert_alternate(&told);
        for name in expected.iter().filter(|name| name.starts_with("stays")) {
            assert!(!told.contains(&format!("leave {name}")), "{trouble:?} {name}: {told:?}");
        }
    }
}

/// A leave whose grace ends while Redis is away runs when it is back, and is told once.
async fn leave_while(trouble: Trouble) {
    let mut server = RedisServer::start();
    let url = server.url();
    let start = async || {
        let mut config = crate::support::gateway::config(Some(&url));
        config.endpoints.rooms = true;
        config.rooms.development = wsproxy::config::rooms::Development::Loopback;
        config.rooms.leave_grace = Duration::from_secs(1);
        config.rate_limit.max_requests_is_set = true;
        TestInstance::start(config).await
    };
    let (one, two) = (start().await, start().await);
    let mut ann = RoomClient::join(&one, "ann").await;
    let mut bob = RoomClient::join(&two, "bob").await;
    let cat = RoomClient::join(&one, "cat").await;
    assert_eq!(ann.told().await, "join bob");
    for member in [&mut ann, &mut bob] {
        assert_eq!(member.told().await, "join cat");
    }
    let snapshot = server.snapshot();
    drop(cat);
    eventually("the connection has ended", || one.metric("wsproxy_room_leaves_waiting") == 1.0)
        .await;
    let away = Duration::from_secs(10);
    match trouble {
        Trouble::Frozen => {
            server.stop();
            tokio::time::sleep(away).await;
            server.cont();
        }
        _ => {
            server.kill();
            server.put_snapshot(&snapshot);
            tokio::time::sleep(away).await;
            server.restart();
        }
    }
    eventually_yes("the member has left", async || members(&server) == ["ann", "bob"]).await;
    all_see(&one, &["ann".into(), "bob".into()]).await;
    all_see(&two, &["ann".into(), "bob".into()]).await;
    for (listener, speaker, last) in [(0, 1, "bob: end"), (1, 0, "ann: end")] {
        let both = [&mut ann, &mut bob];
        both[speaker].say("end").await;
        let told = both[listener].told_until(last).await;
        let leaves = told.iter().filter(|words| *words == "leave cat").count();
        assert_eq!(leaves, 1, "{trouble:?} {listener}: {told:?}");
        assert_alternate(&[vec!["join cat".to_owned()], told].concat());
    }
}

#[tokio::test]
async fn a_leave_that_is_due_while_redis_is_frozen_is_told_once() {
    leave_while(Trouble::Frozen).await;
}

#[tokio::test]
async fn a_leave_that_is_due_while_redis_is_killed_is_told_once() {
    leave_while(Trouble::RolledBack).await;
}

#[tokio::test]
async fn changes_that_were_lost_on_their_way_are_told_again() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let one = start(server.url_on(proxy.port())).await;
    let two = start(server.url()).await;
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    ann.send(json!({ "entitySpawn": { "entityId": "gone" } })).await;
    for member in [&mut near, &mut far] {
        assert_eq!(member.told().await, "spawn gone of ann");
    }
    // What the instance sends from here on never arrives.
    proxy.set(Faults { stall_up: true, ..Faults::default() });
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    ann.send(json!({ "entityDespawn": { "entityId": "gone" } })).await;
    let data = json!({ "avatarUrl": "u" });
    ann.send(json!({ "presenceEvent": { "eventType": "UPDATE", "data": data } })).await;
    for expected in ["spawn e of ann", "despawn gone of ann", "update ann"] {
        assert_eq!(near.told().await, expected);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    proxy.cut(Cut::Reset);
    proxy.set(Faults::default());
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(far.told().await);
    }
    told.sort();
    assert_eq!(told, ["despawn gone of ann", "spawn e of ann", "update ann"]);
    // Those who were told already are not told again, and a late joiner finds all of it.
    let three = start(server.url()).await;
    let late = RoomClient::join(&three, "late").await;
    let state = &late.hello["initialState"];
    let entities = state["entities"].as_array().unwrap().iter().map(|one| &one["id"]);
    assert_eq!(entities.collect::<Vec<_>>(), ["e"]);
    let players = state["players"].as_array().unwrap();
    let found = players.iter().find(|player| player["clientId"] == "ann").unwrap();
    assert_eq!(found["avatarUrl"], "u");
    assert_eq!(near.told().await, "join late");
}

/// Redis has lost the members, and another client has taken the only place before the member joins again.
#[tokio::test]
async fn a_member_that_finds_its_room_full_after_an_outage_is_closed() {
    let server = RedisServer::start();
    let start = async || {
        let mut config = crate::support::gateway::config(Some(&server.url()));
        config.endpoints.rooms = true;
        config.rooms.development = wsproxy::config::rooms::Development::Loopback;
        config.rate_limit.max_requests_is_set = true;
        config.rooms.members_max = 1;
        TestInstance::start(config).await
    };
    let (one, two) = (start().await, start().await);
    let mut ann = RoomClient::join(&one, "ann").await;
    server.call(&["FLUSHALL"]);
    let bob = RoomClient::join(&two, "bob").await;
    assert_eq!(bob.members(), ["bob"]);
    assert_eq!(ann.ended().await, 1013);
    assert_eq!(members(&server), ["bob"]);
}

/// The end of an entity is refused, and its client moves something of the same name before that end is told.
#[tokio::test]
async fn a_position_behind_an_end_that_was_refused_stays() {
    let server = RedisServer::start();
    let (one, two) = (start(server.url()).await, start(server.url()).await);
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    ann.send(json!({ "entitySpawn": { "entityId": "e", "templateId": "t" } })).await;
    for member in [&mut near, &mut far] {
        assert_eq!(member.told().await, "spawn e of ann");
    }
    refuse_writes(&server, true);
    ann.send(json!({ "entityDespawn": { "entityId": "e" } })).await;
    ann.send(position("e", 7.0)).await;
    for words in ["despawn e of ann", "move e of ann to 7"] {
        assert_eq!(near.told().await, words);
    }
    assert_eq!(far.told().await, "move e of ann to 7");
    refuse_writes(&server, false);
    // Positions are published again with what is owed.
    let again = far.told_until("despawn e of ann").await;
    assert!(again.iter().all(|words| words == "move e of ann to 7"), "{again:?}");
    assert_eq!(far.told().await, "move e of ann to 7");
    let is_written = || server.call(&["HEXISTS", "{room:lobby}:positions", "ann e"]).integer() == 1;
    eventually("the position is written again", is_written).await;
    for at in [&two, &start(server.url()).await] {
        let late = RoomClient::join(at, "late").await;
        let entities = late.hello["initialState"]["entities"].as_array().unwrap();
        assert_eq!(entities.len(), 1, "{entities:?}");
        assert_eq!((&entities[0]["id"], &entities[0]["position"]["x"]), (&json!("e"), &json!(7.0)));
        assert_eq!(entities[0].get("templateId"), None);
        late.client.close().await;
    }
}

#[tokio::test]
async fn a_change_that_was_refused_is_told_once_its_client_is_back() {
    let server = RedisServer::start();
    let one = start(server.url()).await;
    let two = start(server.url()).await;
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    refuse_writes(&server, true);
    ann.send(json!({ "entitySpawn": { "entityId": "e" } })).await;
    assert_eq!(near.told().await, "spawn e of ann");
    drop(ann);
    // The instance would publish it again, but there is no connection for which it may do so.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    refuse_writes(&server, false);
    let _back = RoomClient::join(&one, "ann").await;
    assert_eq!(far.told().await, "spawn e of ann");
}

/// More changes are refused than an instance keeps in mind: a comparison with the store shows the others.
#[tokio::test]
async fn changes_that_were_refused_are_told_again_although_there_were_too_many() {
    let server = RedisServer::start();
    let one = start(server.url()).await;
    let two = start(server.url()).await;
    let [mut ann, mut near, mut far] = three_members(&one, &two).await;
    // Each takes about 130 bytes.
    let names: Vec<String> = (0..1500).map(|number| format!("{number:060}")).collect();
    let last = names.last().unwrap();
    for name in &names {
        ann.send(json!({ "entitySpawn": { "entityId": name } })).await;
    }
    for member in [&mut near, &mut far] {
        member.told_until(&format!("spawn {last} of ann")).await;
    }
    refuse_writes(&server, true);
    for name in &names {
        ann.send(json!({ "entityDespawn": { "entityId": name } })).await;
    }
    near.told_until(&format!("despawn {last} of ann")).await;
    refuse_writes(&server, false);
    let mut told = std::collections::BTreeSet::new();
    while told.len() < names.len() {
        let words = far.told().await;
        let name = words.strip_prefix("despawn ").and_then(|rest| rest.strip_suffix(" of ann"));
        told.insert(name.unwrap().to_owned());
    }
    assert_eq!(told.into_iter().collect::<Vec<_>>(), names);
    let late = RoomClient::join(&two, "late").await;
    assert_eq!(late.hello["initialState"]["entities"].as_array().map_or(0, Vec::len), 0);
}

/// Joins a member and one that is near, and one at another instance. Both others have heard of all joins.
async fn three_members(one: &TestInstance, two: &TestInstance) -> [RoomClient; 3] {
    let ann = RoomClient::join(one, "ann").await;
    let mut near = RoomClient::join(one, "near").await;
    let far = RoomClient::join(two, "far").await;
    assert_eq!(near.told().await, "join far");
    [ann, near, far]
}

fn refuse_writes(server: &RedisServer, is_refused: bool) {
    let replicas = if is_refused { "1" } else { "0" };
    server.call(&["CONFIG", "SET", "min-replicas-to-write", replicas]);
}

/// Starts an instance with rooms, a long grace, and room for many entities of a member.
async fn start(url: String) -> TestInstance {
    let mut config = crate::support::gateway::config(Some(&url));
    config.endpoints.rooms = true;
    config.rooms.development = wsproxy::config::rooms::Development::Loopback;
    config.rooms.leave_grace = Duration::from_secs(30);
    (config.rooms.entities_max, config.rooms.messages_per_second) = (2000, 0);
    config.rate_limit.max_requests_is_set = true;
    TestInstance::start(config).await
}

async fn bring(trouble: Trouble, server: &mut RedisServer, snapshot: &[u8]) {
    let pause = async |ms| tokio::time::sleep(Duration::from_millis(ms)).await;
    match trouble {
        Trouble::Killed => {
            server.kill();
            pause(200).await;
            server.forget();
            server.restart();
        }
        Trouble::Emptied => _ = server.call(&["FLUSHALL"]),
        Trouble::Frozen => {
            server.stop();
            pause(1500).await;
            server.cont();
        }
        Trouble::RolledBack => {
            server.kill();
            server.put_snapshot(snapshot);
            server.restart();
        }
    }
}

/// Waits until a newcomer is told of these members. One that a reading lacked is looked for again after ten seconds.
async fn all_see(at: &TestInstance, expected: &[String]) {
    eventually_yes("all see the same members", async || {
        let path = "/ws/lobby?user_id=looks&client_id=looks";
        let Ok(client) = Client::connect(at.address(), path, &[]).await else {
            return false;
        };
        let seen = RoomClient::greeted(client, json!({})).await.whole().await;
        let mut names = seen.members();
        seen.client.close().await;
        names.retain(|name| name != "looks");
        tokio::time::sleep(Duration::from_millis(100)).await;
        names == expected
    })
    .await;
}

/// Removes a living member, as an instance does that takes the member's instance for dead.
fn take_for_dead(server: &RedisServer, client: &str) {
    use crate::support::redis_server::Answer;
    let keys = ["members", "meta", "entities", "positions"];
    let keys = keys.map(|key| format!("{{room:lobby}}:{key}"));
    let Answer::Text(record) = server.call(&["HGET", &keys[0], client]) else {
        panic!("{client} is no member")
    };
    let (connection, _) = record.split_once(' ').unwrap();
    let script = include_str!("../../../../../spec/scripts/room_leave.lua");
    let origin = "0".repeat(17);
    let words = ["room:lobby", &origin, "60000", "1", client, connection, "*"];
    let mut call = vec!["EVAL", script, "4"];
    call.extend(keys.iter().map(String::as_str).chain(words));
    server.call(&call);
}

/// Clients that Redis has as members of the lobby, sorted.
fn members(server: &RedisServer) -> Vec<String> {
    use crate::support::redis_server::Answer;
    let Ok(Answer::Array(names)) = server.try_call(&["HKEYS", "{room:lobby}:members"]) else {
        return Vec::new();
    };
    let mut names: Vec<String> = names
        .into_iter()
        .filter_map(|name| if let Answer::Text(name) = name { Some(name) } else { None })
        .collect();
    names.sort();
    names
}
