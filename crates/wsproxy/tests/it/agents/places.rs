//! The newer connection of a user wins, and every call has one holder.

use std::{collections::HashMap, time::Duration};

use futures_util::{SinkExt, StreamExt, future::join_all};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::site::{Caller, Site, agent, call, connect, response};
use crate::support::{
    client::Client,
    eventually,
    fault_proxy::{Cut, FaultProxy, Faults},
    gateway::TestInstance,
    soon,
};

/// Answers every call with the agent's name until its connection ends; returns the ids of the calls, and the close code.
pub async fn echo(mut agent: Client, name: String) -> (Vec<String>, Option<u16>) {
    let mut ran = Vec::new();
    while let Some(message) = agent.stream.next().await {
        match message {
            Ok(Message::Text(text)) => {
                let call: Value = serde_json::from_str(&text).unwrap();
                if call["type"] != "tool_call" {
                    assert!(
                        call["type"] == "heartbeat_ack" || call["type"] == "connected",
                        "{text}"
                    );
                    continue;
                }
                let request = call["requestId"].as_str().unwrap().to_owned();
                let answer = response(&request, &json!(name));
                ran.push(request);
                if agent.stream.send(Message::text(answer)).await.is_err() {
                    return (ran, None);
                }
            }
            Ok(Message::Close(frame)) => return (ran, frame.map(|frame| frame.code.into())),
            Ok(_) => {}
            Err(_) => return (ran, None),
        }
    }
    (ran, None)
}

/// Asserts that a call is answered by the agent of this name.
async fn answered_by(site: &Site, caller: &mut Caller, user: &str, request: &str, name: &str) {
    caller.subscribe(&format!("response:{request}")).await;
    assert_eq!(site.command(user, &call(request)), 1, "{request}");
    let (_, answer) = caller.next().await;
    assert_eq!(answer["result"], name, "{request}: {answer}");
}

fn owner_of(site: &Site, user: &str) -> String {
    let key = format!("{{agent:{user}:server}}:owner");
    format!("{:?}", site.server.call(&["HGET", &key, "connection"]))
}

#[tokio::test]
async fn the_newer_connection_wins_here_and_elsewhere() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1"]).await;
    let mut caller = site.caller().await;
    let mut before: Option<Client> = None;
    for (turn, instance) in [&one, &one, &two, &one, &two, &two].into_iter().enumerate() {
        let newer = agent(instance, "u1").await;
        if let Some(mut older) = before.take() {
            let begun = Instant::now();
            assert_eq!(older.closed().await, (4001, "replaced".into()));
            assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        }
        let running = tokio::spawn(echo(newer, format!("agent {turn}")));
        let request = format!("q-{turn}");
        answered_by(&site, &mut caller, "u1", &request, &format!("agent {turn}")).await;
        // The agent goes on as the older one of the next turn.
        running.abort();
        let _ = running.await;
        before = Some(agent(instance, "u1").await);
    }
    assert!(site.exists("agent:u1:server"));
}

#[tokio::test]
async fn pairs_at_the_same_instant_leave_one_survivor_each() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    let users: Vec<_> = (0..100).map(|number| format!("u{number}")).collect();
    site.add(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let pairs = users.iter().map(|user| async {
        let (first, second) = tokio::join!(connect(&one, user), connect(&two, user));
        let mut running = Vec::new();
        for (name, client) in [("one", first), ("two", second)] {
            match client {
                Ok(client) => running.push((name, tokio::spawn(echo(client, name.into())))),
                Err(status) => assert_eq!(status, 409),
            }
        }
        (user.clone(), running)
    });
    let mut caller = site.caller().await;
    for (user, running) in join_all(pairs).await {
        let channel = format!("agent:{user}:commands");
        eventually("one connection stays", || {
            let Ok(answer) = site.server.try_call(&["PUBSUB", "NUMSUB", &channel]) else {
                return false;
            };
            format!("{answer:?}").contains("Integer(1)")
        })
        .await;
        let request = format!("q-{user}");
        caller.subscribe(&format!("response:{request}")).await;
        assert_eq!(site.command(&user, &call(&request)), 1);
        let (_, answer) = caller.next().await;
        let winner = answer["result"].as_str().unwrap().to_owned();
        let mut alive = 0;
        for (name, task) in running {
            if name == winner {
                alive += 1;
                assert!(!task.is_finished());
                task.abort();
            } else {
                assert_eq!(soon("the loser's end", task).await.unwrap(), (vec![], Some(4001)));
            }
        }
        assert_eq!(alive, 1, "{user}");
    }
}

