//! Calls over HTTP when instances are killed, Redis is lost, or answers are not what they should be.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    agents::stage::{Open, Stage, TestAgent, call, call_with, echo},
    support::{
        eventually, eventually_yes,
        gateway::{Backend, TestInstance},
        killable::Killable,
        soon,
    },
};

/// Starts a further instance of a stage that can be killed, and connects an agent to it.
async fn killable_holder(stage: &Stage, user: &str) -> (Killable, TestAgent) {
    let secret = stage.add_user(user).await;
    let config = stage.config(|config| config.agents.offline_wait = LONG);
    let (killable, address) = Killable::start(move || async move {
        let instance = TestInstance::start(config).await;
        let address = instance.address();
        std::mem::forget(instance);
        address
    })
    .await;
    let agent = TestAgent::connect_to(address, user, &secret, "").await;
    (killable, agent)
}

#[tokio::test]
async fn a_call_to_a_killed_instance_ends_long_before_its_deadline() {
    let stage = Stage::start(Backend::redis()).await;
    let (killable, mut agent) = killable_holder(&stage, "u-1").await;
    let body = json!({ "tool": "slow", "timeout_ms": 600_000 });
    let kill = async {
        agent.call().await;
        killable.kill();
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), kill);
    assert_eq!(
        (answer.status, &answer.json()["outcome"]),
        (502, &json!("agent_gone")),
        "{answer:?}"
    );
    assert_eq!(stage.audited("u-1").await.outcome, "agent_gone");
}

/// Redis knows no holder until the agent's next heartbeat, and the call runs on.
#[tokio::test]
async fn a_relayed_call_outlives_an_emptied_redis() {
    let stage = Stage::start(Backend::redis()).await;
    let mut agent = stage.agent("u-1").await;
    let mut open = Open::call(stage.caller(), "u-1", &[], &echo(LONG)).await;
    let running = agent.call().await;
    let Backend::Redis(server) = &stage.backend else { unreachable!() };
    // Behind the relay's first look, which reads the generation, and over its next two.
    let looks = || {
        let info = format!("{:?}", server.call(&["INFO", "commandstats"]));
        info.split("cmdstat_pubsub|numsub:calls=")
            .nth(1)
            .map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    };
    let before: u64 = looks();
    eventually("the relay looks", || looks() > before).await;
    server.call(&["FLUSHALL"]);
    eventually("the relay looks twice more", || looks() > before + 2).await;
    agent.respond(&running, json!("done")).await;
    let answer = open.answer().await;
    assert_eq!((answer.status, &answer.json()["result"]), (200, &json!("done")), "{answer:?}");
    assert_eq!((stage.calls("response"), stage.calls("agent_gone")), (1.0, 0.0));
}

#[tokio::test]
async fn a_call_waits_for_the_agent_of_a_killed_instance() {
    let stage = Stage::with(Backend::redis(), |config| config.agents.offline_wait = LONG).await;
    let (killable, agent) = killable_holder(&stage, "u-1").await;
    let secret = agent.secret.clone();
    killable.kill();
    let Backend::Redis(server) = &stage.backend else { unreachable!() };
    let listeners = || server.call(&["PUBSUB", "NUMSUB", "agent:u-1:commands"]);
    eventually("Redis drops the subscription", || {
        format!("{:?}", listeners()).contains("Integer(0)")
    })
    .await;
    let body = echo(LONG);
    let come_back = async {
        let waiting = || stage.caller().metric("wsproxy_agent_calls_waiting");
        eventually("the call waits", || waiting() == 1.0).await;
        let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
        agent.echo().await;
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), come_back);
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[tokio::test]
async fn a_lost_bus_leaves_the_outcome_unknown_and_later_calls_work() {
    let mut stage = Stage::start(Backend::redis()).await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(LONG);
    let mut plain = Open::call(stage.caller(), "u-1", &[], &body).await;
    let headers = [("idempotency-key", "q-1")];
    let mut with_key = Open::call(stage.caller(), "u-1", &headers, &body).await;
    agent.call().await;
    agent.call().await;
    let Backend::Redis(server) = &mut stage.backend else { unreachable!() };
    server.kill();
    let start = Instant::now();
    for (open, retryable) in [(&mut plain, false), (&mut with_key, true)] {
        let answer = open.answer().await;
        assert_eq!(answer.status, 503, "{answer:?}");
        let body = answer.json();
        let error = (&body["error"]["code"], &body["error"]["retryable"]);
        assert_eq!(error, (&json!("outcome_unknown"), &json!(retryable)), "{body}");
        assert_eq!(body.get("outcome"), None);
    }
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    // A call that is certainly not sent may be repeated.
    let refused = call(stage.caller(), "u-1", &body).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["retryable"]),
        (503, &json!(true)),
        "{refused:?}"
    );
    let Backend::Redis(server) = &mut stage.backend else { unreachable!() };
    server.restart();
    eventually_yes("calls work again", async || {
        let brief = echo(Duration::from_millis(500));
        let asked = call(stage.caller(), "u-1", &brief);
        let serve = async {
            // Calls of earlier attempts may come first.
            loop {
                agent.echo().await;
            }
        };
        tokio::select! {
            answer = asked => answer.status == 200,
            () = serve => unreachable!(),
        }
    })
    .await;
}

