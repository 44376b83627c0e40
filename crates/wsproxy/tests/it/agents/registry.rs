//! The registry of connected agents: over both backends, when instances die or freeze, when Redis loses its data.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use uuid::Uuid;
use wsproxy::{endpoint::agents::owner::Claimed, registry::agents::ConnectedAgent};

use super::node::Node;
use crate::support::{
    bus::config,
    eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::{Backend, id, over_both},
    killable::Killable,
    redis_server::{Answer, RedisServer},
    soon,
};

over_both!(agents_are_found_listed_and_counted, newer_connection_stays_when_the_older_leaves,);

async fn agents_are_found_listed_and_counted(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let (connection, _, entry) = node.connect("u1").await;
    entry.describe(Some("linux"), Some("1.2"));
    let _others =
        futures_util::future::join_all((0..30).map(async |n| node.connect(&format!("v{n}")).await))
            .await;
    node.written().await;
    node.wait_found("u1", Some("s1")).await;
    let found = node.registry.find(&id("u1")).await.unwrap().unwrap();
    assert_eq!((&found.user, found.record.connection), (&id("u1"), connection));
    assert_eq!(found.record.platform.as_deref(), Some("linux"));
    assert_eq!(found.record.version.as_deref(), Some("1.2"));
    let connected = found.record.connected_at.as_deref().unwrap();
    assert!(humantime::parse_rfc3339(connected).is_ok(), "{connected}");
    node.wait_counts(&[("s1", 31)]).await;
    let all = list(&node, 7).await;
    assert_eq!(all.len(), 31);
    assert!(all.contains("u1 s1"), "{all:?}");
    assert_eq!(node.registry.find(&id("absent")).await.unwrap(), None);
    drop(entry);
    assert!(node.release("u1", connection).await);
    node.wait_found("u1", None).await;
    node.wait_counts(&[("s1", 30)]).await;
}

/// Reads the whole list in pieces, with its instances.
async fn list(node: &Node, count: usize) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut cursor: Option<String> = None;
    loop {
        let page = soon("a piece", node.registry.list(cursor.as_deref(), count)).await.unwrap();
        let name = |agent: &ConnectedAgent| format!("{} {}", agent.user, agent.server);
        found.extend(page.agents.iter().map(name));
        cursor = page.cursor;
        if cursor.is_none() {
            return found;
        }
    }
}

async fn newer_connection_stays_when_the_older_leaves(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let (_, _, older) = node.connect("u1").await;
    node.written().await;
    let (connection, _, newer) = node.connect("u1").await;
    drop(older);
    node.written().await;
    let found = node.registry.find(&id("u1")).await.unwrap().unwrap();
    assert_eq!(found.record.connection, connection);
    node.wait_counts(&[("s1", 1)]).await;
    assert!(node.lost.1.lock().is_empty(), "the user is still here");
    drop(newer);
    assert_eq!(*node.lost.1.lock(), ["u1"]);
}

/// Starts an instance with agents, which can be killed. Returns their connections too.
async fn start_killable(
    server: &RedisServer,
    name: &str,
    users: Vec<String>,
) -> (Killable, Vec<Uuid>) {
    let (url, name) = (server.url(), name.to_owned());
    let start = async move || {
        let node = Node::with(config(Some(&url)), &name, |_| {}).await;
        let mut open = Vec::new();
        for user in &users {
            open.push(node.connect(user).await);
        }
        node.written().await;
        let connections = open.iter().map(|(connection, ..)| *connection).collect();
        // Neither is dropped: nothing is said at the end.
        std::mem::forget((node, open));
        connections
    };
    Killable::start(start).await
}

