//! Redis, agents and instances that fail in every step.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use wsproxy_proto::names::Id;

use super::{
    calls::{own, scene},
    places::echo,
    site::{Site, agent, call, connect, response, secret},
};
use crate::support::{eventually, gateway::TestInstance, http, raw::Raw, soon};

#[tokio::test]
async fn without_redis_no_agent_gets_in_and_those_inside_stay() {
    let (mut site, instance, mut client, _caller) = scene().await;
    site.server.kill();
    let path = format!("/?userId=u1&secret={}", secret("u1"));
    let refused = http::handshake(instance.address(), &path, &[]).await;
    assert!(refused.status == 503 || refused.status == 504, "{refused:?}");
    client.send(r#"{"type":"heartbeat"}"#).await;
    assert_eq!(client.json().await["type"], "heartbeat_ack");
    // Redis comes back empty: the holder takes its place again.
    site.server.restart();
    let running = tokio::spawn(echo(client, "agent".into()));
    eventually("the place is held again", || {
        site.server
            .try_call(&["EXISTS", "agent:u1:server"])
            .is_ok_and(|answer| answer.integer() == 1)
    })
    .await;
    let mut caller = site.caller().await;
    caller.subscribe("response:q-1").await;
    eventually("a call is heard", || site.command("u1", &call("q-1")) == 1).await;
    assert_eq!(caller.next().await.1["result"], "agent");
    running.abort();
}

#[tokio::test]
async fn redis_that_lost_everything_keeps_the_holder() {
    let (site, instance, mut client, mut caller) = scene().await;
    site.server.call(&["FLUSHALL"]);
    assert!(!site.exists("agent:u1:server"));
    let begun = Instant::now();
    while !site.exists("agent:u1:server") {
        assert!(begun.elapsed() < Duration::from_secs(20));
        client.send(r#"{"type":"heartbeat"}"#).await;
        assert_eq!(client.json().await["type"], "heartbeat_ack");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // A newer connection still replaces it.
    let mut newer = agent(&instance, "u1").await;
    assert_eq!(client.closed().await.0, 4001);
    site.command("u1", &own("q-1", json!({})));
    assert_eq!(newer.json().await["requestId"], "q-1");
    newer.send(response("q-1", &json!(1))).await;
    assert_eq!(caller.next().await.1["outcome"], "response");
}

#[tokio::test]
async fn a_frozen_redis_holds_answers_until_it_goes_on() {
    let (site, _instance, mut client, mut caller) = scene().await;
    for number in 0..20 {
        site.command("u1", &own(&format!("q-{number}"), json!({})));
        client.text().await;
    }
    site.server.stop();
    for number in 0..20 {
        client.send(response(&format!("q-{number}"), &json!(number))).await;
    }
    client.send(r#"{"type":"heartbeat"}"#).await;
    assert_eq!(client.json().await["type"], "heartbeat_ack");
    site.server.cont();
    for number in 0..20 {
        assert_eq!(caller.next().await.1["result"], number);
    }
    caller.silent(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn a_silent_agent_is_closed_and_a_pong_is_no_sign_of_life() {
    let site = Site::start();
    let mut config = site.config("one");
    config.heartbeat.timeout = Duration::from_millis(1500);
    config.heartbeat.timeout_is_set = true;
    let instance = site.instance_with(config).await;
    site.add(&["u1", "u2"]).await;
    let mut lively = agent(&instance, "u2").await;
    let mut silent = Raw::connect(instance.address()).await;
    let path = format!("/?userId=u1&secret={}", secret("u1"));
    assert_eq!(silent.upgrade(&path, "").await.status, 101);
    silent.text().await;
    let mut caller = site.caller().await;
    caller.subscribe("response:mine").await;
    site.command("u1", &own("q-1", json!({})));
    silent.text().await;
    let begun = Instant::now();
    let pongs = async {
        loop {
            silent.frame(0x8a, b"").await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            lively.send(r#"{"type":"heartbeat"}"#).await;
            lively.json().await;
            if begun.elapsed() > Duration::from_millis(1600) {
                return;
            }
        }
    };
    pongs.await;
    assert_eq!(silent.close_frame().await, (4002, "heartbeat timeout".into()));
    assert!(begun.elapsed() < Duration::from_secs(6));
    drop(silent);
    assert_eq!(caller.next().await.1["outcome"], "agent_gone");
    lively.send(r#"{"type":"heartbeat"}"#).await;
    assert_eq!(lively.json().await["type"], "heartbeat_ack");
}

#[tokio::test]
async fn the_timeout_of_agents_is_their_own_until_one_is_set() {
    let site = Site::start();
    let mut config = site.config("one");
    let timeout =
        |config: &wsproxy::config::Config| config.heartbeat.timeout_or(Duration::from_secs(90));
    assert_eq!(timeout(&config), Duration::from_secs(90));
    config.heartbeat.timeout_is_set = true;
    assert_eq!(timeout(&config), Duration::from_secs(60));
}

#[tokio::test]
async fn a_drain_waits_for_calls_and_takes_no_new_ones() {
    let site = Site::start();
    let mut config = site.config("one");
    config.server.shutdown_timeout = Duration::from_secs(20);
    let instance = site.instance_with(config).await;
    site.add(&["u1", "u2", "u3"]).await;
    let (mut busy, mut idle, mut slow) =
        (agent(&instance, "u1").await, agent(&instance, "u2").await, agent(&instance, "u3").await);
    let mut caller = site.caller().await;
    caller.subscribe("response:mine").await;
    site.command("u1", &own("q-1", json!({})));
    site.command("u3", &own("q-3", json!({})));
    busy.text().await;
    slow.text().await;
    let draining = tokio::spawn(instance.drain());
    assert_eq!(idle.closed().await, (1012, "instance restarting".into()));
    site.command("u1", &own("q-2", json!({})));
    let (_, refused) = caller.next().await;
    assert_eq!((&refused["requestId"], &refused["outcome"]), (&json!("q-2"), &json!("busy")));
    busy.send(response("q-1", &json!(1))).await;
    assert_eq!(caller.next().await.1["outcome"], "response");
    assert_eq!(busy.closed().await.0, 1012);
    // The call that never ends has half of the time.
    let (_, gone) = caller.next().await;
    assert_eq!((&gone["requestId"], &gone["outcome"]), (&json!("q-3"), &json!("agent_gone")));
    assert_eq!(slow.closed().await.0, 1012);
    soon("the drain", draining).await.unwrap();
    for user in ["u1", "u2", "u3"] {
        assert!(!site.exists(&format!("agent:{user}:server")), "{user}");
        let status = site.server.call(&["GET", &format!("agent:{user}:status")]);
        assert_eq!(format!("{status:?}"), r#"Text("disconnected")"#);
    }
}

#[tokio::test]
async fn an_instance_ends_soon_while_redis_is_away() {
    let mut site = Site::start();
    let mut config = site.config("one");
    config.server.shutdown_timeout = Duration::from_secs(20);
    let instance = site.instance_with(config).await;
    site.add(&["u1", "u2"]).await;
    let (gone, mut stays) = (agent(&instance, "u1").await, agent(&instance, "u2").await);
    site.server.kill();
    drop(gone);
    let agents = &instance.families().agents;
    eventually("the connection ends", || agents.local(&Id::parse("u1").unwrap()).is_none()).await;
    let begun = Instant::now();
    let draining = tokio::spawn(instance.drain());
    assert_eq!(stays.closed().await.0, 1012);
    soon("the drain", draining).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn another_instance_takes_over_what_a_drained_one_held() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1"]).await;
    let mut client = agent(&one, "u1").await;
    let draining = tokio::spawn(one.drain());
    assert_eq!(client.closed().await.0, 1012);
    drop(client);
    let running = tokio::spawn(echo(agent(&two, "u1").await, "two".into()));
    soon("the drain", draining).await.unwrap();
    let mut caller = site.caller().await;
    caller.subscribe("response:q-1").await;
    assert_eq!(site.command("u1", &call("q-1")), 1);
    assert_eq!(caller.next().await.1["result"], "two");
    assert!(site.exists("agent:u1:server"));
    running.abort();
}

#[tokio::test]
async fn a_result_of_any_shape_arrives_as_it_was_written() {
    let (site, _instance, mut client, mut caller) = scene().await;
    for (number, result) in [
        r#""\u0000\ud800""#.to_owned(),
        "123456789012345678901234567890.5e-7".into(),
        format!("\"{}\"", "x".repeat(1_000_000)),
        format!("{}1{}", "[".repeat(100), "]".repeat(100)),
        r#"{"a":1,"a":2}"#.into(),
    ]
    .into_iter()
    .enumerate()
    {
        let request = format!("q-{number}");
        site.command("u1", &own(&request, json!({})));
        client.text().await;
        client
            .send(format!(
                r#"{{"type":"tool_response","requestId":"{request}","success":true,"result":{result}}}"#
            ))
            .await;
        let (_, text) = soon("the answer", caller.read()).await;
        assert!(text.contains(&format!(r#""result":{result}"#)), "{number}");
    }
    // Too deep for Python's parser: the message is a strike, and the call waits for a better one.
    site.command("u1", &own("q-deep", json!({ "timeout": 300 })));
    client.text().await;
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    client
        .send(format!(
            r#"{{"type":"tool_response","requestId":"q-deep","success":true,"result":{deep}}}"#
        ))
        .await;
    assert_eq!(client.json().await["type"], "error");
    assert_eq!(caller.next().await.1["outcome"], "timeout");
}

#[tokio::test]
async fn calls_to_absent_agents_reach_nobody() {
    let site = Site::start();
    let instance: TestInstance = site.instance("one").await;
    site.add(&["u1"]).await;
    assert_eq!(site.command("u1", &call("q-1")), 0);
    drop(connect(&instance, "u1").await.unwrap());
    eventually("the place is free", || !site.exists("agent:u1:server")).await;
    eventually("nobody listens", || site.command("u1", &call("q-1")) == 0).await;
}
