//! Handshakes of users' agents: who gets in, and every refusal.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use wsproxy_proto::disconnect::Disconnect;

use super::{
    calls::{own, scene},
    site::{Site, agent, connect, connect_as, secret},
};
use crate::support::{
    binary::Binary,
    client::Client,
    eventually,
    gateway::{TestInstance, config},
    http,
};

/// The status and the code of a refused handshake.
async fn refusal(instance: &TestInstance, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let response = http::handshake(instance.address(), path, headers).await;
    let code = response.json()["error"]["code"].as_str().unwrap_or_default().to_owned();
    (response.status, code)
}

#[tokio::test]
async fn each_place_of_a_secret_opens() {
    let (_site, instance, _first, _caller) = scene().await;
    let (secret, encoded) =
        (secret("u1"), "bearer64.c2VjcmV0LW9mLXUxLTAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVm");
    for (path, headers, protocol) in [
        ("/?userId=u1", vec![("authorization", format!("Bearer {secret}"))], None),
        (
            "/?userId=u1",
            vec![("sec-websocket-protocol", format!("wsproxy.v1, bearer.{secret}"))],
            Some("wsproxy.v1"),
        ),
        (
            "/?userId=u1",
            vec![("sec-websocket-protocol", format!("{encoded}, wsproxy.v1"))],
            Some("wsproxy.v1"),
        ),
        (
            "/?userId=u1",
            vec![(
                "sec-websocket-protocol",
                format!("wsproxy.v1, wsproxy.agent.v2, bearer.{secret}"),
            )],
            Some("wsproxy.agent.v2"),
        ),
        ("/?x=1&userId=%751&v=2", vec![("authorization", format!("bearer {secret}"))], None),
    ] {
        let mut client = Client::connect(instance.address(), path, &headers).await.unwrap();
        let selected = client.headers.get("sec-websocket-protocol");
        assert_eq!(selected.map(|value| value.to_str().unwrap()), protocol, "{headers:?}");
        let connected = client.json().await;
        let is_newer = path.contains("v=2") || protocol == Some("wsproxy.agent.v2");
        assert_eq!(connected["connectionId"].is_string(), is_newer, "{connected}");
        assert_eq!(connected.as_object().unwrap().len(), if is_newer { 6 } else { 4 });
    }
}

#[tokio::test]
async fn bad_openings_are_refused_with_their_status() {
    let (site, instance, mut client, mut caller) = scene().await;
    let good = secret("u1");
    let bearer = |secret: &str| format!("Bearer {secret}");
    let (right, wrong) = (bearer(&good), bearer("wrong"));
    for (path, headers, status, code) in [
        ("/".to_owned(), vec![], 401, "missing_credentials"),
        ("/?userId=u1".into(), vec![], 401, "missing_credentials"),
        (format!("/?secret={good}"), vec![], 401, "missing_credentials"),
        ("/?userId=u1&secret=".into(), vec![], 401, "malformed_credentials"),
        (format!("/?userId=u1&secret={good}&secret={good}"), vec![], 401, "malformed_credentials"),
        (format!("/?userId=u1&userId=u1&secret={good}"), vec![], 401, "malformed_credentials"),
        (format!("/?userId=a:b&secret={good}"), vec![], 401, "malformed_credentials"),
        (format!("/?userId=&secret={good}"), vec![], 401, "malformed_credentials"),
        (format!("/?userId=%ff&secret={good}"), vec![], 401, "malformed_credentials"),
        (
            "/?userId=u1".into(),
            vec![("authorization", &*right), ("authorization", &*right)],
            401,
            "malformed_credentials",
        ),
        (
            "/?userId=u1".into(),
            vec![("sec-websocket-protocol", "bearer.x")],
            401,
            "malformed_credentials",
        ),
        ("/?userId=u1".into(), vec![("authorization", &*wrong)], 403, "invalid_credentials"),
        (format!("/?userId=u2&secret={good}"), vec![], 403, "invalid_credentials"),
        (format!("/?userId=u1&secret={good}x"), vec![], 403, "invalid_credentials"),
        (
            format!("/?userId=u1&secret={good}"),
            vec![("sec-websocket-version", "8")],
            426,
            "upgrade_required",
        ),
    ] {
        assert_eq!(
            refusal(&instance, &path, &headers).await,
            (status, code.to_owned()),
            "{path} {headers:?}"
        );
    }
    // The same words for an unknown user and for a wrong secret.
    let bodies = [format!("/?userId=u1&secret={good}x"), format!("/?userId=nobody&secret={good}")];
    let mut texts = Vec::new();
    for path in bodies {
        texts.push(http::handshake(instance.address(), &path, &[]).await.body);
    }
    assert_eq!(texts[0], texts[1]);
    // The agent that is connected did not notice.
    site.command("u1", &own("q-1", json!({})));
    assert_eq!(client.json().await["requestId"], "q-1");
    drop(client);
    caller.next().await;
}

