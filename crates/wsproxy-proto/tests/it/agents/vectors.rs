//! Every vector of `spec/agents`, as the gateway reads and writes it. The packages are tested with the same files.

use std::{str, time::Duration};

use serde_json::{Value, json};
use uuid::Uuid;
use wsproxy_proto::agents::{
    answer::{self, Answer, Form},
    body_hash,
    command::{self, BadCommandKind, Command, ToolCall},
    message::{self, AgentMessage, ToolResponse},
    outcome::{Failure, Outcome},
    writer::{self, CallDetails, ConnectedDetails},
};
use wsproxy_proto::names::Id;

#[test]
fn every_command_is_read_and_passed_on_as_the_vectors_say() {
    for case in cases(include_str!("../../../../../spec/agents/commands.json"), "cases") {
        let payload = case["command"].as_str().unwrap();
        let read = command::parse(payload.as_bytes());
        let found = match &read {
            Ok(Command::Call(call)) => call_as_json(call),
            Ok(Command::Cancel { request, reply_to }) => {
                json!({ "kind": "cancel", "request": request.as_str(), "reply_to": text(reply_to) })
            }
            Ok(Command::Owner(marker)) => json!({
                "kind": "owner",
                "connection": marker.connection.map(|id| id.to_string()),
                "generation": marker.generation,
                "former": marker.former.map(|id| id.to_string()),
            }),
            Ok(Command::Other) => json!({ "kind": "other" }),
            Err(bad) => json!({
                "kind": "dropped",
                "error": error_name(bad.kind),
                "request": text(&bad.request),
                "reply_to": text(&bad.reply_to),
            }),
        };
        assert_members(&found, &case);
        let again = match &read {
            Ok(Command::Call(call)) => call.encode(),
            Ok(Command::Cancel { request, reply_to }) => {
                command::cancel(request, reply_to.as_ref())
            }
            Ok(Command::Owner(marker)) => marker.encode(),
            Ok(Command::Other) | Err(_) => continue,
        };
        assert_eq!(command::parse(&again), read, "{}", case["name"]);
        if let Ok(Command::Call(call)) = read {
            // Handed on it is the same call, whatever the caller wrote beside.
            let handed_on = command::hand_on(&call);
            let expected = Command::Call(ToolCall { again: true, ..call.clone() });
            assert_eq!(command::parse(&handed_on), Ok(expected), "{}", case["name"]);
        }
    }
}

#[test]
fn every_message_of_an_agent_becomes_the_answer_of_the_vectors() {
    let user = user();
    for case in cases(include_str!("../../../../../spec/agents/agent_messages.json"), "cases") {
        let found = match message::parse(case["message"].as_str().unwrap().as_bytes()) {
            Ok(AgentMessage::Heartbeat) => json!({ "kind": "heartbeat" }),
            Ok(AgentMessage::Hello(hello)) => json!({
                "kind": "hello",
                "version": hello.version,
                "platform": hello.platform,
                "cancel": hello.cancel,
            }),
            Ok(AgentMessage::Response(response)) => response_as_json(&user, &response),
            Ok(AgentMessage::Progress(progress)) => {
                let published = answer::progress(&user, &progress);
                let again = Answer::parse(&published);
                let told = Answer::Progress { user: user.clone(), progress: progress.clone() };
                assert_eq!(again, Some(told), "{}", case["name"]);
                json!({
                    "kind": "progress",
                    "request": progress.request.as_str(),
                    "published_to_reply_to": utf8(&published),
                    "event_data": utf8(&answer::progress_data(&progress)),
                })
            }
            Err(bad) => json!({ "kind": "invalid", "error": bad.code() }),
        };
        assert_members(&found, &case);
    }
}

