//! Token streams as clients see them: merged for who comes late, ended for who would wait for ever.

use serde_json::{Value, json};

use crate::support::{
    eventually,
    gateway::{Backend, TestInstance, over_both},
    redis_server::Answer,
};

over_both!(
    a_client_sees_a_stream_grow_and_end,
    who_comes_late_gets_all_text_and_then_the_rest,
    who_comes_back_gets_what_was_missed,
    who_lost_its_history_gets_the_text_again,
    a_worker_that_died_is_noticed,
    what_does_not_fit_is_refused,
    a_clients_stop_reaches_the_worker,
);

async fn start(backend: &Backend) -> TestInstance {
    let mut config = backend.config();
    config.sessions.history = true;
    TestInstance::start(config).await
}

async fn change(instance: &TestInstance, change: Value) -> (u16, Value) {
    let response = instance.api("POST", "/api/v1/sessions/s/streams/a", &change.to_string()).await;
    (response.status, response.json())
}

async fn done(instance: &TestInstance, wanted: Value) -> Value {
    let (status, answer) = change(instance, wanted.clone()).await;
    assert_eq!(status, 200, "{wanted}: {answer}");
    answer
}

async fn append(instance: &TestInstance, texts: &[&str]) -> Vec<Value> {
    let mut answers = Vec::new();
    for text in texts {
        answers.push(done(instance, json!({ "op": "append", "text": text })).await);
    }
    answers
}

/// The message without its id, which is not known beforehand.
fn without_id(mut message: Value) -> Value {
    message.as_object_mut().unwrap().remove("event_id").expect("it has an id");
    message
}

async fn a_client_sees_a_stream_grow_and_end(backend: Backend) {
    let instance = start(&backend).await;
    let mut client = instance.client("s").await;
    done(&instance, json!({ "op": "open", "meta": { "model": "m" } })).await;
    append(&instance, &["Hel", "lo \"ä\"\n"]).await;
    done(&instance, json!({ "op": "renew" })).await;
    done(&instance, json!({ "op": "end", "outcome": "finish" })).await;
    for expected in [
        json!({ "type": "stream_open", "stream": "a", "meta": { "model": "m" } }),
        json!({ "type": "stream_append", "stream": "a", "seq": 1, "text": "Hel" }),
        json!({ "type": "stream_append", "stream": "a", "seq": 2, "text": "lo \"ä\"\n" }),
        json!({ "type": "stream_end", "stream": "a", "outcome": "finish", "seq": 2 }),
    ] {
        assert_eq!(without_id(client.json().await), expected);
    }
}

async fn who_comes_late_gets_all_text_and_then_the_rest(backend: Backend) {
    let instance = start(&backend).await;
    done(&instance, json!({ "op": "open", "meta": { "model": "m" } })).await;
    append(&instance, &["a", "b", "c"]).await;
    let mut client = instance.client("s").await;
    let snapshot = client.json().await;
    assert_eq!(
        (&snapshot["type"], &snapshot["state"]),
        (&json!("stream_snapshot"), &json!("open"))
    );
    assert_eq!((&snapshot["text"], &snapshot["seq"]), (&json!("abc"), &json!(3)));
    assert_eq!(snapshot["meta"], json!({ "model": "m" }));
    append(&instance, &["d"]).await;
    assert_eq!(client.json().await["seq"], 4);
    let error = json!({ "code": "model", "message": "no more" });
    done(&instance, json!({ "op": "end", "outcome": "error", "error": error })).await;
    assert_eq!(client.json().await["error"], error);
    // After the end too.
    let mut client = instance.client("s").await;
    let snapshot = client.json().await;
    assert_eq!((&snapshot["text"], &snapshot["state"]), (&json!("abcd"), &json!("error")));
    assert_eq!(snapshot["error"], error);
}

async fn who_comes_back_gets_what_was_missed(backend: Backend) {
    let instance = start(&backend).await;
    done(&instance, json!({ "op": "open" })).await;
    let answers = append(&instance, &["a", "b", "c"]).await;
    let at = answers[0]["event_id"].as_str().unwrap();
    let mut client = instance.client_with("s", &format!("&last_event_id={at}")).await;
    assert_eq!(client.json().await["count"], 2);
    assert_eq!(client.json().await["text"], "b");
    assert_eq!(client.json().await["text"], "c");
}

async fn who_lost_its_history_gets_the_text_again(backend: Backend) {
    let mut config = backend.config();
    config.sessions.history = true;
    config.history.entries_max = 2;
    let instance = TestInstance::start(config).await;
    done(&instance, json!({ "op": "open" })).await;
    let answers = append(&instance, &["a", "b", "c", "d", "e"]).await;
    let at = answers[0]["event_id"].as_str().unwrap();
    let mut client = instance.client_with("s", &format!("&last_event_id={at}")).await;
    assert_eq!(client.json().await["code"], "history_lost");
    assert_eq!(client.json().await["text"], "abcde");
    append(&instance, &["f"]).await;
    assert_eq!(client.json().await["text"], "f");
}

