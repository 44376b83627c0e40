//! The registry of rooms: over both backends, when instances die or freeze, when Redis loses its data.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    bus::Bus,
    config::LimitsConfig,
    hub::{Hub, delivery::Delivery, inbox::Inbox, sink::Sink, subscription::Subscription},
    registry::{
        lease::{Lease, LeaseSettings, Timing},
        rooms::{RoomDoubts, RoomList, RoomMembership, RoomRegistry},
        sessions::SessionLogLimits,
    },
    store::command::StoreError,
};
use wsproxy_proto::names::Names;

use crate::support::{
    FAST_LEASE,
    bus::config,
    eventually, eventually_ok,
    fault_proxy::{FaultProxy, Faults},
    gateway::{Backend, id, over_both},
    killable::Killable,
    redis_server::{Answer, RedisServer},
    soon,
};

mod family;

over_both!(rooms_are_listed_while_they_have_a_connection,);

/// An instance without its endpoints.
struct Node {
    name: Arc<str>,
    server: u64,
    registry: Arc<RoomRegistry>,
    lease: Arc<Lease>,
    hub: Arc<Hub>,
    bus: Bus,
    end: CancellationToken,
}

/// Messages of a channel.
#[derive(Debug, Default)]
struct Heard(Mutex<Vec<Vec<u8>>>);

impl Inbox for Heard {
    fn message(&self, payload: &[u8]) {
        self.0.lock().push(payload.to_vec());
    }

    fn lost(&self) {}

    fn recovered(&self) {}
}

impl Node {
    async fn on(backend: &Backend, name: &str, server: u64) -> Self {
        Self::with(backend.url().as_deref(), name, server, FAST_LEASE).await
    }

    async fn with(url: Option<&str>, name: &str, server: u64, timing: Timing) -> Self {
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
        let registry = RoomRegistry::start(&lease, &bus, server);
        let node = Self { name: name.into(), server, registry, lease, hub, bus, end };
        node.ready().await;
        node
    }

    /// Waits until the bus is connected.
    async fn ready(&self) {
        eventually("the bus is ready", || {
            let status = self.bus.status();
            status.connected && status.subscribed
        })
        .await;
    }

    /// Enters a room and waits until Redis has that.
    async fn enter(&self, room: &str, connection: u64) -> RoomMembership {
        let membership = self.registry.enter(&id(room), connection);
        soon("an entered room", membership.entered()).await.unwrap();
        membership
    }

