//! Who is connected where, and sending them away: over both backends, several instances, and every fault.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy::{
    bus::{Bus, Keep, Publish},
    hub::{
        Hub,
        delivery::Delivery,
        tap::{Tap, TapEntry},
    },
    registry::{
        Entry, Joining, Peer, Presence, Registry, Settings, Totals, Transport,
        control::Target,
        lease::{self, Lease, Pace},
        sessions::Limits,
    },
};
use wsproxy_proto::{disconnect::Disconnect, names::Names};

use crate::support::{
    bus::config,
    eventually,
    fault_proxy::{Cut, FaultProxy, Faults},
    gateway::{Backend, TestInstance, id, over_both},
    redis_server::{Answer, RedisServer},
    soon,
};

over_both!(
    connections_come_and_go,
    a_command_reaches_whom_it_names_and_nobody_else,
    revoked_tokens_are_known,
    a_revocation_covers_clocks_that_are_ahead_by_the_leeway,
    a_later_revocation_does_not_cut_an_earlier_one_short,
    health_tells_counts,
    a_drained_instance_leaves_nothing,
);

const HOUR: Duration = Duration::from_secs(3600);

/// Short enough for a test; an instance that a busy machine delays is not dead yet.
const FAST: Pace = Pace {
    lease: Duration::from_millis(2500),
    refresh: Duration::from_millis(150),
    retry: Duration::from_millis(100),
    linger: Duration::from_millis(20),
};

/// One that looks, but is never the one who removes a dead instance.
const SLOW: Pace =
    Pace { refresh: Duration::from_secs(60), lease: Duration::from_secs(200), ..FAST };

/// What an instance has below its endpoints.
struct Node {
    registry: Arc<Registry>,
    lease: Arc<Lease>,
    hub: Arc<Hub>,
    bus: Bus,
    end: CancellationToken,
}

/// A connection of a node.
struct Client {
    connection: Uuid,
    tap: Arc<Tap>,
    entry: Entry,
}

impl Node {
    fn new(url: Option<&str>, name: &str, pace: Pace) -> Self {
        let config = config(url);
        let (hub, names, tasks) = (Hub::new(), Names::new(""), TaskTracker::new());
        let end = CancellationToken::new();
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let bus = match url {
            Some(_) => Bus::redis(&config, name, &names, delivery, &tasks, end.clone()).unwrap(),
            None => Bus::memory(
                &config,
                &wsproxy::config::Limits::default(),
                delivery,
                &tasks,
                end.clone(),
            ),
        };
        hub.connect(bus.clone());
        let server_id: Arc<str> = name.into();
        let lease = lease::Settings {
            server_id: Arc::clone(&server_id),
            names: names.clone(),
            response_timeout: config.response_timeout,
            index_ttl: HOUR,
            announcements: Limits { entries_max: 100, ttl: HOUR },
            pace,
        };
        let lease = Lease::start(lease, &bus);
        let settings = Settings { server_id, names, ttl: HOUR, leeway: LEEWAY };
        let registry = Registry::start(settings, Arc::clone(&hub), &bus, &lease);
        Self { registry, lease, hub, bus, end }
    }

    /// One that follows commands.
    async fn on(server: &RedisServer, name: &str, pace: Pace) -> Self {
        let node = Self::new(Some(&server.url()), name, pace);
        node.ready().await;
        node
    }

    async fn over(backend: &Backend) -> Self {
        match backend {
            Backend::Memory => {
                let node = Self::new(None, "node", FAST);
                node.ready().await;
                node
            }
            Backend::Redis(server) => Self::on(server, "node", FAST).await,
        }
    }

    async fn ready(&self) {
        let followed = || self.registry.counters.rechecks.value() > 0;
        eventually("commands are followed", followed).await;
    }

    fn join(&self, user: &str) -> Client {
        self.join_with(user, None, None)
    }

