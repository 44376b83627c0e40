//! Calls over HTTP to an agent that is away for a moment, and to one that is away for long.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;

use crate::{
    agents::stage::{Open, Stage, TestAgent, call, call_with, echo},
    support::{
        eventually, eventually_ok,
        gateway::{Backend, over_both},
        http::Response,
    },
};

over_both!(
    a_call_waits_for_an_agent_that_left_a_moment_ago,
    a_call_waits_no_longer_than_allowed,
    calls_for_one_agent_all_wait_and_are_all_answered,
    a_waiting_call_is_cancelled,
    a_waiting_asynchronous_call_is_cancelled,
    a_cancel_of_a_call_that_waits_nowhere_is_refused,
    a_client_that_hangs_up_waits_no_more,
    a_thousand_calls_wait_and_others_are_refused,
    an_agent_that_is_not_expected_is_not_waited_for,
);

impl Stage {
    /// Connects an agent and sends it away; answers its secret.
    async fn absent(&self, user: &str) -> String {
        let agent = self.agent(user).await;
        let secret = agent.secret.clone();
        agent.client.close().await;
        let connections = &self.holder().families().agents.connections;
        eventually("the agent has left", || connections.is_empty()).await;
        secret
    }

    /// Cancels a waiting call; where there are two instances, at the one where it does not wait.
    async fn cancel_elsewhere(&self, path: &str) -> Response {
        eventually_ok("the cancel is heard", async || {
            let cancelled = self.holder().api("DELETE", path, "").await;
            // The instance of the call may be about to listen.
            if cancelled.status == 404 { Err(cancelled) } else { Ok(cancelled) }
        })
        .await
    }

    /// Calls that wait at the instance which takes requests.
    fn waiting(&self) -> f64 {
        self.caller().metric("wsproxy_agent_calls_waiting")
    }
}

async fn a_call_waits_for_an_agent_that_left_a_moment_ago(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let secret = stage.absent("u-1").await;
    let body = echo(LONG);
    let come_back = async {
        eventually("the call waits", || stage.waiting() == 1.0).await;
        let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
        agent.echo().await
    };
    let (answer, sent) = tokio::join!(call(stage.caller(), "u-1", &body), come_back);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["request_id"], sent["requestId"]);
    assert_eq!(stage.waiting(), 0.0);
    assert_eq!(stage.caller().gateway().runtime.budget.used(), 0);
}

async fn a_call_waits_no_longer_than_allowed(backend: Backend) {
    let wait = Duration::from_millis(600);
    let stage = Stage::with(backend, |config| config.agents.offline_wait = wait).await;
    stage.absent("u-1").await;
    let start = Instant::now();
    let answer = call(stage.caller(), "u-1", &echo(LONG)).await;
    assert_eq!((answer.status, &answer.json()["outcome"]), (503, &json!("agent_offline")));
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    assert_eq!(stage.waiting(), 0.0);
    // Behind the wait the agent is not expected any more.
    let gone = async || call(stage.caller(), "u-1", &echo(LONG)).await;
    let start = Instant::now();
    assert_eq!(gone().await.status, 503);
    assert!(start.elapsed() < wait, "{:?}", start.elapsed());
}

async fn calls_for_one_agent_all_wait_and_are_all_answered(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let secret = stage.absent("u-1").await;
    let body = echo(LONG);
    let calls = join_all((0..50).map(|_| call(stage.caller(), "u-1", &body)));
    let serve = async {
        eventually("all calls wait", || stage.waiting() == 50.0).await;
        let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
        for _ in 0..50 {
            agent.echo().await;
        }
        agent
    };
    let (answers, _agent) = tokio::join!(calls, serve);
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    assert_eq!(stage.calls("response"), 50.0);
}

async fn a_waiting_call_is_cancelled(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    stage.absent("u-1").await;
    let (headers, body) = ([("idempotency-key", "q-1")], echo(LONG));
    let cancel = async {
        eventually("the call waits", || stage.waiting() == 1.0).await;
        stage.caller().api("DELETE", "/api/v1/agents/u-1/calls/q-1", "").await
    };
    let asked = call_with(stage.caller(), "u-1", &headers, &body);
    let (answer, cancelled) = tokio::join!(asked, cancel);
    assert_eq!(cancelled.status, 202);
    assert_eq!((answer.status, &answer.json()["outcome"]), (409, &json!("cancelled")));
    eventually("the call is counted", || stage.calls("cancelled") == 1.0).await;
    assert_eq!(stage.audited("u-1").await.outcome, "cancelled");
    let (answer, ()) = tokio::join!(call_with(stage.caller(), "u-1", &headers, &body), async {
        eventually("the call waits again", || stage.waiting() == 1.0).await;
        stage.cancel_elsewhere("/api/v1/agents/u-1/calls/q-1").await;
    });
    assert_eq!((answer.status, &answer.json()["outcome"]), (409, &json!("cancelled")));
}

