//! A client that comes back: exactly what it missed, or the word that something is missing.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use wsproxy::config::{Config, EventIds};

use crate::support::{
    client::Client,
    gateway::{Backend, TestInstance, over_both},
};

over_both!(
    a_reconnecting_client_gets_missed_messages_then_live_ones,
    an_id_of_the_workers_own_resumes_too,
    late_joiners_may_have_the_stream_from_its_start,
    a_position_that_is_no_longer_held_is_told,
    a_position_that_never_was_is_told,
    without_history_resuming_is_refused_in_words,
    a_client_that_missed_nothing_is_told_so,
    a_client_that_saw_nothing_can_resume,
    the_first_frame_may_say_where_to_resume,
    the_subprotocol_carries_ids_beside_opaque_bytes,
    ids_can_be_hidden,
    plain_publishes_with_an_id_are_captured,
    more_than_a_page_is_resumed_in_order,
    more_than_may_wait_for_one_client_is_told,
    small_messages_count_with_what_it_costs_to_keep_them,
    reconnecting_clients_lose_and_double_no_message,
    a_malformed_event_id_is_refused,
    an_idempotency_key_publishes_once,
    history_can_be_read_by_workers,
    entries_and_bytes_are_bounded,
);

fn with_history(backend: &Backend) -> Config {
    let mut config = backend.config();
    config.sessions.history = true;
    config
}

async fn start(backend: &Backend) -> TestInstance {
    TestInstance::start(with_history(backend)).await
}

