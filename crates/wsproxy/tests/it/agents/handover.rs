//! The place of a user's agent while the way to Redis is slow or breaks: no late end harms a newer connection, and no
//! agent stays connected and deaf.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::site::{Site, agent, call, connect, response};
use crate::support::{
    client::Client,
    eventually,
    fault_proxy::{Cut, FaultProxy, Faults},
    gateway::TestInstance,
    redis_server::Answer,
    soon,
};

/// Starts an instance whose way to Redis is the proxy.
async fn behind(site: &Site, name: &str, proxy: &FaultProxy) -> TestInstance {
    let mut config = site.config(name);
    config.redis.response_timeout = Duration::from_secs(3);
    config.redis.url = Some(site.server.url_on(proxy.port()).into());
    site.instance_with(config).await
}

/// Answers every call of an agent until its connection ends.
async fn serve(mut agent: Client) {
    while let Some(Ok(message)) = futures_util::StreamExt::next(&mut agent.stream).await {
        let Message::Text(text) = message else { continue };
        let message: Value = serde_json::from_str(&text).unwrap();
        if let Some(request) = message["requestId"].as_str() {
            agent.send(response(request, &json!("served"))).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_end_of_an_older_connection_leaves_the_newer_alone() {
    const USERS: usize = 60;
    let site = Site::start();
    let proxy = FaultProxy::start(site.server.port()).await;
    let slow = behind(&site, "one", &proxy).await;
    let fast = site.instance("two").await;
    let users: Vec<_> = (0..USERS).map(|n| format!("u{n}")).collect();
    site.add(&users.iter().map(|user| &**user).collect::<Vec<_>>()).await;
    proxy.set(Faults { delay: Duration::from_millis(250), ..Faults::default() });
    let mut random = StdRng::seed_from_u64(7);
    let plans: Vec<_> = users
        .iter()
        .map(|user| (user, random.random_bool(0.5), random.random_range(0..700)))
        .collect();
    let replace = async |(user, is_here, pause): (&String, bool, u64)| {
        let mut older = agent(&slow, user).await;
        let newer = agent(if is_here { &slow } else { &fast }, user).await;
        // The end of the older socket comes at any moment, before or behind the marker.
        sleep(Duration::from_millis(pause)).await;
        drop(older.stream.close(None).await);
        drop(older);
        newer
    };
    let newer = futures_util::future::join_all(plans.iter().map(|plan| replace(*plan))).await;
    sleep(Duration::from_secs(2)).await;
    for ((user, is_here, _), mut newer) in plans.into_iter().zip(newer) {
        let server = if is_here { "one" } else { "two" };
        let key = format!("agent:{user}:server");
        assert_eq!(site.server.call(&["GET", &key]), Answer::Text(server.into()), "{user}");
        assert_eq!(site.command(user, &call("q-1")), 1, "{user}");
        assert_eq!(newer.json().await["requestId"], "q-1", "{user}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_connects_while_the_bus_breaks_is_never_deaf() {
    const USERS: usize = 20;
    let site = Site::start();
    let proxy = FaultProxy::start(site.server.port()).await;
    let instance = behind(&site, "one", &proxy).await;
    let users: Vec<_> = (0..USERS).map(|n| format!("u{n}")).collect();
    site.add(&users.iter().map(|user| &**user).collect::<Vec<_>>()).await;
    let mut agents = Vec::new();
    for user in &users {
        // Claims, markers and subscriptions are at any point on their way when the connections are cut.
        let opening = connect(&instance, user);
        let cut = async {
            sleep(Duration::from_millis(agents.len() as u64 % 8)).await;
            proxy.cut(Cut::Reset);
        };
        let (opened, ()) = tokio::join!(opening, cut);
        match opened {
            Ok(agent) => agents.push((user, tokio::spawn(serve(agent)))),
            Err(status) => assert!([409, 503, 504].contains(&status.as_u16()), "{status}"),
        }
        instance.ready().await;
    }
    println!("{} of {USERS} handshakes were completed", agents.len());
    let mut caller = site.caller().await;
    for (user, mut serving) in agents {
        let request = format!("q-{user}");
        caller.subscribe(&format!("response:{request}")).await;
        let deadline = Instant::now() + Duration::from_secs(3);
        // A call is answered, or the connection ends.
        loop {
            site.command(user, &call(&request));
            let step = Duration::from_millis(500);
            if let Ok((channel, _)) = timeout(step, caller.read()).await {
                assert_eq!(channel, format!("response:{request}"));
                break;
            }
            if timeout(Duration::from_millis(1), &mut serving).await.is_ok() {
                break;
            }
            assert!(Instant::now() < deadline, "{user} is connected and deaf");
        }
        serving.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_to_an_agent_that_hops_are_answered_once_each() {
    const HOPS: usize = 12;
    let site = Site::start();
    let mut configs = [site.config("one"), site.config("two")];
    for config in &mut configs {
        config.agents.replacements_per_minute = 0;
    }
    let [one, two] = configs;
    let instances = [site.instance_with(one).await, site.instance_with(two).await];
    site.add(&["u1"]).await;
    let mut serving = vec![tokio::spawn(serve(agent(&instances[0], "u1").await))];
    let mut caller = site.caller().await;
    let mut calls = Vec::new();
    let end = Instant::now() + Duration::from_millis(300) * HOPS as u32;
    let mut hop = Instant::now() + Duration::from_millis(300);
    while Instant::now() < end {
        let request = format!("q-{}", calls.len());
        caller.subscribe(&format!("response:{request}")).await;
        let receivers = site.command("u1", &call(&request));
        assert!((1..=2).contains(&receivers), "{receivers}");
        calls.push(request);
        if Instant::now() >= hop {
            hop += Duration::from_millis(300);
            let next = agent(&instances[serving.len() % 2], "u1").await;
            serving.push(tokio::spawn(serve(next)));
        }
    }
    let mut answers: std::collections::HashMap<String, Vec<String>> = Default::default();
    for _ in 0..calls.len() {
        let (channel, answer) = soon("an answer", caller.read()).await;
        answers.entry(channel).or_default().push(answer);
    }
    caller.silent(Duration::from_millis(500)).await;
    let (mut served, mut failed) = (0, 0);
    for request in &calls {
        let found = &answers[&format!("response:{request}")];
        assert_eq!(found.len(), 1, "{request}: {found:?}");
        match found[0].contains("served") {
            true => served += 1,
            false => failed += 1,
        }
    }
    println!("{} calls over {} hops: {served} served, {failed} failed", calls.len(), serving.len());
    assert!(served > failed * 10, "{served} {failed}");
    eventually("one agent is left", || {
        serving.iter().filter(|task| !task.is_finished()).count() == 1
    })
    .await;
}
