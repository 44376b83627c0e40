//! Agents in the worker API and in the answers for operators: who is connected, secrets, health, metrics.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    agents::stage::{Stage, TestAgent},
    support::{
        binary::Binary,
        client::Client,
        eventually, eventually_yes,
        gateway::{API_KEY, Backend, TestInstance, over_both},
        http::{self, Response},
    },
};

over_both!(
    connected_agents_are_listed_and_found,
    an_agent_is_disconnected_with_a_reason,
    secrets_are_given_out_and_replaced,
    a_removed_user_is_sent_away,
    health_and_metrics_tell_of_agents,
);

async fn get(instance: &TestInstance, path: &str) -> Response {
    instance.api("GET", path, "").await
}

async fn connected_agents_are_listed_and_found(backend: Backend) {
    let stage = Stage::start(backend).await;
    let empty = get(stage.caller(), "/api/v1/agents").await;
    assert_eq!((empty.status, &empty.json()["agents"]), (200, &json!([])), "{empty:?}");
    let mut agents = Vec::new();
    for n in 0..5 {
        agents.push(stage.agent_v2(&format!("u-{n}")).await);
    }
    let found = async || get(stage.caller(), "/api/v1/agents/u-3").await;
    eventually_yes("the agent is described", async || found().await.json()["version"] == "1.0")
        .await;
    let found = found().await.json();
    let server = &*stage.holder().gateway().server_id;
    assert_eq!((&found["user_id"], &found["server_id"]), (&json!("u-3"), &json!(server)));
    assert_eq!((&found["platform"], &found["version"]), (&json!("linux"), &json!("1.0")));
    assert!(found["connected_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{found}");
    let listed = async || {
        let (mut users, mut path) = (BTreeSet::new(), "/api/v1/agents".to_owned());
        loop {
            let page = get(stage.caller(), &path).await.json();
            users.extend(
                page["agents"].as_array().unwrap().iter().map(|agent| agent["user_id"].to_string()),
            );
            match page["cursor"].as_str() {
                Some(cursor) => path = format!("/api/v1/agents?cursor={cursor}"),
                None => return (users, page["servers"].clone()),
            }
        }
    };
    eventually_yes("all are listed", async || listed().await.0.len() == 5).await;
    assert_eq!(listed().await.1[server], 5);
    if !matches!(stage.backend, Backend::Memory) {
        let bad = get(stage.caller(), "/api/v1/agents?cursor=%22x").await;
        bad.assert_refused(400, "bad_request");
    }
    get(stage.caller(), "/api/v1/agents/nobody").await.assert_refused(404, "not_found");
    drop(agents);
    eventually_yes("all have left", async || listed().await.0.is_empty()).await;
    get(stage.caller(), "/api/v1/agents/u-3").await.assert_refused(404, "not_found");
}

async fn an_agent_is_disconnected_with_a_reason(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let path = "/api/v1/agents/u-1/disconnect";
    let long = json!({ "reason": "x".repeat(124) }).to_string();
    stage.caller().api("POST", path, &long).await.assert_refused(400, "bad_request");
    let told = stage.caller().api("POST", path, r#"{"reason":"maintenance"}"#).await;
    assert_eq!((told.status, &told.json()["instances"]), (200, &json!(stage.instances.len())));
    assert_eq!(agent.client.closed().await, (4004, "maintenance".into()));
    // Also where the instance that gives the command holds the agent, and gets the command from the bus once more.
    assert_eq!(stage.holder().metric("wsproxy_agent_control_disconnects_total"), 1.0);
}

async fn secrets_are_given_out_and_replaced(backend: Backend) {
    let stage = Stage::start(backend).await;
    let path = "/api/v1/agents/u-1/secrets";
    let post = async |query: &str, body: &str| {
        stage.caller().api("POST", &format!("{path}{query}"), body).await
    };
    stage.add_user("warm").await;
    let first = post("", r#"{"platform":"darwin","expires_in":3600}"#).await;
    assert_eq!((first.status, first.header("cache-control")), (201, "no-store"), "{first:?}");
    let first = first.json();
    assert_eq!((&first["user_id"], &first["created"]), (&json!("u-1"), &json!(true)));
    assert!(first["expires_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{first}");
    let old = first["secret"].as_str().unwrap();
    assert!(old.starts_with("wsa_"), "{first}");
    let mut agent = TestAgent::connect(stage.holder(), "u-1", old, "").await;
    let second = post("", "").await.json();
    assert_eq!((&second["created"], second.get("instances")), (&json!(false), None));
    let replaced = post("?replace=true", "").await;
    assert_eq!(replaced.status, 201, "{replaced:?}");
    assert_eq!(replaced.json()["instances"], json!(stage.instances.len()));
    assert_eq!(agent.client.closed().await.0, 4401);
    let connect = async |secret: &str| {
        let path = format!("/?userId=u-1&secret={secret}");
        Client::connect(stage.holder().address(), &path, &[]).await.map(drop)
    };
    for revoked in [old, second["secret"].as_str().unwrap()] {
        assert_eq!(connect(revoked).await.unwrap_err(), 403);
    }
    assert!(connect(replaced.json()["secret"].as_str().unwrap()).await.is_ok());
    for bad in [
        ("?replace=x", ""),
        ("?other=1", ""),
        ("", r#"{"platform":"beos"}"#),
        ("", r#"{"expires_in":0}"#),
        ("", r#"{"expires_in":18446744073709551615}"#),
        ("", r#"{"secret":"mine"}"#),
    ] {
        post(bad.0, bad.1).await.assert_refused(400, "bad_request");
    }
    for _ in 0..7 {
        assert_eq!(post("", "").await.status, 201);
    }
    let refused = post("", "").await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (409, &json!("conflict")));
}

async fn a_removed_user_is_sent_away(backend: Backend) {
    let stage = Stage::start(backend).await;
    let mut agent = stage.agent("u-1").await;
    let removed = stage.caller().api("DELETE", "/api/v1/agents/u-1", "").await;
    assert_eq!(
        (removed.status, &removed.json()["instances"]),
        (200, &json!(stage.instances.len()))
    );
    assert_eq!(agent.client.closed().await.0, 4401);
    let path = format!("/?userId=u-1&secret={}", agent.secret);
    let refused = Client::connect(stage.holder().address(), &path, &[]).await.map(drop);
    assert_eq!(refused.unwrap_err(), 403);
    let again = stage.caller().api("DELETE", "/api/v1/agents/u-1", "").await;
    again.assert_refused(404, "not_found");
}

async fn health_and_metrics_tell_of_agents(backend: Backend) {
    let stage = Stage::start(backend).await;
    let _agents = (stage.agent("u-1").await, stage.agent("u-2").await);
    let holder = stage.holder();
    let server = &*holder.gateway().server_id;
    let health = holder.get("/health").await.json();
    let expected = json!({
        "status": "healthy", "serverId": server, "connections": 2, "uptime": health["uptime"],
    });
    assert_eq!(health, expected, "nothing else without a key");
    assert!(health["uptime"].is_u64());
    let health = get(holder, "/health").await.json();
    let database = json!({
        "kind": "sqlite", "connected": true, "writable": true, "audit": { "queued": 0, "dropped": 0 },
    });
    assert_eq!((&health["database"], &health["server_id"]), (&database, &json!(server)));
    let metrics = async |headers: &[(&str, &str)]| -> Value {
        let mut all = vec![("accept", "application/json")];
        all.extend_from_slice(headers);
        http::request(holder.admin_address(), "GET", "/metrics", &all, b"").await.json()
    };
    let told = metrics(&[]).await;
    assert!(told["metrics"].as_array().is_some_and(|samples| samples.len() > 50));
    assert_eq!((&told["serverId"], &told["connections"]), (&json!(server), &json!(2)));
    assert!(told["uptime"].is_u64() && told["memory"]["rss"].as_u64() > Some(1024 * 1024));
    assert_eq!(told.get("connectedUsers"), None, "users are named with a key only");
    let key = format!("Bearer {API_KEY}");
    let told = metrics(&[("authorization", &key)]).await;
    let mut users: Vec<_> = told["connectedUsers"].as_array().unwrap().iter().collect();
    users.sort_by_key(|user| user.to_string());
    assert_eq!(users, ["u-1", "u-2"]);
    assert_eq!(told.get("connectedUsersTruncated"), None);
    let text = holder.get("/metrics").await;
    assert!(!text.body.contains("u-1"), "Prometheus never sees a user");
}

#[tokio::test]
async fn without_agents_their_routes_are_not_found() {
    let instance = TestInstance::with(|_| {}).await;
    for (method, path, body) in [
        ("GET", "/api/v1/agents", ""),
        ("GET", "/api/v1/agents/u", ""),
        ("DELETE", "/api/v1/agents/u", ""),
        ("POST", "/api/v1/agents/u/disconnect", ""),
        ("POST", "/api/v1/agents/u/secrets", ""),
        ("POST", "/api/v1/agents/u/calls", r#"{"tool":"t"}"#),
        ("GET", "/api/v1/agents/u/calls/q", ""),
        ("DELETE", "/api/v1/agents/u/calls/q", ""),
    ] {
        let refused = instance.api(method, path, body).await;
        refused.assert_refused(404, "not_found");
        assert!(refused.body.contains("endpoints.agents"), "{method} {path}: {refused:?}");
    }
    assert_eq!(instance.get("/health").await.json(), json!({ "status": "healthy" }));
}

#[tokio::test]
async fn a_database_that_is_away_degrades_the_instance() {
    let stage = Stage::with(Backend::Memory, |config| {
        // Nothing listens there.
        config.database.url = Some("postgres://u:p@127.0.0.1:9/x".into());
    })
    .await;
    let health = stage.caller().api("GET", "/health", "").await;
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("degraded")));
    assert_eq!(health.json()["database"]["connected"], false);
    let refused = stage.caller().api("POST", "/api/v1/agents/u/secrets", "").await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (503, &json!("database_unavailable"))
    );
}

#[tokio::test]
async fn a_line_sums_up_agents_at_intervals() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agents.db");
    let start = async |interval: &str| {
        let binary = Binary::start(&[
            ("WSPROXY_ENDPOINTS__AGENTS", "true"),
            ("WSPROXY_DATABASE__PATH", path.to_str().unwrap()),
            ("WSPROXY_LOG__SUMMARY_INTERVAL", interval),
            ("LOG_LEVEL", "info"),
        ])
        .await;
        let headers = [("authorization", format!("Bearer {API_KEY}"))];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        let path = "/api/v1/agents/nobody/calls";
        let body = br#"{"tool":"t","params":{"password":"hunter2"}}"#;
        let answer = http::request(binary.address, "POST", path, &headers, body).await;
        assert_eq!(answer.status, 503, "{answer:?}");
        binary
    };
    const LINE: &str = "Agents, and their calls since the last such line.";
    let binary = start("300ms").await;
    eventually("several lines are written", || binary.lines(LINE).len() >= 3).await;
    let lines = binary.lines(LINE);
    let offline: u64 = lines.iter().map(|line| line["agent_offline"].as_u64().unwrap()).sum();
    assert_eq!(offline, 1, "each call is in one line: {lines:?}");
    let line = &lines[0];
    assert_eq!((&line["connections"], &line["in_flight"]), (&json!(0), &json!(0)), "{line}");
    assert!(line["memory_bytes"].as_u64() > Some(1024 * 1024), "{line}");
    drop(binary);
    let binary = start("0s").await;
    binary.line("Listening.").await;
    assert_eq!(binary.lines(LINE).len(), 0);
}
