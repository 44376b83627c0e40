//! The registry of lanes: over both backends and several instances, when instances die, when Redis loses its data or is away.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    bus::Bus,
    config::LimitsConfig,
    hub::{
        Hub, delivery::Delivery, follower::FollowerQueue, sink::Sink, subscription::Subscription,
    },
    registry::{
        lease::{Lease, LeaseSettings, Timing},
        sessions::SessionLogLimits,
        tunnel::{LaneEntry, LaneRegistry, OpeningLane, RegisterError, RemoteLane, Successor},
    },
};
use wsproxy_proto::names::Names;

use crate::support::{
    FAST_LEASE,
    bus::config,
    eventually, eventually_ok,
    gateway::{Backend, id, over_both},
    killable::Killable,
    redis_server::{Answer, RedisServer},
    soon,
};

mod faults;

over_both!(
    lanes_are_announced_to_workers,
    older_connection_of_a_process_is_refused,
    a_lane_gives_way_to_a_newer_one,
);

/// An instance without its endpoints.
struct Node {
    lanes: Arc<LaneRegistry>,
    lease: Arc<Lease>,
    hub: Arc<Hub>,
    bus: Bus,
    end: CancellationToken,
}

impl Node {
    async fn on(backend: &Backend, name: &str) -> Self {
        let node = Self::with(backend.url().as_deref(), name, FAST_LEASE);
        node.ready().await;
        node
    }

    fn with(url: Option<&str>, name: &str, timing: Timing) -> Self {
        let (config, names) = (config(url), Names::new(""));
        let (hub, tasks, end) = (Hub::new(), TaskTracker::new(), CancellationToken::new());
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let stop = end.clone();
        let bus = match url {
            Some(_) => Bus::redis(&config, name, &names, delivery, &tasks, stop).unwrap(),
            None => Bus::embedded(&config, &LimitsConfig::default(), delivery, &tasks, stop),
        };
        hub.connect(bus.clone());
        let lease = LeaseSettings {
            server_id: name.into(),
            names,
            response_timeout: config.response_timeout,
            index_ttl: HOUR,
            announcements: SessionLogLimits { entries_max: 100, ttl: HOUR },
            offline_wait: HOUR,
            empty_room_ttl: Duration::from_secs(60),
            timing,
        };
        let lease = Lease::start(lease, &bus);
        let peer: Arc<str> = format!("http://{name}:1").into();
        let lanes = LaneRegistry::start(&lease, &hub, &bus, Some(peer));
        Self { lanes, lease, hub, bus, end }
    }

    /// Waits until the bus is connected.
    async fn ready(&self) {
        eventually("the bus is ready", || {
            let status = self.bus.status();
            status.connected && status.subscribed
        })
        .await;
    }

    async fn try_register(
        &self,
        agent: &str,
        boot: &str,
        number: u64,
    ) -> Result<LaneEntry, RegisterError> {
        soon("an entry", self.lanes.register(lane("c1", agent, boot, number), false)).await
    }

    async fn register(&self, agent: &str, boot: &str, number: u64) -> LaneEntry {
        self.try_register(agent, boot, number).await.unwrap()
    }

    async fn elsewhere(&self) -> watch::Receiver<Arc<[RemoteLane]>> {
        soon("lanes", self.lanes.elsewhere(&id("c1"))).await.unwrap()
    }

    /// Waits until these lanes of `c1` are known: agent, instance and number.
    async fn wait_elsewhere(&self, wanted: &[(&str, &str, u64)]) {
        eventually_ok("the lanes are known", async || {
            let found = self.lanes.elsewhere(&id("c1")).await;
            let found = found.map(|lanes| lanes.borrow().clone());
            let is_wanted = found.as_ref().is_ok_and(|found| {
                let found = found
                    .iter()
                    .map(|lane| (lane.agent.as_str(), &*lane.record.server_id, lane.record.number));
                found.eq(wanted.iter().copied())
            });
            if is_wanted { Ok(()) } else { Err(found) }
        })
        .await;
    }

