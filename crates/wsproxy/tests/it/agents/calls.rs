//! Calls over Redis: with the exact frames of existing agents and callers, and every outcome.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use wsproxy::hub::inbox::Inbox;
use wsproxy_proto::{agents::outcome::Outcome, names::Id};

use super::{
    places::echo,
    site::{Caller, Site, agent, call, connect_as, response, secret},
};
use crate::support::{client::Client, eventually, gateway::TestInstance};

/// A site with an instance, an agent of the first version, and a caller that subscribes `response:mine`.
pub async fn scene() -> (Site, TestInstance, Client, Caller) {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1"]).await;
    let agent = agent(&instance, "u1").await;
    let mut caller = site.caller().await;
    caller.subscribe("response:mine").await;
    (site, instance, agent, caller)
}

/// Connects an agent of the second version that says hello.
pub async fn newer_agent(instance: &TestInstance) -> Client {
    let path = format!("/?userId=u1&secret={}&v=2", secret("u1"));
    let mut agent = connect_as(instance, &path).await.unwrap();
    let connected = agent.json().await;
    assert_eq!(connected["heartbeat"], json!({ "interval": 30_000, "timeout": 90_000 }));
    assert!(connected["connectionId"].is_string());
    agent
        .send(
            r#"{"type":"hello","version":"2.1","platform":"linux","capabilities":["cancel","progress"]}"#,
        )
        .await;
    agent
}

/// A call that is answered on the caller's own channel.
pub fn own(request: &str, more: Value) -> Value {
    let mut call = call(request);
    call["replyTo"] = "response:mine".into();
    call.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    call
}

/// The next answer: its request id, outcome or code, and itself.
async fn outcome(caller: &mut Caller) -> (String, String, Value) {
    let (_, answer) = caller.next().await;
    let word = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
    (word("requestId"), word("outcome"), answer)
}

