//! Clients of histories under faults: they get the exact sequence, or `history_lost`.

use rustix::process::Signal;
use serde_json::json;
use wsproxy::config::Config;

use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    fault_proxy::{Cut, FaultProxy},
    gateway::{Backend, TestInstance, config, over_both},
    redis_server::{Options, RedisServer},
};

over_both!(a_gate_that_overflows_is_told);

fn with_history(url: &str) -> Config {
    let mut config = config(Some(url));
    config.sessions.history = true;
    config
}

/// A server that has all its data after a restart.
fn durable() -> RedisServer {
    let arguments = ["--appendonly", "yes", "--appendfsync", "always"].map(str::to_owned).to_vec();
    RedisServer::start_with(Options { arguments, ..Options::default() })
}

fn keep(server: &RedisServer, numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    let publish = |n| server.keep(DOWN, &format!(r#"{{"n":{n}}}"#));
    numbers.into_iter().map(publish).collect()
}

#[track_caller]
fn assert_numbers(
    client: &mut Client,
    numbers: impl IntoIterator<Item = u32>,
) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        for n in numbers {
            assert_eq!(client.json().await["n"], n, "{caller}");
        }
    }
}

async fn assert_lost(client: &mut Client, reason: &str) -> String {
    let notice = client.json().await;
    assert_eq!((&notice["code"], &notice["reason"]), (&json!("history_lost"), &json!(reason)));
    notice["event_id"].as_str().unwrap().to_owned()
}

async fn lost(instance: &TestInstance) {
    eventually("the loss is noticed", || !instance.gateway().bus.status().connected).await;
}

fn lost_count(instance: &TestInstance, reason: &str) -> f64 {
    instance.metric(&format!("wsproxy_history_lost_total{{reason=\"{reason}\"}}"))
}

#[tokio::test]
async fn messages_of_a_network_cut_arrive_without_notice() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let instance = TestInstance::start(with_history(&server.url_on(proxy.port()))).await;
    let mut client = instance.client("s").await;
    // A second client of the same topic, which has seen nothing before the loss.
    let mut second = instance.client("s").await;
    let mut idle = instance.client("idle").await;
    keep(&server, 0..3);
    assert_numbers(&mut client, 0..3).await;
    assert_numbers(&mut second, 0..3).await;
    for round in 1..4 {
        proxy.retarget(1);
        proxy.cut(Cut::Reset);
        lost(&instance).await;
        keep(&server, round * 100..round * 100 + 50);
        proxy.retarget(server.port());
        instance.ready().await;
        keep(&server, round * 100 + 50..round * 100 + 60);
        assert_numbers(&mut client, round * 100..round * 100 + 60).await;
        assert_numbers(&mut second, round * 100..round * 100 + 60).await;
    }
    server.keep("session:idle:down", r#"{"n":1}"#);
    assert_numbers(&mut idle, [1]).await;
    assert!(instance.metric("wsproxy_healed_messages_total") >= 150.0);
    for reason in ["trimmed", "unknown", "expired", "emptied", "overflow"] {
        assert_eq!(lost_count(&instance, reason), 0.0, "{reason}");
    }
    assert_eq!(instance.metric("wsproxy_bus_loss_notices_total"), 0.0);
}

#[tokio::test]
async fn restarted_with_its_data_nothing_is_missing() {
    let mut server = durable();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    let mut idle = instance.client("idle").await;
    keep(&server, 0..5);
    server.kill();
    lost(&instance).await;
    server.restart();
    // Some of these come before the instance is back, some after.
    let ids = keep(&server, 5..200);
    assert_numbers(&mut client, 0..200).await;
    instance.ready().await;
    server.keep("session:idle:down", r#"{"n":1}"#);
    assert_numbers(&mut idle, [1]).await;
    let mut late = instance.client_with("s", &format!("&last_event_id={}", ids[100])).await;
    assert_eq!(late.json().await["count"], 94);
    assert_numbers(&mut late, 106..200).await;
}

#[tokio::test]
async fn restarted_empty_everybody_is_told() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    let mut idle = instance.client("idle").await;
    let ids = keep(&server, 0..5);
    assert_numbers(&mut client, 0..5).await;
    server.kill();
    lost(&instance).await;
    server.restart();
    assert_lost(&mut client, "emptied").await;
    assert_lost(&mut idle, "emptied").await;
    instance.ready().await;
    keep(&server, 5..8);
    assert_numbers(&mut client, 5..8).await;
    assert_eq!(lost_count(&instance, "emptied"), 2.0);
    let mut late = instance.client_with("s", &format!("&last_event_id={}", ids[2])).await;
    let position = assert_lost(&mut late, "emptied").await;
    keep(&server, 8..10);
    assert_numbers(&mut late, 8..10).await;
    assert_numbers(&mut client, 8..10).await;
    let mut late = instance.client_with("s", &format!("&last_event_id={position}")).await;
    assert_eq!(late.json().await["count"], 2);
}

