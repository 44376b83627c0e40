//! Revoked tokens: how long and for whom, on every instance, also one that missed the command.

use std::time::{Duration, Instant};

use wsproxy::registry::control::Target;
use wsproxy_proto::disconnect::Disconnect;

use super::{HOUR, LEEWAY, Node, totals};
use crate::support::{
    FAST_LEASE, eventually, eventually_yes,
    fault_proxy::{Cut, FaultProxy, Faults},
    gateway::{Backend, id, over_both},
    redis_server::RedisServer,
};

over_both!(
    revoked_tokens_are_known,
    a_revocation_covers_clocks_that_are_ahead_by_the_leeway,
    a_later_revocation_does_not_cut_an_earlier_one_short,
);

/// Seconds since 1970, an hour from now.
fn later() -> u64 {
    crate::support::issuer::now() + 3600
}

async fn a_later_revocation_does_not_cut_an_earlier_one_short(backend: Backend) {
    let node = Node::over(&backend).await;
    let short = Duration::from_millis(50);
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    node.disconnect(Target::User(id("u")), Some(short)).await;
    node.disconnect(Target::User(id("v")), Some(short)).await;
    let is_over = async || !node.is_revoked("v", None, None).await;
    eventually_yes("the revocation expires", is_over).await;
    assert!(node.is_revoked("u", None, None).await);
    node.close().await;
}

async fn a_revocation_covers_clocks_that_are_ahead_by_the_leeway(backend: Backend) {
    let node = Node::over(&backend).await;
    let before = crate::support::issuer::now();
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    let after = crate::support::issuer::now();
    assert!(node.is_revoked("u", None, Some(before + LEEWAY)).await);
    assert!(!node.is_revoked("u", None, Some(after + LEEWAY + 1)).await);
    node.close().await;
}

async fn revoked_tokens_are_known(backend: Backend) {
    let node = Node::over(&backend).await;
    assert!(!node.is_revoked("u", Some("t"), None).await);
    let client = node.join_with("w", Some("t"), Some(1));
    assert_eq!(node.disconnect(Target::Token("t".into()), Some(HOUR)).await, 1);
    assert_eq!(client.ended().await, &Disconnect::REVOKED);
    assert!(node.is_revoked("u", Some("t"), Some(later())).await);
    assert!(!node.is_revoked("u", Some("t2"), Some(1)).await);
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    assert!(node.is_revoked("u", None, Some(1)).await);
    assert!(!node.is_revoked("u", Some("t2"), Some(later())).await);
    // Who does not say when it was made cannot prove that it is newer.
    assert!(node.is_revoked("u", Some("t2"), None).await);
    node.disconnect(Target::Token("short".into()), Some(Duration::from_millis(50))).await;
    let is_over = async || !node.is_revoked("v", Some("short"), None).await;
    eventually_yes("the revocation expires", is_over).await;
    node.close().await;
}

#[tokio::test]
async fn revocations_are_stored_in_one_slot_with_their_time() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    let key = "{ws}:revoked:user:u";
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    assert!(server.call(&["PTTL", key]).integer() > 3_000_000);
    // A foreign value counts as a revocation, and keeps its own expiry.
    server.call(&["SET", key, "yes"]);
    assert!(node.is_revoked("u", None, Some(later())).await);
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    assert_eq!(server.call(&["PTTL", key]).integer(), -1);
    node.disconnect(Target::Token("t".into()), Some(HOUR)).await;
    assert!(server.call(&["PTTL", "{ws}:revoked:jti:t"]).integer() > 3_000_000);
    node.close().await;
}

#[tokio::test]
async fn revocations_of_the_version_before_still_count() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    server.call(&["SET", "ws:revoked:user:u", "1000", "EX", "600"]);
    server.call(&["SET", "ws:revoked:jti:t", "1000", "EX", "600"]);
    assert!(node.is_revoked("u", None, Some(1000 + LEEWAY)).await);
    assert!(!node.is_revoked("u", None, Some(1001 + LEEWAY)).await);
    assert!(node.is_revoked("v", Some("t"), Some(later())).await);
    // The later of two counts.
    server.call(&["SET", "{ws}:revoked:user:u", "500", "EX", "600"]);
    assert!(node.is_revoked("u", None, Some(1000)).await);
    server.call(&["SET", "{ws}:revoked:user:u", "2000", "EX", "600"]);
    assert!(node.is_revoked("u", None, Some(2000)).await);
    node.close().await;
}

#[tokio::test]
async fn a_revocation_reaches_every_instance_within_a_second() {
    let server = RedisServer::start();
    let (one, two) =
        (Node::on(&server, "one", FAST_LEASE).await, Node::on(&server, "two", FAST_LEASE).await);
    let clients = [one.join("u"), two.join("u"), two.join("v")];
    one.wait_present("u", 2).await;
    one.wait_totals(totals(1, 3, 0)).await;
    two.wait_totals(totals(2, 3, 0)).await;
    let start = Instant::now();
    assert_eq!(one.disconnect(Target::User(id("u")), Some(HOUR)).await, 2);
    for client in &clients[..2] {
        assert_eq!(client.ended().await, &Disconnect::REVOKED);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(clients[2].lives());
    assert!(two.is_revoked("u", None, Some(5)).await);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_revocation_that_an_instance_missed_is_made_up_for() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let deaf = Node::new(Some(&server.url_on(proxy.port())), "deaf", FAST_LEASE);
    deaf.ready().await;
    let other = Node::on(&server, "other", FAST_LEASE).await;
    let old = deaf.join_with("u", None, Some(5));
    let new = deaf.join_with("u", None, Some(later()));
    let named = deaf.join_with("v", Some("t"), Some(later()));
    let bystander = deaf.join_with("v", Some("t2"), Some(5));
    proxy.set(Faults { refuse: true, ..Faults::default() });
    proxy.cut(Cut::Reset);
    eventually("the bus is missed", || !deaf.bus.status().connected).await;
    other.disconnect(Target::User(id("u")), Some(HOUR)).await;
    other.disconnect(Target::Token("t".into()), Some(HOUR)).await;
    assert!(old.lives() && named.lives());
    proxy.set(Faults::default());
    assert_eq!(old.ended().await, &Disconnect::REVOKED);
    assert_eq!(named.ended().await, &Disconnect::REVOKED);
    assert!(new.lives() && bystander.lives());
    deaf.close().await;
    other.close().await;
}
