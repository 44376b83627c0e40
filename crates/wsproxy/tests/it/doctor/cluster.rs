//! The check against a Redis Cluster, started from the file of `deploy/redis/cluster`, and against ones that are wrong.

use std::time::Instant;

use super::*;
use crate::support::{
    PATIENCE,
    cluster::{Cluster, MASTERS, PASSWORDS},
    redis_server::{Answer, free_port},
};

/// Variables with which all families and histories are served on a Cluster.
fn serving(url: &str) -> Vec<(&'static str, &str)> {
    vec![
        ("REDIS_URL", url),
        ("WSPROXY_ENDPOINTS__AGENTS", "true"),
        ("WSPROXY_ENDPOINTS__TUNNEL", "true"),
        ("WSPROXY_SESSIONS__HISTORY", "true"),
        ("WSPROXY_SESSIONS__NO_RECEIVER", "queue"),
        ("WSPROXY_SESSIONS__EVENTS_LOG", "true"),
        ("WSPROXY_EVENTS__HISTORY", "true"),
    ]
}

fn named(cluster: &Cluster, role: &str, place: usize) -> String {
    format!("{role} 127.0.0.1:{}", cluster.nodes[place].port())
}

#[test]
fn every_node_of_a_cluster_is_examined() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("agents.db").display().to_string();
    let environment = [serving(&url), vec![("WSPROXY_DATABASE__PATH", &*file)]].concat();
    let examined = Examined::with(&environment);
    assert_eq!((examined.code, examined.errors()), (Some(0), 0), "{}", examined.output);
    assert!(
        !examined.findings.iter().any(|one| one["level"] == "warning" && one["part"] == "redis")
    );
    examined.has("ok", "redis", &["3 masters with slots, 3 replicas: all slots have a master"]);
    for place in 0..2 * MASTERS {
        let role = if place < MASTERS { "master" } else { "replica" };
        let node = named(&cluster, role, place);
        for told in [
            "connected, version 7",
            "maxmemory-policy noeviction",
            "output buffer for subscribers: 268435456 bytes",
            "the append-only file is on",
            "has all rights",
        ] {
            examined.has("ok", "redis", &[&node, told]);
        }
        examined.has("ok", "clock", &[&node, "agrees"]);
    }
    for secret in PASSWORDS {
        assert!(!examined.output.contains(secret), "{}", examined.output);
    }
    // The check leaves nothing behind.
    for node in &cluster.nodes {
        assert_eq!(node.call(&["DBSIZE"]), Answer::Integer(0));
    }
}

#[test]
fn faults_of_a_cluster_are_told_node_by_node() {
    let mut cluster = Cluster::start();
    let url = cluster.url();
    let environment = serving(&url);
    cluster.nodes[0].call(&["CONFIG", "SET", "cluster-require-full-coverage", "yes"]);
    cluster.nodes[3].call(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    cluster.nodes[4].call(&["ACL", "SETUSER", "wsproxy", "-pubsub", "-cluster|links", "-asking"]);
    cluster.nodes[5].kill();
    wait("the nodes miss it", || cluster.lacks(0, 5));
    let examined = Examined::with(&environment);
    assert_eq!(examined.code, Some(1), "{}", examined.output);
    let coverage = "cluster-require-full-coverage is yes";
    examined.has("warning", "redis", &[&named(&cluster, "master", 0), coverage]);
    examined.has("error", "redis", &[&named(&cluster, "replica", 3), "allkeys-lru"]);
    let lacks = ["CLUSTER LINKS; ASKING; PUBSUB NUMSUB"];
    examined.has("error", "redis", &[&named(&cluster, "replica", 4), "may not", lacks[0]]);
    examined.has("error", "redis", &[&named(&cluster, "replica", 5), "is away"]);
    examined.has("warning", "redis", &[&named(&cluster, "master", 2), "has no replica"]);
    examined.has("warning", "redis", &[&format!("127.0.0.1:{} cannot", cluster.nodes[5].port())]);
    // A node that hangs hides nothing of the others, and a lost part is told with its slots.
    cluster.nodes[2].stop();
    wait("the nodes miss it", || cluster.lacks(0, 2));
    cluster.nodes[1].stop();
    let began = Instant::now();
    let examined = Examined::with(&environment);
    cluster.nodes[1].cont();
    cluster.nodes[2].cont();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    examined.has("error", "redis", &["5462 slots have no master that runs: 10922-16383"]);
    examined.has("error", "redis", &[&named(&cluster, "master", 1), "cannot be used"]);
    examined.has("error", "redis", &[&named(&cluster, "replica", 3), "allkeys-lru"]);
    examined.has("ok", "redis", &[&named(&cluster, "master", 0), "has all rights"]);
}

#[test]
fn a_node_that_announces_a_wrong_address_is_told() {
    let cluster = Cluster::start();
    let url = cluster.url();
    let wrong = free_port().to_string();
    cluster.nodes[1].call(&["CONFIG", "SET", "cluster-announce-port", &wrong]);
    let told = format!("127.0.0.1:{wrong}");
    wait("it is announced", || {
        let Answer::Text(nodes) = cluster.nodes[0].call(&["CLUSTER", "NODES"]) else { panic!() };
        nodes.contains(&told)
    });
    let examined = Examined::with(&serving(&url));
    examined.has("error", "redis", &[&format!("master {told}"), "cannot be used"]);
    assert!(examined.output.contains("cluster-announce-ip"), "{}", examined.output);
    assert_eq!(examined.errors(), 1, "{}", examined.output);
}

#[test]
fn servers_that_are_no_cluster_or_two_are_told() {
    let (one, other, plain) = (lone(), lone(), RedisServer::start());
    let of = |servers: &[&RedisServer]| {
        let seeds: Vec<_> = servers.iter().map(|one| format!("127.0.0.1:{}", one.port())).collect();
        Examined::of_redis(&format!("redis+cluster://{}", seeds.join(",")))
    };
    let examined = of(&[&one, &other, &plain]);
    let both = [&one, &other].map(|one| format!("127.0.0.1:{}", one.port()));
    let told = format!("{} and {} belong to different Clusters", both[0], both[1]);
    examined.has("error", "redis", &[&told]);
    let told = format!("127.0.0.1:{}: is not in cluster mode", plain.port());
    examined.has("error", "redis", &[&told]);
    let examined = of(&[&plain]);
    examined.has("error", "redis", &["no node of redis.url tells of its Cluster"]);
    examined.has("warning", "redis", &["names 1 node(s)"]);
    let examined = of(&[&one]);
    assert_eq!(examined.errors(), 0, "{}", examined.output);
    examined.has("warning", "redis", &["fewer than three masters"]);
}

/// A Cluster of one node.
fn lone() -> RedisServer {
    let bus_port = free_port().to_string();
    let arguments = ["--cluster-enabled", "yes", "--cluster-port", &bus_port];
    let arguments = arguments.map(String::from).to_vec();
    let server = RedisServer::start_with(Options { arguments, ..Options::default() });
    server.call(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    server
}

fn wait(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
