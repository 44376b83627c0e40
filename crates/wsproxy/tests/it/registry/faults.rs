//! The registry when instances die or freeze, and when Redis loses its data.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;
use wsproxy::{hub::follower::FollowerQueue, registry::lease::Timing};

use super::{HOUR, Node, totals};
use crate::support::{
    FAST_LEASE, eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::id,
    killable::Killable,
    redis_server::{Answer, RedisServer},
    soon,
};

/// Starts a node with connections of some users, which can be killed.
async fn start_killable(server: &RedisServer, name: &str, users: Vec<String>) -> Killable {
    let (url, name) = (server.url(), name.to_owned());
    let start = async move || {
        let node = Node::new(Some(&url), &name, FAST_LEASE);
        let clients: Vec<_> = users.iter().map(|user| node.join(user)).collect();
        node.ready().await;
        node.wait_written().await;
        for user in &users {
            node.wait_present(user, 1).await;
        }
        // Neither is dropped: nothing is said at the end.
        std::mem::forget((node, clients));
    };
    Killable::start(start).await.0
}

#[tokio::test]
async fn a_killed_instance_is_ignored_then_dead_then_removed() {
    let server = RedisServer::start();
    let users: Vec<_> = (0..600).map(|n| format!("u{n}")).collect();
    let killed = start_killable(&server, "killed", users).await;
    let looks = Node::on(&server, "looks", SLOW).await;
    let stays = looks.join("u1");
    looks.wait_present("u1", 2).await;
    looks.wait_totals(totals(1, 601, 0)).await;
    killed.kill();
    looks.wait_present("u1", 1).await;
    assert_eq!(looks.presence("u1").await[0].connection_id, stays.connection);
    looks.wait_totals(totals(1, 1, 600)).await;
    let events = FollowerQueue::new(10_000);
    let sinks = [("ws:registry".into(), wsproxy::hub::sink::Sink::Follower(Arc::clone(&events)))];
    let _subscription = looks.hub.subscribe(sinks).await.unwrap();
    let reaper = Node::on(&server, "reaper", FAST_LEASE).await;
    let second = Node::on(&server, "second", FAST_LEASE).await;
    looks.wait_totals(totals(1, 1, 0)).await;
    let event = soon("an event", events.next_message()).await.unwrap();
    assert_eq!(event, r#"{"event":"server_lost","server_id":"killed"}"#);
    let reaped = |node: &Node| node.lease.counters.servers_reaped.value();
    assert_eq!(reaped(&reaper) + reaped(&second), 1);
    assert_eq!(server.call(&["HLEN", "ws:user:u1:connections"]), Answer::Integer(1));
    assert_eq!(server.call(&["EXISTS", "ws:server:killed:connections"]), Answer::Integer(0));
    assert_eq!(server.call(&["ZCARD", "ws:servers"]), Answer::Integer(3));
    for node in [looks, reaper, second] {
        node.close().await;
    }
}

#[tokio::test]
async fn leftovers_of_an_earlier_run_are_removed() {
    let server = RedisServer::start();
    start_killable(&server, "node", vec!["old".into(), "both".into()]).await.kill();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    let client = node.join("both");
    node.wait_present("old", 0).await;
    node.wait_present("both", 1).await;
    assert_eq!(node.presence("both").await[0].connection_id, client.connection);
    node.wait_totals(totals(1, 1, 0)).await;
    node.close().await;
}

#[tokio::test]
async fn a_redis_that_comes_back_empty_is_told_everything_again() {
    let mut server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    let stays: Vec<_> = (0..300).map(|_| node.join("stays")).collect();
    let (goes, second) = (node.join("goes"), node.join("goes"));
    node.wait_present("stays", 300).await;
    node.wait_present("goes", 2).await;
    server.kill();
    // Changes during the outage are written after it.
    drop(goes);
    let comes = node.join("comes");
    drop(node.join("never"));
    server.restart();
    node.wait_present("stays", 300).await;
    node.wait_present("comes", 1).await;
    node.wait_present("goes", 1).await;
    node.wait_totals(totals(302, 302, 0)).await;
    assert_eq!(node.registry.counters.writer.rewrites.value(), 1);
    drop((stays, comes, second));
    node.wait_totals(totals(0, 0, 0)).await;
    node.close().await;
}

#[tokio::test]
async fn entries_that_redis_lost_or_kept_are_noticed() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    let clients = [node.join("u"), node.join("u")];
    node.wait_present("u", 2).await;
    // As after an eviction, or a failover to a replica that lagged behind.
    server.call(&["DEL", "ws:user:u:connections", "ws:server:node:connections"]);
    node.wait_present("u", 2).await;
    let ghost = Uuid::now_v7().to_string();
    server.call(&["HSET", "ws:server:node:connections", &ghost, "ghost"]);
    let ghosts = || server.call(&["HEXISTS", "ws:server:node:connections", &ghost]);
    eventually("the ghost is gone", || ghosts() == Answer::Integer(0)).await;
    drop(clients);
    node.close().await;
}

#[tokio::test]
async fn one_wrong_typed_key_keeps_no_other_user_out() {
    let server = RedisServer::start();
    server.call(&["SET", "ws:user:odd:connections", "a string"]);
    let node = Node::on(&server, "node", FAST_LEASE).await;
    let _clients = [node.join("odd"), node.join("u")];
    node.wait_present("u", 1).await;
    assert!(node.registry.connections_of(&id("odd")).await.is_err());
    node.close().await;
}

#[tokio::test]
async fn an_instance_that_was_taken_for_dead_comes_back() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let frozen = Node::new(Some(&server.url_on(proxy.port())), "frozen", FAST_LEASE);
    frozen.ready().await;
    let client = frozen.join("u");
    let other = Node::on(&server, "other", FAST_LEASE).await;
    other.wait_present("u", 1).await;
    proxy.set(Faults { stall_up: true, stall_down: true, ..Faults::default() });
    let reaped = || other.lease.counters.servers_reaped.value() == 1;
    eventually("the frozen instance is removed", reaped).await;
    other.wait_present("u", 0).await;
    proxy.set(Faults::default());
    other.wait_present("u", 1).await;
    drop(client);
    other.wait_present("u", 0).await;
    frozen.close().await;
    other.close().await;
}

/// The clock of the instance is not asked: a lease ends when Redis says so.
#[tokio::test]
async fn leases_end_by_the_clock_of_redis() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", Timing { refresh: HOUR, ..FAST_LEASE }).await;
    let lease = || server.call(&["PTTL", "ws:server:node"]).integer();
    eventually("the lease is there", || lease() > 0).await;
    let _client = node.join("u");
    node.wait_present("u", 1).await;
    // An end that lies behind Redis' present, whatever the instance thinks.
    server.call(&["ZADD", "ws:servers", "1", "node"]);
    assert!(node.presence("u").await.is_empty());
    node.wait_totals(totals(1, 0, 1)).await;
    node.close().await;
}

/// One that looks, but is never the one who removes a dead instance.
const SLOW: Timing =
    Timing { refresh: Duration::from_secs(60), lease: Duration::from_secs(200), ..FAST_LEASE };