#[tokio::test]
async fn only_upgrades_reach_the_endpoint_and_only_where_it_is_served() {
    let site = Site::start();
    let mut config_of_agents = site.config("one");
    config_of_agents.agents.path = "/agents".into();
    let instance = site.instance_with(config_of_agents).await;
    site.add(&["u1"]).await;
    let path = format!("/agents?userId=u1&secret={}", secret("u1"));
    assert!(connect_as(&instance, &path).await.is_ok());
    let plain = http::request(instance.address(), "GET", "/agents", &[], b"").await;
    assert_eq!(plain.status, 404);
    // A proxy did not pass `Upgrade` on.
    http::request(instance.address(), "GET", &path, &[], b"")
        .await
        .assert_refused(426, "upgrade_required");
    assert_eq!(connect(&instance, "u1").await.err().unwrap(), 404);
    let without = TestInstance::start(config(None)).await;
    let refused = http::handshake(without.address(), "/?userId=u1", &[]).await;
    refused.assert_refused(404, "not_found");
    assert!(refused.body.contains("endpoints.agents is off"), "{refused:?}");
}

#[tokio::test]
async fn guesses_are_limited_per_address_and_user() {
    let (site, instance, _agent, _caller) = scene().await;
    site.add(&["u2"]).await;
    for number in 0..30 {
        let path = format!("/?userId=u1&secret=guess-{number}");
        assert_eq!(refusal(&instance, &path, &[]).await.0, 403);
    }
    // Also with the right secret, so that a guess cannot be told from a refusal.
    let path = format!("/?userId=u1&secret={}", secret("u1"));
    let refused = http::handshake(instance.address(), &path, &[]).await;
    assert_eq!((refused.status, refused.header("retry-after").is_empty()), (429, false));
    assert!(connect(&instance, "u2").await.is_ok());
}

#[tokio::test]
async fn flapping_agents_are_refused_and_the_holder_stays() {
    let site = Site::start();
    let mut config = site.config("one");
    config.agents.replacements_per_minute = 3;
    let instance = site.instance_with(config).await;
    site.add(&["u1"]).await;
    let mut agents = Vec::new();
    for _ in 0..4 {
        agents.push(agent(&instance, "u1").await);
    }
    let path = format!("/?userId=u1&secret={}", secret("u1"));
    let refused = http::handshake(instance.address(), &path, &[]).await;
    assert_eq!(refused.status, 429);
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    let mut caller = site.caller().await;
    caller.subscribe("response:mine").await;
    site.command("u1", &own("q-1", json!({})));
    assert_eq!(agents.last_mut().unwrap().json().await["requestId"], "q-1");
    assert_eq!(instance.families().agents.counters.flapping.value(), 1);
}