#[tokio::test]
async fn calls_in_the_instant_of_a_first_connect_are_answered() {
    let site = Site::start();
    let instance = site.instance("one").await;
    let users: Vec<_> = (0..20).map(|number| format!("u{number}")).collect();
    site.add(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    for user in &users {
        let mut caller = site.caller().await;
        let connecting = async { agent(&instance, user).await };
        let publishing = async {
            let mut received = Vec::new();
            for number in 0.. {
                let request = format!("{user}-{number}");
                caller.subscribe(&format!("response:{request}")).await;
                if site.command(user, &call(&request)) > 0 {
                    received.push(format!("response:{request}"));
                }
                if received.len() >= 5 {
                    break;
                }
                tokio::task::yield_now().await;
            }
            received
        };
        let (client, mut received) = tokio::join!(connecting, publishing);
        let running = tokio::spawn(echo(client, "first".into()));
        while !received.is_empty() {
            let (channel, answer) = caller.next().await;
            assert_eq!(answer["result"], "first", "{answer}");
            let at = received.iter().position(|expected| *expected == channel);
            received.remove(at.expect("one answer for each call"));
        }
        running.abort();
    }
}

#[tokio::test]
async fn a_late_cleanup_does_not_touch_the_newer_connection() {
    let site = Site::start();
    let proxy = FaultProxy::start(site.server.port()).await;
    let mut config = site.config("one");
    // A link that is slow, not dead.
    config.redis.response_timeout = Duration::from_secs(3);
    config.redis.url = Some(format!("redis://127.0.0.1:{}", proxy.port()).into());
    let one = site.instance_with(config).await;
    let two = site.instance("two").await;
    let users: Vec<_> = (0..12).map(|number| format!("u{number}")).collect();
    site.add(&users.iter().map(String::as_str).collect::<Vec<_>>()).await;
    proxy.set(Faults { delay: Duration::from_millis(200), ..Faults::default() });
    let runs = users.iter().enumerate().map(|(number, user)| {
        let (one, two) = (&one, &two);
        async move {
            let first = agent(one, user).await;
            let wait =
                |salt: u64| Duration::from_millis((number as u64 * 7919 + salt * 104_729) % 450);
            tokio::time::sleep(wait(1)).await;
            // The end of the older connection and the handshake of the newer one overlap in every order.
            let target = if number % 2 == 0 { one } else { two };
            let leave = async {
                tokio::time::sleep(wait(2)).await;
                drop(first);
            };
            let (newer, ()) = tokio::join!(
                async {
                    tokio::time::sleep(wait(3)).await;
                    agent(target, user).await
                },
                leave
            );
            (user, newer)
        }
    });
    let connected = join_all(runs).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut caller = site.caller().await;
    for (user, newer) in connected {
        assert!(site.exists(&format!("agent:{user}:server")), "{user}");
        let running = tokio::spawn(echo(newer, "newer".into()));
        answered_by(&site, &mut caller, user, &format!("q-{user}"), "newer").await;
        running.abort();
    }
}

#[tokio::test]
async fn a_lost_marker_does_not_leave_a_deaf_agent() {
    let site = Site::start();
    let proxy = FaultProxy::start(site.server.port()).await;
    let mut config = site.config("one");
    config.redis.url = Some(format!("redis://127.0.0.1:{}", proxy.port()).into());
    let one = site.instance_with(config).await;
    site.add(&["u1"]).await;
    for round in 0..6 {
        let connecting = connect(&one, "u1");
        let cutting = async {
            // In the middle of the handshake, at a later point in every round.
            tokio::time::sleep(Duration::from_millis(round * 2)).await;
            proxy.cut(Cut::Reset);
        };
        let (connected, ()) = tokio::join!(connecting, cutting);
        let Ok(client) = connected else { continue };
        let running = tokio::spawn(echo(client, "agent".into()));
        let request = format!("q-{round}");
        let mut caller = site.caller().await;
        caller.subscribe(&format!("response:{request}")).await;
        let begun = Instant::now();
        while site.command("u1", &call(&request)) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "nobody hears the commands");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (_, answer) = timeout(Duration::from_secs(5), caller.read()).await.map_or_else(
            |_| panic!("round {round}: no answer; owner {}", owner_of(&site, "u1")),
            |(channel, text)| (channel, serde_json::from_str::<Value>(&text).unwrap()),
        );
        assert_eq!(answer["result"], "agent", "{answer}");
        running.abort();
    }
}