/// A message to which the history gave its id.
fn spliced(id: &str, n: u32) -> String {
    format!(r#"{{"event_id":"{id}","n":{n}}}"#)
}

/// Publishes `{"n":…}` for each number; answers the ids.
async fn keep(instance: &TestInstance, numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    let mut ids = Vec::new();
    for n in numbers {
        ids.push(instance.keep("s", &format!(r#"{{"n":{n}}}"#)).await);
    }
    ids
}

async fn assert_numbers(client: &mut Client, numbers: impl IntoIterator<Item = u32>) {
    for n in numbers {
        assert_eq!(client.json().await["n"], n);
    }
}

async fn a_reconnecting_client_gets_missed_messages_then_live_ones(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = instance.client("s").await;
    let ids = keep(&instance, 0..3).await;
    for n in 0..3 {
        assert_eq!(client.text().await, spliced(&ids[n as usize], n));
    }
    client.close().await;
    let missed = keep(&instance, 3..6).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={}", ids[2])).await;
    let resumed = json!({ "type": "resumed", "count": 3, "last_event_id": ids[2] });
    assert_eq!(client.json().await, resumed);
    for n in 3..6 {
        assert_eq!(client.text().await, spliced(&missed[n as usize - 3], n));
    }
    keep(&instance, 6..9).await;
    assert_numbers(&mut client, 6..9).await;
    assert_eq!(instance.metric("wsproxy_resumed_total"), 1.0);
    assert_eq!(instance.metric("wsproxy_replayed_messages_total"), 3.0);
}

async fn an_id_of_the_workers_own_resumes_too(backend: Backend) {
    let instance = start(&backend).await;
    for n in 0..4 {
        let path = format!("/api/v1/sessions/s/messages?history=true&event_id=own-{n}");
        let body = format!(r#"{{"event_id":"own-{n}","n":{n}}}"#);
        assert_eq!(instance.api("POST", &path, &body).await.status, 200);
    }
    let mut client = instance.client_with("s", "&last_event_id=own-1").await;
    assert_eq!(client.json().await["count"], 2);
    assert_eq!(client.text().await, r#"{"event_id":"own-2","n":2}"#);
    assert_eq!(client.text().await, r#"{"event_id":"own-3","n":3}"#);
}

async fn late_joiners_may_have_the_stream_from_its_start(backend: Backend) {
    let instance = start(&backend).await;
    keep(&instance, 0..5).await;
    let mut client = instance.client_with("s", "&last_event_id=0").await;
    assert_eq!(client.json().await, json!({"type":"resumed","count":5,"last_event_id":"0"}));
    assert_numbers(&mut client, 0..5).await;
}

async fn a_position_that_is_no_longer_held_is_told(backend: Backend) {
    let mut config = with_history(&backend);
    config.history.entries_max = 5;
    let instance = TestInstance::start(config).await;
    let ids = keep(&instance, 0..20).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={}", ids[2])).await;
    let notice = client.json().await;
    assert_eq!((&notice["code"], &notice["reason"]), (&json!("history_lost"), &json!("trimmed")));
    assert_eq!(notice["event_id"], ids[19]);
    keep(&instance, 20..22).await;
    assert_numbers(&mut client, 20..22).await;
    let series = "wsproxy_history_lost_total{reason=\"trimmed\"}";
    assert_eq!(instance.metric(series), 1.0);
    // Its own position, which it was told, is one to resume from.
    let at = notice["event_id"].as_str().unwrap();
    let mut client = instance.client_with("s", &format!("&last_event_id={at}")).await;
    assert_eq!(client.json().await["count"], 2);
    // The start is gone as well.
    let mut client = instance.client_with("s", "&last_event_id=0").await;
    assert_eq!(client.json().await["reason"], "trimmed");
}

async fn a_position_that_never_was_is_told(backend: Backend) {
    let instance = start(&backend).await;
    let ids = keep(&instance, 0..3).await;
    let (ms, _) = ids[2].split_once('-').unwrap();
    for unknown in [format!("{ms}-999999"), "some-other-id".into()] {
        let mut client = instance.client_with("s", &format!("&last_event_id={unknown}")).await;
        let notice = client.json().await;
        assert_eq!(
            (&notice["code"], &notice["reason"]),
            (&json!("history_lost"), &json!("unknown"))
        );
        assert_eq!(notice["event_id"], ids[2]);
    }
    // Of no life of this log, and of the form of an earlier version.
    for (id, reason) in [("1000-0-00000000", "unknown"), ("1000-0", "unknown"), ("0-0", "unknown")]
    {
        let mut client = instance.client_with("s", &format!("&last_event_id={id}")).await;
        assert_eq!(client.json().await["reason"], reason, "{id}");
    }
}

async fn without_history_resuming_is_refused_in_words(backend: Backend) {
    let instance = TestInstance::start(backend.config()).await;
    let mut client = instance.client_with("s", "&last_event_id=17-0").await;
    assert_eq!(client.json().await["reason"], "disabled");
    instance.publish("session:s:down", "live");
    assert_eq!(client.text().await, "live");
}

async fn a_client_that_missed_nothing_is_told_so(backend: Backend) {
    let instance = start(&backend).await;
    let ids = keep(&instance, 0..2).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={}", ids[1])).await;
    assert_eq!(client.json().await["count"], 0);
    keep(&instance, 2..3).await;
    assert_numbers(&mut client, 2..3).await;
}

async fn a_client_that_saw_nothing_can_resume(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = instance.client_with("s", "&last_event_id=").await;
    let opened = client.json().await;
    assert_eq!(opened["type"], "opened");
    let position = opened["event_id"].as_str().unwrap().to_owned();
    assert!(position.starts_with("1-0-"), "{position}");
    client.close().await;
    keep(&instance, 0..2).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={position}")).await;
    assert_eq!(client.json().await["count"], 2);
    assert_numbers(&mut client, 0..2).await;
}

async fn the_first_frame_may_say_where_to_resume(backend: Backend) {
    let instance = start(&backend).await;
    let ids = keep(&instance, 0..4).await;
    let mut client = instance.client_with("s", "&resume=frame").await;
    keep(&instance, 4..5).await;
    client.send(format!(r#"{{"type":"resume","last_event_id":"{}"}}"#, ids[1])).await;
    assert_eq!(client.json().await["type"], "resumed");
    assert_numbers(&mut client, 2..5).await;
    // Another first message is the worker's, and the client begins with what is live.
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client_with("s", "&resume=frame").await;
    client.send(r#"{"hello":1}"#).await;
    assert_eq!(worker.next().await, r#"{"hello":1}"#);
    assert_eq!(client.json().await["type"], "opened");
    keep(&instance, 5..6).await;
    assert_numbers(&mut client, 5..6).await;
}

async fn the_subprotocol_carries_ids_beside_opaque_bytes(backend: Backend) {
    let instance = start(&backend).await;
    let token = instance.token("s").await;
    let headers = [("sec-websocket-protocol", format!("wsproxy.id.v1, bearer.{token}"))];
    let mut client =
        Client::connect(instance.address(), "/agent/ws/s?last_event_id=", &headers).await.unwrap();
    assert_eq!(client.headers["sec-websocket-protocol"], "wsproxy.id.v1");
    assert!(client.text().await.contains("\n{"));
    let id = instance.keep("s", "opaque {text}").await;
    assert_eq!(client.text().await, format!("{id}\nopaque {{text}}"));
    instance.publish("session:s:down", vec![0xff, 0xfe]);
    assert_eq!(client.next().await, Message::binary(vec![b'\n', 0xff, 0xfe]));
}

async fn ids_can_be_hidden(backend: Backend) {
    let mut config = with_history(&backend);
    config.sessions.event_ids = EventIds::None;
    let instance = TestInstance::start(config).await;
    let mut client = instance.client("s").await;
    instance.keep("s", r#"{"a":1}"#).await;
    assert_eq!(client.text().await, r#"{"a":1}"#);
}

async fn plain_publishes_with_an_id_are_captured(backend: Backend) {
    let mut config = with_history(&backend);
    config.sessions.capture = true;
    let instance = TestInstance::start(config.clone()).await;
    let other = TestInstance::start(config).await;
    let mut clients = vec![instance.client("s").await, instance.client("s").await];
    if !matches!(backend, Backend::Memory) {
        clients.push(other.client("s").await);
    }
    for n in 0..20 {
        instance.publish("session:s:down", format!(r#"{{"event_id":"e{n}","n":{n}}}"#));
    }
    instance.publish("session:s:down", "no id");
    for client in &mut clients {
        let mut seen: Vec<Value> = Vec::new();
        while seen.len() < 20 {
            let text = client.text().await;
            if text != "no id" {
                seen.push(serde_json::from_str(&text).unwrap());
            }
        }
        assert_eq!(
            seen.iter().map(|m| m["n"].as_u64().unwrap()).collect::<Vec<_>>(),
            (0..20).collect::<Vec<_>>()
        );
    }
    let mut client = instance.client_with("s", "&last_event_id=e9").await;
    assert_eq!(client.json().await["count"], 10);
}

async fn more_than_a_page_is_resumed_in_order(backend: Backend) {
    let mut config = with_history(&backend);
    config.history.entries_max = 5000;
    let instance = TestInstance::start(config).await;
    let first = keep(&instance, 0..1).await;
    let messages: Vec<_> = (1..1001)
        .map(|n| json!({ "to": "session:s", "message": { "n": n }, "history": true }))
        .collect();
    for messages in messages.chunks(500) {
        let body = json!({ "messages": messages }).to_string();
        assert_eq!(instance.api("POST", "/api/v1/events/batch", &body).await.status, 200);
    }
    let mut client = instance.client_with("s", &format!("&last_event_id={}", first[0])).await;
    assert_eq!(client.json().await["count"], 1000);
    assert_numbers(&mut client, 1..1001).await;
}

async fn more_than_may_wait_for_one_client_is_told(backend: Backend) {
    let mut config = with_history(&backend);
    config.limits.send_buffer_bytes = 64 * 1024;
    let instance = TestInstance::start(config).await;
    let large = format!(r#"{{"x":"{}"}}"#, "x".repeat(10_000));
    for _ in 0..10 {
        instance.keep("s", &large).await;
    }
    let mut client = instance.client_with("s", "&last_event_id=0").await;
    assert_eq!(client.json().await["reason"], "overflow");
    keep(&instance, 0..1).await;
    assert_numbers(&mut client, 0..1).await;
}

async fn small_messages_count_with_what_it_costs_to_keep_them(backend: Backend) {
    let mut config = with_history(&backend);
    config.limits.send_buffer_bytes = 64 * 1024;
    let instance = TestInstance::start(config).await;
    // A fifth of the room by their data alone; closed as slow, the client would come back to the same.
    keep(&instance, 0..900).await;
    let mut client = instance.client_with("s", "&last_event_id=0").await;
    assert_eq!(client.json().await["reason"], "overflow");
    keep(&instance, 0..1).await;
    assert_numbers(&mut client, 0..1).await;
}

async fn reconnecting_clients_lose_and_double_no_message(backend: Backend) {
    let instance = start(&backend).await;
    let publishing = async {
        for n in 0..400 {
            instance.keep("s", &format!(r#"{{"n":{n}}}"#)).await;
        }
    };
    let reading = async {
        let (mut next, mut last) = (0_u64, "0".to_owned());
        let mut connections = 0;
        while next < 400 {
            let mut client = instance.client_with("s", &format!("&last_event_id={last}")).await;
            connections += 1;
            let greeting = client.json().await;
            assert!(matches!(greeting["type"].as_str(), Some("resumed")), "{greeting}");
            for _ in 0..connections % 17 {
                if next == 400 {
                    break;
                }
                let message = client.json().await;
                assert_eq!(message["n"], next, "after {connections} connections");
                last = message["event_id"].as_str().unwrap().to_owned();
                next += 1;
            }
        }
    };
    tokio::join!(publishing, reading);
}

async fn a_malformed_event_id_is_refused(backend: Backend) {
    let instance = start(&backend).await;
    let token = instance.token("s").await;
    let long = "x".repeat(200);
    for bad in ["a%20b", "%ff", long.as_str(), "a%0ab"] {
        let path = format!("/agent/ws/s?token={token}&last_event_id={bad}");
        assert_eq!(instance.handshake(&path, &[]).await.status, 400, "{bad}");
    }
    let path = format!("/agent/ws/s?token={token}&resume=maybe");
    assert_eq!(instance.handshake(&path, &[]).await.status, 400);
    assert!(instance.has_token("s").await);
}

async fn an_idempotency_key_publishes_once(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = instance.client("s").await;
    let message = json!({ "to": "session:s", "message": { "n": 1 }, "idempotency_key": "k" });
    let body = json!({ "messages": [message, message] }).to_string();
    let answer = instance.api("POST", "/api/v1/events/batch", &body).await.json();
    let (first, second) = (&answer["results"][0], &answer["results"][1]);
    assert_eq!(first["event_id"], second["event_id"]);
    assert_eq!((&first["duplicate"], &second["duplicate"]), (&json!(false), &json!(true)));
    keep(&instance, 2..3).await;
    assert_numbers(&mut client, [1, 2]).await;
}

async fn history_can_be_read_by_workers(backend: Backend) {
    let instance = start(&backend).await;
    let ids = keep(&instance, 0..5).await;
    let path = format!("/api/v1/sessions/s/history?after={}&limit=2", ids[1]);
    let page = instance.api("GET", &path, "").await.json();
    assert_eq!(page["events"][0], json!({ "event_id": ids[2], "data": r#"{"n":2}"# }));
    assert_eq!(page["events"].as_array().unwrap().len(), 2);
    assert_eq!((&page["complete"], &page["history_lost"]), (&json!(false), &Value::Null));
    assert_eq!(page["position"], ids[4]);
    let page = instance.api("GET", "/api/v1/sessions/none/history", "").await.json();
    assert_eq!((&page["events"], &page["complete"]), (&json!([]), &json!(true)));
    assert_eq!(instance.api("GET", "/api/v1/sessions/s/history?limit=0", "").await.status, 400);
}

async fn entries_and_bytes_are_bounded(backend: Backend) {
    let mut config = with_history(&backend);
    config.history.bytes_max = 10_000;
    config.history.entries_max = 50;
    let instance = TestInstance::start(config).await;
    let large = "x".repeat(3_000);
    for _ in 0..10 {
        instance.keep("s", &large).await;
    }
    let page = instance.api("GET", "/api/v1/sessions/s/history", "").await.json();
    assert_eq!(page["events"].as_array().unwrap().len(), 3);
    assert_eq!(page["history_lost"], "trimmed");
    instance.keep("s", &"x".repeat(20_000)).await;
    let page = instance.api("GET", "/api/v1/sessions/s/history", "").await.json();
    assert_eq!(page["events"].as_array().unwrap().len(), 1, "the newest stays");
    keep(&instance, 0..100).await;
    let page = instance.api("GET", "/api/v1/sessions/s/history", "").await.json();
    assert_eq!(page["events"].as_array().unwrap().len(), 50);
}

#[tokio::test]
async fn what_is_older_than_the_ttl_is_not_held() {
    let mut config = with_history(&Backend::Memory);
    config.history.ttl = Duration::from_millis(300);
    let instance = TestInstance::start(config).await;
    let ids = keep(&instance, 0..2).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let mut client = instance.client_with("s", &format!("&last_event_id={}", ids[0])).await;
    assert_eq!(client.json().await["reason"], "expired");
}