    async fn follow(&self) -> Announced {
        let queue = FollowerQueue::new(1 << 20);
        let sinks = [("tunnels:events".into(), Sink::Follower(Arc::clone(&queue)))];
        let subscription = soon("a subscription", self.hub.subscribe(sinks)).await.unwrap();
        Announced { queue, _subscription: subscription }
    }

    async fn written(&self) {
        eventually("all is written", || self.lanes.is_written()).await;
    }

    async fn close(&self) {
        soon("the end", self.lanes.close()).await;
        soon("the end of the lease", self.lease.close()).await;
        self.end.cancel();
    }
}

/// Announcements as workers hear them.
struct Announced {
    queue: Arc<FollowerQueue>,
    _subscription: Subscription,
}

impl Announced {
    async fn next(&self) -> Value {
        let message = soon("an announcement", self.queue.next_message()).await.unwrap();
        serde_json::from_slice(&message).unwrap()
    }
}

fn lane(cluster: &str, agent: &str, boot: &str, number: u64) -> OpeningLane {
    OpeningLane {
        cluster: id(cluster),
        agent: id(agent),
        boot_id: id(boot),
        number,
        capabilities: 1 << 60,
    }
}

async fn lanes_are_announced_to_workers(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let announced = node.follow().await;
    let entry = node.register("a", "boot", 7).await;
    let mut told = announced.next().await;
    let registration = told["registration"].as_u64().unwrap();
    assert!(registration > 1_700_000_000_000_000, "{told}");
    let members = told.as_object_mut().unwrap();
    members.remove("peer");
    assert_eq!(
        told,
        json!({
            "event": "connected", "cluster_id": "c1", "agent_id": "a", "server_id": "s1",
            "boot_id": "boot", "number": 7, "capabilities": 1_u64 << 60, "draining": false,
            "registration": registration,
        })
    );
    entry.drain();
    entry.drain();
    let told = announced.next().await;
    assert_eq!((&told["event"], &told["draining"]), (&json!("draining"), &json!(true)));
    assert_eq!(told["registration"], registration);
    drop(entry);
    let told = announced.next().await;
    assert_eq!((&told["event"], &told["agent_id"]), (&json!("lost"), &json!("a")));
    assert_eq!(told["registration"], registration);
    node.close().await;
    if let Backend::Redis(redis) = &backend {
        assert_eq!(redis.call(&["KEYS", "*"]), Answer::Array(vec![]), "nothing is left");
    }
}

async fn older_connection_of_a_process_is_refused(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let newer = node.register("a", "boot", 2).await;
    let refused = node.try_register("a", "boot", 1).await;
    assert!(matches!(refused, Err(RegisterError::Superseded)));
    // Agents with other ids are others.
    let other = node.register("b", "boot", 1).await;
    assert_eq!(node.lanes.len(), 2);
    drop((newer, other));
    assert!(node.lanes.is_empty());
    node.close().await;
}

async fn a_lane_gives_way_to_a_newer_one(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let first = node.register("a", "boot", 1).await;
    let second = node.register("a", "boot", 2).await;
    assert_eq!(soon("the end", first.superseded()).await, Successor::SameProcess);
    let third = node.register("a", "other", 1).await;
    assert_eq!(soon("the end", second.superseded()).await, Successor::OtherProcess);
    // The ends of older lanes do not touch the newest.
    drop((first, second));
    node.written().await;
    assert_eq!((node.lanes.len(), node.lanes.superseded()), (1, 2));
    if let Backend::Redis(redis) = &backend {
        let entry = entry(redis, "a");
        assert_eq!((&entry["boot_id"], &entry["number"]), (&json!("other"), &json!(1)));
    }
    drop(third);
    node.close().await;
}

/// The entry of an agent of `c1`.
fn entry(redis: &RedisServer, agent: &str) -> Value {
    match redis.call(&["HGET", "tunnel:c1", agent]) {
        Answer::Text(entry) => serde_json::from_str(&entry).unwrap(),
        other => panic!("{other:?} is no entry"),
    }
}

