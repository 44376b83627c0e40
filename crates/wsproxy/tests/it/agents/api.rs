//! Calls of tools over HTTP: every status, on the agent's own instance and on another one.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    agents::stage::{Open, Stage, call, call_with, echo},
    support::{
        eventually,
        gateway::{Backend, over_both},
        http::Response,
        soon,
    },
};

over_both!(
    a_call_is_answered_with_the_result_of_the_tool,
    a_tools_error_is_an_answer,
    a_call_that_is_not_answered_times_out,
    a_call_without_an_agent_is_refused_and_audited,
    a_call_ends_with_the_connection_of_its_agent,
    a_busy_agent_is_told_and_the_call_may_be_repeated,
    a_client_that_hangs_up_cancels_its_call,
    a_cancelled_call_is_answered_and_the_agent_told,
    a_repeated_key_joins_its_call_and_is_refused_behind_its_end,
    one_of_two_callers_may_leave,
    a_large_result_passes_whole,
    a_malformed_call_is_refused,
    params_reach_the_agent_as_they_were_written,
);

/// Asserts status, code, outcome, and whether the call may be repeated.
#[track_caller]
fn assert_failed(answer: &Response, status: u16, code: &str, retryable: bool) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), "application/json");
    let body = answer.json();
    assert_eq!(
        (&body["error"]["code"], &body["error"]["retryable"]),
        (&json!(code), &json!(retryable))
    );
    let is_outcome = !matches!(code, "duplicate" | "conflict" | "outcome_unknown");
    assert_eq!(body.get("outcome"), is_outcome.then(|| json!(code)).as_ref(), "{body}");
    assert!(body["request_id"].as_str().is_some_and(|id| !id.is_empty()), "{body}");
    assert_eq!(
        answer.headers.contains_key("retry-after"),
        retryable && status != 502,
        "{answer:?}"
    );
}

async fn a_call_is_answered_with_the_result_of_the_tool(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let body = json!({ "tool": "echo", "params": { "n": 1.50, "s": "\u{e9}" } });
    let (answer, sent) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(sent["tool"], "echo");
    let expected = json!({
        "request_id": sent["requestId"],
        "outcome": "response",
        "success": true,
        "result": { "n": 1.5, "s": "\u{e9}" },
        "error": null,
        "execution_time_ms": 12,
    });
    assert_eq!(answer.json(), expected);
    assert_eq!(stage.calls("response"), 1.0);
}

async fn a_tools_error_is_an_answer(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(Duration::from_secs(20));
    let respond = async {
        let call = agent.call().await;
        let members = json!({ "success": false, "error": "no such file" });
        agent.respond_with(&call, members).await;
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), respond);
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!((&body["outcome"], &body["success"]), (&json!("response"), &json!(false)));
    assert_eq!((&body["result"], &body["error"]), (&Value::Null, &json!("no such file")));
}

async fn a_call_that_is_not_answered_times_out(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let body = echo(Duration::from_millis(300));
    let cancelled = async {
        let call = agent.call().await;
        assert!(call["deadlineMs"].as_u64().is_some_and(|left| left <= 300), "{call}");
        let cancel = agent.client.json().await;
        assert_eq!(cancel["type"], "tool_cancel", "{cancel}");
        assert_eq!(cancel["requestId"], call["requestId"]);
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), cancelled);
    assert_failed(&answer, 504, "timeout", false);
    assert_eq!(stage.calls("timeout"), 1.0);
}

async fn a_call_without_an_agent_is_refused_and_audited(backend: Backend) {
    let stage = Stage::start(backend).await;
    let answer = call(stage.caller(), "nobody", &echo(Duration::from_secs(20))).await;
    assert_failed(&answer, 503, "agent_offline", true);
    assert_eq!(stage.calls("agent_offline"), 1.0);
    let row = stage.audited("nobody").await;
    assert_eq!((&*row.outcome, &*row.tool), ("agent_offline", "echo"));
    assert!(row.details.contains("api.keys"), "{row:?}");
}

async fn a_call_ends_with_the_connection_of_its_agent(backend: Backend) {
    let stage = Stage::start(backend).await;
    for (key, retryable) in [(None, false), (Some("q-1"), true)] {
        let mut agent = stage.agent("u-1").await;
        let headers: Vec<_> = key.map(|key| ("idempotency-key", key)).into_iter().collect();
        let body = echo(Duration::from_secs(20));
        let leave = async {
            agent.call().await;
            drop(agent);
        };
        let (answer, ()) = tokio::join!(call_with(stage.caller(), "u-1", &headers, &body), leave);
        assert_failed(&answer, 502, "agent_gone", retryable);
    }
    assert_eq!(stage.calls("agent_gone"), 2.0);
}

async fn a_busy_agent_is_told_and_the_call_may_be_repeated(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.in_flight_max = 1).await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(Duration::from_secs(20));
    let first = call(stage.caller(), "u-1", &body);
    let second = async {
        let running = agent.call().await;
        let refused = call(stage.caller(), "u-1", &body).await;
        assert_failed(&refused, 429, "busy", true);
        agent.respond(&running, Value::Null).await;
    };
    let (answer, ()) = tokio::join!(first, second);
    assert_eq!(answer.status, 200, "{answer:?}");
}

async fn a_client_that_hangs_up_cancels_its_call(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let open = Open::call(stage.caller(), "u-1", &[], &echo(Duration::from_secs(20))).await;
    let call = agent.call().await;
    drop(open);
    let cancel = soon("the cancel", agent.client.json()).await;
    assert_eq!(
        (&cancel["type"], &cancel["requestId"]),
        (&json!("tool_cancel"), &call["requestId"])
    );
    eventually("the outcome is counted", || stage.calls("cancelled") == 1.0).await;
}