#[tokio::test]
async fn agents_of_a_killed_instance_lose_their_places_once() {
    const AGENTS: usize = 600;
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { unreachable!() };
    let users: Vec<_> = (0..AGENTS).map(|n| format!("u{n}")).collect();
    let (killed, open) = start_killable(server, "killed", users).await;
    let nodes = [Node::on(&backend, "one").await, Node::on(&backend, "two").await];
    // One has moved to an instance that lives.
    let (moved, _, _entry) = nodes[0].connect("u7").await;
    let events = nodes[0].names.agents_events();
    let (heard, _subscription) = nodes[0].follow(&events).await;
    killed.kill();
    nodes[0].wait_found("u8", None).await;
    let removed = || server.call(&["ZSCORE", "ws:servers", "killed"]) == Answer::Null;
    eventually("the killed instance is removed", removed).await;
    let events = heard.wait(AGENTS - 1).await;
    let users: BTreeSet<_> = events
        .iter()
        .map(|text| {
            let event: Value = serde_json::from_str(text).unwrap();
            assert_eq!(
                (&event["event"], &event["serverId"]),
                (&json!("disconnected"), &json!("killed"))
            );
            assert!(event["generation"].as_str().unwrap().parse::<u64>().unwrap() > 1 << 50);
            event["userId"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!((events.len(), users.len(), users.contains("u7")), (AGENTS - 1, AGENTS - 1, false));
    let told: Vec<_> = nodes.iter().flat_map(|node| node.lost.0.lock().clone()).collect();
    assert_eq!(told.len(), AGENTS - 1);
    let reaped = nodes.iter().map(|node| node.lease.counters.agents_reaped.value());
    assert_eq!(reaped.sum::<u64>(), AGENTS as u64 - 1);
    assert_eq!(server.call(&["EXISTS", "ws:server:killed:agents"]).integer(), 0);
    assert_eq!(server.call(&["EXISTS", "agent:u8:server", "agent:u7:server"]).integer(), 1);
    assert_eq!(server.call(&["GET", "agent:u8:status"]), Answer::Text("disconnected".into()));
    assert!(server.call(&["TTL", "agent:u8:status"]).integer() > 600_000);
    assert_eq!(server.call(&["EXISTS", "agent:u7:status"]).integer(), 0);
    let found = nodes[1].registry.find(&id("u7")).await.unwrap().unwrap();
    assert_eq!((found.record.connection, &*found.server), (moved, "one"));
    // An agent that comes back finds its place free, and its old connection does not get it again.
    let (_, generation, _entry) = nodes[1].connect("u8").await;
    let late = nodes[0].refresh("u8", open[8], 1).await;
    assert!(matches!(late, Claimed::Lost { owner: Some(_), generation: g } if g == generation));
    for node in nodes {
        node.close().await;
    }
}

#[tokio::test]
async fn later_run_of_the_same_name_ends_the_places_of_the_earlier() {
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { unreachable!() };
    let users = ["gone", "back"].map(String::from).to_vec();
    start_killable(server, "s1", users).await.0.kill();
    let node = Node::on(&backend, "s1").await;
    let (connection, _, entry) = node.connect("back").await;
    node.wait_found("gone", None).await;
    node.wait_counts(&[("s1", 1)]).await;
    let found = node.registry.find(&id("back")).await.unwrap().unwrap();
    assert_eq!(found.record.connection, connection);
    assert_eq!(*node.lost.0.lock(), ["gone"]);
    assert_eq!(server.call(&["GET", "agent:gone:status"]), Answer::Text("disconnected".into()));
    drop(entry);
    node.close().await;
    assert_eq!(server.call(&["EXISTS", "ws:server:s1:agents"]).integer(), 0);
}

#[tokio::test]
async fn frozen_instance_that_thaws_lists_its_agents_again() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let frozen = Node::with(config(Some(&server.url_on(proxy.port()))), "frozen", |_| {}).await;
    let (connection, generation, _entry) = frozen.connect("u1").await;
    frozen.written().await;
    // The generation stays for longer than the test takes.
    let minute = Duration::from_secs(60);
    let url = server.url();
    let other =
        Node::with(config(Some(&url)), "other", |settings| settings.offline_wait = minute).await;
    other.wait_found("u1", Some("frozen")).await;
    proxy.set(Faults { stall_up: true, stall_down: true, ..Faults::default() });
    let reaped = || other.lease.counters.servers_reaped.value() == 1;
    eventually("the frozen instance is removed", reaped).await;
    assert_eq!(other.registry.find(&id("u1")).await.unwrap(), None);
    assert_eq!(*other.lost.0.lock(), ["u1"]);
    proxy.set(Faults::default());
    frozen.ready().await;
    frozen.wait_counts(&[("frozen", 1), ("other", 0)]).await;
    // While the generation stays, the connection learns that its place was released.
    let lost = frozen.refresh("u1", connection, generation).await;
    assert_eq!(lost, Claimed::Lost { owner: None, generation });
    // Later it may have the place again.
    server.call(&["DEL", "{agent:u1:server}:owner"]);
    let held = frozen.refresh("u1", connection, generation).await;
    assert!(matches!(held, Claimed::Held { generation: g, .. } if g == generation));
    other.wait_found("u1", Some("frozen")).await;
    frozen.close().await;
    other.close().await;
}

#[tokio::test]
async fn redis_that_comes_back_empty_is_told_everything_again() {
    let mut server = RedisServer::start();
    let nodes = [
        Node::with(config(Some(&server.url())), "s1", |_| {}).await,
        Node::with(config(Some(&server.url())), "s2", |_| {}).await,
    ];
    let (first, held, _first) = nodes[0].connect("u1").await;
    let (_, _, second) = nodes[1].connect("u2").await;
    nodes[0].wait_counts(&[("s1", 1), ("s2", 1)]).await;
    server.kill();
    // Changes during the outage are written after it.
    drop(second);
    let third = nodes[1].registry.join(&id("u3"), Uuid::now_v7());
    server.restart();
    nodes[1].ready().await;
    nodes[0].ready().await;
    nodes[0].wait_counts(&[("s1", 1), ("s2", 1)]).await;
    assert_eq!(list(&nodes[0], 100).await, BTreeSet::from(["u1 s1".into(), "u3 s2".into()]));
    // The place is not known until it is taken again.
    assert_eq!(nodes[1].registry.find(&id("u1")).await.unwrap(), None);
    assert!(
        matches!(nodes[0].refresh("u1", first, held).await, Claimed::Held { generation, .. } if generation == held)
    );
    nodes[1].wait_found("u1", Some("s1")).await;
    server.call(&["FLUSHALL"]);
    nodes[0].wait_counts(&[("s1", 1), ("s2", 1)]).await;
    assert!(nodes[0].registry.counters.rewrites.value() >= 1);
    drop(third);
    for node in nodes {
        node.close().await;
    }
}

#[tokio::test]
async fn list_goes_over_living_instances_only() {
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { unreachable!() };
    let (one, two) = (Node::on(&backend, "a.one").await, Node::on(&backend, "two").await);
    let mut open = Vec::new();
    for n in 0..300 {
        open.push(one.connect(&format!("a{n}")).await);
        open.push(two.connect(&format!("b{n}")).await);
    }
    one.wait_counts(&[("a.one", 300), ("two", 300)]).await;
    let all = list(&two, 50).await;
    assert_eq!(all.len(), 600);
    // Another hand wrote these; the list bears them.
    server.call(&["HSET", "ws:server:two:agents", "no:id", "{}", "odd", "odd"]);
    assert_eq!(list(&one, 1000).await.len(), 600);
    server.call(&["HSET", "ws:server:dead:agents", "u", "{}"]);
    assert!(!list(&one, 1000).await.iter().any(|name| name.ends_with("dead")));
    for bad in ["", "x", ".two", "1x.two", "-1.two"] {
        assert!(one.registry.list(Some(bad), 10).await.is_err(), "{bad}");
    }
    drop(open);
    for node in [one, two] {
        node.close().await;
    }
}
