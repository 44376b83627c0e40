//! The log of sessions when their instance was killed, froze, or was taken for dead.

use rustix::process::Signal;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{LIMITS, LOG, Node, entries, stories, story, wait_marked, wait_story};
use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    fault_proxy::{FaultProxy, Faults},
    gateway::bearer,
    http,
    killable::Killable,
    redis_server::{Answer, RedisServer},
};

/// Starts a node with open sessions, which can be killed. Returns the connections of the sessions too.
async fn start_killable(
    server: &RedisServer,
    name: &str,
    sessions: usize,
) -> (Killable, Vec<Uuid>) {
    let (url, own_name) = (server.url(), name.to_owned());
    let start = async move || {
        let node = Node::new(&url, &own_name, LIMITS);
        let open = (0..sessions).map(|n| node.open("a", &format!("s{n}"))).collect();
        node.written().await;
        std::mem::forget(node);
        open
    };
    let started = Killable::start(start).await;
    wait_marked(server, name, sessions).await;
    started
}

#[tokio::test]
async fn sessions_of_a_killed_instance_are_announced_closed_once() {
    let server = RedisServer::start();
    let (killed, open) = start_killable(&server, "killed", 600).await;
    let others = [Node::on(&server, "one"), Node::on(&server, "two")];
    let stays = others[0].open("a", "stays");
    killed.kill();
    let gone = || server.call(&["ZSCORE", "ws:servers", "killed"]) == Answer::Null;
    eventually("the killed instance is removed", gone).await;
    let stories = stories(&server, LOG);
    for connection in &open {
        assert_eq!(stories[&connection.to_string()], ["opened", "closed server_lost"]);
    }
    assert_eq!((stories.len(), entries(&server, LOG).len()), (601, 1201));
    let (_, last) = entries(&server, LOG).pop().unwrap();
    assert!(humantime::parse_rfc3339(last["timestamp"].as_str().unwrap()).is_ok());
    let about = ["event", "reason", "code", "server_id", "agent_id", "transport"];
    assert_eq!(
        about.map(|name| last[name].clone()),
        [
            json!("closed"),
            json!("server_lost"),
            json!(1006),
            json!("killed"),
            json!("a"),
            json!("websocket")
        ]
    );
    assert_eq!(last.as_object().unwrap().len(), 9, "{last}");
    assert_eq!(story(&server, LOG, stays), ["opened"]);
    assert_eq!(server.call(&["EXISTS", "ws:server:killed:sessions"]), Answer::Integer(0));
    let reaped = others.iter().map(|node| node.lease.counters.sessions_reaped.value());
    assert_eq!(reaped.sum::<u64>(), 600);
    for node in others {
        node.close().await;
    }
}

#[tokio::test]
async fn a_crash_before_the_log_leaves_both_events_to_others() {
    let server = RedisServer::start();
    // As a gateway leaves it that dies between entering a session and announcing it, or a foreign hand.
    let connection = Uuid::now_v7();
    let stored = json!({"agent_id": "a", "session_id": "s", "transport": "sse",
        "opened": "2026-11-28T00:00:00.000Z", "announced": false});
    server.call(&[
        "HSET",
        "ws:server:dead:sessions",
        &connection.to_string(),
        &stored.to_string(),
        "odd",
        "odd",
    ]);
    server.call(&["ZADD", "ws:servers", "1", "dead"]);
    let node = Node::on(&server, "node");
    wait_story(&server, LOG, connection, &["opened", "closed server_lost"]).await;
    assert_eq!(entries(&server, LOG)[0].1["timestamp"], "2026-11-28T00:00:00.000Z");
    let left = || server.call(&["EXISTS", "ws:server:dead:sessions"]) == Answer::Integer(0);
    eventually("nothing is left", left).await;
    node.close().await;
}

#[tokio::test]
async fn a_later_run_of_the_same_name_announces_what_is_gone() {
    let server = RedisServer::start();
    let (killed, open) = start_killable(&server, "node", 300).await;
    killed.kill();
    let node = Node::on(&server, "node");
    let new = node.open("a", "new");
    eventually("all ends are announced", || node.log.counters.lost.value() == 300).await;
    let found = stories(&server, LOG);
    for connection in &open {
        assert_eq!(found[&connection.to_string()], ["opened", "closed server_lost"]);
    }
    node.written().await;
    assert_eq!(story(&server, LOG, new), ["opened"]);
    eventually("the list is as long as it has members", || {
        server.call(&["HLEN", "ws:server:node:sessions"]) == Answer::Integer(1)
    })
    .await;
    node.close().await;
}

