//! Receivers of a message on a Cluster: a node counts its own subscribers only, and a worker may be at any of them.

use std::time::Duration;

use serde_json::json;
use wsproxy::config::NoReceiver;

use super::Pair;
use crate::support::{
    cluster::{Cluster, MASTERS},
    eventually,
    gateway::TestInstance,
    redis_process::Subscriber,
};

/// A worker at a node.
async fn worker(cluster: &std::sync::Arc<Cluster>, place: usize, channel: &str) -> Subscriber {
    let (cluster, channel) = (cluster.clone(), channel.to_owned());
    tokio::task::spawn_blocking(move || cluster.nodes[place].subscribe(&channel)).await.unwrap()
}

async fn next(mut worker: Subscriber) -> (Subscriber, String) {
    let read = tokio::task::spawn_blocking(move || {
        let message = worker.next();
        (worker, message)
    });
    read.await.unwrap()
}

fn kept(instance: &TestInstance) -> f64 {
    instance.metric("wsproxy_bus_publishes_kept_total")
}

#[tokio::test]
async fn a_worker_at_any_node_is_a_receiver_where_messages_are_kept() {
    let pair = Pair::with(|config| config.sessions.no_receiver = NoReceiver::Queue).await;
    let Pair { cluster, one, two } = &pair;
    for place in 0..2 * MASTERS {
        let session = format!("s-{place}");
        let up = format!("session:{session}:up");
        let mut client = one.client(&session).await;
        let mut at = worker(cluster, place, &up).await;
        for number in 0..5 {
            client.send(number.to_string()).await;
            let (back, message) = next(at).await;
            assert_eq!(message, number.to_string(), "node {place}");
            at = back;
        }
        assert_eq!((kept(one), kept(two)), (f64::from(place as u32), 0.0), "node {place}");
        drop(at);
        gone(cluster, &up).await;
        client.send("6").await;
        eventually("it is kept", || kept(one) == f64::from(place as u32 + 1)).await;
        let log = format!("{{{up}}}:log");
        let log = one.gateway().store.read_log(&log, "", 10).await.unwrap();
        assert_eq!(log.iter().map(|entry| &entry.data[..]).collect::<Vec<_>>(), [b"6"]);
    }
    pair.drain().await;
}

#[tokio::test]
async fn a_worker_at_any_node_is_a_receiver_where_its_lack_is_an_error() {
    let pair = Pair::with(|config| config.sessions.no_receiver = NoReceiver::Error).await;
    let Pair { cluster, one, .. } = &pair;
    for place in 0..2 * MASTERS {
        let session = format!("s-{place}");
        let up = format!("session:{session}:up");
        let mut client = one.client(&session).await;
        let at = worker(cluster, place, &up).await;
        client.send("1").await;
        let (at, message) = next(at).await;
        assert_eq!(message, "1");
        // The next message that the client gets is not about it.
        one.publish(&format!("session:{session}:down"), "down");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(client.text().await, "down", "node {place}");
        drop(at);
        gone(cluster, &up).await;
        client.send("2").await;
        let error = client.json().await;
        assert_eq!(error["code"], "no_receiver", "node {place}: {error}");
    }
    pair.drain().await;
}

#[tokio::test]
async fn the_api_counts_receivers_at_any_node() {
    let pair = Pair::start().await;
    let Pair { cluster, one, two } = &pair;
    let client = two.client("s").await;
    let send = async |path: &str| {
        let sent = one.api("POST", path, r#"{"n":1}"#).await;
        assert_eq!(sent.status, 200, "{sent:?}");
        sent.json()["receivers"].as_u64().unwrap()
    };
    for query in ["", "?history=true"] {
        assert!(send(&format!("/api/v1/sessions/s/messages{query}")).await > 0, "{query}");
    }
    drop(client);
    for place in 0..2 * MASTERS {
        let session = format!("w-{place}");
        let path = format!("/api/v1/sessions/{session}/messages");
        assert_eq!(send(&path).await, 0);
        let at = worker(cluster, place, &format!("session:{session}:down")).await;
        assert!(send(&path).await > 0, "node {place}");
        assert_eq!(next(at).await.1, json!({ "n": 1 }).to_string());
    }
    pair.drain().await;
}

/// Waits until no node has a subscriber.
async fn gone(cluster: &Cluster, channel: &str) {
    eventually("no worker is left", || {
        cluster.nodes.iter().all(|node| node.subscribers(channel) == 0)
    })
    .await;
}