async fn a_cancel_of_a_call_that_waits_nowhere_is_refused(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    stage.absent("u-1").await;
    let (headers, body) = ([("idempotency-key", "q-1")], echo(LONG));
    let asked = call_with(stage.caller(), "u-1", &headers, &body);
    let (answer, ()) = tokio::join!(asked, async {
        eventually("the call waits", || stage.waiting() == 1.0).await;
        for instance in &stage.instances {
            let another = instance.api("DELETE", "/api/v1/agents/u-1/calls/q-2", "").await;
            another.assert_refused(404, "not_found");
        }
        assert_eq!(stage.waiting(), 1.0);
        let path = "/api/v1/agents/u-1/calls/q-1";
        assert_eq!(stage.caller().api("DELETE", path, "").await.status, 202);
    });
    assert_eq!(answer.json()["outcome"], "cancelled");
}

async fn a_waiting_asynchronous_call_is_cancelled(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let secret = stage.absent("u-1").await;
    let headers = [("idempotency-key", "q-1"), ("prefer", "respond-async")];
    let (path, body) = ("/api/v1/agents/u-1/calls/q-1", echo(LONG));
    let cancel = async {
        eventually("the call waits", || stage.waiting() == 1.0).await;
        stage.cancel_elsewhere(path).await
    };
    let asked = call_with(stage.caller(), "u-1", &headers, &body);
    let (answer, cancelled) = tokio::join!(asked, cancel);
    assert_eq!(cancelled.status, 202);
    assert_eq!((answer.status, &answer.json()["outcome"]), (409, &json!("cancelled")));
    assert_eq!(stage.audited("u-1").await.outcome, "cancelled");
    let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
    // The agent's first call is the next one.
    let body = json!({ "tool": "second" });
    let (answer, sent) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!((answer.status, &sent["tool"]), (200, &json!("second")));
}

async fn a_client_that_hangs_up_waits_no_more(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let secret = stage.absent("u-1").await;
    let open = Open::call(stage.caller(), "u-1", &[], &echo(LONG)).await;
    eventually("the call waits", || stage.waiting() == 1.0).await;
    drop(open);
    eventually("the call waits no more", || stage.waiting() == 0.0).await;
    let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
    // The agent's first call is the next one.
    let body = json!({ "tool": "second" });
    let (answer, sent) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!((answer.status, &sent["tool"]), (200, &json!("second")));
}

async fn a_thousand_calls_wait_and_others_are_refused(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let secret = stage.absent("u-1").await;
    let body = echo(LONG);
    let mut waiting = Vec::new();
    for _ in 0..1024 {
        waiting.push(Open::call(stage.caller(), "u-1", &[], &body).await);
    }
    eventually("the room is full", || stage.waiting() == 1024.0).await;
    let refused = call(stage.caller(), "u-1", &body).await;
    assert_eq!((refused.status, &refused.json()["outcome"]), (503, &json!("agent_offline")));
    assert!(stage.caller().gateway().runtime.budget.used() > 1024 * 512);
    drop(waiting);
    eventually("the room is empty", || stage.waiting() == 0.0).await;
    assert_eq!(stage.caller().gateway().runtime.budget.used(), 0);
    let mut agent = TestAgent::connect(stage.holder(), "u-1", &secret, "").await;
    let (answer, _) = tokio::join!(call(stage.caller(), "u-1", &body), agent.echo());
    assert_eq!(answer.status, 200);
}

async fn an_agent_that_is_not_expected_is_not_waited_for(backend: Backend) {
    let stage = Stage::with(backend, |config| config.agents.offline_wait = LONG).await;
    let body = echo(LONG);
    let start = Instant::now();
    let mut refused = 0;
    for _ in 0..100 {
        let answers = join_all((0..100).map(|_| call(stage.caller(), "absent", &body))).await;
        refused += answers.iter().filter(|answer| answer.status == 503).count();
    }
    assert_eq!(refused, 10_000);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    assert_eq!((stage.waiting(), stage.calls("agent_offline")), (0.0, 10_000.0));
}

const LONG: Duration = Duration::from_secs(20);