    fn join_with(&self, user: &str, token: Option<&str>, issued_at: Option<u64>) -> Client {
        let (connection, tap) = (Uuid::now_v7(), Tap::new(10_000));
        let entry = self.registry.join(Joining {
            connection,
            user: id(user),
            peer: Peer::Stream(Arc::clone(&tap)),
            token: token.map(Into::into),
            issued_at,
            address: Some([127, 0, 0, 1].into()),
            user_agent: Some(format!("a \"test\" {}", "ä".repeat(200))),
            transport: Transport::Sse,
        });
        Client { connection, tap, entry }
    }

    async fn presence(&self, user: &str) -> Vec<Presence> {
        let user = id(user);
        soon("presence", self.registry.connections_of(&user)).await.unwrap()
    }

    /// Waits until a user has so many connections on instances that are alive.
    async fn wait_present(&self, user: &str, count: usize) {
        let deadline = Instant::now() + crate::support::PATIENCE;
        loop {
            let found = self.registry.connections_of(&id(user)).await;
            if found.as_ref().is_ok_and(|found| found.len() == count) {
                return;
            }
            assert!(Instant::now() < deadline, "{user} has not {count} connections: {found:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn wait_totals(&self, wanted: Totals) {
        let deadline = Instant::now() + crate::support::PATIENCE;
        loop {
            let totals = self.registry.totals().await;
            if totals == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{totals:?} instead of {wanted:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn wait_written(&self) {
        eventually("all is written", || self.registry.is_written()).await;
    }

    fn command(&self, command: &str) {
        let (channel, payload) = ("ws:control".into(), command.to_owned().into());
        let publish = Publish { channel, payload, keep: Keep::Nothing, receipt: None };
        self.hub.publish(publish).unwrap();
    }

    async fn disconnect(&self, target: Target, revoke: Option<Duration>) -> u64 {
        soon("a disconnect", self.registry.disconnect(target, None, None, revoke)).await.unwrap()
    }

    async fn is_revoked(&self, user: &str, token: Option<&str>, issued_at: Option<u64>) -> bool {
        let user = id(user);
        soon("a verdict", self.registry.is_revoked(&user, token, issued_at)).await.unwrap()
    }

    async fn close(&self) {
        soon("the end", self.registry.close()).await;
        soon("the end of the lease", self.lease.close()).await;
        self.end.cancel();
    }
}

impl Client {
    async fn ended(&self) -> &'static Disconnect {
        match soon("the end of a connection", self.tap.next_entry()).await {
            Some(TapEntry::End(ending)) => ending.why,
            other => panic!("{other:?} is no end"),
        }
    }

    /// Whether nobody has sent it away.
    fn lives(&self) -> bool {
        futures_util::FutureExt::now_or_never(self.tap.next_entry()).is_none()
    }
}

fn totals(local: u64, alive: u64, dead: u64) -> Totals {
    Totals { total: alive + dead, local, alive, dead }
}

/// Seconds since 1970, an hour from now.
/// By how many seconds clocks may differ.
const LEEWAY: u64 = 5;

fn later() -> u64 {
    crate::support::issuer::now() + 3600
}

async fn connections_come_and_go(backend: Backend) {
    let node = Node::over(&backend).await;
    let (one, two, other) = (node.join("u"), node.join("u"), node.join("v"));
    node.wait_present("u", 2).await;
    let found = node.presence("u").await;
    assert_eq!(
        found.iter().map(|presence| presence.connection_id).collect::<Vec<_>>(),
        [one.connection, two.connection]
    );
    let told = serde_json::to_value(&found[0]).unwrap();
    assert_eq!(told["server_id"], "node");
    assert_eq!(told["transport"], "sse");
    assert_eq!(told["address"], "127.0.0.1");
    assert!(told["user_agent"].as_str().unwrap().starts_with("a \"test\" ää"));
    assert!(humantime::parse_rfc3339(told["connected_at"].as_str().unwrap()).is_ok());
    node.wait_totals(totals(3, 3, 0)).await;
    drop((one, other));
    node.wait_present("u", 1).await;
    node.wait_present("v", 0).await;
    assert_eq!(node.presence("u").await[0].connection_id, two.connection);
    node.wait_totals(totals(1, 1, 0)).await;
    drop(two);
    node.wait_totals(totals(0, 0, 0)).await;
    node.close().await;
}

async fn a_command_reaches_whom_it_names_and_nobody_else(backend: Backend) {
    let node = Node::over(&backend).await;
    let clients: Vec<_> =
        (0..3).map(|n| node.join_with("u", Some(&format!("t{n}")), None)).collect();
    let bystander = node.join("u2");
    node.command(&format!(r#"{{"op":"disconnect","connection_id":"{}"}}"#, clients[0].connection));
    assert_eq!(clients[0].ended().await, &Disconnect::BACKEND);
    node.command(r#"{"op":"disconnect","jti":"t1","code":4401,"reason":"signed out"}"#);
    assert_eq!(clients[1].ended().await, &Disconnect::REVOKED);
    assert!(clients[2].lives());
    // A refreshed connection is found by its new token and no longer by its old one.
    clients[2].entry.renew(Some("t9"), Some(5));
    assert_eq!(node.disconnect(Target::Token("t2".into()), None).await, 1);
    assert!(clients[2].lives());
    for bad in [
        "no JSON",
        r#"{"op":"dance","user_id":"u2"}"#,
        r#"{"op":"disconnect"}"#,
        r#"{"op":"disconnect","user_id":"u2","jti":"t"}"#,
        r#"{"op":"disconnect","user_id":"u2","code":1006}"#,
        r#"{"op":"disconnect","user_id":"u2","cod":4000}"#,
    ] {
        node.command(bad);
    }
    node.command(r#"{"op":"disconnect","user_id":"u"}"#);
    assert_eq!(clients[2].ended().await, &Disconnect::BACKEND);
    assert_eq!(node.registry.counters.bad_commands.value(), 6);
    assert!(bystander.lives());
    node.close().await;
}

async fn a_later_revocation_does_not_cut_an_earlier_one_short(backend: Backend) {
    let node = Node::over(&backend).await;
    let short = Duration::from_millis(50);
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    node.disconnect(Target::User(id("u")), Some(short)).await;
    node.disconnect(Target::User(id("v")), Some(short)).await;
    let deadline = Instant::now() + crate::support::PATIENCE;
    while node.is_revoked("v", None, None).await {
        assert!(Instant::now() < deadline, "a revocation does not expire");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
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
    let deadline = Instant::now() + crate::support::PATIENCE;
    while node.is_revoked("v", Some("short"), None).await {
        assert!(Instant::now() < deadline, "a revocation does not expire");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    node.close().await;
}

/// An instance that serves events.
async fn instance(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.secret_key = Some("a-secret-key-of-at-least-32-bytes!".into());
    TestInstance::start(config).await
}

fn joining(user: &str) -> Joining {
    Joining {
        connection: Uuid::now_v7(),
        user: id(user),
        peer: Peer::Stream(Tap::new(1000)),
        token: None,
        issued_at: None,
        address: None,
        user_agent: None,
        transport: Transport::WebSocket,
    }
}

async fn health_tells_counts(backend: Backend) {
    let instance = instance(&backend).await;
    let registry = instance.gateway().registry.clone().unwrap();
    let _entry = registry.join(joining("u"));
    let deadline = Instant::now() + crate::support::PATIENCE;
    let health = loop {
        let response = instance.get("/ws/health").await;
        let health = response.json();
        if health["connections"]["total"] == 1 {
            assert_eq!(response.status, 200);
            break health;
        }
        assert!(Instant::now() < deadline, "{health}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let counts = serde_json::json!({"total": 1, "local": 1, "alive": 1, "dead": 0});
    assert_eq!(health["connections"], counts);
    assert_eq!(health["status"], "healthy");
    assert_eq!(health["redis"], serde_json::json!({"connected": true, "pubsub_connected": true}));
    assert!(humantime::parse_rfc3339(health["timestamp"].as_str().unwrap()).is_ok());
}

async fn a_drained_instance_leaves_nothing(backend: Backend) {
    let instance = instance(&backend).await;
    let registry = instance.gateway().registry.clone().unwrap();
    let entries: Vec<_> = (0..300).map(|n| registry.join(joining(&format!("u{n}")))).collect();
    eventually("all is written", || registry.is_written()).await;
    drop(entries);
    instance.drain().await;
    if let Backend::Redis(server) = &backend {
        let left = server.call(&["KEYS", "ws:*"]);
        assert_eq!(left, Answer::Array(vec![]), "nothing is left");
    }
}

#[tokio::test]
async fn whoever_comes_and_goes_at_once_is_never_written() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST).await;
    for _ in 0..100 {
        drop(node.join("u"));
    }
    let stays = node.join("stays");
    node.wait_present("stays", 1).await;
    assert_eq!(node.registry.counters.written.value(), 1);
    drop(stays);
    node.close().await;
}

#[tokio::test]
async fn everything_expires() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST).await;
    let _client = node.join_with("u", Some("t"), None);
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    node.disconnect(Target::Token("t".into()), Some(HOUR)).await;
    node.wait_present("u", 1).await;
    let Answer::Array(keys) = server.call(&["KEYS", "*"]) else { panic!("no keys") };
    assert_eq!(keys.len(), 6, "{keys:?}");
    for key in keys {
        let Answer::Text(key) = key else { panic!("{key:?} is no key") };
        assert!(server.call(&["PTTL", &key]).integer() > 0, "{key} does not expire");
    }
    node.close().await;
}

#[tokio::test]
async fn revocations_are_stored_in_one_slot_with_their_time() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST).await;
    let key = "{ws}:revoked:user:u";
    node.disconnect(Target::User(id("u")), Some(HOUR)).await;
    assert!(server.call(&["PTTL", key]).integer() > 3_000_000);
    // Whatever somebody else wrote there is no licence, and stays as long as that one wanted.
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
    let node = Node::on(&server, "node", FAST).await;
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
    let (one, two) = (Node::on(&server, "one", FAST).await, Node::on(&server, "two", FAST).await);
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

/// All that a process does ends at once, and its connections to Redis with it.
struct Killable(Option<tokio::runtime::Runtime>);

impl Killable {
    /// A node with connections of some users, in a runtime of its own.
    async fn start(server: &RedisServer, name: &str, users: Vec<String>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().unwrap();
        let (url, name) = (server.url(), name.to_owned());
        let started = runtime.spawn(async move {
            let node = Node::new(Some(&url), &name, FAST);
            let clients: Vec<_> = users.iter().map(|user| node.join(user)).collect();
            node.ready().await;
            node.wait_written().await;
            for user in &users {
                node.wait_present(user, 1).await;
            }
            // Neither is dropped: nothing is said at the end.
            std::mem::forget((node, clients));
        });
        started.await.unwrap();
        Self(Some(runtime))
    }

    fn kill(mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[tokio::test]
async fn a_killed_instance_is_ignored_then_counted_as_dead_then_removed() {
    let server = RedisServer::start();
    let users: Vec<_> = (0..600).map(|n| format!("u{n}")).collect();
    let killed = Killable::start(&server, "killed", users).await;
    let looks = Node::on(&server, "looks", SLOW).await;
    let stays = looks.join("u1");
    looks.wait_present("u1", 2).await;
    looks.wait_totals(totals(1, 601, 0)).await;
    killed.kill();
    looks.wait_present("u1", 1).await;
    assert_eq!(looks.presence("u1").await[0].connection_id, stays.connection);
    looks.wait_totals(totals(1, 1, 600)).await;
    let events = Tap::new(10_000);
    let sinks = [("ws:registry".into(), wsproxy::hub::Sink::Tap(Arc::clone(&events)))];
    let _subscription = looks.hub.subscribe(sinks).await.unwrap();
    let reaper = Node::on(&server, "reaper", FAST).await;
    let second = Node::on(&server, "second", FAST).await;
    looks.wait_totals(totals(1, 1, 0)).await;
    let event = soon("an event", events.next()).await.unwrap();
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
async fn what_an_earlier_run_of_the_same_name_left_is_removed() {
    let server = RedisServer::start();
    Killable::start(&server, "node", vec!["old".into(), "both".into()]).await.kill();
    let node = Node::on(&server, "node", FAST).await;
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
    let node = Node::on(&server, "node", FAST).await;
    let stays: Vec<_> = (0..300).map(|_| node.join("stays")).collect();
    let (goes, second) = (node.join("goes"), node.join("goes"));
    node.wait_present("stays", 300).await;
    node.wait_present("goes", 2).await;
    server.kill();
    // What happens in the outage is made up for.
    drop(goes);
    let comes = node.join("comes");
    drop(node.join("never"));
    server.restart();
    node.wait_present("stays", 300).await;
    node.wait_present("comes", 1).await;
    node.wait_present("goes", 1).await;
    node.wait_totals(totals(302, 302, 0)).await;
    assert_eq!(node.registry.counters.rewrites.value(), 1);
    drop((stays, comes, second));
    node.wait_totals(totals(0, 0, 0)).await;
    node.close().await;
}

#[tokio::test]
async fn entries_that_redis_lost_or_kept_are_noticed() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST).await;
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
async fn one_key_of_another_kind_keeps_nobody_else_out() {
    let server = RedisServer::start();
    server.call(&["SET", "ws:user:odd:connections", "a string"]);
    let node = Node::on(&server, "node", FAST).await;
    let _clients = [node.join("odd"), node.join("u")];
    node.wait_present("u", 1).await;
    assert!(node.registry.connections_of(&id("odd")).await.is_err());
    node.close().await;
}

#[tokio::test]
async fn an_instance_that_was_taken_for_dead_comes_back() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let frozen = Node::new(Some(&server.url_on(proxy.port())), "frozen", FAST);
    frozen.ready().await;
    let client = frozen.join("u");
    let other = Node::on(&server, "other", FAST).await;
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

#[tokio::test]
async fn a_revocation_that_an_instance_missed_is_made_up_for() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let deaf = Node::new(Some(&server.url_on(proxy.port())), "deaf", FAST);
    deaf.ready().await;
    let other = Node::on(&server, "other", FAST).await;
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

/// The clock of the instance is not asked: a lease ends when Redis says so.
#[tokio::test]
async fn leases_end_by_the_clock_of_redis() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", Pace { refresh: HOUR, ..FAST }).await;
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

/// Bytes of memory that this process uses.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
#[ignore = "a measurement"]
async fn how_long_twenty_thousand_take() {
    const CLIENTS: usize = 20_000;
    let server = RedisServer::start();
    let (one, two) = (Node::on(&server, "one", FAST).await, Node::on(&server, "two", FAST).await);
    let (start, before) = (Instant::now(), resident());
    let clients: Vec<_> = (0..CLIENTS)
        .flat_map(|n| [one.join(&format!("u{}", n % 10_000)), two.join("everybody")])
        .collect();
    println!("{} joins: {:?}", clients.len(), start.elapsed());
    one.wait_written().await;
    two.wait_written().await;
    println!("memory of each, with its tap: {} bytes", (resident() - before) / clients.len());
    println!("all written after {:?}", start.elapsed());
    let start = Instant::now();
    two.registry.connections_of(&id("everybody")).await.unwrap();
    println!("presence of a user with {CLIENTS} connections: {:?}", start.elapsed());
    let start = Instant::now();
    one.disconnect(Target::User(id("everybody")), Some(HOUR)).await;
    for client in clients.iter().skip(1).step_by(2) {
        client.ended().await;
    }
    println!("{CLIENTS} of one user sent away by another instance: {:?}", start.elapsed());
    let start = Instant::now();
    drop(clients);
    one.close().await;
    two.close().await;
    println!("all left: {:?}", start.elapsed());
}