#[tokio::test]
async fn existing_agents_and_callers_work_unchanged() {
    let (site, _instance, mut agent, mut caller) = scene().await;
    assert!(site.exists("agent:u1:server"));
    caller.subscribe("response:q-1").await;
    assert_eq!(site.command("u1", &call("q-1")), 1);
    assert_eq!(
        agent.text().await,
        r#"{"type":"tool_call","requestId":"q-1","tool":"read_file","params":{"path":"/x"}}"#
    );
    agent.send(response("q-1", &json!({ "content": "hello" }))).await;
    let (channel, answer) = caller.next().await;
    assert_eq!(channel, "response:q-1");
    assert_eq!(
        answer,
        json!({ "userId": "u1", "success": true, "result": { "content": "hello" }, "executionTime": 12 })
    );
    agent.send(r#"{"type":"heartbeat","timestamp":1234567890}"#).await;
    let ack = agent.json().await;
    assert_eq!(ack["type"], "heartbeat_ack");
    assert!(ack["timestamp"].is_u64());
    // Any other JSON object goes to the agent as it is.
    for verbatim in [r#"{ "type":"ping", "n": 1.50 }"#, r#"{"type":"tool_call","tool":"x"}"#] {
        site.server.call(&["PUBLISH", "agent:u1:commands", verbatim]);
        assert_eq!(agent.text().await, verbatim);
    }
}

#[tokio::test]
async fn each_call_has_the_outcome_that_its_end_makes() {
    let (site, _instance, mut agent, mut caller) = scene().await;
    // A tool's error is an answer.
    site.command("u1", &own("q-1", json!({})));
    agent.text().await;
    agent
        .send(r#"{"type":"tool_response","requestId":"q-1","success":false,"error":{"why":"no"}}"#)
        .await;
    let (request, word, answer) = outcome(&mut caller).await;
    assert_eq!((&*request, &*word), ("q-1", "response"));
    assert_eq!((&answer["success"], &answer["error"]), (&json!(false), &json!("{\"why\":\"no\"}")));
    // The deadline.
    let begun = Instant::now();
    site.command("u1", &own("q-2", json!({ "timeout": 300 })));
    agent.text().await;
    let (request, word, answer) = outcome(&mut caller).await;
    assert_eq!((&*request, &*word, &answer["code"]), ("q-2", "timeout", &json!("timeout")));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert!(begun.elapsed() < Duration::from_secs(3));
    // A cancelled call, and what comes too late for it.
    site.command("u1", &own("q-3", json!({})));
    agent.text().await;
    site.command("u1", &json!({ "type": "tool_cancel", "requestId": "q-3" }));
    assert_eq!(outcome(&mut caller).await.1, "cancelled");
    for late in ["q-2", "q-3", "q-1", "never", "q-1"] {
        agent.send(response(late, &json!(1))).await;
    }
    // The connection ends.
    site.command("u1", &own("q-4", json!({})));
    agent.text().await;
    let begun = Instant::now();
    drop(agent);
    let (request, word, answer) = outcome(&mut caller).await;
    assert_eq!((&*request, &*word), ("q-4", "agent_gone"));
    assert!(answer["error"].as_str().unwrap().starts_with("agent_gone: "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    caller.silent(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn odd_responses_are_counted_and_never_published() {
    let (site, instance, mut agent, mut caller) = scene().await;
    site.command("u1", &own("q-1", json!({ "timeout": 200 })));
    agent.text().await;
    outcome(&mut caller).await;
    site.command("u1", &own("q-2", json!({})));
    agent.text().await;
    for request in ["q-1", "q-2", "q-2", "other"] {
        agent.send(response(request, &json!(request))).await;
    }
    assert_eq!(outcome(&mut caller).await.0, "q-2");
    caller.silent(Duration::from_millis(200)).await;
    let counters = &instance.families().agents.counters;
    eventually("all are counted", || counters.unknown.value() == 1).await;
    assert_eq!((counters.late.value(), counters.duplicate.value()), (1, 1));
}

#[tokio::test]
async fn a_request_id_runs_once() {
    let (site, _instance, mut agent, mut caller) = scene().await;
    caller.subscribe("response:second").await;
    let first = own("q-1", json!({}));
    let mut second = first.clone();
    second["replyTo"] = "response:second".into();
    let mut other = second.clone();
    other["tool"] = "other".into();
    // The same call for the same channel, and for another one; then another call with this id.
    for command in [&first, &first, &second, &other] {
        site.command("u1", command);
    }
    agent.text().await;
    let (channel, answer) = caller.next().await;
    assert_eq!((&*channel, &answer["code"]), ("response:second", &json!("conflict")));
    agent.send(response("q-1", &json!("once"))).await;
    let mut channels = [caller.next().await, caller.next().await];
    channels.sort_by_key(|(channel, _)| channel.clone());
    assert_eq!(channels[0].0, "response:mine");
    assert_eq!(channels[1].0, "response:second");
    assert_eq!(
        (&channels[0].1["result"], &channels[1].1["result"]),
        (&json!("once"), &json!("once"))
    );
    // Remembered.
    site.command("u1", &second);
    let (_, answer) = caller.next().await;
    assert_eq!(answer["code"], "duplicate");
    // A copy that another gateway handed on gets no second answer.
    second["again"] = true.into();
    site.command("u1", &second);
    site.command("u1", &own("q-2", json!({})));
    assert_eq!(agent.json().await["requestId"], "q-2");
    agent.send(response("q-2", &json!(2))).await;
    assert_eq!(outcome(&mut caller).await.0, "q-2");
}

#[tokio::test]
async fn more_calls_than_the_bound_are_busy() {
    let site = Site::start();
    let mut config = site.config("one");
    config.agents.in_flight_max = 3;
    let instance = site.instance_with(config).await;
    site.add(&["u1"]).await;
    let mut agent = agent(&instance, "u1").await;
    let mut caller = site.caller().await;
    caller.subscribe("response:mine").await;
    for number in 0..4 {
        site.command("u1", &own(&format!("q-{number}"), json!({})));
    }
    let (request, word, _) = outcome(&mut caller).await;
    assert_eq!((&*request, &*word), ("q-3", "busy"));
    for _ in 0..3 {
        agent.text().await;
    }
    agent.send(response("q-1", &json!(1))).await;
    assert_eq!(outcome(&mut caller).await.0, "q-1");
    site.command("u1", &own("q-5", json!({})));
    assert_eq!(agent.json().await["requestId"], "q-5");
}

#[tokio::test]
async fn large_calls_to_a_full_inbox_do_not_hold_up_the_bus() {
    let (_site, instance, mut agent, mut caller) = scene().await;
    let agents = &instance.families().agents;
    let inbox = agents.local(&Id::parse("u1").unwrap()).unwrap();
    let busy = || agents.counters.calls.of(Outcome::Busy).count.value();
    let text = "x".repeat(900_000);
    // Nothing else runs on this thread meanwhile, so that the inbox becomes full: it takes 8 MiB.
    for number in 0..12 {
        let more = json!({ "params": { "text": text } });
        inbox.message(own(&format!("q-{number}"), more).to_string().as_bytes());
    }
    assert_eq!(busy(), 0, "none was read here");
    let mut refused = Vec::new();
    for _ in 0..3 {
        let (request, word, _) = outcome(&mut caller).await;
        assert_eq!(word, "busy");
        refused.push(request);
    }
    assert_eq!((refused.join(" "), busy()), ("q-9 q-10 q-11".into(), 3));
    for number in 0..9 {
        let request = format!("q-{number}");
        assert_eq!(agent.json().await["requestId"], request);
        agent.send(response(&request, &json!(1))).await;
        assert_eq!(outcome(&mut caller).await.0, request);
    }
    caller.silent(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn commands_that_make_no_sense_are_dropped_or_refused() {
    let (site, instance, mut agent, mut caller) = scene().await;
    caller.subscribe("response:q-1").await;
    for bad in [
        "",
        "nonsense",
        "[1]",
        "\"text\"",
        "{",
        r#"{"a":1}}"#,
        "{\"type\":\"tool_call\",\"requestId\":\"a b\"}",
    ] {
        site.server.call(&["PUBLISH", "agent:u1:commands", bad]);
    }
    for (command, channel) in [
        (json!({ "type": "tool_call", "requestId": "q-1", "tool": 7 }), "response:q-1"),
        (
            json!({ "type": "tool_call", "requestId": "q-1", "tool": "t", "timeout": -1 }),
            "response:q-1",
        ),
        (
            json!({ "type": "tool_call", "requestId": "q-1", "tool": "t", "replyTo": "agent:u1:commands" }),
            "response:q-1",
        ),
    ] {
        site.command("u1", &command);
        let (told, answer) = caller.next().await;
        assert_eq!((&*told, &answer["code"]), (channel, &json!("bad_request")));
    }
    // Markers of gateways never reach an agent; an older one changes nothing.
    let marker = r#"{"type":"owner","connectionId":"01900000-0000-7000-8000-000000000000","generation":"1"}"#;
    site.server.call(&["PUBLISH", "agent:u1:commands", marker]);
    site.command("u1", &own("q-2", json!({})));
    assert_eq!(agent.json().await["requestId"], "q-2");
    assert!(instance.families().agents.counters.bad_commands.value() >= 10);
}

#[tokio::test]
async fn agents_that_break_the_rules_are_told_and_closed() {
    let (site, instance, mut client, _caller) = scene().await;
    for bad in
        ["nonsense", "[]", r#"{"type":"unknown"}"#, r#"{"type":"tool_response","requestId":"q"}"#]
    {
        client.send(bad).await;
        let error = client.json().await;
        assert_eq!(error["type"], "error", "{bad}: {error}");
    }
    // Messages of the second version are not known to the first.
    client.send(r#"{"type":"hello","version":"1"}"#).await;
    assert_eq!(client.json().await["code"], "unknown_type");
    for _ in 0..4 {
        client.send("{").await;
        client.json().await;
    }
    client.send("{").await;
    assert_eq!(client.closed().await, (1008, "too many invalid messages".into()));
    let mut client = agent(&instance, "u1").await;
    client.send_message(Message::binary(b"{}".to_vec())).await;
    assert_eq!(client.closed().await.0, 1003);
    let mut client = agent(&instance, "u1").await;
    let large = response("q", &json!("x".repeat(2 * 1024 * 1024)));
    client.send(large).await;
    assert_eq!(client.closed().await.0, 1009);
    drop(site);
}

#[tokio::test]
async fn newer_agents_get_deadlines_and_cancels_and_send_progress() {
    let (site, instance, _older, mut caller) = scene().await;
    let mut agent = newer_agent(&instance).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    site.command(
        "u1",
        &own("q-1", json!({ "timeout": 20_000, "progress": true, "traceparent": trace })),
    );
    let call = agent.json().await;
    assert_eq!((&call["deadlineMs"], &call["traceparent"]), (&json!(20_000), &json!(trace)));
    // At most some twenty a second, and the newest one.
    for progress in 0..100 {
        agent
            .send(format!(
                r#"{{"type":"tool_progress","requestId":"q-1","progress":{progress},"total":100}}"#
            ))
            .await;
    }
    let mut seen = Vec::new();
    while seen.last() != Some(&99) {
        let (_, answer) = caller.next().await;
        assert_eq!((&answer["type"], &answer["userId"]), (&json!("tool_progress"), &json!("u1")));
        seen.push(answer["progress"].as_i64().unwrap());
    }
    assert!(seen.is_sorted() && seen.len() < 20, "{seen:?}");
    site.command("u1", &json!({ "type": "tool_cancel", "requestId": "q-1" }));
    assert_eq!(
        agent.json().await,
        json!({ "type": "tool_cancel", "requestId": "q-1", "reason": "cancelled" })
    );
    assert_eq!(outcome(&mut caller).await.1, "cancelled");
    site.command("u1", &own("q-2", json!({ "timeout": 100 })));
    agent.json().await;
    assert_eq!(agent.json().await["reason"], "timeout");
    assert_eq!(outcome(&mut caller).await.1, "timeout");
}

/// Whatever `PUBLISH` counted as received is answered, also while the agent leaves and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn calls_to_an_ending_connection_are_refused_at_once() {
    let (site, _instance, agent, mut caller) = scene().await;
    // The agent does not answer the close frame, so that its connection stays for a while.
    let order = r#"{"op":"disconnect","userId":"u1"}"#;
    assert_eq!(site.server.call(&["PUBLISH", "agents:control", order]).integer(), 1);
    let end = Instant::now() + Duration::from_secs(2);
    for number in 0.. {
        assert!(Instant::now() < end, "no call was refused before the connection ended");
        assert_eq!(site.command("u1", &own(&format!("q-{number}"), json!({}))), 1);
        let (_, outcome, _) = outcome(&mut caller).await;
        // A call that came before the order was sent, and ended with it.
        if outcome != "agent_gone" {
            assert_eq!(outcome, "agent_offline");
            break;
        }
    }
    drop(agent);
}

#[tokio::test]
async fn calls_while_an_agent_leaves_are_all_answered() {
    let (site, instance, first, mut caller) = scene().await;
    let mut client = Some(first);
    let mut sent = 0;
    for round in 0..12 {
        let (agent_ends, calling) = (
            async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let client = client.take().unwrap();
                if round % 2 == 0 {
                    client.close().await;
                } else {
                    drop(client);
                }
                if round % 3 == 0 {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                agent(&instance, "u1").await
            },
            async {
                let mut sent = 0;
                let end = Instant::now() + Duration::from_millis(120);
                for number in 0.. {
                    sent += site.command("u1", &own(&format!("q-{round}-{number}"), json!({})));
                    if Instant::now() > end {
                        return sent;
                    }
                    tokio::time::sleep(Duration::from_micros(300)).await;
                }
                sent
            },
        );
        let (newer, count) = tokio::join!(agent_ends, calling);
        sent += count;
        let running = tokio::spawn(echo(newer, "agent".into()));
        while sent > 0 {
            outcome(&mut caller).await;
            sent -= 1;
        }
        running.abort();
        let _ = running.await;
        client = Some(agent(&instance, "u1").await);
    }
    caller.silent(Duration::from_millis(200)).await;
}