async fn a_worker_that_died_is_noticed(backend: Backend) {
    let instance = start(&backend).await;
    let other = TestInstance::start({
        let mut config = backend.config();
        config.sessions.history = true;
        config
    })
    .await;
    let mut client = instance.client("s").await;
    done(&instance, json!({ "op": "open", "lease_ms": 1000 })).await;
    assert_eq!(client.json().await["type"], "stream_open");
    let end = without_id(client.json().await);
    assert_eq!((&end["type"], &end["outcome"]), (&json!("stream_end"), &json!("error")));
    assert_eq!(end["error"]["code"], "worker_lost");
    let (status, answer) = change(&instance, json!({ "op": "append", "text": "late" })).await;
    assert_eq!((status, &answer["error"]["code"]), (409, &json!("conflict")));
    // It was told once, although two instances look after it.
    instance.keep("s", r#"{"n":1}"#).await;
    assert_eq!(client.json().await["n"], 1);
    drop(other);
}

async fn what_does_not_fit_is_refused(backend: Backend) {
    let instance = start(&backend).await;
    let append = json!({ "op": "append", "text": "x" });
    assert_eq!(change(&instance, append.clone()).await.0, 404);
    done(&instance, json!({ "op": "open" })).await;
    done(&instance, append).await;
    assert_eq!(change(&instance, json!({ "op": "append", "text": "x", "seq": 7 })).await.0, 409);
    assert_eq!(change(&instance, json!({ "op": "dance" })).await.0, 400);
    assert_eq!(change(&instance, json!({ "op": "renew", "lease_ms": 1 })).await.0, 400);
    done(&instance, json!({ "op": "end", "outcome": "cancelled" })).await;
    done(&instance, json!({ "op": "end", "outcome": "cancelled" })).await;
    assert_eq!(change(&instance, json!({ "op": "end", "outcome": "finish" })).await.0, 409);
}

async fn a_clients_stop_reaches_the_worker(backend: Backend) {
    let instance = start(&backend).await;
    let mut worker = instance.follow("session:s:up").await;
    let mut client = instance.client("s").await;
    done(&instance, json!({ "op": "open" })).await;
    client.send(r#"{"type":"stream_stop","stream":"a"}"#).await;
    assert_eq!(worker.json().await, json!({ "type": "stream_stop", "stream": "a" }));
}

/// Streams of dead workers end once Redis takes writes again, whatever it refused them for.
async fn dead_streams_end_after(refuse: &[&str], allow: &[&str]) {
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { panic!("no Redis") };
    let instance = start(&backend).await;
    let mut client = instance.client("s").await;
    done(&instance, json!({ "op": "open", "lease_ms": 1000 })).await;
    append(&instance, &["Hel"]).await;
    assert_eq!(client.json().await["type"], "stream_open");
    assert_eq!(client.json().await["type"], "stream_append");
    // A fresh lease, so that the refusal comes before its end.
    done(&instance, json!({ "op": "renew", "lease_ms": 1000 })).await;
    server.call(refuse);
    let refused = || instance.metric("wsproxy_errors_total{kind=\"stream_end_refused\"}") >= 2.0;
    eventually("Redis refuses to end it", refused).await;
    server.call(allow);
    let end = without_id(client.json().await);
    assert_eq!((&end["type"], &end["outcome"]), (&json!("stream_end"), &json!("error")));
    assert_eq!(end["error"]["code"], "worker_lost");
    assert_eq!(server.call(&["ZCARD", "streams:leases"]), Answer::Integer(0));
}

#[tokio::test]
async fn a_dead_workers_stream_ends_after_redis_was_full() {
    let allow = ["CONFIG", "SET", "maxmemory", "0"];
    dead_streams_end_after(&["CONFIG", "SET", "maxmemory", "1000"], &allow).await;
}

#[tokio::test]
async fn a_dead_workers_stream_ends_after_replicas_were_missing() {
    let allow = ["CONFIG", "SET", "min-replicas-to-write", "0"];
    dead_streams_end_after(&["CONFIG", "SET", "min-replicas-to-write", "1"], &allow).await;
}

#[tokio::test]
async fn streams_that_cannot_be_ended_keep_no_other_waiting() {
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { panic!("no Redis") };
    let instance = start(&backend).await;
    // More than one round looks at, all older than the one that can be ended.
    for n in 0..250 {
        let session = format!("odd{n}");
        server.call(&["SET", &format!("{{session:{session}:down}}:stream:a"), "a string"]);
        server.call(&["ZADD", "streams:leases", &n.to_string(), &format!("{session}/a")]);
    }
    server.call(&["ZADD", "streams:leases", "1", "gone/a", "1", "no member of ours"]);
    let mut client = instance.client("s").await;
    done(&instance, json!({ "op": "open", "lease_ms": 1000 })).await;
    assert_eq!(client.json().await["type"], "stream_open");
    assert_eq!(client.json().await["error"]["code"], "worker_lost");
    // Only a lease without a stream is forgotten.
    let left = || server.call(&["ZCARD", "streams:leases"]) == Answer::Integer(250);
    eventually("leases of no stream are forgotten", left).await;
}
