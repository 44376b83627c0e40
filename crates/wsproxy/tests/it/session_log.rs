//! Opened and closed sessions in the log of their agent, at least once: under every fault of an instance
//! and of Redis.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy::{
    bus::Bus,
    hub::{Hub, delivery::Delivery},
    registry::{
        Transport,
        lease::{Lease, LeaseSettings},
        sessions::{SessionLog, SessionLogLimits, SessionRecord},
    },
};
use wsproxy_proto::names::Names;

use crate::support::{
    FAST_LEASE,
    bus::config,
    eventually, eventually_ok,
    fault_proxy::{Cut, FaultProxy, Faults},
    gateway::{Backend, TestInstance, id, over_both},
    http::Stream,
    redis_server::{Answer, RedisServer},
    soon,
};

mod dead_instances;

over_both!(sessions_are_kept_as_they_are_announced, a_follower_goes_on_behind_its_last_entry);

/// The parts of an instance below its sessions.
struct Node {
    log: Arc<SessionLog>,
    lease: Arc<Lease>,
    end: CancellationToken,
}

impl Node {
    fn new(url: &str, name: &str, limits: SessionLogLimits) -> Self {
        let config = config(Some(url));
        let (hub, names, tasks) = (Hub::new(), Names::new(""), TaskTracker::new());
        let end = CancellationToken::new();
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let bus = Bus::redis(&config, name, &names, delivery, &tasks, end.clone()).unwrap();
        hub.connect(bus.clone());
        let settings = LeaseSettings {
            offline_wait: HOUR,
            empty_room_ttl: HOUR,
            server_id: name.into(),
            names,
            response_timeout: config.response_timeout,
            index_ttl: HOUR,
            announcements: limits,
            timing: FAST_LEASE,
        };
        let lease = Lease::start(settings, &bus);
        Self { log: SessionLog::start(limits, &hub, &bus, &lease), lease, end }
    }

    fn on(server: &RedisServer, name: &str) -> Self {
        Self::new(&server.url(), name, LIMITS)
    }

    fn open(&self, agent: &str, session: &str) -> Uuid {
        let connection = Uuid::now_v7();
        let opened = humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string();
        let (agent, session) = (id(agent), id(session));
        let record = SessionRecord {
            agent,
            session,
            transport: Transport::WebSocket,
            opened: opened.into(),
            trace: None,
        };
        self.log.opened(connection, record);
        connection
    }

    fn shut(&self, connection: Uuid) {
        let closed = json!({"event": "closed", "connection_id": connection, "code": 1000});
        self.log.closed(connection, closed.to_string().into());
    }

    async fn written(&self) {
        eventually("everything is in the log", || self.log.is_written()).await;
    }

    async fn close(&self) {
        soon("the end of the log", self.log.close()).await;
        soon("the end of the lease", self.lease.close()).await;
        self.end.cancel();
    }
}