/// An owner that never answers: a subscriber of the commands channel that is no gateway.
#[tokio::test]
async fn an_owner_that_says_nothing_is_waited_for_two_seconds_behind_the_deadline() {
    let stage = Stage::start(Backend::redis()).await;
    let other = TestInstance::start(stage.backend.config()).await;
    let mut commands = other.follow("agent:u-1:commands").await;
    let start = Instant::now();
    let body = json!({ "tool": "t", "params": { "a": 1 }, "timeout_ms": 400 });
    let headers = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")];
    let asked = call_with(stage.caller(), "u-1", &headers, &body);
    let (answer, sent) = tokio::join!(asked, commands.json());
    assert_eq!((answer.status, &answer.json()["outcome"]), (504, &json!("timeout")), "{answer:?}");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(2400) && waited < Duration::from_secs(8), "{waited:?}");
    assert_eq!((&sent["type"], &sent["tool"]), (&json!("tool_call"), &json!("t")));
    assert_eq!(
        (&sent["params"], &sent["requestId"]),
        (&json!({ "a": 1 }), &answer.json()["request_id"])
    );
    assert!(sent["timeout"].as_u64().is_some_and(|left| (1..=400).contains(&left)), "{sent}");
    assert_eq!(
        (&sent["caller"], &sent["traceparent"]),
        (&json!("api.keys[1]"), &json!(headers[0].1))
    );
    assert!(sent["replyTo"].as_str().is_some_and(|to| to.starts_with("response:")), "{sent}");
    assert_eq!((sent.get("keep"), sent.get("progress")), (None, None));
}