#[test]
fn every_message_to_an_agent_has_the_bytes_of_the_vectors() {
    let (user, request) = (user(), request());
    let connection = Uuid::from_u128(0x0190_f5a0_0000_7000_8000_0000_0000_0001);
    let (interval, timeout) = (Duration::from_secs(30), Duration::from_secs(90));
    let details = ConnectedDetails { connection, interval, timeout };
    let connected = |details| writer::connected(&user, NOW_MS, "ws-server-1", details);
    let call = |details| writer::tool_call(&request, "read_file", br#"{"path":"/x"}"#, details);
    let traced = CallDetails { deadline_ms: LEFT_MS, traceparent: Some(TRACEPARENT) };
    let untraced = CallDetails { traceparent: None, ..traced };
    let strike = message::parse(b"{}").unwrap_err();
    let ours = [
        connected(None),
        connected(Some(&details)),
        writer::heartbeat_ack(NOW_MS),
        call(None),
        call(Some(&untraced)),
        call(Some(&traced)),
        writer::tool_cancel(&request, Outcome::Timeout.label()),
        writer::tool_cancel(&request, Outcome::Cancelled.label()),
        writer::error(strike.code(), &format!("The message is invalid: {strike}.")),
    ];
    let vectors = cases(include_str!("../../../../../spec/agents/gateway_messages.json"), "cases");
    let texts: Vec<_> = vectors.iter().map(|case| case["text"].as_str().unwrap()).collect();
    assert_eq!(ours.each_ref().map(|text| utf8(text)).as_slice(), texts);
}

#[test]
fn every_failure_has_the_bytes_of_the_vectors_and_is_told_from_the_others() {
    let (user, request) = (user(), request());
    let vectors = cases(include_str!("../../../../../spec/agents/failures.json"), "failures");
    assert_eq!(vectors.len(), Failure::ALL.len());
    for (failure, case) in Failure::ALL.into_iter().zip(vectors) {
        let published = answer::failure(&user, &request, failure, Form::Request);
        let to_caller = answer::failure(&user, &request, failure, Form::Caller);
        let found = json!({
            "code": failure.code(),
            "outcome": failure.outcome().map(Outcome::label),
            "message": failure.message(&user).to_string(),
            "published": utf8(&published),
            "published_to_reply_to": utf8(&to_caller),
        });
        assert_members(&found, &case);
        let Some(Answer::Ended(answer)) = Answer::parse(&to_caller) else { panic!("{case}") };
        assert_eq!((answer.failure, answer.success), (Some(failure), false));
        assert_eq!((answer.user, answer.request), (user.clone(), request.clone()));
    }
    for outcome in Outcome::ALL {
        assert_eq!(Outcome::parse(outcome.label()), Some(outcome));
        let told = outcome.failure().and_then(Failure::outcome);
        assert_eq!(told.unwrap_or(Outcome::Response), outcome);
    }
}

#[test]
fn answers_of_others_are_refused_and_unknown_codes_are_failures() {
    let to = |rest: &str| format!(r#"{{"userId":"u1","requestId":"q-1"{rest}}}"#);
    let good = to(r#","success":true,"outcome":"response""#);
    assert!(Answer::parse(good.as_bytes()).is_some());
    for other in [
        to(""),
        to(r#","success":true"#),
        to(r#","success":true,"outcome":"timeout""#),
        to(r#","success":true,"outcome":"response","userId":"u2""#),
        good.replace(r#""u1""#, r#""u:1""#),
        good.replace("requestId", "request"),
        "{}".into(),
        "[]".into(),
    ] {
        assert_eq!(Answer::parse(other.as_bytes()), None, "{other}");
    }
    let later = to(r#","success":false,"code":"of_a_later_version""#);
    let Some(Answer::Ended(answer)) = Answer::parse(later.as_bytes()) else { panic!("{later}") };
    assert_eq!(answer.failure, Some(Failure::AgentGone));
}

#[test]
fn payloads_that_are_not_utf8_are_refused() {
    let payload = b"{\"type\":\"\xff\"}";
    assert_eq!(command::parse(payload).unwrap_err().kind, BadCommandKind::NotAnObject);
    assert_eq!(message::parse(payload).unwrap_err().code(), "invalid_json");
}

#[test]
fn thousands_of_levels_are_an_error_and_cost_no_stack() {
    for depth in [5_000, 1_000_000] {
        let nested = "[".repeat(depth) + &"]".repeat(depth);
        let response = format!(
            r#"{{"type":"tool_response","requestId":"q-1","success":true,"result":{nested}}}"#
        );
        assert_eq!(message::parse(response.as_bytes()).unwrap_err().code(), "invalid_json");
        let call =
            format!(r#"{{"type":"tool_call","requestId":"q-1","tool":"t","params":{nested}}}"#);
        let bad = command::parse(call.as_bytes()).unwrap_err();
        assert_eq!(bad.kind, BadCommandKind::NotAnObject);
    }
}

#[test]
fn hash_of_a_body_tells_tool_and_params_apart() {
    let hashes = [
        body_hash("ab", b"c"),
        body_hash("a", b"bc"),
        body_hash("", b"abc"),
        body_hash("ab", b"C"),
        body_hash("ab", b""),
    ];
    for (i, hash) in hashes.iter().enumerate() {
        assert!(!hashes[..i].contains(hash), "{i}");
    }
    // The first bytes of SHA-1 over 8 bytes of length, the tool and the params.
    let known = [0x72, 0x0f, 0x89, 0xa8];
    assert_eq!(body_hash("read_file", b"{}")[..4], known);
}

fn call_as_json(call: &ToolCall<'_>) -> Value {
    let traceparent = call.traceparent.as_deref();
    let details = CallDetails { deadline_ms: LEFT_MS, traceparent };
    let sent = |details| writer::tool_call(&call.request, &call.tool, call.params, details);
    assert_eq!(call.body_hash, body_hash(&call.tool, call.params));
    json!({
        "kind": "call",
        "request": call.request.as_str(),
        "tool": call.tool,
        "params": utf8(call.params),
        "timeout_ms": call.timeout_ms,
        "traceparent": traceparent,
        "progress": call.progress,
        "reply_to": text(&call.reply_to),
        "keep": call.keep,
        "caller": call.caller,
        "to_agent_v1": utf8(&sent(None)),
        "to_agent_v2": utf8(&sent(Some(&details))),
    })
}

fn response_as_json(user: &Id, response: &ToolResponse<'_>) -> Value {
    let to_caller = answer::response(user, response, Form::Caller);
    let Some(Answer::Ended(again)) = Answer::parse(&to_caller) else { panic!("{response:?}") };
    assert_eq!((&again.user, &again.request), (user, &response.request));
    assert_eq!((again.failure, again.success), (None, response.success));
    assert_eq!(again.result, response.result);
    assert_eq!(again.error, response.error.as_deref());
    assert_eq!(again.execution_time, response.execution_time);
    json!({
        "kind": "response",
        "request": response.request.as_str(),
        "success": response.success,
        "result": response.result.map(utf8),
        "error": response.error.as_deref().map(utf8),
        "execution_time": response.execution_time.map(utf8),
        "published": utf8(&answer::response(user, response, Form::Request)),
        "published_to_reply_to": utf8(&to_caller),
    })
}

const fn error_name(kind: BadCommandKind) -> &'static str {
    match kind {
        BadCommandKind::NotAnObject => "not_an_object",
        BadCommandKind::Repeated => "repeated",
        BadCommandKind::BadRequestId => "bad_request_id",
        BadCommandKind::BadTool => "bad_tool",
        BadCommandKind::BadTimeout => "bad_timeout",
        BadCommandKind::BadReplyTo => "bad_reply_to",
        BadCommandKind::BadMarker => "bad_marker",
    }
}

/// Checks that the vector has all members of `found`, with the same values, and a name at most besides.
#[track_caller]
fn assert_members(found: &Value, case: &Value) {
    let without = ["name", "command", "message", "scope"];
    let mut wanted = case.clone();
    let wanted_members = wanted.as_object_mut().unwrap();
    wanted_members.retain(|name, _| !without.contains(&&**name) || found.get(name).is_some());
    assert_eq!(*found, wanted, "{}", case["name"]);
}

fn cases(file: &str, member: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(file).unwrap();
    assert!(file["about"].as_str().unwrap().len() > 100);
    file[member].as_array().unwrap().clone()
}

fn text(id: &Option<Id>) -> Option<&str> {
    id.as_ref().map(Id::as_str)
}

fn utf8(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

fn user() -> Id {
    Id::parse("u1").unwrap()
}

fn request() -> Id {
    Id::parse("q-1").unwrap()
}

const NOW_MS: u64 = 1_764_379_365_123;
const LEFT_MS: u64 = 29_950;
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
