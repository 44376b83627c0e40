//! Lanes when instances are killed, when Redis loses its data or is away.

use super::*;

/// Starts an instance with lanes of `c1`, which can be killed.
async fn start_killable(redis: &RedisServer, name: &str, agents: &'static [&str]) -> Killable {
    let (url, name) = (redis.url(), name.to_owned());
    let start = async move || {
        let node = Node::with(Some(&url), &name, FAST_LEASE);
        node.ready().await;
        let mut entries = Vec::new();
        for agent in agents {
            entries.push(node.register(agent, "boot", 1).await);
        }
        // Neither is dropped: nothing is said at the end.
        std::mem::forget((node, entries));
    };
    Killable::start(start).await.0
}

#[tokio::test]
async fn lanes_of_a_killed_instance_are_removed_and_announced() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let killed = start_killable(redis, "killed", &["a", "b"]).await;
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    one.wait_elsewhere(&[("a", "killed", 1), ("b", "killed", 1)]).await;
    // Another hand wrote these.
    redis.call(&["HSET", "ws:server:killed:tunnels", "odd", "x", "c9/a", "odd"]);
    killed.kill();
    // The agent is back before its old instance is given up.
    let back = two.register("b", "boot", 2).await;
    one.wait_elsewhere(&[("a", "killed", 1), ("b", "s2", 2)]).await;
    let announced = one.follow().await;
    one.wait_elsewhere(&[("b", "s2", 2)]).await;
    let told = announced.next().await;
    let told = ["event", "agent_id", "server_id"].map(|member| told[member].clone());
    assert_eq!(told, [json!("lost"), json!("a"), json!("killed")]);
    eventually("the killed instance is removed", || {
        redis.call(&["ZSCORE", "ws:servers", "killed"]) == Answer::Null
    })
    .await;
    let reaped = |node: &Node| node.lease.counters.lanes_reaped.value();
    assert_eq!(reaped(&one) + reaped(&two), 1);
    assert_eq!(redis.call(&["EXISTS", "ws:server:killed:tunnels"]).integer(), 0);
    assert_eq!(entry(redis, "b")["server_id"], "s2");
    drop(back);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn later_run_of_the_same_name_removes_the_lanes_of_the_earlier() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    start_killable(redis, "s1", &["a", "b"]).await.kill();
    let node = Node::on(&backend, "s1").await;
    let back = node.register("a", "boot", 2).await;
    eventually("the other lane is removed", || {
        redis.call(&["HEXISTS", "tunnel:c1", "b"]).integer() == 0
    })
    .await;
    node.written().await;
    assert_eq!(entry(redis, "a")["number"], 2);
    assert!(back.is_entered());
    drop(back);
    node.close().await;
}

#[tokio::test]
async fn a_lane_of_an_instance_without_a_lease_does_not_count() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let node = Node::on(&backend, "s1").await;
    let record = r#"{"server_id":"gone","boot_id":"b","number":1,"registration":5}"#;
    redis.call(&["HSET", "tunnel:c1", "a", record]);
    // An instance judges others once it has held its lease for the length of one.
    node.wait_elsewhere(&[("a", "gone", 1)]).await;
    node.wait_elsewhere(&[]).await;
    node.close().await;
}