#[tokio::test]
async fn an_asynchronous_call_without_an_outcome_times_out() {
    let stage = Stage::start(Backend::redis()).await;
    let other = TestInstance::start(stage.backend.config()).await;
    let mut commands = other.follow("agent:u-1:commands").await;
    let body = json!({ "tool": "t", "timeout_ms": 300 });
    let headers = [("prefer", "respond-async"), ("idempotency-key", "q-1")];
    let begun = call_with(stage.caller(), "u-1", &headers, &body);
    let (begun, sent) = tokio::join!(begun, commands.json());
    assert_eq!(begun.status, 202, "{begun:?}");
    assert_eq!((&sent["keep"], sent.get("replyTo")), (&json!(true), None), "{sent}");
    let path = "/api/v1/agents/u-1/calls/q-1";
    assert_eq!(stage.caller().api("GET", path, "").await.status, 202);
    // The question waits for the end of the patience, and no longer.
    let start = Instant::now();
    let asked = stage.caller().api("GET", &format!("{path}?wait=30"), "").await;
    assert_eq!((asked.status, &asked.json()["outcome"]), (504, &json!("timeout")), "{asked:?}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[tokio::test]
async fn only_the_answer_for_this_user_and_call_ends_a_call() {
    let stage = Stage::start(Backend::redis()).await;
    let other = TestInstance::start(stage.backend.config()).await;
    let mut commands = other.follow("agent:u-1:commands").await;
    let body = echo(LONG);
    let answer_it = async {
        let sent = commands.json().await;
        let channel = sent["replyTo"].as_str().unwrap();
        let answer = |user: &str, request: &Value, result: u64| {
            json!({ "userId": user, "success": true, "result": result, "error": null,
                "requestId": request, "outcome": "response" })
            .to_string()
        };
        let id = &sent["requestId"];
        for odd in [
            answer("u-2", id, 1),
            answer("u-1", &json!("other"), 2),
            "no JSON".to_owned(),
            "{}".to_owned(),
            json!({ "userId": "u-1", "requestId": id }).to_string(),
            format!(
                r#"{{"userId":"u-1","requestId":{id},"x":{}1{}}}"#,
                "[".repeat(5000),
                "]".repeat(5000)
            ),
            answer("u-1", id, 3),
            answer("u-1", id, 4),
        ] {
            other.publish(channel, odd);
        }
    };
    let (answer, ()) = tokio::join!(call(stage.caller(), "u-1", &body), answer_it);
    assert_eq!((answer.status, &answer.json()["result"]), (200, &json!(3)), "{answer:?}");
}

#[tokio::test]
async fn a_call_with_a_foreign_reply_channel_reaches_no_channel_of_others() {
    let stage = Stage::start(Backend::redis()).await;
    let mut agent = stage.agent("u-1").await;
    let mut foreign = stage.caller().follow("session:s:down").await;
    let mut prefixed = stage.caller().follow("response:x:y").await;
    let mut answers = stage.caller().follow("response:q-1").await;
    for channel in ["session:s:down", "response:x:y", "response:", "x"] {
        let command = json!({
            "type": "tool_call", "requestId": "q-1", "tool": "t", "params": {}, "replyTo": channel,
        });
        stage.caller().publish("agent:u-1:commands", command.to_string());
        let refused = answers.json().await;
        assert_eq!(refused["code"], "bad_request", "{channel}: {refused}");
    }
    for follower in [&mut foreign, &mut prefixed] {
        let silent = tokio::time::timeout(Duration::from_millis(100), follower.next()).await;
        assert!(silent.is_err(), "{silent:?}");
    }
    // The agent got none of them.
    let body = json!({ "tool": "next" });
    let (answer, sent) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!((answer.status, &sent["tool"]), (200, &json!("next")));
}

/// A relayed call is one command to Redis and one answer: no other command is sent for it.
#[tokio::test]
async fn a_relayed_call_costs_two_publishes() {
    let stage = Stage::start(Backend::redis()).await;
    let mut agent = stage.agent("u-1").await;
    let body = echo(LONG);
    let Backend::Redis(server) = &stage.backend else { unreachable!() };
    let stats = |name: &str| -> u64 {
        let info = format!("{:?}", server.call(&["INFO", "commandstats"]));
        let line = info.split(&format!("cmdstat_{name}:calls=")).nth(1);
        line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    };
    let before = ["subscribe", "unsubscribe", "exists", "get", "publish"].map(stats);
    for _ in 0..50 {
        let (answer, _) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
        assert_eq!(answer.status, 200);
    }
    let after = ["subscribe", "unsubscribe", "exists", "get", "publish"].map(stats);
    assert_eq!(before[..4], after[..4]);
    // Instances publish to themselves now and then, to prove their connections.
    let published = after[4] - before[4];
    assert!((100..130).contains(&published), "{published}");
}

#[tokio::test]
async fn a_relayed_call_is_answered_while_its_instance_drains() {
    let mut stage = Stage::start(Backend::redis()).await;
    let mut agent = stage.agent("u-1").await;
    let mut open = Open::call(stage.caller(), "u-1", &[], &echo(LONG)).await;
    let call = agent.call().await;
    let draining = stage.instances.remove(0);
    let core = std::sync::Arc::clone(draining.gateway());
    let drained = async {
        eventually("the instance closes", || core.is_closing()).await;
        agent.respond(&call, json!("late")).await;
        soon("the answer", open.answer()).await
    };
    let ((), answer) = tokio::join!(draining.drain(), drained);
    assert_eq!((answer.status, &answer.json()["result"]), (200, &json!("late")), "{answer:?}");
}

const LONG: Duration = Duration::from_secs(25);
