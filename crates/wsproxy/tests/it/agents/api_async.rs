//! Asynchronous calls over HTTP: begun, asked for, forgotten.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    agents::stage::{Open, Stage, call_with, echo},
    support::{
        eventually_yes,
        gateway::{Backend, over_both},
        http::Response,
        soon,
    },
};

over_both!(
    an_asynchronous_call_is_asked_for_later,
    a_question_waits_for_the_outcome,
    a_failed_outcome_is_kept,
    an_asynchronous_call_joins_a_plain_one_of_redis,
    a_large_result_is_kept_without_itself,
    a_repeated_key_finds_the_same_call,
    an_asynchronous_call_without_an_agent_leaves_nothing,
    a_question_of_another_user_finds_nothing,
    an_asynchronous_call_is_cancelled,
);

async fn begin(stage: &Stage, key: &str) -> Response {
    let headers = [("prefer", "respond-async"), ("idempotency-key", key)];
    call_with(stage.caller(), "u-1", &headers, &echo(Duration::from_secs(20))).await
}

async fn ask(stage: &Stage, user: &str, id: &str, query: &str) -> Response {
    // Any instance knows the outcome.
    let path = format!("/api/v1/agents/{user}/calls/{id}{query}");
    stage.holder().api("GET", &path, "").await
}

/// Asks until the call has ended.
async fn ended(stage: &Stage, id: &str) -> Response {
    let mut last = None;
    eventually_yes("the call ends", async || {
        let answer = ask(stage, "u-1", id, "").await;
        last = Some(answer.clone());
        answer.status != 202
    })
    .await;
    last.unwrap()
}

async fn an_asynchronous_call_is_asked_for_later(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(Duration::from_secs(30));
    let begun = call_with(stage.caller(), "u-1", &LATER, &body).await;
    assert_eq!(begun.status, 202, "{begun:?}");
    let told = begun.json();
    let id = told["request_id"].as_str().unwrap();
    assert_eq!(begun.header("location"), format!("/api/v1/agents/u-1/calls/{id}"));
    assert_eq!(begun.header("preference-applied"), "respond-async");
    assert_eq!(told["status"], "running");
    let is_left = |told: &Value| {
        told["deadline_ms"].as_u64().is_some_and(|ms| (20_000..=30_000).contains(&ms))
    };
    assert!(is_left(&told), "{told}");
    let call = agent.call().await;
    assert_eq!(call["requestId"], id);
    let asked = ask(&stage, "u-1", id, "").await;
    assert_eq!(asked.status, 202, "{asked:?}");
    assert!(is_left(&asked.json()), "{asked:?}");
    agent.respond(&call, json!([1, 2])).await;
    let asked = ended(&stage, id).await;
    let expected = json!({
        "request_id": id, "outcome": "response", "success": true,
        "result": [1, 2], "error": null, "execution_time_ms": 12,
    });
    assert_eq!((asked.status, asked.json()), (200, expected));
    // It is still there.
    assert_eq!(ask(&stage, "u-1", id, "?wait=5").await.status, 200);
}

async fn a_question_waits_for_the_outcome(backend: Backend) {
    let stage = Stage::with(backend, |config| {
        // A question may wait for longer than another request may take.
        config.server.header_timeout = Duration::from_millis(300);
        config.server.handshake_timeout = Duration::from_millis(700);
    })
    .await;
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    let call = agent.call().await;
    let waited = std::time::Instant::now();
    assert_eq!(ask(&stage, "u-1", "q-1", "?wait=2").await.status, 202);
    assert!(waited.elapsed() >= Duration::from_secs(2));
    let asked = ask(&stage, "u-1", "q-1", "?wait=30");
    let respond = async {
        stage.settled().await;
        agent.respond(&call, json!(1)).await;
    };
    let (asked, ()) = soon("the outcome", async { tokio::join!(asked, respond) }).await;
    assert_eq!((asked.status, &asked.json()["result"]), (200, &json!(1)));
    for wait in ["?wait=61", "?wait=-1", "?wait=x", "?other=1"] {
        assert_eq!(ask(&stage, "u-1", "q-1", wait).await.status, 400, "{wait}");
    }
}