#[tokio::test]
async fn lanes_of_other_instances_are_followed_without_asking_redis() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    let a = two.register("a", "boot", 1).await;
    assert!(one.lanes.known_elsewhere(&id("c1")).is_none());
    one.wait_elsewhere(&[("a", "s2", 1)]).await;
    let lanes = one.elsewhere().await;
    assert_eq!(lanes.borrow()[0].record.peer.as_deref(), Some("http://s2:1"));
    assert_eq!(lanes.borrow()[0].record.capabilities, 1 << 60);
    let b = two.register("b", "boot2", 1).await;
    one.wait_elsewhere(&[("a", "s2", 1), ("b", "s2", 1)]).await;
    b.drain();
    eventually("the drain is known", || lanes.borrow()[1].record.draining).await;
    drop(b);
    one.wait_elsewhere(&[("a", "s2", 1)]).await;
    for _ in 0..1000 {
        one.elsewhere().await;
    }
    // At the first request, and once or twice since announcements may have been missed at the start.
    assert!(one.lanes.counters.readings.value() <= 3);
    // Its own lanes are no lanes elsewhere.
    two.wait_elsewhere(&[]).await;
    // A stale table is put right.
    redis.call(&["HDEL", "tunnel:c1", "a"]);
    let known = one.lanes.known_elsewhere(&id("c1")).unwrap();
    assert!(one.lanes.read_again(&id("c1"), &known[0]).await.unwrap().is_empty());
    drop(a);
    // A message that no gateway wrote, and an entry.
    redis.call(&["PUBLISH", "tunnels:events", "{\"event\":\"dance\"}"]);
    redis.call(&["HSET", "tunnel:c2", "x", "no JSON"]);
    assert!(one.lanes.elsewhere(&id("c2")).await.unwrap().borrow().is_empty());
    eventually("both are counted", || one.lanes.counters.unreadable.value() == 2).await;
    assert!(one.lanes.has_peers().await.unwrap());
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_lane_gives_way_to_one_at_another_instance() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    for node in [&one, &two] {
        node.elsewhere().await;
    }
    let first = one.register("a", "boot", 1).await;
    let second = two.register("a", "boot", 2).await;
    assert_eq!(soon("the end", first.superseded()).await, Successor::SameProcess);
    let late = one.try_register("a", "boot", 1).await;
    assert!(matches!(late, Err(RegisterError::Superseded)));
    let third = one.register("a", "other", 1).await;
    assert_eq!(soon("the end", second.superseded()).await, Successor::OtherProcess);
    two.wait_elsewhere(&[("a", "s1", 1)]).await;
    drop((first, second));
    one.written().await;
    two.written().await;
    assert_eq!(entry(redis, "a")["boot_id"], "other");
    eventually("its own hash is empty", || {
        redis.call(&["EXISTS", "ws:server:s2:tunnels"]) == Answer::Integer(0)
    })
    .await;
    drop(third);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn many_lanes_enter_and_leave_at_once() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let node = Node::on(&backend, "s1").await;
    let opening = (0..600).map(|n| {
        node.lanes.register(lane(&format!("c{}", n % 200), &format!("a{n}"), "boot", n), false)
    });
    let entries = soon("entries", futures_util::future::try_join_all(opening)).await.unwrap();
    assert!(entries.iter().all(LaneEntry::is_entered));
    assert_eq!(redis.call(&["HLEN", "tunnel:c7"]).integer(), 3);
    assert_eq!(redis.call(&["HLEN", "ws:server:s1:tunnels"]).integer(), 600);
    assert!(redis.call(&["PTTL", "tunnel:c7"]).integer() > 3_000_000);
    drop(entries);
    node.close().await;
    assert_eq!(redis.call(&["KEYS", "*"]), Answer::Array(vec![]), "nothing is left");
}

const HOUR: Duration = Duration::from_secs(3600);
