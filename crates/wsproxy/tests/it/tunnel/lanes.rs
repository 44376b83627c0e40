//! Handshakes of lanes, the order of two lanes of one agent, and the end of an instance.

use wsproxy_conn::lane::{LaneEnd, LaneSettings};
use wsproxy_proto::tunnel::code::Code;

use crate::support::{
    cluster_agent::{AGENT, CLIENT, ClusterAgent, Name, config, handshake, head, hello, sha256},
    eventually,
    gateway::TestInstance,
    http::{Response, request},
    raw::Raw,
};

async fn connect(gateway: &TestInstance, name: Name<'_>) -> Result<ClusterAgent, Response> {
    ClusterAgent::named(gateway.address(), name, LaneSettings::default(), hello).await
}

#[tokio::test]
async fn a_lane_needs_its_clusters_token() {
    let gateway = TestInstance::start(config(None)).await;
    for (cluster, token, status, code) in [
        ("c1", "wrong", 401, "invalid_token"),
        ("c1", "other-token", 403, "invalid_token"),
        ("c9", AGENT, 403, "invalid_token"),
        ("c9", "wrong", 404, "not_found"),
        ("a%20b", AGENT, 400, "bad_id"),
    ] {
        let refused = connect(&gateway, Name { cluster, token, ..Name::default() }).await;
        let refused = refused.err().unwrap();
        assert_eq!(
            (refused.status, refused.json()["error"]["code"].as_str()),
            (status, Some(code))
        );
    }
    let good = handshake(Name::default());
    for (from, to, status) in [
        ("Authorization: Bearer token-of-agents\r\n", "", 401),
        ("wsproxy.tunnel.v1", "wsproxy.tunnel.v9", 426),
        ("X-Wsproxy-Agent: node-1", "X-Wsproxy-Agent: node-1 x", 400),
        ("Upgrade: websocket\r\n", "", 426),
    ] {
        let mut raw = Raw::connect(gateway.address()).await;
        raw.write(good.replace(from, to).as_bytes()).await;
        assert_eq!(raw.response().await.status, status, "{from}");
    }
    assert!(connect(&gateway, Name::default()).await.is_ok());
    gateway.drain().await;
}

#[tokio::test]
async fn the_newer_lane_of_an_agent_wins() {
    let gateway = TestInstance::start(config(None)).await;
    let first = connect(&gateway, Name { number: 2, ..Name::default() }).await.unwrap();
    let older = connect(&gateway, Name { number: 1, ..Name::default() }).await;
    assert_eq!(older.err().unwrap().status, 409);
    let newer = connect(&gateway, Name { number: 3, ..Name::default() }).await.unwrap();
    assert_eq!(first.ended().await, LaneEnd::GoneAway(Code::Superseded));
    let other_boot = connect(&gateway, Name { boot: 2, ..Name::default() }).await.unwrap();
    assert_eq!(newer.ended().await, LaneEnd::GoneAway(Code::Superseded));
    let other_agent = Name { agent: "node-2", ..Name::default() };
    let other_agent = connect(&gateway, other_agent).await.unwrap();
    assert!(other_boot.lane.status().go_away.is_none());
    assert!(other_agent.lane.status().go_away.is_none());
    gateway.drain().await;
}

#[tokio::test]
async fn a_stored_token_opens_its_cluster() {
    let gateway = TestInstance::start(config(None)).await;
    let (names, store) = (&gateway.gateway().names, &gateway.gateway().store);
    let key = names.tunnel_auth(&wsproxy_proto::names::Id::parse("d1").unwrap());
    let hash = sha256("stored");
    store.save(&key, hash.as_bytes(), std::time::Duration::from_secs(60)).await.unwrap();
    let name = |token| Name { cluster: "d1", token, ..Name::default() };
    assert_eq!(connect(&gateway, name("wrong")).await.err().unwrap().status, 401);
    let _agent = connect(&gateway, name("stored")).await.unwrap();
    let bearer = format!("Bearer {CLIENT}");
    let headers = [("Authorization", &*bearer)];
    let answered = request(gateway.address(), "GET", "/clusters/d1/proxy/", &headers, b"").await;
    assert_eq!((answered.status, &*answered.body), (200, "hello"));
    gateway.drain().await;
}

#[tokio::test]
async fn an_instance_that_ends_drains_its_lanes() {
    let gateway = TestInstance::start(config(None)).await;
    let agent = connect(&gateway, Name::default()).await.unwrap();
    let mut raw = Raw::connect(gateway.address()).await;
    raw.write(head("GET", "/", "").as_bytes()).await;
    assert_eq!(raw.response().await.body, "hello");
    gateway.drain().await;
    assert_eq!(agent.ended().await, LaneEnd::GoneAway(Code::Restarting));
}

#[tokio::test]
async fn a_lane_counts_among_the_connections() {
    let gateway = TestInstance::start(config(None)).await;
    let agent = connect(&gateway, Name::default()).await.unwrap();
    let active = || gateway.gateway().seats.taken();
    assert_eq!(active(), 1);
    agent.cut();
    eventually("the seat is free", || active() == 0).await;
    gateway.drain().await;
}
