//! Acknowledgements of events: reports to workers, repetitions, bounds, and acks after a resume.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Connected, LIFE, connect, connect_with, event, send, start, start_with, token};
use crate::support::{
    client::Client,
    gateway::{Backend, over_both},
};

over_both!(
    an_acknowledged_message_is_reported_and_not_sent_again,
    an_unacknowledged_message_is_repeated_verbatim_then_reported,
    enveloped_messages_have_a_head_also_when_repeated,
    messages_that_wait_for_an_ack_are_bounded,
    a_client_that_leaves_is_reported_with_what_it_owes,
    what_is_resumed_wants_its_acks_too,
    a_thousand_messages_that_want_acks_are_resumed_at_once,
    a_flood_of_acks_of_nothing_is_only_counted,
);

fn wanting_ack(n: u32) -> Value {
    json!({ "type": "task_status_update", "data": { "n": n }, "ack": true })
}

async fn an_acknowledged_message_is_reported_and_not_sent_again(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.events.ack_interval = Duration::from_secs(2);
    })
    .await;
    let mut worker = instance.follow("ws:acks").await;
    let Connected { mut client, hello } = connect_with(&instance, "u-1", "").await;
    let id = send(&instance, "users/u-1", &wanting_ack(1)).await;
    let message = client.json().await;
    assert_eq!((&message["event_id"], &message["ack"]), (&json!(id), &json!(true)));
    client.send(json!({ "type": "ack", "event_id": id }).to_string()).await;
    let report = worker.json().await;
    assert_eq!(report["event"], "acknowledged");
    assert_eq!((&report["event_id"], &report["user_id"]), (&json!(id), &json!("u-1")));
    assert_eq!(report["connection_id"], hello["connection_id"]);
    assert_eq!(report["server_id"], *instance.gateway().server_id);
    // Those who publish by themselves give the id.
    instance.publish("ws:broadcast", r#"{"ack":true,"event_id":"own"}"#);
    assert_eq!(client.text().await, r#"{"ack":true,"event_id":"own"}"#);
    client.send(r#"{"type":"ack","ack_id":"own"}"#).await;
    assert_eq!(worker.json().await["event_id"], "own");
    // This one is sent again; had the others been, they would come before.
    let id = send(&instance, "users/u-1", &wanting_ack(2)).await;
    for _ in 0..2 {
        assert_eq!(client.json().await["event_id"], id);
    }
}

async fn an_unacknowledged_message_is_repeated_verbatim_then_reported(backend: Backend) {
    let instance = start_with(&backend, |config| config.events.ack_tries = 3).await;
    let mut worker = instance.follow("ws:acks").await;
    let mut client = connect(&instance, "u-1").await;
    let start = Instant::now();
    let id = send(&instance, "broadcast", &wanting_ack(1)).await;
    let first = client.text().await;
    assert!(first.starts_with(&format!(r#"{{"event_id":"{id}","#)), "{first}");
    assert_eq!(client.text().await, first);
    assert_eq!(client.text().await, first);
    assert!(start.elapsed() >= Duration::from_millis(600), "{:?}", start.elapsed());
    let report = worker.json().await;
    assert_eq!((&report["event"], &report["tries"]), (&json!("unacknowledged"), &json!(3)));
    assert_eq!((&report["event_id"], &report["reason"]), (&json!(id), &json!("tries")));
    assert_eq!(instance.metric("wsproxy_event_messages_resent_total"), 2.0);
    assert_eq!(instance.metric("wsproxy_event_acks_total{outcome=\"tries\"}"), 1.0);
}

async fn enveloped_messages_have_a_head_also_when_repeated(backend: Backend) {
    let instance = start(&backend).await;
    let mut worker = instance.follow("ws:acks").await;
    let protocols = format!("wsproxy.id.v1, bearer.{}", token("u-1", LIFE));
    let headers = [("sec-websocket-protocol", protocols)];
    let mut client = Client::connect(instance.address(), "/ws", &headers).await.unwrap();
    let hello = client.text().await;
    let (head, hello) = hello.split_once('\n').unwrap();
    let hello: Value = serde_json::from_str(hello).unwrap();
    assert_eq!(hello["event_id"], head);
    client.send(r#"{"type":"ping"}"#).await;
    assert!(client.text().await.starts_with("\n{"));
    client.send("nonsense").await;
    assert!(client.text().await.starts_with("\n{"));
    let id = send(&instance, "users/u-1", &wanting_ack(1)).await;
    let first = client.text().await;
    assert!(first.starts_with(&format!("{id}\n{{")), "{first}");
    assert_eq!(client.text().await, first);
    client.send(json!({ "type": "ack", "event_id": id }).to_string()).await;
    assert_eq!(worker.json().await["event"], "acknowledged");
}

async fn messages_that_wait_for_an_ack_are_bounded(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.events.ack_queue = 3;
        config.events.ack_interval = Duration::from_secs(600);
    })
    .await;
    let mut worker = instance.follow("ws:acks").await;
    let mut client = connect(&instance, "u-1").await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(send(&instance, "users/u-1", &wanting_ack(n)).await);
        assert_eq!(client.json().await["data"]["n"], n);
    }
    for id in &ids[..2] {
        let report = worker.json().await;
        assert_eq!((&report["event_id"], &report["reason"]), (&json!(id), &json!("overflow")));
    }
    client.send(json!({ "type": "ack", "event_id": ids[4] }).to_string()).await;
    assert_eq!(worker.json().await["event"], "acknowledged");
}

async fn a_client_that_leaves_is_reported_with_what_it_owes(backend: Backend) {
    let instance = start(&backend).await;
    let mut worker = instance.follow("ws:acks").await;
    let mut client = connect(&instance, "u-1").await;
    instance.publish("ws:user:u-1", r#"{"ack":true,"event_id":"e"}"#);
    client.text().await;
    drop(client);
    let report = worker.json().await;
    assert_eq!((&report["event_id"], &report["reason"]), (&json!("e"), &json!("closed")));
}

async fn what_is_resumed_wants_its_acks_too(backend: Backend) {
    let instance = start(&backend).await;
    let mut worker = instance.follow("ws:acks").await;
    let Connected { client, hello } = connect_with(&instance, "u-1", "").await;
    client.close().await;
    let id = send(&instance, "users/u-1", &wanting_ack(1)).await;
    let parameters = format!("&last_event_id={}", hello["event_id"].as_str().unwrap());
    let mut client = connect_with(&instance, "u-1", &parameters).await.client;
    assert_eq!(client.json().await["count"], 1);
    let first = client.text().await;
    assert_eq!(client.text().await, first);
    client.send(json!({ "type": "ack", "event_id": id }).to_string()).await;
    let report = worker.json().await;
    assert_eq!((&report["event"], &report["event_id"]), (&json!("acknowledged"), &json!(id)));
}

async fn a_thousand_messages_that_want_acks_are_resumed_at_once(backend: Backend) {
    let instance = start_with(&backend, |config| {
        config.events.ack_interval = Duration::from_secs(600);
        config.history.bytes_max = 8 * 1024 * 1024;
    })
    .await;
    let filling = "x".repeat(1500);
    for batch in 0..2 {
        for to in ["broadcast", "user:u-1"] {
            let messages = (0..500).map(|n| {
                let message =
                    json!({ "type": "t", "ack": true, "data": [batch, n], "filling": filling });
                json!({ "to": to, "message": message })
            });
            let body = json!({ "messages": messages.collect::<Vec<_>>() }).to_string();
            assert_eq!(instance.api("POST", "/api/v1/events/batch", &body).await.status, 200);
        }
    }
    let mut client = connect_with(&instance, "u-1", "&last_event_id=0").await.client;
    assert_eq!(client.json().await["count"], 2000);
    for _ in 0..2000 {
        assert_eq!(client.json().await["type"], "t");
    }
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.json().await["type"], "pong");
    assert_eq!(instance.metric("wsproxy_event_acks_total{outcome=\"wanted\"}"), 2000.0);
}

async fn a_flood_of_acks_of_nothing_is_only_counted(backend: Backend) {
    let instance = start_with(&backend, |config| config.limits.messages_per_second = 0).await;
    let mut client = connect(&instance, "u-1").await;
    for n in 0..1000 {
        client.send(format!(r#"{{"type":"ack","event_id":"none-{n}"}}"#)).await;
    }
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.json().await["type"], "pong");
    assert_eq!(instance.metric("wsproxy_event_acks_total{outcome=\"unknown\"}"), 1000.0);
}

#[tokio::test]
async fn messages_and_reports_cross_instances() {
    let backend = Backend::redis();
    let (one, other) = (start(&backend).await, start(&backend).await);
    let mut client = connect(&one, "u-1").await;
    let mut worker = other.follow("ws:acks").await;
    let id = send(&other, "users/u-1", &wanting_ack(1)).await;
    assert_eq!(client.json().await["event_id"], id);
    client.send(json!({ "type": "ack", "event_id": id }).to_string()).await;
    assert_eq!(worker.json().await["event_id"], id);
    client.close().await;
    send(&one, "broadcast", &event(2)).await;
    let mut client = connect_with(&other, "u-1", &format!("&last_event_id={id}")).await.client;
    assert_eq!(client.json().await["count"], 1);
    assert_eq!(client.json().await["data"]["n"], 2);
}