async fn a_cancelled_call_is_answered_and_the_agent_told(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let body = echo(Duration::from_secs(20));
    let cancel = async {
        let call = agent.call().await;
        let id = call["requestId"].as_str().unwrap();
        let path = format!("/api/v1/agents/u-1/calls/{id}");
        let answer = stage.caller().api("DELETE", &path, "").await;
        assert_eq!((answer.status, answer.json()), (202, json!({ "request_id": id })));
        assert_eq!(agent.client.json().await["type"], "tool_cancel");
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), cancel);
    assert_failed(&answer, 409, "cancelled", false);
    // A call that is not there is cancelled without an effect.
    let answer = stage.caller().api("DELETE", "/api/v1/agents/u-1/calls/other", "").await;
    assert_eq!(answer.status, 202, "{answer:?}");
}

async fn a_repeated_key_joins_its_call_and_is_refused_behind_its_end(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let headers = [("idempotency-key", "q-1")];
    let body = echo(Duration::from_secs(20));
    let again = || call_with(stage.caller(), "u-1", &headers, &body);
    let mut first = Open::call(stage.caller(), "u-1", &headers, &body).await;
    let running = agent.call().await;
    assert_eq!(running["requestId"], "q-1");
    let mut second = Open::call(stage.holder(), "u-1", &headers, &body).await;
    let mut third = Open::call(stage.caller(), "u-1", &headers, &body).await;
    let other = json!({ "tool": "other" });
    let refused = call_with(stage.caller(), "u-1", &headers, &other).await;
    assert_failed(&refused, 409, "conflict", false);
    stage.settled().await;
    agent.respond(&running, json!("one")).await;
    for open in [&mut first, &mut second, &mut third] {
        let answer = open.answer().await;
        assert_eq!((answer.status, &answer.json()["result"]), (200, &json!("one")), "{answer:?}");
    }
    assert_failed(&again().await, 409, "duplicate", false);
    let refused = call_with(stage.caller(), "u-1", &headers, &other).await;
    assert_failed(&refused, 409, "conflict", false);
    assert_eq!(stage.calls("response"), 1.0);
}

async fn one_of_two_callers_may_leave(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent_v2("u-1").await;
    let headers = [("idempotency-key", "q-1")];
    let body = echo(Duration::from_secs(20));
    let leaving = Open::call(stage.caller(), "u-1", &headers, &body).await;
    let running = agent.call().await;
    let mut staying = Open::call(stage.holder(), "u-1", &headers, &body).await;
    stage.settled().await;
    drop(leaving);
    stage.settled().await;
    agent.respond(&running, json!(1)).await;
    assert_eq!(staying.answer().await.status, 200);
    // Had the agent been told to cancel, this would not be the next message.
    let (answer, _) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!(answer.status, 200);
}

async fn a_large_result_passes_whole(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let text = "x".repeat(1024 * 1024 - 1000);
    let respond = async {
        let call = agent.call().await;
        agent.respond(&call, json!(text)).await;
    };
    let body = echo(Duration::from_secs(20));
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), respond);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["result"].as_str().map(str::len), Some(text.len()));
}

async fn a_malformed_call_is_refused(backend: Backend) {
    let stage = Stage::start(backend).await;
    let post = async |path: &str, body: &str| stage.caller().api("POST", path, body).await;
    for body in [
        "",
        "[]",
        "{}",
        r#"{"tool":""}"#,
        r#"{"tool":1}"#,
        r#"{"tool":"t","params":[]}"#,
        r#"{"tool":"t","timeout_ms":0}"#,
        r#"{"tool":"t","timeout_ms":3600001}"#,
        r#"{"tool":"t","timeout":1}"#,
        r#"{"tool":"t","tool":"u"}"#,
    ] {
        let answer = post("/api/v1/agents/u-1/calls", body).await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        assert_eq!(answer.json()["error"]["code"], "bad_request", "{body}");
    }
    let valid = r#"{"tool":"t"}"#;
    assert_eq!(post("/api/v1/agents/u%3A1/calls", valid).await.json()["error"]["code"], "bad_id");
    let headers = [("idempotency-key", "a:b")];
    let answer = call_with(stage.caller(), "u-1", &headers, &json!({ "tool": "t" })).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (400, &json!("bad_id")));
    let answer = stage.caller().get("/api/v1/agents").await;
    assert_eq!(answer.status, 401, "{answer:?}");
}

async fn params_reach_the_agent_as_they_were_written(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let params = r#"{"n":115792089237316195423570985008687907853269984665640564039457,"e":1E400,"s":"\u00e9\/"}"#;
    let body = format!(r#"{{"tool":"t","params":{params}}}"#);
    let check = async {
        let text = agent.client.text().await;
        assert!(text.contains(params), "{text}");
        let id = text.split(r#""requestId":""#).nth(1).unwrap().split('"').next().unwrap();
        let response = format!(
            r#"{{"type":"tool_response","requestId":"{id}","success":true,"result":{params}}}"#
        );
        agent.client.send(response).await;
    };
    let asked = stage.caller().api("POST", "/api/v1/agents/u-1/calls", &body);
    let (answer, ()) = tokio::join!(asked, check);
    assert!(answer.body.contains(&format!(r#""result":{params}"#)), "{answer:?}");
}
