//! The registry of users' connections, and disconnects by command: over both backends and several instances.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy::{
    bus::{
        Bus,
        publish::{Keep, Publish},
    },
    client::{
        self,
        event_stream_outbox::{self, EventStreamOutbox},
    },
    hub::{Hub, delivery::Delivery},
    registry::{
        Joining, Membership, Presence, Registry, RegistrySettings, Totals, Transport,
        control::Target,
        lease::{self, Lease, Timing},
        sessions::SessionLogLimits,
    },
};
use wsproxy_conn::{Runtime, clock};
use wsproxy_proto::{disconnect::Disconnect, names::Names};

use crate::support::{
    FAST_LEASE,
    bus::config,
    eventually, eventually_ok,
    gateway::{Backend, TestInstance, id, over_both},
    redis_server::{Answer, RedisServer},
    soon,
};

mod faults;
mod revocation;

over_both!(
    connections_come_and_go,
    a_command_reaches_only_the_clients_it_names,
    health_tells_counts,
    a_drained_instance_leaves_nothing,
);

/// The parts of an instance below its endpoints.
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
    outbox: Arc<EventStreamOutbox>,
    entry: Membership,
}

/// The queue of a connection's client.
fn outbox(connection: Uuid) -> Arc<EventStreamOutbox> {
    EventStreamOutbox::new(connection, 10_000, Runtime::new(1 << 20, clock::now()), None)
}

impl Node {
    fn new(url: Option<&str>, name: &str, timing: Timing) -> Self {
        let config = config(url);
        let (hub, names, tasks) = (Hub::new(), Names::new(""), TaskTracker::new());
        let end = CancellationToken::new();
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let bus = match url {
            Some(_) => Bus::redis(&config, name, &names, delivery, &tasks, end.clone()).unwrap(),
            None => Bus::embedded(
                &config,
                &wsproxy::config::LimitsConfig::default(),
                delivery,
                &tasks,
                end.clone(),
            ),
        };
        hub.connect(bus.clone());
        let server_id: Arc<str> = name.into();
        let lease = lease::LeaseSettings {
            server_id: Arc::clone(&server_id),
            names: names.clone(),
            response_timeout: config.response_timeout,
            index_ttl: HOUR,
            announcements: SessionLogLimits { entries_max: 100, ttl: HOUR },
            offline_wait: Duration::from_secs(5),
            empty_room_ttl: Duration::from_secs(60),
            timing,
        };
        let lease = Lease::start(lease, &bus);
        let settings = RegistrySettings { server_id, names, ttl: HOUR, leeway: LEEWAY };
        let registry = Registry::start(settings, Arc::clone(&hub), &bus, &lease);
        Self { registry, lease, hub, bus, end }
    }

    /// One that follows commands.
    async fn on(server: &RedisServer, name: &str, timing: Timing) -> Self {
        let node = Self::new(Some(&server.url()), name, timing);
        node.ready().await;
        node
    }

    async fn over(backend: &Backend) -> Self {
        let node = Self::new(backend.url().as_deref(), "node", FAST_LEASE);
        node.ready().await;
        node
    }

    async fn ready(&self) {
        let followed = || self.registry.counters.rechecks.value() > 0;
        eventually("commands are followed", followed).await;
    }

    fn join(&self, user: &str) -> Client {
        self.join_with(user, None, None)
    }

    fn join_with(&self, user: &str, token: Option<&str>, issued_at: Option<u64>) -> Client {
        let connection = Uuid::now_v7();
        let outbox = outbox(connection);
        let entry = self.registry.join(Joining {
            connection,
            user: id(user),
            client: client::Client::EventStream(Arc::clone(&outbox)),
            token: token.map(Into::into),
            issued_at,
            address: Some([127, 0, 0, 1].into()),
            user_agent: Some(format!("a \"test\" {}", "ä".repeat(200))),
            transport: Transport::Sse,
        });
        Client { connection, outbox, entry }
    }

    async fn presence(&self, user: &str) -> Vec<Presence> {
        let user = id(user);
        soon("presence", self.registry.connections_of(&user)).await.unwrap()
    }