#[tokio::test]
async fn rolled_back_to_an_older_snapshot_whoever_saw_more_is_told() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    let mut other = instance.client("other").await;
    server.keep("session:other:down", r#"{"n":0}"#);
    let before = keep(&server, 0..5);
    let snapshot = server.snapshot();
    let after = keep(&server, 5..8);
    assert_numbers(&mut client, 0..8).await;
    assert_numbers(&mut other, [0]).await;
    server.kill();
    lost(&instance).await;
    server.put_snapshot(&snapshot);
    server.restart();
    assert_lost(&mut client, "unknown").await;
    instance.ready().await;
    keep(&server, 8..10);
    assert_numbers(&mut client, 8..10).await;
    // The other session lost nothing by it.
    server.keep("session:other:down", r#"{"n":1}"#);
    assert_numbers(&mut other, [1]).await;
    let mut late = instance.client_with("s", &format!("&last_event_id={}", after[1])).await;
    assert_lost(&mut late, "unknown").await;
    let mut late = instance.client_with("s", &format!("&last_event_id={}", before[2])).await;
    assert_eq!(late.json().await["count"], 4);
    assert_numbers(&mut late, [3, 4, 8, 9]).await;
}

#[tokio::test]
async fn a_kill_for_the_output_buffer_loses_no_message() {
    let arguments =
        ["--client-output-buffer-limit", "pubsub 128kb 0 0"].map(str::to_owned).to_vec();
    let server = RedisServer::start_with(Options { arguments, ..Options::default() });
    let mut config = with_history(&server.url());
    config.history.bytes_max = 64 * 1024 * 1024;
    config.history.entries_max = 100_000;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    let large = "x".repeat(900);
    let lost_before = instance.metric("wsproxy_bus_links_lost_total");
    for round in 0..8 {
        // One script is one round for Redis: its answers to the subscriber pile up meanwhile.
        let script = "for n=1,400 do redis.call('PUBLISH','session:none:down',ARGV[1]) end \
            redis.call('PUBLISH','session:s:down',ARGV[2])";
        let plain = instance.follow("session:none:down").await;
        server.call(&["EVAL", script, "0", &large, "plain"]);
        drop(plain);
        keep(&server, round * 10..round * 10 + 10);
    }
    let mut seen = 0;
    while seen < 80 {
        let text = client.text().await;
        if text != "plain" {
            let message: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(message["n"], seen, "{text}");
            seen += 1;
        }
    }
    let lost_after = instance.metric("wsproxy_bus_links_lost_total");
    assert!(lost_after > lost_before, "the limit was never reached");
}

#[tokio::test]
async fn clients_killed_by_redis_again_and_again_miss_nothing() {
    let server = RedisServer::start();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    for round in 0..10 {
        keep(&server, round * 20..round * 20 + 10);
        server.call(&["CLIENT", "KILL", "TYPE", if round % 3 == 2 { "normal" } else { "pubsub" }]);
        keep(&server, round * 20 + 10..round * 20 + 20);
    }
    assert_numbers(&mut client, 0..200).await;
}

#[tokio::test]
async fn a_server_that_stands_still_for_a_while_costs_nothing() {
    let server = RedisServer::start();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    keep(&server, 0..5);
    assert_numbers(&mut client, 0..5).await;
    server.stop();
    lost(&instance).await;
    // The kernel accepts connections for a stopped server: attempts to greet it fail meanwhile.
    let failed = || instance.gateway().bus.counters().connects_failed.value();
    let before = failed();
    eventually("attempts fail", || failed() > before + 2).await;
    server.cont();
    keep(&server, 5..50);
    assert_numbers(&mut client, 5..50).await;
    instance.ready().await;
    keep(&server, 50..60);
    assert_numbers(&mut client, 50..60).await;
}

#[tokio::test]
async fn an_instance_that_is_killed_leaves_its_clients_to_another() {
    let server = RedisServer::start();
    let url = server.url();
    let environment = [("REDIS_URL", url.as_str()), ("WSPROXY_SESSIONS__HISTORY", "true")];
    let (first, second) = (Binary::start(&environment).await, Binary::start(&environment).await);
    let mut clients = Vec::new();
    for _ in 0..20 {
        let path = format!("/agent/ws/s?token={}&last_event_id=", first.token("s").await);
        let mut client = Client::connect(first.address, &path, &[]).await.unwrap();
        assert_eq!(client.json().await["type"], "opened");
        clients.push(client);
    }
    keep(&server, 0..10);
    let mut positions = Vec::new();
    for (n, mut client) in clients.into_iter().enumerate() {
        // Each has come to another place when it happens.
        let mut position = String::new();
        for expected in 0..=(n as u32 % 10) {
            let message = client.json().await;
            assert_eq!(message["n"], expected);
            position = message["event_id"].as_str().unwrap().to_owned();
        }
        positions.push((n as u32 % 10, position, client));
    }
    first.signal(Signal::KILL);
    keep(&server, 10..20);
    for (seen, position, _) in positions {
        let token = second.token("s").await;
        let path = format!("/agent/ws/s?token={token}&last_event_id={position}");
        let mut client = Client::connect(second.address, &path, &[]).await.unwrap();
        assert_eq!(client.json().await["count"], 19 - seen);
        assert_numbers(&mut client, seen + 1..20).await;
    }
}

#[tokio::test]
async fn instances_whose_clocks_are_apart_agree() {
    let server = RedisServer::start();
    let url = server.url();
    let environment = [("REDIS_URL", url.as_str()), ("WSPROXY_SESSIONS__HISTORY", "true")];
    let libraries = std::fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
    let mut libraries = libraries.map(|path| path.join("faketime/libfaketime.so.1"));
    let library = libraries.find(|path| path.exists()).expect("the package faketime is needed");
    let library = library.to_str().unwrap();
    let apart =
        |offset| [&environment[..], &[("LD_PRELOAD", library), ("FAKETIME", offset)]].concat();
    let first = Binary::start(&apart("-2h")).await;
    let second = Binary::start(&apart("+3h")).await;
    let mut position = "0".to_owned();
    for round in 0..6 {
        let instance = if round % 2 == 0 { &first } else { &second };
        keep(&server, round * 2..round * 2 + 1);
        let path = "/api/v1/sessions/s/messages?history=true";
        let body = format!(r#"{{"n":{}}}"#, round * 2 + 1);
        assert_eq!(instance.api("POST", path, &body).await.status, 200);
        let token = instance.token("s").await;
        let path = format!("/agent/ws/s?token={token}&last_event_id={position}");
        let mut client = Client::connect(instance.address, &path, &[]).await.unwrap();
        assert_eq!(client.json().await["type"], "resumed", "round {round}");
        for n in [round * 2, round * 2 + 1] {
            let message = client.json().await;
            assert_eq!(message["n"], n);
            position = message["event_id"].as_str().unwrap().to_owned();
        }
    }
}

async fn a_gate_that_overflows_is_told(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    config.limits.send_buffer_bytes = 64 * 1024;
    let instance = TestInstance::start(config).await;
    let first = instance.keep("s", r#"{"n":0}"#).await;
    let mut client = instance.client_with("s", "&resume=frame").await;
    let large = format!(r#"{{"x":"{}"}}"#, "x".repeat(10_000));
    for _ in 0..10 {
        instance.keep("s", &large).await;
    }
    client.send(format!(r#"{{"type":"resume","last_event_id":"{first}"}}"#)).await;
    assert_lost(&mut client, "overflow").await;
    instance.keep("s", r#"{"n":1}"#).await;
    assert_numbers(&mut client, [1]).await;
    assert_eq!(lost_count(&instance, "overflow"), 1.0);
}

#[tokio::test]
async fn a_lost_history_in_mid_stream_sends_the_whole_text() {
    let mut server = RedisServer::start();
    let instance = TestInstance::start(with_history(&server.url())).await;
    let mut client = instance.client("s").await;
    let change = async |change: serde_json::Value| {
        let path = "/api/v1/sessions/s/streams/a";
        assert_eq!(instance.api("POST", path, &change.to_string()).await.status, 200);
    };
    change(json!({ "op": "open", "lease_ms": 600_000 })).await;
    change(json!({ "op": "append", "text": "kept", "lease_ms": 600_000 })).await;
    let snapshot = server.snapshot();
    change(json!({ "op": "append", "text": " and not", "lease_ms": 600_000 })).await;
    for expected in ["stream_open", "stream_append", "stream_append"] {
        assert_eq!(client.json().await["type"], expected);
    }
    server.kill();
    lost(&instance).await;
    server.put_snapshot(&snapshot);
    server.restart();
    assert_lost(&mut client, "unknown").await;
    let shown = client.json().await;
    assert_eq!((&shown["type"], &shown["text"]), (&json!("stream_snapshot"), &json!("kept")));
    instance.ready().await;
    change(json!({ "op": "append", "text": " again", "lease_ms": 600_000 })).await;
    let next = client.json().await;
    assert_eq!((&next["seq"], &next["text"]), (&json!(2), &json!(" again")));
}

const DOWN: &str = "session:s:down";