#[tokio::test]
async fn an_open_connection_survives_a_loss_of_the_bus() {
    let site = Site::start();
    let proxy = FaultProxy::start(site.server.port()).await;
    let mut config = site.config("one");
    config.redis.url = Some(format!("redis://127.0.0.1:{}", proxy.port()).into());
    let one = site.instance_with(config).await;
    site.add(&["u1"]).await;
    let running = tokio::spawn(echo(agent(&one, "u1").await, "agent".into()));
    let mut caller = site.caller().await;
    for round in 0..3 {
        proxy.cut(Cut::Reset);
        let request = format!("q-{round}");
        caller.subscribe(&format!("response:{request}")).await;
        eventually("the call is heard", || site.command("u1", &call(&request)) == 1).await;
        let (_, answer) = caller.next().await;
        assert_eq!(answer["result"], "agent");
    }
    assert!(!running.is_finished());
    running.abort();
}

/// A user hops between two instances while calls come: each id runs once at most, and each caller gets one answer.
#[tokio::test]
async fn a_hopping_user_runs_each_call_once_and_answers_once() {
    let site = Site::start();
    let mut config = site.config("one");
    config.agents.replacements_per_minute = 0;
    let one = site.instance_with(config.clone()).await;
    config.server.server_id = Some("two".into());
    let two = site.instance_with(config).await;
    site.add(&["u1"]).await;
    let instances: [&TestInstance; 2] = [&one, &two];
    let mut agents = vec![tokio::spawn(echo(agent(&one, "u1").await, "agent".into()))];
    let mut caller = site.caller().await;
    let end = Instant::now() + Duration::from_secs(4);
    let hopping = async {
        for hop in 1_usize.. {
            tokio::time::sleep(Duration::from_millis(300)).await;
            if Instant::now() > end {
                return;
            }
            let client = agent(instances[hop % 2], "u1").await;
            agents.push(tokio::spawn(echo(client, "agent".into())));
        }
    };
    let calling = async {
        let mut sent = Vec::new();
        for number in 0.. {
            let request = format!("q-{number}");
            caller.subscribe(&format!("response:{request}")).await;
            if site.command("u1", &call(&request)) > 0 {
                sent.push(request);
            }
            if Instant::now() > end {
                return sent;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        sent
    };
    let ((), sent) = tokio::join!(hopping, calling);
    let mut answers: HashMap<String, usize> = HashMap::new();
    for _ in 0..sent.len() {
        let Ok((channel, _)) = timeout(Duration::from_secs(10), caller.read()).await else { break };
        *answers.entry(channel).or_default() += 1;
    }
    caller.silent(Duration::from_millis(300)).await;
    let silent: Vec<_> = sent
        .iter()
        .filter(|request| !answers.contains_key(&format!("response:{request}")))
        .collect();
    assert!(silent.is_empty(), "{} of {} without an answer: {silent:?}", silent.len(), sent.len());
    assert!(answers.values().all(|count| *count == 1), "{answers:?}");
    let mut runs: HashMap<String, usize> = HashMap::new();
    let last = agents.pop().unwrap();
    last.abort();
    for task in agents {
        let (ran, code) = soon("the end of a replaced agent", task).await.unwrap();
        assert_eq!(code, Some(4001));
        ran.into_iter().for_each(|request| *runs.entry(request).or_default() += 1);
    }
    assert!(runs.values().all(|count| *count == 1), "{runs:?}");
}
