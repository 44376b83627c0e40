//! Two instances on a Redis with Sentinel, started from the files of `deploy/redis/sentinel`, under faults and load:
//! clients of histories get the exact sequence or `history_lost` once, and plain messages flow soon after a failover.
//!
//! `SENTINEL_LONG=1` freezes the master for 12 seconds, as `scripts/test --long` does.

use std::time::{Duration, Instant};

use rand::seq::IteratorRandom;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;
use wsproxy::config::Config;

use crate::support::{
    bus::{TestBus, config as redis_config, message},
    client::Client,
    eventually,
    gateway::{API_KEY, TestInstance, config},
    http,
    redis_process::until,
    redis_server::{Answer, Options, RedisServer, free_port},
    sentinel::{Deployment, REDIS_PASSWORD, SENTINEL_PASSWORD, sentinel_on, tls_sentinel},
    soon,
};

fn on(deployment: &Deployment) -> Config {
    let mut config = config(Some(&deployment.url()));
    config.redis.sentinel_password = Some(SENTINEL_PASSWORD.into());
    config.sessions.history = true;
    config
}

/// A deployment with two instances, clients of histories at both, and a load on each history.
struct Stage {
    deployment: Deployment,
    instances: Vec<TestInstance>,
    clients: Vec<JoinHandle<Seen>>,
    /// The numbers of each session's messages that a publish was answered for.
    loads: Vec<JoinHandle<Vec<u64>>>,
    end: CancellationToken,
}

/// The messages that a client got.
#[derive(Default)]
struct Seen {
    numbers: Vec<u64>,
    notices: Vec<Value>,
}

impl Stage {
    async fn open() -> Self {
        let deployment = tokio::task::spawn_blocking(Deployment::start).await.unwrap();
        let mut instances = Vec::new();
        for _ in 0..2 {
            instances.push(TestInstance::start(on(&deployment)).await);
        }
        let (mut clients, mut loads, end) = (Vec::new(), Vec::new(), CancellationToken::new());
        for session in 0..SESSIONS {
            let client = instances[session % 2].client(&name(session)).await;
            clients.push(tokio::spawn(watch(client)));
            let address = instances[0].admin_address();
            loads.push(tokio::spawn(publish(address, name(session), end.clone())));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        Self { deployment, instances, clients, loads, end }
    }

    /// Publishes plain messages at one instance until one reaches a follower at the other, and returns the time of it.
    async fn plain_flow(&self) -> Instant {
        let mut follower = self.instances[1].follow(PLAIN).await;
        let publish = async {
            loop {
                self.instances[0].publish(PLAIN, "plain");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            text = follower.next() => assert_eq!(text, "plain"),
            () = publish => {}
        }
        Instant::now()
    }

    /// Asserts that each plain message of one instance reaches a follower at the other.
    async fn plain_messages_arrive(&self) {
        let mut follower = self.instances[1].follow(PLAIN).await;
        for number in 0..20 {
            self.instances[0].publish(PLAIN, number.to_string());
            // A message of the flow before may still be on its way.
            while follower.next().await != number.to_string() {}
        }
    }

    /// Ends the load, and compares what was published with what each client got.
    async fn judge(self, may_lose: bool) {
        let Self { instances, clients, loads, end, deployment } = self;
        eventually("both instances are ready", || {
            instances.iter().all(|one| {
                let status = one.gateway().bus.status();
                status.connected && status.subscribed && status.refusal.is_none()
            })
        })
        .await;
        // Load on the new master too.
        tokio::time::sleep(Duration::from_millis(500)).await;
        end.cancel();
        for (session, (client, load)) in clients.into_iter().zip(loads).enumerate() {
            let answered = load.await.unwrap();
            assert!(answered.len() > 10, "{} publishes", answered.len());
            until_last(&instances[0], &name(session)).await;
            let seen = soon("the end of a session", client).await.unwrap();
            let told = seen.notices.len();
            assert!(told <= usize::from(may_lose), "session {session} is told: {:?}", seen.notices);
            assert!(
                seen.numbers.is_sorted_by(|a, b| a < b),
                "session {session}: {:?}",
                seen.numbers
            );
            let missing: Vec<_> = answered
                .iter()
                .filter(|number| seen.numbers.binary_search(number).is_err())
                .collect();
            assert!(told == 1 || missing.is_empty(), "session {session} misses {missing:?}");
        }
        for instance in instances {
            instance.drain().await;
        }
        drop(deployment);
    }
}

fn name(session: usize) -> String {
    format!("s-{session}")
}

/// Reads a client's messages up to the last one.
async fn watch(mut client: Client) -> Seen {
    let mut seen = Seen::default();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(120), client.next());
        let Message::Text(text) = next.await.expect("messages go on") else { continue };
        let message: Value = serde_json::from_str(&text).unwrap();
        match message["n"].as_u64() {
            Some(LAST) => return seen,
            Some(number) => seen.numbers.push(number),
            None => seen.notices.push(message),
        }
    }
}