async fn a_failed_outcome_is_kept(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    agent.call().await;
    drop(agent);
    let asked = ended(&stage, "q-1").await;
    // The question is answered, whatever the outcome.
    assert_eq!(asked.status, 200, "{asked:?}");
    let body = asked.json();
    assert_eq!(
        (&body["outcome"], &body["error"]["code"]),
        (&json!("agent_gone"), &json!("agent_gone"))
    );
    // The same call again is a duplicate: a repetition needs another key.
    assert_eq!(body["error"]["retryable"], false, "{body}");
    assert_eq!(begin(&stage, "q-1").await.status, 409);
}

/// Both callers have no channel of their own, but the outcome of one is kept.
async fn an_asynchronous_call_joins_a_plain_one_of_redis(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let plain = r#"{"type":"tool_call","requestId":"q-1","tool":"echo","params":{"n":1.5}}"#;
    stage.caller().publish("agent:u-1:commands", plain);
    let call = agent.call().await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    stage.settled().await;
    agent.respond(&call, json!(1)).await;
    let asked = ended(&stage, "q-1").await;
    assert_eq!((asked.status, &asked.json()["result"]), (200, &json!(1)), "{asked:?}");
}

async fn a_large_result_is_kept_without_itself(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    let call = agent.call().await;
    agent.respond(&call, json!("x".repeat(300_000))).await;
    let body = ended(&stage, "q-1").await.json();
    assert_eq!((&body["too_large"], &body["size"]), (&json!(true), &json!(300_002)));
    assert_eq!((&body["outcome"], &body["success"]), (&json!("response"), &json!(true)));
    assert_eq!(body.get("result"), None);
}

async fn a_repeated_key_finds_the_same_call(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    let call = agent.call().await;
    let again = begin(&stage, "q-1").await;
    assert_eq!((again.status, &again.json()["status"]), (202, &json!("running")), "{again:?}");
    let headers = [("prefer", "respond-async"), ("idempotency-key", "q-1")];
    let other = call_with(stage.caller(), "u-1", &headers, &json!({ "tool": "other" })).await;
    assert_eq!((other.status, &other.json()["error"]["code"]), (409, &json!("conflict")));
    agent.respond(&call, json!(1)).await;
    assert_eq!(ended(&stage, "q-1").await.status, 200);
    let again = begin(&stage, "q-1").await;
    assert_eq!((again.status, &again.json()["error"]["code"]), (409, &json!("duplicate")));
    assert_eq!(stage.calls("response"), 1.0);
}

async fn an_asynchronous_call_without_an_agent_leaves_nothing(backend: Backend) {
    let stage = Stage::start(backend).await;
    let refused = begin(&stage, "q-1").await;
    assert_eq!((refused.status, &refused.json()["outcome"]), (503, &json!("agent_offline")));
    assert_eq!(ask(&stage, "u-1", "q-1", "").await.status, 404);
    assert_eq!(stage.calls("agent_offline"), 1.0);
    assert_eq!(stage.audited("u-1").await.outcome, "agent_offline");
    // So it may be sent again.
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    agent.echo().await;
    assert_eq!(ended(&stage, "q-1").await.status, 200);
}

async fn a_question_of_another_user_finds_nothing(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    agent.call().await;
    for query in ["", "?wait=1"] {
        let asked = ask(&stage, "u-2", "q-1", query).await;
        assert_eq!((asked.status, &asked.json()["error"]["code"]), (404, &json!("not_found")));
        assert_eq!(ask(&stage, "u-1", "q-2", query).await.status, 404);
    }
    // A synchronous call keeps nothing.
    let headers = [("idempotency-key", "q-3")];
    let mut open = Open::call(stage.caller(), "u-1", &headers, &json!({ "tool": "t" })).await;
    agent.echo().await;
    assert_eq!(open.answer().await.status, 200);
    assert_eq!(ask(&stage, "u-1", "q-3", "").await.status, 404);
}

async fn an_asynchronous_call_is_cancelled(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    assert_eq!(begin(&stage, "q-1").await.status, 202);
    agent.call().await;
    let cancelled = stage.caller().api("DELETE", "/api/v1/agents/u-1/calls/q-1", "").await;
    assert_eq!(cancelled.status, 202);
    assert_eq!(agent.client.json().await["type"], "tool_cancel");
    assert_eq!(ended(&stage, "q-1").await.json()["outcome"], "cancelled");
}

const LATER: [(&str, &str); 1] = [("prefer", "respond-async")];
