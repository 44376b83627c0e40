//! Calls over HTTP that are followed as an event stream.

use std::time::Duration;

use serde_json::json;

use crate::{
    agents::stage::{Open, Stage, echo},
    support::{
        eventually,
        gateway::{Backend, over_both},
    },
};

over_both!(
    progress_comes_before_the_result,
    an_outcome_before_the_first_event_is_a_plain_answer,
    a_failure_behind_the_head_is_an_event,
    a_client_that_leaves_the_stream_cancels_its_call,
    a_silent_call_has_its_head_with_a_comment,
);

async fn progress_comes_before_the_result(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let body = echo(Duration::from_secs(20));
    let mut open = Open::call(stage.caller(), "u-1", &EVENTS, &body).await;
    let call = agent.call().await;
    agent.progress(&call, 3).await;
    let head = open.answer().await;
    assert_eq!((head.status, head.header("content-type")), (200, "text/event-stream"));
    assert_eq!((head.header("connection"), head.header("x-accel-buffering")), ("close", "no"));
    let event = "event: progress\ndata: {\"progress\":3,\"total\":10,\"message\":\"indexing\"}\n\n";
    open.expect(event).await;
    agent.respond(&call, json!({ "lines": "a\nb" })).await;
    let seen = open.expect("event: result\n").await;
    assert!(seen.find("event: progress") < seen.find("event: result"), "{seen}");
    let seen = open.expect("\"execution_time_ms\":12}\n\n").await;
    let data = seen.split("event: result\ndata: ").nth(1).unwrap().lines().next().unwrap();
    let expected = json!({
        "request_id": call["requestId"], "outcome": "response", "success": true,
        "result": { "lines": "a\nb" }, "error": null, "execution_time_ms": 12,
    });
    assert_eq!(serde_json::from_str::<serde_json::Value>(data).unwrap(), expected);
    open.0.end().await;
}

async fn an_outcome_before_the_first_event_is_a_plain_answer(backend: Backend) {
    let stage = Stage::start(backend).await;
    let body = echo(Duration::from_secs(20));
    let mut open = Open::call(stage.caller(), "nobody", &EVENTS, &body).await;
    let answer = open.answer().await;
    assert_eq!((answer.status, answer.header("content-type")), (503, "application/json"));
    assert_eq!(answer.json()["outcome"], "agent_offline");
    let mut agent = stage.agent("u-1").await;
    let mut open = Open::call(stage.caller(), "u-1", &EVENTS, &body).await;
    agent.echo().await;
    let answer = open.answer().await;
    assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"));
}

async fn a_failure_behind_the_head_is_an_event(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let body = echo(Duration::from_secs(20));
    let mut open = Open::call(stage.caller(), "u-1", &EVENTS, &body).await;
    let call = agent.call().await;
    agent.progress(&call, 1).await;
    assert_eq!(open.answer().await.status, 200);
    drop(agent);
    let seen = open.expect("event: result\n").await;
    assert!(seen.contains("event: progress"), "{seen}");
    open.expect(r#""code":"agent_gone""#).await;
    open.expect(r#""outcome":"agent_gone""#).await;
    open.0.end().await;
}

async fn a_client_that_leaves_the_stream_cancels_its_call(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let body = echo(Duration::from_secs(20));
    let mut open = Open::call(stage.caller(), "u-1", &EVENTS, &body).await;
    let call = agent.call().await;
    agent.progress(&call, 1).await;
    assert_eq!(open.answer().await.status, 200);
    drop(open);
    let cancel = agent.client.json().await;
    assert_eq!(
        (&cancel["type"], &cancel["requestId"]),
        (&json!("tool_cancel"), &call["requestId"])
    );
    eventually("the outcome is counted", || stage.calls("cancelled") == 1.0).await;
}

/// Takes longer than a request may take to arrive and to be answered otherwise.
async fn a_silent_call_has_its_head_with_a_comment(backend: Backend) {
    let stage = Stage::with(backend, |config| {
        config.server.header_timeout = Duration::from_millis(500);
        config.server.handshake_timeout = Duration::from_millis(500);
    })
    .await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(Duration::from_secs(25));
    let mut open = Open::call(stage.caller(), "u-1", &EVENTS, &body).await;
    let call = agent.call().await;
    let head = open.answer().await;
    assert_eq!((head.status, head.header("content-type")), (200, "text/event-stream"));
    open.expect(":\n").await;
    agent.respond(&call, json!(1)).await;
    open.expect("event: result\n").await;
}

const EVENTS: [(&str, &str); 1] = [("accept", "text/event-stream")];