#[tokio::test]
async fn lanes_work_while_redis_is_away_and_are_written_afterwards() {
    let mut redis = RedisServer::start();
    let (one, two) = (
        Node::with(Some(&redis.url()), "s1", FAST_LEASE),
        Node::with(Some(&redis.url()), "s2", FAST_LEASE),
    );
    one.ready().await;
    two.ready().await;
    let stays = two.register("stays", "boot", 1).await;
    let moves = two.register("moves", "boot", 1).await;
    one.wait_elsewhere(&[("moves", "s2", 1), ("stays", "s2", 1)]).await;
    redis.kill();
    eventually("Redis is missed", || !one.bus.status().connected).await;
    // The table goes on, and a further cluster costs at most one attempt in a while.
    one.wait_elsewhere(&[("moves", "s2", 1), ("stays", "s2", 1)]).await;
    assert!(one.lanes.elsewhere(&id("unknown")).await.is_err());
    // Without a credential that is judged here the lane is refused.
    let refused = two.try_register("new", "boot", 1).await;
    assert!(matches!(refused, Err(RegisterError::Unavailable(_))));
    // The agent of one lane is back elsewhere meanwhile.
    let accept = one.lanes.register(lane("c1", "moves", "boot", 2), true);
    let back = soon("a lane", accept).await.unwrap();
    assert!(!back.is_entered());
    redis.restart();
    assert_eq!(soon("the end", moves.superseded()).await, Successor::SameProcess);
    eventually("the lane is entered", || back.is_entered()).await;
    two.wait_elsewhere(&[("moves", "s1", 2)]).await;
    one.wait_elsewhere(&[("stays", "s2", 1)]).await;
    eventually("the hash is whole", || redis.call(&["HLEN", "tunnel:c1"]).integer() == 2).await;
    assert_eq!(entry(&redis, "stays")["server_id"], "s2");
    drop((stays, moves, back));
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn emptied_redis_is_told_everything_again() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    let held = two.register("a", "boot", 1).await;
    let registration = entry(redis, "a")["registration"].clone();
    let mut lanes = one.elsewhere().await;
    lanes.mark_unchanged();
    redis.call(&["FLUSHALL"]);
    let is_back = || redis.call(&["HEXISTS", "tunnel:c1", "a"]).integer() == 1;
    eventually("the lane is written again", is_back).await;
    assert_eq!(entry(redis, "a")["registration"], registration, "it has the registration it had");
    assert!(!lanes.has_changed().unwrap(), "the table never lost it");
    // As after an eviction of one key.
    redis.call(&["DEL", "tunnel:c1"]);
    eventually("the lane is written again", is_back).await;
    drop(held);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_lane_that_is_written_again_gives_way_to_a_later_one() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let node = Node::on(&backend, "s1").await;
    let held = node.register("a", "boot", 1).await;
    let registration = entry(redis, "a")["registration"].as_u64().unwrap();
    // Redis lost the lane; another process has come since, of which this instance heard nothing.
    let later = |number| {
        format!(r#"{{"server_id":"s9","boot_id":"x","number":1,"registration":{number}}}"#)
    };
    redis.call(&["HSET", "tunnel:c1", "a", &later(registration + 1)]);
    redis.call(&["DEL", "ws:server:s1:tunnels"]);
    assert_eq!(soon("the end", held.superseded()).await, Successor::OtherProcess);
    drop(held);
    node.written().await;
    assert_eq!(entry(redis, "a")["server_id"], "s9");
    // An earlier one gives way.
    let held = node.register("b", "boot", 1).await;
    let registration = entry(redis, "b")["registration"].as_u64().unwrap();
    redis.call(&["HSET", "tunnel:c1", "b", &later(registration - 1)]);
    redis.call(&["DEL", "ws:server:s1:tunnels"]);
    eventually("it is written again", || entry(redis, "b")["server_id"] == "s1").await;
    assert_eq!(entry(redis, "b")["registration"], registration);
    drop(held);
    node.close().await;
}

#[tokio::test]
async fn a_key_of_another_type_refuses_its_own_cluster_only() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let node = Node::on(&backend, "s1").await;
    redis.call(&["SET", "tunnel:c1", "a string"]);
    let refused = node.try_register("a", "boot", 1).await;
    assert!(matches!(refused, Err(RegisterError::Unavailable(_))), "{:?}", refused.err());
    let other = soon("an entry", node.lanes.register(lane("c2", "a", "boot", 1), false)).await;
    assert!(other.is_ok());
    drop(other);
    node.close().await;
}