/// The entries of a log, oldest first, with their ids.
fn entries(server: &RedisServer, log: &str) -> Vec<(String, Value)> {
    let Answer::Array(entries) = server.call(&["XRANGE", log, "-", "+"]) else { panic!("no log") };
    let entry = |entry| match entry {
        Answer::Array(parts) => match &parts[..] {
            [Answer::Text(id), Answer::Array(fields)] => match &fields[..] {
                [Answer::Text(name), Answer::Text(data)] if name == "data" => {
                    (id.clone(), serde_json::from_str(data).unwrap())
                }
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    entries.into_iter().map(entry).collect()
}

/// The events of each connection in a log, in order; a `closed` with its reason where it has one.
fn stories(server: &RedisServer, log: &str) -> HashMap<String, Vec<String>> {
    let mut stories = HashMap::<_, Vec<_>>::new();
    for (_, event) in entries(server, log) {
        let word = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let again = if event["again"] == true { "again" } else { "" };
        let said = format!("{} {}{again}", word("event"), word("reason")).trim_end().to_owned();
        stories.entry(word("connection_id")).or_default().push(said);
    }
    stories
}

/// The events of one connection.
fn story(server: &RedisServer, log: &str, connection: Uuid) -> Vec<String> {
    stories(server, log).remove(&connection.to_string()).unwrap_or_default()
}

async fn wait_story(server: &RedisServer, log: &str, connection: Uuid, wanted: &[&str]) {
    let what = format!("the log says {wanted:?}");
    let told = eventually_ok(&what, async || {
        let found = story(server, log, connection);
        if found == wanted { Ok(()) } else { Err(found) }
    });
    told.await;
}

/// Waits until Redis has this many sessions of an instance as announced. The log has an announcement before that, and
/// what is not marked as announced is announced once more by others.
async fn wait_marked(server: &RedisServer, name: &str, count: usize) {
    let list = format!("ws:server:{name}:sessions");
    let is_marked = |value: &&Answer| matches!(value, Answer::Text(text) if text.contains(r#""announced":true"#));
    let marked = || match server.call(&["HVALS", &list]) {
        Answer::Array(values) => values.iter().filter(is_marked).count(),
        other => panic!("{other:?}"),
    };
    eventually("the sessions are marked as announced", || marked() == count).await;
}

/// An instance whose sessions are kept in a log.
async fn instance(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.sessions.events_log = true;
    TestInstance::start(config).await
}

async fn sessions_are_kept_as_they_are_announced(backend: Backend) {
    let instance = instance(&backend).await;
    let mut announced = instance.follow("agent:agent:sessions").await;
    let client = instance.client("s").await;
    let opened = announced.json().await;
    assert_eq!((&opened["event"], &opened["session_id"]), (&json!("opened"), &json!("s")));
    assert_eq!(opened["transport"], "websocket");
    client.close().await;
    let closed = announced.json().await;
    assert_eq!((&closed["event"], &closed["reason"]), (&json!("closed"), &json!("normal")));
    assert!(closed["duration_ms"].is_u64() && closed["messages_in"] == 0);
    let key = "{agent:agent:sessions}:log";
    let kept = instance.gateway().store.read_log(key, "", 10).await.unwrap();
    let kept: Vec<Value> =
        kept.iter().map(|entry| serde_json::from_slice(&entry.data).unwrap()).collect();
    assert_eq!(kept, [opened, closed]);
    drop(announced);
    instance.drain().await;
    if let Backend::Redis(server) = &backend {
        let left = server.call(&["KEYS", "ws:*"]);
        assert_eq!(left, Answer::Array(vec![]), "nothing is left");
    }
}

async fn a_follower_goes_on_behind_its_last_entry(backend: Backend) {
    let instance = instance(&backend).await;
    let path = "/api/v1/sessions/events?agent=agent";
    let mut live = Stream::open(&instance, path).await;
    for n in 0..3 {
        instance.client(&format!("s{n}")).await.close().await;
    }
    live.expect("\"session_id\":\"s2\",").await;
    let log = instance.families().sessions.log.clone().unwrap();
    eventually("all is written", || log.is_written()).await;
    live.expect("\"session_id\":\"s2\",").await;
    let mut all = Stream::open(&instance, &format!("{path}&log=true")).await;
    let ids = |stream: &Stream| -> Vec<String> {
        let ids = stream.seen.split("\n").filter_map(|line| line.split_once("id: "));
        ids.filter(|(before, _)| !before.contains("data")).map(|(_, id)| id.trim().into()).collect()
    };
    while ids(&all).len() < 6 {
        all.expect("closed").await;
        assert!(all.raw.read().await > 0);
        all.expect("closed").await;
    }
    let ids = ids(&all);
    assert_eq!(ids.len(), 6, "{}", all.seen);
    let mut rest = Stream::open(&instance, &format!("{path}&after={}", ids[4])).await;
    rest.expect(&format!("id: {}\n", ids[5])).await;
    assert!(!rest.seen.contains(&ids[4]) && !rest.seen.contains("history_lost"), "{}", rest.seen);
    // The older path says the same.
    let old = format!("/api/v1/agents/agent/sessions/events?after={}", ids[4]);
    Stream::open(&instance, &old).await.expect(&format!("id: {}\n", ids[5])).await;
    // An entry that the log does not have: something may be missing behind it.
    let mut lost = Stream::open(&instance, &format!("{path}&after=5-5")).await;
    lost.expect("event: history_lost\ndata: {\"reason\":\"trimmed\"}\n").await;
    lost.expect(&format!("id: {}\n", ids[5])).await;
    let mut newer = Stream::open(&instance, &format!("{path}&after=99999999999999-0")).await;
    newer.expect("event: history_lost\ndata: {\"reason\":\"unknown\"}\n").await;
    newer.expect(&format!("id: {}\n", ids[5])).await;
    for odd in ["", "?agent=a:b", "?agent=a&after=x", "?agent=a&dance=1"] {
        let refused = instance.api("GET", &format!("/api/v1/sessions/events{odd}"), "").await;
        assert_eq!(refused.status, 400, "{odd}: {refused:?}");
    }
    let off = TestInstance::start(backend.config()).await;
    let refused = off.api("GET", &format!("{path}&log=true"), "").await;
    refused.assert_refused(400, "bad_request");
}

#[tokio::test]
async fn without_a_log_nothing_more_is_written() {
    let server = RedisServer::start();
    let instance = TestInstance::start(crate::support::gateway::config(Some(&server.url()))).await;
    let mut announced = instance.follow("agent:agent:sessions").await;
    let client = instance.client("s").await;
    assert_eq!(announced.json().await["event"], "opened");
    client.close().await;
    assert_eq!(announced.json().await["event"], "closed");
    let Answer::Array(keys) = server.call(&["KEYS", "*"]) else { panic!("no keys") };
    let epoch = Answer::Text("wsproxy:epoch".into());
    assert!(keys.iter().all(|key| *key == epoch), "{keys:?}");
}

#[tokio::test]
async fn what_happens_while_redis_is_away_is_in_the_log_afterwards() {
    let mut server = RedisServer::start();
    let node = Node::on(&server, "node");
    let (stays, goes) = (node.open("a", "stays"), node.open("a", "goes"));
    node.written().await;
    server.kill();
    node.shut(goes);
    let (comes, passes) = (node.open("a", "comes"), node.open("b", "passes"));
    node.shut(passes);
    server.restart();
    // It came back empty: what is open is announced again.
    wait_story(&server, LOG, stays, &["opened again"]).await;
    wait_story(&server, LOG, comes, &["opened"]).await;
    wait_story(&server, LOG, goes, &["closed"]).await;
    wait_story(&server, "{agent:b:sessions}:log", passes, &["opened", "closed"]).await;
    // The hash follows the logs.
    let known = || server.call(&["HLEN", "ws:server:node:sessions"]);
    eventually("only open sessions are known", || known() == Answer::Integer(2)).await;
    node.close().await;
}

#[tokio::test]
async fn an_outage_makes_no_hole_and_no_false_end() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let url = server.url_on(proxy.port());
    let nodes = [Node::new(&url, "one", LIMITS), Node::new(&url, "two", LIMITS)];
    let open = [nodes[0].open("a", "s0"), nodes[1].open("a", "s1")];
    nodes[0].written().await;
    nodes[1].written().await;
    proxy.set(Faults { refuse: true, ..Faults::default() });
    proxy.cut(Cut::Reset);
    let mut passing = Vec::new();
    let expired =
        || server.call(&["EXISTS", "ws:server:one", "ws:server:two"]) == Answer::Integer(0);
    eventually("all leases have run out", || {
        passing.push(nodes[0].open("a", "passes"));
        nodes[0].shut(passing[passing.len() - 1]);
        expired()
    })
    .await;
    proxy.set(Faults::default());
    nodes[0].written().await;
    let found = stories(&server, LOG);
    for connection in passing {
        let story = &found[&connection.to_string()];
        assert!(
            story.starts_with(&["opened".into()]) && story.ends_with(&["closed".into()]),
            "{story:?}"
        );
    }
    // Both were away as long as a dead instance is: the one that came back first has not buried the other.
    tokio::time::sleep(FAST_LEASE.refresh * 10).await;
    for connection in open {
        // One that was about to bury the other may make it announce what is open once more.
        let told = story(&server, LOG, connection);
        assert!(told.iter().all(|line| line.starts_with("opened")), "{told:?}");
        assert!(!told.is_empty());
    }
    for node in nodes {
        node.close().await;
    }
}

#[tokio::test]
async fn a_redis_that_was_emptied_is_told_what_is_open() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node");
    let open: Vec<_> = (0..300).map(|n| node.open("a", &format!("s{n}"))).collect();
    node.written().await;
    server.call(&["FLUSHALL"]);
    for connection in &open {
        wait_story(&server, LOG, *connection, &["opened again"]).await;
    }
    wait_marked(&server, "node", open.len()).await;
    // As after a failover to a replica that lagged behind: the lease is there, the sessions are not.
    server.call(&["DEL", "ws:server:node:sessions"]);
    wait_story(&server, LOG, open[0], &["opened again", "opened again"]).await;
    let ghost = Uuid::now_v7();
    let stored = json!({"agent_id": "a", "session_id": "ghost", "transport": "sse", "opened": "", "announced": true});
    node.written().await;
    server.call(&["HSET", "ws:server:node:sessions", &ghost.to_string(), &stored.to_string()]);
    wait_story(&server, LOG, ghost, &["closed server_lost"]).await;
    node.close().await;
}

#[tokio::test]
async fn a_full_redis_gets_every_announcement_later() {
    let server = RedisServer::start();
    let node = Node::on(&server, "node");
    let open: Vec<_> = (0..50).map(|n| node.open("a", &format!("s{n}"))).collect();
    node.written().await;
    server.call(&["CONFIG", "SET", "maxmemory", "1000"]);
    open.iter().for_each(|connection| node.shut(*connection));
    let late = node.open("a", "late");
    let refused =
        || node.log.counters.retried.value() > 0 || node.lease.counters.failures.value() > 0;
    eventually("Redis refuses", refused).await;
    assert!(node.log.waiting_bytes() > 0);
    server.call(&["CONFIG", "SET", "maxmemory", "0"]);
    for connection in &open {
        wait_story(&server, LOG, *connection, &["opened", "closed"]).await;
    }
    wait_story(&server, LOG, late, &["opened"]).await;
    server.call(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    node.shut(late);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(story(&server, LOG, late), ["opened"]);
    server.call(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    wait_story(&server, LOG, late, &["opened", "closed"]).await;
    node.close().await;
}

#[tokio::test]
async fn ten_thousand_sessions_ending_at_once_are_all_logged() {
    const SESSIONS: usize = 10_000;
    let server = RedisServer::start();
    let node = Node::on(&server, "node");
    let open: Vec<_> =
        (0..SESSIONS).map(|n| node.open(if n % 4 == 0 { "b" } else { "a" }, "s")).collect();
    node.written().await;
    let start = Instant::now();
    open.iter().for_each(|connection| node.shut(*connection));
    node.close().await;
    println!("{SESSIONS} ends: {:?}", start.elapsed());
    let logs = [LOG, "{agent:b:sessions}:log"].map(|log| entries(&server, log));
    let mut closed = std::collections::HashSet::new();
    for (_, event) in logs.iter().flatten().filter(|(_, event)| event["event"] == "closed") {
        closed.insert(event["connection_id"].as_str().unwrap().to_owned());
    }
    assert_eq!(closed.len(), SESSIONS);
    assert_eq!(server.call(&["KEYS", "ws:*"]), Answer::Array(vec![]), "nothing is left");
}

#[tokio::test]
async fn a_log_is_bounded_and_expires() {
    let server = RedisServer::start();
    let limits = SessionLogLimits { entries_max: 10, ttl: Duration::from_millis(1500) };
    let node = Node::new(&server.url(), "node", limits);
    for n in 0..25 {
        node.open("a", &format!("s{n}"));
    }
    node.written().await;
    let kept = entries(&server, LOG);
    assert_eq!((kept.len(), &kept[9].1["session_id"]), (10, &json!("s24")));
    assert!((1..=1500).contains(&server.call(&["PTTL", LOG]).integer()));
    for n in 0..8 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        node.open("a", &format!("late{n}"));
    }
    node.written().await;
    // What is older than the ttl goes although the log lives.
    let kept = entries(&server, LOG);
    assert!(
        kept.iter().all(|(_, event)| event["session_id"].as_str().unwrap().starts_with("late")),
        "{kept:?}"
    );
    let expired = || server.call(&["EXISTS", LOG]) == Answer::Integer(0);
    eventually("the log expires", expired).await;
    node.close().await;
}

const HOUR: Duration = Duration::from_secs(3600);

const LOG: &str = "{agent:a:sessions}:log";

const LIMITS: SessionLogLimits = SessionLogLimits { entries_max: 100_000, ttl: HOUR };