/// Publishes rising numbers with history until `end`, and returns those that were answered for.
async fn publish(
    address: std::net::SocketAddr,
    session: String,
    end: CancellationToken,
) -> Vec<u64> {
    let mut answered = Vec::new();
    for number in 0.. {
        if end.is_cancelled() {
            break;
        }
        if keep(address, &session, number).await {
            answered.push(number);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    answered
}

async fn keep(address: std::net::SocketAddr, session: &str, number: u64) -> bool {
    let path = format!("/api/v1/sessions/{session}/messages?history=true");
    let key = format!("Bearer {}", API_KEY);
    let body = format!(r#"{{"n":{number}}}"#);
    let headers = [("authorization", key.as_str())];
    let sent = http::request(address, "POST", &path, &headers, body.as_bytes());
    matches!(tokio::time::timeout(Duration::from_secs(10), sent).await, Ok(response) if response.status == 200)
}

async fn until_last(instance: &TestInstance, session: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !keep(instance.admin_address(), session, LAST).await {
        assert!(Instant::now() < deadline, "the last message is not taken");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_master_loses_no_message_unsaid() {
    let mut stage = Stage::open().await;
    let old = stage.deployment.master();
    stage.deployment.servers[old].kill();
    stage.deployment.decided(old).await;
    let decided = Instant::now();
    let gap = stage.plain_flow().await.duration_since(decided);
    assert!(gap < FLOW_MAX, "{gap:?}");
    stage.deployment.servers[old].start();
    stage.deployment.is_replica(old).await;
    stage.judge(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_master_that_thaws_gets_no_message() {
    let stage = Stage::open().await;
    let old = stage.deployment.master();
    stage.deployment.servers[old].stop();
    let frozen = Instant::now();
    stage.deployment.decided(old).await;
    let decided = Instant::now();
    let gap = stage.plain_flow().await.duration_since(decided);
    assert!(gap < FLOW_MAX, "{gap:?}");
    if std::env::var_os("SENTINEL_LONG").is_some() {
        tokio::time::sleep(Duration::from_secs(12).saturating_sub(frozen.elapsed())).await;
    }
    stage.deployment.servers[old].cont();
    // Until it is a replica it says that it is a master, and takes every publish.
    stage.plain_messages_arrive().await;
    stage.deployment.is_replica(old).await;
    stage.plain_messages_arrive().await;
    stage.judge(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_comes_back_without_sentinels_is_used_again() {
    let mut stage = Stage::open().await;
    let master = stage.deployment.master();
    stage.deployment.sentinels.iter_mut().for_each(|sentinel| sentinel.kill());
    stage.deployment.servers[master].kill();
    until("the loss is noticed", || !stage.instances[0].gateway().bus.status().connected).await;
    stage.deployment.servers[master].start();
    stage.plain_flow().await;
    stage.deployment.sentinels.iter_mut().for_each(|sentinel| sentinel.start());
    stage.plain_flow().await;
    assert_eq!(stage.deployment.master(), master);
    stage.judge(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_that_lagged_is_told_once() {
    let mut stage = Stage::open().await;
    let old = stage.deployment.master();
    stage.deployment.servers[old].call(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    let replicas: Vec<_> = (0..3).filter(|server| *server != old).collect();
    for replica in &replicas {
        // The replicas lose their master, and cannot come back.
        stage.deployment.servers[*replica].call(&["CONFIG", "SET", "masterauth", "wrong"]);
        stage.deployment.servers[*replica].call(&["CLIENT", "KILL", "TYPE", "master"]);
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    stage.deployment.servers[old].kill();
    for replica in &replicas {
        stage.deployment.servers[*replica].call(&["CONFIG", "SET", "masterauth", REDIS_PASSWORD]);
    }
    stage.deployment.decided(old).await;
    let decided = Instant::now();
    let gap = stage.plain_flow().await.duration_since(decided);
    assert!(gap < FLOW_MAX, "{gap:?}");
    eventually("the loss of the tail is told", || {
        stage.instances.iter().all(|one| {
            one.gateway().metrics.text().lines().any(|line| {
                line.starts_with("wsproxy_history_lost_total{") && !line.ends_with(" 0")
            })
        })
    })
    .await;
    stage.judge(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_on_command_moves_all_connections() {
    let stage = Stage::open().await;
    let old = stage.deployment.master();
    let sentinel = stage.deployment.sentinels.iter().choose(&mut rand::rng()).unwrap();
    sentinel.call(&["SENTINEL", "FAILOVER", "mymaster"]);
    let new = stage.deployment.decided(old).await;
    let decided = Instant::now();
    let gap = stage.plain_flow().await.duration_since(decided);
    assert!(gap < FLOW_MAX, "{gap:?}");
    stage.deployment.is_replica(old).await;
    let connected = stage.deployment.servers[new].call(&["CLIENT", "LIST"]);
    let Answer::Text(clients) = connected else { panic!() };
    for purpose in ["subscribe", "publish", "command"] {
        let count = clients.lines().filter(|line| line.contains(&format!("-{purpose} "))).count();
        assert_eq!(count, 2, "{purpose}: {clients}");
    }
    stage.judge(true).await;
}

#[tokio::test]
async fn without_a_sentinel_an_instance_starts_and_is_not_ready() {
    let port = free_port();
    let url = format!("redis+sentinel://127.0.0.1:{port}/mymaster");
    let instance = TestInstance::start_unready(config(Some(&url))).await;
    eventually("the reason is told", || {
        let error = instance.gateway().bus.status().last_error;
        error.is_some_and(|error| error.contains(&format!("sentinel 127.0.0.1:{port}: ")))
    })
    .await;
    assert_eq!(instance.get("/ready").await.status, 503);
    let directory = tempfile::tempdir().unwrap();
    let server = RedisServer::start();
    // The sentinel comes later, on that port.
    let _sentinel = sentinel_on(port, server.port(), directory.path());
    instance.ready().await;
    assert_eq!(instance.get("/ready").await.status, 200);
}

#[tokio::test]
async fn a_wrong_name_or_login_is_told() {
    let bus = TestBus::sentinel();
    let (sentinel, _) = bus.sentinel.as_ref().unwrap();
    let of = |place: &str| redis_config(Some(&format!("redis+sentinel://{place}")));
    let told = async |config: &wsproxy::config::RedisConfig, text: &str| {
        let bus = TestBus::on(config);
        eventually("the reason is told", || {
            bus.bus.status().last_error.is_some_and(|error| error.contains(text))
        })
        .await;
    };
    told(&of(&format!("127.0.0.1:{}/other", sentinel.port())), "no master with the name other")
        .await;
    let data = bus.server.as_ref().unwrap().port();
    told(&of(&format!("127.0.0.1:{data}/mymaster")), "not a sentinel").await;
    let mut wrong = of(&format!("127.0.0.1:{}/mymaster", sentinel.port()));
    // A sentinel without passwords takes any one for its default user.
    wrong.sentinel_username = Some("gateway".into());
    wrong.sentinel_password = Some("secret".into());
    told(&wrong, "refused user or password").await;
    bus.ready().await;
    assert!(bus.bus.publish(message("a", "x")).is_ok());
}

#[tokio::test]
async fn tls_reaches_the_sentinels_and_the_master() {
    let server = RedisServer::start_with(Options { tls: true, ..Options::default() });
    let directory = tempfile::tempdir().unwrap();
    let certificates = server.ca_file().parent().unwrap().to_owned();
    let sentinel = tls_sentinel(server.port(), &certificates, directory.path());
    let url = format!("rediss+sentinel://localhost:{}/mymaster", sentinel.port());
    let mut config = redis_config(Some(&url));
    config.ca_file = Some(server.ca_file());
    let bus = TestBus::on(&config);
    bus.ready().await;
    bus.subscribe(&["a"]).await;
    bus.publish("a", "over TLS");
    bus.seen.wait_for(1).await;
}

/// Sessions with a client and a load each.
const SESSIONS: usize = 4;

/// Topic of messages without history.
const PLAIN: &str = "session:plain:down";

/// Number of a session's last message.
const LAST: u64 = 1_000_000_000;

/// Time within which plain messages flow after Sentinel has decided.
const FLOW_MAX: Duration = Duration::from_secs(2);