    /// Waits until a user has so many connections on instances that are alive.
    async fn wait_present(&self, user: &str, count: usize) {
        let what = format!("{user} has {count} connections");
        let present = eventually_ok(&what, async || {
            let found = self.registry.connections_of(&id(user)).await;
            if found.as_ref().is_ok_and(|found| found.len() == count) { Ok(()) } else { Err(found) }
        });
        present.await;
    }

    async fn wait_totals(&self, wanted: Totals) {
        let what = format!("there are {wanted:?}");
        let counted = eventually_ok(&what, async || {
            let totals = self.registry.totals().await;
            if totals == wanted { Ok(()) } else { Err(totals) }
        });
        counted.await;
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
        match soon("the end of a connection", self.outbox.next()).await {
            Some(event_stream_outbox::EventStreamEntry::End(ending)) => ending.why,
            other => panic!("{other:?} is no end"),
        }
    }

    /// True while no command has disconnected it.
    fn lives(&self) -> bool {
        futures_util::FutureExt::now_or_never(self.outbox.next()).is_none()
    }
}

fn totals(local: u64, alive: u64, dead: u64) -> Totals {
    Totals { total: alive + dead, local, alive, dead }
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

async fn a_command_reaches_only_the_clients_it_names(backend: Backend) {
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

/// An instance that serves events.
async fn instance(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.events = true;
    config.jwt.secret_key = Some("a-secret-key-of-at-least-32-bytes!".into());
    TestInstance::start(config).await
}

fn joining(user: &str) -> Joining {
    let connection = Uuid::now_v7();
    Joining {
        connection,
        user: id(user),
        client: client::Client::EventStream(outbox(connection)),
        token: None,
        issued_at: None,
        address: None,
        user_agent: None,
        transport: Transport::WebSocket,
    }
}

async fn health_tells_counts(backend: Backend) {
    let instance = instance(&backend).await;
    let registry = instance.families().events.registry.clone().unwrap();
    let _entry = registry.join(joining("u"));
    let health = eventually_ok("the connection is counted", async || {
        let response = instance.get("/ws/health").await;
        let health = response.json();
        let is_counted = health["connections"]["total"] == 1;
        if is_counted && response.status == 200 { Ok(health) } else { Err(health) }
    })
    .await;
    let counts = serde_json::json!({"total": 1, "local": 1, "alive": 1, "dead": 0});
    assert_eq!(health["connections"], counts);
    assert_eq!(health["status"], "healthy");
    assert_eq!(health["redis"], serde_json::json!({"connected": true, "pubsub_connected": true}));
    assert!(humantime::parse_rfc3339(health["timestamp"].as_str().unwrap()).is_ok());
}

async fn a_drained_instance_leaves_nothing(backend: Backend) {
    let instance = instance(&backend).await;
    let registry = instance.families().events.registry.clone().unwrap();
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
async fn short_connections_are_never_written() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
    for _ in 0..100 {
        drop(node.join("u"));
    }
    let stays = node.join("stays");
    node.wait_present("stays", 1).await;
    assert_eq!(node.registry.counters.writer.written.value(), 1);
    drop(stays);
    node.close().await;
}

#[tokio::test]
async fn everything_expires() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node", FAST_LEASE).await;
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
    let (one, two) =
        (Node::on(&server, "one", FAST_LEASE).await, Node::on(&server, "two", FAST_LEASE).await);
    let (start, before) = (Instant::now(), resident());
    let clients: Vec<_> = (0..CLIENTS)
        .flat_map(|n| [one.join(&format!("u{}", n % 10_000)), two.join("everybody")])
        .collect();
    println!("{} joins: {:?}", clients.len(), start.elapsed());
    one.wait_written().await;
    two.wait_written().await;
    println!("memory of each, with its outbox: {} bytes", (resident() - before) / clients.len());
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

const HOUR: Duration = Duration::from_secs(3600);

/// By how many seconds clocks may differ.
const LEEWAY: u64 = 5;