    /// Enters a room, and writes the record of the member as the join does.
    async fn join(
        &self,
        redis: &RedisServer,
        room: &str,
        client: &str,
        number: u64,
    ) -> RoomMembership {
        let membership = self.enter(room, number).await;
        let Self { server, name, .. } = self;
        let record = format!(r#"{server:016x}-{number} user {{"server":"{name}","name":"a b"}}"#);
        redis.call(&["HSET", &members(room), client, &record]);
        membership
    }

    async fn written(&self) {
        eventually("all is written", || self.registry.is_written()).await;
    }

    async fn wait_rooms(&self, wanted: &[&str]) {
        eventually_ok("the rooms are listed", async || {
            let list = self.registry.rooms(1000).await;
            let is_wanted = list.as_ref().is_ok_and(|list| {
                list.rooms.iter().map(|room| room.as_str()).eq(wanted.iter().copied())
            });
            if is_wanted { Ok(()) } else { Err(list) }
        })
        .await;
    }

    async fn follow(&self, channel: &str) -> (Arc<Heard>, Subscription) {
        let heard = Arc::new(Heard::default());
        let sinks = [(channel.into(), Sink::Inbox(Arc::clone(&heard) as Arc<dyn Inbox>))];
        let subscription = soon("a subscription", self.hub.subscribe(sinks)).await.unwrap();
        (heard, subscription)
    }

    fn doubts(&self) -> RoomDoubts {
        *self.registry.doubts().borrow()
    }

    fn reaped(&self) -> u64 {
        self.lease.counters.room_members_reaped.value()
    }

    async fn close(&self) {
        soon("the end", self.registry.close()).await;
        soon("the end of the lease", self.lease.close()).await;
        self.end.cancel();
    }
}

/// Key of a room's members.
fn members(room: &str) -> String {
    Names::new("").room_members(&id(room))
}

/// Starts an instance with members, which can be killed: rooms and clients.
async fn start_killable(
    redis: &RedisServer,
    name: &str,
    server: u64,
    open: Vec<(&'static str, String)>,
) -> Killable {
    let (url, name) = (redis.url(), name.to_owned());
    let start = async move || {
        let node = Node::with(Some(&url), &name, server, FAST_LEASE).await;
        let mut guards = Vec::new();
        for (number, (room, _)) in open.iter().enumerate() {
            guards.push(node.enter(room, number as u64).await);
        }
        // Neither is dropped: nothing is said at the end.
        std::mem::forget((node, guards));
    };
    Killable::start(start).await.0
}

/// Writes records of members, as joins of an instance do.
fn write_members(redis: &RedisServer, name: &str, server: u64, open: &[(&'static str, String)]) {
    for (number, (room, client)) in open.iter().enumerate() {
        let record = format!(r#"{server:016x}-{number} user {{"name":"x","server":"{name}"}}"#);
        redis.call(&["HSET", &members(room), client, &record]);
    }
}

async fn rooms_are_listed_while_they_have_a_connection(backend: Backend) {
    let node = Node::on(&backend, "s1", 1).await;
    let (first, second) = (node.enter("lobby", 1).await, node.enter("lobby", 2).await);
    let _other = node.enter("arena", 3).await;
    node.wait_rooms(&["arena", "lobby"]).await;
    assert_eq!(node.registry.len(), 2);
    let cut = node.registry.rooms(1).await.unwrap();
    assert_eq!((cut.rooms.len(), cut.is_cut), (1, true));
    let all = node.registry.rooms(2).await.unwrap();
    assert_eq!(all, RoomList { rooms: vec![id("arena"), id("lobby")], is_cut: false });
    drop(first);
    node.written().await;
    node.wait_rooms(&["arena", "lobby"]).await;
    drop(second);
    node.wait_rooms(&["arena"]).await;
    assert_eq!(node.doubts(), RoomDoubts::default());
    node.close().await;
}

#[tokio::test]
async fn entering_does_not_wait_for_other_changes() {
    let redis = RedisServer::start();
    let timing = Timing { linger: HOUR, refresh: HOUR, lease: HOUR * 2, ..FAST_LEASE };
    let node = Node::with(Some(&redis.url()), "s1", 1, timing).await;
    for number in 0..20 {
        let guard = node.enter(&format!("r{number}"), number).await;
        assert_eq!(redis.call(&["HLEN", "ws:server:s1:rooms"]).integer(), number as i64 + 1);
        std::mem::forget(guard);
    }
    let written = node.registry.counters.written.value();
    let again = node.enter("r1", 100).await;
    assert_eq!(node.registry.counters.written.value(), written, "the room is there already");
    drop(again);
    // Changes of one room that follow each other.
    for number in 200..240 {
        drop(node.enter("short", number).await);
    }
}

#[tokio::test]
async fn members_of_a_killed_instance_leave_once() {
    const MEMBERS: usize = 1203;
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let mut open: Vec<_> = (0..MEMBERS).map(|n| ("big", format!("c{n}"))).collect();
    open.extend([("small", "one".into()), ("small", "two".into())]);
    let killed = start_killable(redis, "killed", 0xdead, open.clone()).await;
    write_members(redis, "killed", 0xdead, &open);
    let nodes = [Node::on(&backend, "one", 1).await, Node::on(&backend, "two", 2).await];
    // One client is back at an instance that lives, and one has always been there.
    let _moved = nodes[0].join(redis, "big", "c7", 1).await;
    let _stays = nodes[1].join(redis, "small", "stays", 1).await;
    for field in ["c8 e1", "c8 e2", "c7 e1"] {
        redis.call(&["HSET", "{room:big}:entities", field, "spawn"]);
        redis.call(&["HSET", "{room:big}:positions", field, "position"]);
    }
    // Another hand wrote these.
    redis.call(&["HSET", "ws:server:killed:rooms", "no:id", "x", "wrong", "x"]);
    redis.call(&["SET", &members("wrong"), "a string"]);
    redis.call(&["HSET", &members("small"), "odd", "odd", "odder", "a b {\"server\":7}"]);
    nodes[0].wait_rooms(&["big", "small", "wrong"]).await;
    let (heard, _subscription) = nodes[0].follow("room:big").await;
    killed.kill();
    let removed = || redis.call(&["ZSCORE", "ws:servers", "killed"]) == Answer::Null;
    eventually("the killed instance is removed", removed).await;
    eventually("leaves are heard", || heard.0.lock().len() >= MEMBERS - 1).await;
    let heard = heard.0.lock().clone();
    let (mut clients, mut versions) = (BTreeSet::new(), BTreeSet::new());
    for payload in &heard {
        let (head, body) = payload.split_at(4 + 17);
        assert_eq!(head, [b"\xffR\x01L".as_slice(), &[0; 17]].concat());
        let (version, client) = std::str::from_utf8(body).unwrap().split_once(' ').unwrap();
        versions.insert(version.parse::<u64>().unwrap());
        clients.insert(client.to_owned());
    }
    assert_eq!((heard.len(), clients.len(), clients.contains("c7")), (1202, 1202, false));
    assert_eq!(versions.last().unwrap() - versions.first().unwrap(), 1201);
    assert_eq!(nodes.iter().map(Node::reaped).sum::<u64>(), 1204);
    assert_eq!(redis.call(&["HKEYS", &members("big")]), texts(&["c7"]));
    assert_eq!(redis.call(&["HLEN", &members("small")]).integer(), 3);
    for kept in ["{room:big}:entities", "{room:big}:positions"] {
        assert_eq!(redis.call(&["HKEYS", kept]), texts(&["c7 e1"]));
    }
    assert_eq!(redis.call(&["EXISTS", "ws:server:killed:rooms"]).integer(), 0);
    nodes[1].wait_rooms(&["big", "small"]).await;
    for node in nodes {
        node.close().await;
    }
}

fn texts(texts: &[&str]) -> Answer {
    Answer::Array(texts.iter().map(|text| Answer::Text((*text).into())).collect())
}

#[tokio::test]
async fn later_run_of_the_same_name_ends_the_members_of_the_earlier() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let open = vec![("both", "old".to_owned()), ("gone", "old".to_owned())];
    start_killable(redis, "s1", 1, open.clone()).await.kill();
    write_members(redis, "s1", 1, &open);
    let node = Node::on(&backend, "s1", 2).await;
    // The number of a connection of the earlier run.
    let guard = node.join(redis, "both", "new", 0).await;
    node.wait_rooms(&["both"]).await;
    assert_eq!(redis.call(&["HKEYS", &members("both")]), texts(&["new"]));
    assert_eq!(redis.call(&["EXISTS", &members("gone")]).integer(), 0);
    assert_eq!(node.doubts(), RoomDoubts::default());
    drop(guard);
    node.close().await;
    assert_eq!(redis.call(&["EXISTS", "ws:server:s1:rooms"]).integer(), 0);
}

#[tokio::test]
async fn frozen_instance_that_thaws_learns_that_its_lease_lapsed() {
    let redis = RedisServer::start();
    let proxy = FaultProxy::start(redis.port()).await;
    let url = redis.url_on(proxy.port());
    let frozen = Node::with(Some(&url), "frozen", 1, FAST_LEASE).await;
    let guard = frozen.join(&redis, "lobby", "c1", 1).await;
    let other = Node::with(Some(&redis.url()), "other", 2, FAST_LEASE).await;
    other.wait_rooms(&["lobby"]).await;
    let mut doubts = frozen.registry.doubts();
    proxy.set(Faults { stall_up: true, stall_down: true, ..Faults::default() });
    let reaped = || other.lease.counters.servers_reaped.value() == 1;
    eventually("the frozen instance is removed", reaped).await;
    assert_eq!(other.reaped(), 1);
    assert_eq!(redis.call(&["HLEN", &members("lobby")]).integer(), 0);
    other.wait_rooms(&[]).await;
    proxy.set(Faults::default());
    let lapsed = soon("a doubt", doubts.wait_for(|doubts| doubts.lapsed > 0)).await;
    assert!(lapsed.is_ok());
    drop(lapsed);
    // An instance that joins its members again waits for the room.
    frozen.ready().await;
    soon("an entered room", guard.entered()).await.unwrap();
    assert_eq!(redis.call(&["HLEN", "ws:server:frozen:rooms"]).integer(), 1);
    other.wait_rooms(&["lobby"]).await;
    drop(guard);
    other.wait_rooms(&[]).await;
    frozen.close().await;
    other.close().await;
}

#[tokio::test]
async fn redis_that_comes_back_empty_is_told_everything_again() {
    let mut redis = RedisServer::start();
    let node = Node::with(Some(&redis.url()), "s1", 1, FAST_LEASE).await;
    let (stays, goes) = (node.enter("stays", 1).await, node.enter("goes", 2).await);
    node.written().await;
    assert_eq!(node.doubts(), RoomDoubts::default());
    redis.kill();
    // Changes during the outage are written after it.
    drop(goes);
    let comes = node.registry.enter(&id("comes"), 3);
    assert!(matches!(comes.entered().await, Err(StoreError::Lost(_))));
    redis.restart();
    node.ready().await;
    node.wait_rooms(&["comes", "stays"]).await;
    soon("an entered room", stays.entered()).await.unwrap();
    let told = node.doubts();
    assert!(told.emptied + told.lapsed > 0, "{told:?}");
    redis.call(&["FLUSHALL"]);
    let mut doubts = node.registry.doubts();
    let emptied = |doubts: &RoomDoubts| doubts.emptied > told.emptied;
    drop(soon("a doubt", doubts.wait_for(emptied)).await.unwrap());
    soon("an entered room", stays.entered()).await.unwrap();
    assert_eq!(redis.call(&["HEXISTS", "ws:server:s1:rooms", "stays"]).integer(), 1);
    node.wait_rooms(&["comes", "stays"]).await;
    // As after an eviction: the lease runs, and a part of the data is lost.
    let before = node.doubts();
    redis.call(&["HDEL", "ws:server:s1:rooms", "stays"]);
    let emptied = |doubts: &RoomDoubts| doubts.emptied > before.emptied;
    drop(soon("a doubt", doubts.wait_for(emptied)).await.unwrap());
    node.wait_rooms(&["comes", "stays"]).await;
    assert_eq!(node.doubts().lapsed, told.lapsed);
    drop((stays, comes));
    node.close().await;
    assert_eq!(redis.call(&["EXISTS", "ws:server:s1:rooms"]).integer(), 0);
}

#[tokio::test]
async fn a_member_whose_leave_could_not_run_is_left_to_others() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let (ending, other) = (Node::on(&backend, "s1", 1).await, Node::on(&backend, "s2", 2).await);
    ending.join(redis, "lobby", "c1", 1).await.abandon();
    ending.close().await;
    eventually("the member leaves", || other.reaped() == 1).await;
    assert_eq!(redis.call(&["HLEN", &members("lobby")]).integer(), 0);
    other.wait_rooms(&[]).await;
    other.close().await;
}

#[tokio::test]
async fn a_living_instance_makes_up_for_a_leave_that_could_not_run() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let node = Node::on(&backend, "s1", 1).await;
    let stays = node.join(redis, "lobby", "stays", 1).await;
    node.join(redis, "lobby", "goes", 2).await.abandon();
    node.join(redis, "other", "goes", 3).await.abandon();
    let count = |room: &str| redis.call(&["HLEN", &members(room)]).integer();
    eventually("the members leave", || count("lobby") == 1 && count("other") == 0).await;
    assert_eq!(redis.call(&["HEXISTS", &members("lobby"), "stays"]).integer(), 1);
    node.wait_rooms(&["lobby"]).await;
    drop(stays);
    node.close().await;
}

const HOUR: Duration = Duration::from_secs(3600);