#[tokio::test]
async fn an_instance_taken_for_dead_announces_its_sessions_again() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let frozen = Node::new(&server.url_on(proxy.port()), "frozen", LIMITS);
    let (stays, goes) = (frozen.open("a", "stays"), frozen.open("a", "goes"));
    wait_marked(&server, "frozen", 2).await;
    let other = Node::on(&server, "other");
    proxy.set(Faults { stall_up: true, stall_down: true, ..Faults::default() });
    wait_story(&server, LOG, stays, &["opened", "closed server_lost"]).await;
    frozen.shut(goes);
    let comes = frozen.open("a", "comes");
    proxy.set(Faults::default());
    wait_story(&server, LOG, stays, &["opened", "closed server_lost", "opened again"]).await;
    wait_story(&server, LOG, goes, &["opened", "closed server_lost", "closed"]).await;
    frozen.written().await;
    // Once more where it was announced before the instance saw that it had been taken for dead.
    let told = story(&server, LOG, comes);
    assert!(told.last().unwrap().starts_with("opened"), "{told:?}");
    eventually("the list is as long as it has members", || {
        server.call(&["HLEN", "ws:server:frozen:sessions"]) == Answer::Integer(2)
    })
    .await;
    frozen.shut(stays);
    frozen.written().await;
    assert_eq!(story(&server, LOG, stays).last().unwrap(), "closed");
    frozen.close().await;
    other.close().await;
}

#[tokio::test]
async fn a_log_that_takes_nothing_keeps_no_other_waiting() {
    let server = RedisServer::start();
    server.call(&["SET", "{agent:bad:sessions}:log", "a string"]);
    let (killed, _) = start_killable(&server, "killed", 1).await;
    let ghost = Uuid::now_v7();
    let stored = json!({"agent_id": "bad", "session_id": "s", "transport": "sse", "opened": "", "announced": true});
    server.call(&["HSET", "ws:server:killed:sessions", &ghost.to_string(), &stored.to_string()]);
    killed.kill();
    let node = Node::on(&server, "node");
    let (bad, good) = (node.open("bad", "s"), node.open("a", "s"));
    wait_story(&server, LOG, good, &["opened"]).await;
    node.shut(bad);
    let lost = || entries(&server, LOG).iter().any(|(_, event)| event["reason"] == "server_lost");
    eventually("the killed instance's other session is announced", lost).await;
    assert!(!node.log.is_written());
    server.call(&["DEL", "{agent:bad:sessions}:log"]);
    wait_story(&server, "{agent:bad:sessions}:log", bad, &["opened", "closed"]).await;
    node.close().await;
}

/// A `wsproxy serve` that keeps its sessions in a log.
async fn binary(server: &RedisServer, name: &str) -> Binary {
    let environment = [
        ("REDIS_URL", &*server.url()),
        ("SERVER_ID", name),
        ("WSPROXY_SESSIONS__EVENTS_LOG", "true"),
    ];
    Binary::start(&environment).await
}

async fn connect(gateway: &Binary, session: &str) -> Client {
    let token = gateway.token(session).await;
    let path = format!("/a/ws/{session}");
    Client::connect(gateway.address, &path, &bearer(&token)).await.expect("the token is right")
}

fn reasons(server: &RedisServer, session: &str) -> Vec<String> {
    let of = entries(server, LOG).into_iter().filter(|(_, event)| event["session_id"] == session);
    let word = |event: &Value| event["reason"].as_str().unwrap_or("opened").to_owned();
    of.map(|(_, event)| word(&event)).collect()
}

#[tokio::test]
async fn a_killed_and_a_frozen_process_are_told_apart_afterwards() {
    let server = RedisServer::start();
    let lives = binary(&server, "lives").await;
    let (mut killed, frozen) = (binary(&server, "killed").await, binary(&server, "frozen").await);
    let _gone = connect(&killed, "gone").await;
    let mut back = connect(&frozen, "back").await;
    wait_marked(&server, "killed", 1).await;
    wait_marked(&server, "frozen", 1).await;
    frozen.signal(Signal::STOP);
    killed.signal(Signal::KILL);
    killed.exited().await;
    eventually("both are taken for dead", || {
        [reasons(&server, "gone"), reasons(&server, "back")]
            .iter()
            .all(|reasons| reasons.ends_with(&["server_lost".into()]))
    })
    .await;
    frozen.signal(Signal::CONT);
    let again = || reasons(&server, "back") == ["opened", "server_lost", "opened"];
    eventually("the frozen instance is back", again).await;
    back.send("[\"still here\"]").await;
    back.close().await;
    let closed = || reasons(&server, "back").ends_with(&["normal".into()]);
    eventually("its end is announced", closed).await;
    assert_eq!(reasons(&server, "gone"), ["opened", "server_lost"]);
    let reaped = lives.metric("wsproxy_registry_sessions_reaped_total").await;
    assert_eq!(reaped, 2.0);
    let health = http::request(lives.address, "GET", "/metrics", &[], b"").await;
    assert!(health.body.contains("wsproxy_session_log_waiting_bytes 0"));
}