#[tokio::test]
async fn a_command_ends_connections_on_every_instance() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1", "u2"]).await;
    let (mut first, mut second) = (agent(&one, "u1").await, agent(&two, "u2").await);
    let begun = Instant::now();
    let order = |order: &str| site.server.call(&["PUBLISH", "agents:control", order]).integer();
    assert_eq!(order(r#"{"op":"revoke","userId":"u1"}"#), 2);
    assert_eq!(first.closed().await, (Disconnect::REVOKED.code, "credential revoked".into()));
    assert_eq!(order(r#"{"op":"disconnect","userId":"u2","reason":"maintenance"}"#), 2);
    assert_eq!(second.closed().await, (4004, "maintenance".into()));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    eventually("the places are free", || {
        !site.exists("agent:u1:server") && !site.exists("agent:u2:server")
    })
    .await;
    // The secret of another row opened this connection.
    let mut third = agent(&one, "u1").await;
    order(r#"{"op":"revoke","userId":"u1","secretId":"01900000-0000-7000-8000-000000000000"}"#);
    third.send(r#"{"type":"heartbeat"}"#).await;
    assert_eq!(third.json().await["type"], "heartbeat_ack");
}

#[tokio::test]
async fn a_handshake_that_waits_is_ended_by_a_revocation() {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1"]).await;
    // Redis stands still, so that the handshake waits behind its secret.
    site.server.stop();
    let path = format!("/?userId=u1&secret={}", secret("u1"));
    let waiting = tokio::spawn({
        let address = instance.address();
        async move { http::handshake(address, &path, &[]).await }
    });
    let connections = instance.families().agents.connections.clone();
    let user = crate::support::gateway::id("u1");
    eventually("the handshake is registered", || !connections.of(&user).is_empty()).await;
    eventually("its secret is judged", || {
        instance.families().agents.counters.auth.accepted.value() == 1
    })
    .await;
    let presence = instance.families().agents.presence.clone().unwrap();
    let order = wsproxy::endpoint::agents::presence::control::Order::revoke(user, None);
    // The command reaches this instance without Redis.
    let ordering = tokio::spawn(async move { presence.order(&order).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    site.server.cont();
    waiting.await.unwrap().assert_refused(403, "invalid_credentials");
    let _ = ordering.await;
    eventually("the place is free", || !site.exists("agent:u1:server")).await;
}

/// Secrets are in no line of the log, in no metric and in no answer.
#[tokio::test]
async fn secrets_are_never_shown() {
    let site = Site::start();
    let path = site.database_path();
    let url = site.server.url();
    let binary = Binary::start(&[
        ("WSPROXY_ENDPOINTS__AGENTS", "true"),
        ("WSPROXY_DATABASE__PATH", &path),
        ("REDIS_URL", &url),
        ("LOG_LEVEL", "trace"),
    ])
    .await;
    let marks = ["hunter2secret", "hunter2param", "hunter2result"];
    let mut texts = Vec::new();
    site.add_when_ready(&["u1"]).await;
    for path in [
        format!("/?userId=u1&secret={}", marks[0]),
        format!("/&userId=u1&secret={}", marks[0]),
        format!("/?userId={}&secret={}", marks[0].replace("2s", ":s"), marks[0]),
        format!("/ws?userId=u1&secret={}", marks[0]),
        format!("/x/ws/y&secret={}", marks[0]),
    ] {
        texts.push(format!("{:?}", http::handshake(binary.address, &path, &[]).await));
    }
    let good = secret("u1");
    let mut agent =
        Client::connect(binary.address, &format!("/?userId=u1&secret={good}"), &[]).await.unwrap();
    agent.text().await;
    let mut caller = site.caller().await;
    caller.subscribe("response:q-1").await;
    let call = json!({ "type": "tool_call", "requestId": "q-1", "tool": "t", "params": { "text": marks[1] } });
    site.command("u1", &call);
    agent.text().await;
    agent.send(super::site::response("q-1", &json!(marks[2]))).await;
    caller.next().await;
    agent.close().await;
    let metrics = http::request(binary.address, "GET", "/metrics", &[], b"").await;
    texts.push(format!("{metrics:?}"));
    binary.line("Connection closed.").await;
    let log = binary.log();
    assert!(log.contains("invalid_credentials"));
    texts.push(log);
    for text in texts {
        for mark in marks.iter().copied().chain([&*good]) {
            assert!(!text.contains(mark), "{mark} is shown");
        }
    }
}
