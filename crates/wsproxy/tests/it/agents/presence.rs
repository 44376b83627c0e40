//! Knowledge of other programs about connected agents, commands to all instances, and a user's one place among several
//! instances.

use std::time::{Duration, Instant};

use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use wsproxy::{
    database::agents::{Issued, NewSecret, Others, UserRule},
    endpoint::agents::presence::control::Order,
};

use super::site::{Caller, Site, agent, call, connect, connect_as, response};
use crate::support::{
    client::Client,
    eventually, eventually_yes,
    gateway::{TestInstance, id},
    http,
    redis_server::Answer,
};

/// Waits until the status of a user's agent is this one.
async fn wait_status(site: &Site, user: &str, status: &str) {
    let key = format!("agent:{user}:status");
    let is_set = || site.server.call(&["GET", &key]) == Answer::Text(status.into());
    eventually("the status is written", is_set).await;
}

/// Waits until the row of a user has this status.
async fn wait_row(site: &Site, user: &str, status: &str) {
    let rows = site.rows("SELECT user_id || ' ' || status FROM agent_credentials");
    let wanted = format!("{user} {status}");
    eventually_yes("the row is written", async || rows().await.contains(&wanted)).await;
}

/// The next announcement: the event, its user and its instance.
async fn announced(events: &mut Caller) -> (String, String, String) {
    let (channel, event) = events.next().await;
    assert_eq!(channel, "agents:events");
    assert!(event["generation"].as_str().unwrap().parse::<u64>().is_ok(), "{event}");
    let text = |name: &str| event[name].as_str().unwrap().to_owned();
    (text("event"), text("userId"), text("serverId"))
}

/// Answers the next call of an agent, and returns the answer of its caller.
async fn served(site: &Site, caller: &mut Caller, agent: &mut Client, request: &str) -> Value {
    caller.subscribe(&format!("response:{request}")).await;
    assert_eq!(site.command("u1", &call(request)), 1);
    let call = agent.json().await;
    assert_eq!(call["requestId"], request);
    agent.send(response(request, &json!(request))).await;
    caller.next().await.1
}

#[tokio::test]
async fn others_learn_when_an_agent_comes_and_goes() {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1"]).await;
    let mut events = site.caller().await;
    events.subscribe("agents:events").await;
    let agent = agent(&instance, "u1").await;
    let expected = |event: &str| (event.to_owned(), "u1".to_owned(), "one".to_owned());
    assert_eq!(announced(&mut events).await, expected("connected"));
    wait_status(&site, "u1", "connected").await;
    let ttl = site.server.call(&["TTL", "agent:u1:status"]).integer();
    assert!((110..=120).contains(&ttl), "{ttl}");
    wait_row(&site, "u1", "connected").await;
    let listed = || site.server.call(&["HLEN", "ws:server:one:agents"]).integer() == 1;
    eventually("the agent is listed", listed).await;
    agent.close().await;
    assert_eq!(announced(&mut events).await, expected("disconnected"));
    wait_status(&site, "u1", "disconnected").await;
    wait_row(&site, "u1", "disconnected").await;
    assert!(!site.exists("agent:u1:server"));
    eventually("the list is empty", || !site.exists("ws:server:one:agents")).await;
    instance.drain().await;
}

#[tokio::test]
async fn newer_connection_at_another_instance_ends_the_older() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1"]).await;
    let mut events = site.caller().await;
    events.subscribe("agents:events").await;
    let mut older = agent(&one, "u1").await;
    let begun = Instant::now();
    let mut newer = agent(&two, "u1").await;
    assert_eq!(older.closed().await, (4001, "replaced".into()));
    println!("replaced after {:?}", begun.elapsed());
    for server in ["one", "two"] {
        let expected = ("connected".to_owned(), "u1".to_owned(), server.to_owned());
        assert_eq!(announced(&mut events).await, expected);
    }
    let mut caller = site.caller().await;
    let answer = served(&site, &mut caller, &mut newer, "q-1").await;
    assert_eq!(answer["result"], "q-1");
    assert_eq!(site.server.call(&["GET", "agent:u1:server"]), Answer::Text("two".into()));
    wait_status(&site, "u1", "connected").await;
    wait_row(&site, "u1", "connected").await;
    // The end of the older one was not announced.
    events.silent(Duration::from_millis(300)).await;
    let listed = || site.server.call(&["HLEN", "ws:server:two:agents"]).integer() == 1;
    eventually("the newer one is listed", listed).await;
    eventually("the older one is not", || !site.exists("ws:server:one:agents")).await;
}

#[tokio::test]
async fn pairs_that_connect_at_one_instant_leave_one_each() {
    const PAIRS: usize = 100;
    let site = Site::start();
    let instances = [site.instance("one").await, site.instance("two").await];
    let users: Vec<_> = (0..PAIRS).map(|n| format!("u{n}")).collect();
    site.add(&users.iter().map(|user| &**user).collect::<Vec<_>>()).await;
    let pair = async |user: &str| {
        let [one, two] = &instances;
        let (one, two) = tokio::join!(connect(one, user), connect(two, user));
        for refused in [&one, &two] {
            assert!(refused.as_ref().is_ok() || refused.as_ref().is_err_and(|s| *s == 409));
        }
        let opened: Vec<_> = [one, two].into_iter().flatten().collect();
        assert!(!opened.is_empty(), "{user}");
        opened
    };
    let opened = futures_util::future::join_all(users.iter().map(|user| pair(user))).await;
    for (user, opened) in users.iter().zip(opened) {
        let key = format!("agent:{user}:server");
        // The one that was replaced leaves the channel once it has seen the marker.
        let alone = Answer::Array(vec![Answer::Text(channel(user)), Answer::Integer(1)]);
        let listening = || site.server.call(&["PUBSUB", "NUMSUB", &channel(user)]);
        eventually("one instance listens", || listening() == alone).await;
        assert_eq!(site.command(user, &json!({"type": "hello"})), 1, "{user}");
        assert!(site.exists(&key), "{user}");
        let mut survivors = 0;
        for mut agent in opened {
            survivors += usize::from(is_survivor(&mut agent).await);
        }
        assert_eq!(survivors, 1, "{user}");
    }
}

fn channel(user: &str) -> String {
    format!("agent:{user}:commands")
}

/// Whether an agent gets the message that the test has published, and is not replaced.
async fn is_survivor(agent: &mut Client) -> bool {
    loop {
        match agent.next().await {
            Message::Text(text) if text.contains("hello") => return true,
            Message::Text(text) => assert!(text.contains("connected"), "{text}"),
            Message::Close(Some(frame)) => {
                assert_eq!(u16::from(frame.code), 4001);
                return false;
            }
            Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn commands_to_all_instances_end_connections() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1", "u2", "u3"]).await;
    let mut agents = [agent(&one, "u1").await, agent(&two, "u2").await, agent(&two, "u3").await];
    let publish = |text: &str| site.server.call(&["PUBLISH", "agents:control", text]).integer();
    let begun = Instant::now();
    assert_eq!(publish(r#"{"op":"revoke","userId":"u1"}"#), 2);
    assert_eq!(agents[0].closed().await, (4401, "credential revoked".into()));
    println!("revoked after {:?}", begun.elapsed());
    assert_eq!(publish(r#"{"op":"disconnect","userId":"u2","reason":"bye"}"#), 2);
    assert_eq!(agents[1].closed().await, (4004, "bye".into()));
    for bad in ["", "{}", r#"{"op":"disconnect","userId":"u:3"}"#] {
        publish(bad);
    }
    let counters = |instance: &TestInstance| {
        let presence = instance.families().agents.presence.clone().unwrap();
        presence.counters.bad_commands.value()
    };
    eventually("bad commands are counted", || (counters(&one), counters(&two)) == (3, 3)).await;
    let presence = one.families().agents.presence.clone().unwrap();
    let instances = presence.order(&Order::disconnect(id("u3"), None)).await.unwrap();
    assert_eq!(instances, 2);
    assert_eq!(agents[2].closed().await, (4004, "ended by the backend".into()));
    wait_status(&site, "u3", "disconnected").await;
}

#[tokio::test]
async fn secrets_revoked_while_redis_is_away_close_connections() {
    let mut site = Site::start();
    let instance = site.instance("one").await;
    let database = instance.families().agents.database.clone().unwrap();
    site.add(&["clear", "adopted", "revoked", "removed"]).await;
    let (mut first, mut other) = (Vec::new(), Vec::new());
    for user in ["stored", "one-of-two"] {
        first.push(database.issue(&id(user), a_secret()).await.unwrap());
        other.push(database.issue(&id(user), a_secret()).await.unwrap());
    }
    let stored = async |user: &str, secret: &Issued| {
        let secret = secret.secret.expose_secret();
        let mut client = connect_as(&instance, &format!("/?userId={user}&secret={secret}")).await;
        client.as_mut().unwrap().json().await;
        client.unwrap()
    };
    let mut stay = [
        agent(&instance, "clear").await,
        agent(&instance, "adopted").await,
        stored("one-of-two", &first[1]).await,
    ];
    let go = [
        agent(&instance, "revoked").await,
        agent(&instance, "removed").await,
        stored("stored", &first[0]).await,
    ];
    site.server.kill();
    database.revoke(&id("revoked"), None).await.unwrap();
    database.remove(&id("removed")).await.unwrap();
    database.revoke(&id("stored"), Some(first[0].id)).await.unwrap();
    database.revoke(&id("one-of-two"), Some(other[1].id)).await.unwrap();
    let sql = "UPDATE agent_credentials SET shared_secret = 'another' WHERE user_id = 'clear' \
               RETURNING user_id";
    site.rows(sql)().await;
    assert_eq!(database.adopt(false).await.unwrap().adopted, ["adopted"]);
    let rechecks = || {
        let presence = instance.families().agents.presence.clone().unwrap();
        presence.counters.rechecks.value()
    };
    let before = rechecks();
    site.server.restart();
    for mut agent in go {
        assert_eq!(agent.closed().await, (4401, "credential revoked".into()));
    }
    eventually("the secrets were read again", || rechecks() > before).await;
    for agent in &mut stay {
        agent.send(r#"{"type":"heartbeat"}"#).await;
        assert_eq!(agent.json().await["type"], "heartbeat_ack");
    }
}

/// A wish for a secret beside others.
fn a_secret() -> NewSecret {
    NewSecret {
        platform: None,
        expires_in: None,
        secret: None,
        user: UserRule::Any,
        others: Others::Keep,
    }
}

#[tokio::test]
async fn a_handshake_is_not_counted_as_a_connection() {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1", "u2"]).await;
    let _agent = agent(&instance, "u1").await;
    site.server.stop();
    let counted = async {
        let connections = &instance.families().agents.connections;
        eventually("the handshake waits", || connections.of(&id("u2")).len() == 1).await;
        let accept = [("accept", "application/json")];
        http::request(instance.admin_address(), "GET", "/metrics", &accept, b"").await.json()
    };
    let (_, metrics) = tokio::join!(connect(&instance, "u2"), counted);
    assert_eq!(metrics["connections"], 1);
    site.server.cont();
}

#[tokio::test]
async fn row_of_an_agent_that_is_gone_is_corrected() {
    let site = Site::start();
    let one = site.instance("one").await;
    site.add(&["gone", "here"]).await;
    let _agent = agent(&one, "here").await;
    wait_row(&site, "here", "connected").await;
    // As killed instances leave rows where no other one notices, or none has the database.
    let sql = "UPDATE agent_credentials SET status = 'connected', last_seen = '2020-01-01 00:00:00' \
               RETURNING user_id";
    assert_eq!(site.rows(sql)().await.len(), 2);
    let _two = site.instance("two").await;
    wait_row(&site, "gone", "disconnected").await;
    wait_row(&site, "here", "connected").await;
}

#[tokio::test]
async fn place_is_taken_again_after_redis_was_emptied() {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1"]).await;
    let mut agent = agent(&instance, "u1").await;
    site.server.call(&["FLUSHALL"]);
    // A heartbeat refreshes at most once a second.
    eventually_yes("the place is taken again", async || {
        agent.send(r#"{"type":"heartbeat","timestamp":1}"#).await;
        assert_eq!(agent.json().await["type"], "heartbeat_ack");
        site.exists("agent:u1:server")
    })
    .await;
    wait_status(&site, "u1", "connected").await;
    let mut caller = site.caller().await;
    let answer = served(&site, &mut caller, &mut agent, "q-1").await;
    assert_eq!(answer["result"], "q-1");
}

#[tokio::test]
async fn place_is_taken_again_after_redis_was_restarted() {
    let mut site = Site::start();
    let instances = [site.instance("one").await, site.instance("two").await];
    site.add(&["u1", "u2"]).await;
    let mut agent1 = agent(&instances[0], "u1").await;
    let _agent2 = agent(&instances[1], "u2").await;
    site.server.kill();
    site.server.restart();
    for instance in &instances {
        instance.ready().await;
    }
    // Nothing has to come from the agent for that.
    let again = || site.exists("agent:u1:server") && site.exists("agent:u2:server");
    eventually("the places are taken again", again).await;
    let mut caller = site.caller().await;
    let answer = served(&site, &mut caller, &mut agent1, "q-1").await;
    assert_eq!(answer["result"], "q-1");
}

#[tokio::test]
async fn holder_takes_its_place_back_from_a_redis_that_was_rolled_back() {
    let site = Site::start();
    let (one, two) = (site.instance("one").await, site.instance("two").await);
    site.add(&["u1"]).await;
    let mut older = agent(&one, "u1").await;
    let owner = "{agent:u1:server}:owner";
    let Answer::Array(before) = site.server.call(&["HGETALL", owner]) else { panic!("no owner") };
    let mut newer = agent(&two, "u1").await;
    assert_eq!(older.closed().await.0, 4001);
    // As after a failover to a replica that lagged behind.
    let mut words = vec!["HSET", owner];
    words.extend(before.iter().map(|word| match word {
        Answer::Text(word) => &**word,
        other => panic!("{other:?}"),
    }));
    site.server.call(&words);
    site.server.call(&["SET", "agent:u1:server", "one"]);
    let is_back = || site.server.call(&["GET", "agent:u1:server"]) == Answer::Text("two".into());
    eventually_yes("the place is taken back", async || {
        newer.send(r#"{"type":"heartbeat","timestamp":1}"#).await;
        assert_eq!(newer.json().await["type"], "heartbeat_ack");
        is_back()
    })
    .await;
    let mut caller = site.caller().await;
    let answer = served(&site, &mut caller, &mut newer, "q-1").await;
    assert_eq!(answer["result"], "q-1");
}

#[tokio::test]
async fn redis_that_froze_for_a_while_costs_no_place() {
    let site = Site::start();
    let instance = site.instance("one").await;
    site.add(&["u1", "u2"]).await;
    let mut agent1 = agent(&instance, "u1").await;
    site.server.stop();
    let refused = connect(&instance, "u2").await.err().map(|status| status.as_u16());
    assert!(matches!(refused, Some(503 | 504)), "{refused:?}");
    site.server.cont();
    instance.ready().await;
    let _agent2 = agent(&instance, "u2").await;
    let mut caller = site.caller().await;
    let answer = served(&site, &mut caller, &mut agent1, "q-1").await;
    assert_eq!(answer["result"], "q-1");
    assert!(site.exists("agent:u1:server") && site.exists("agent:u2:server"));
}

#[tokio::test]
async fn drained_instance_leaves_no_place() {
    let site = Site::start();
    let instance = site.instance("one").await;
    let users: Vec<_> = (0..50).map(|n| format!("u{n}")).collect();
    site.add(&users.iter().map(|user| &**user).collect::<Vec<_>>()).await;
    let mut agents = Vec::new();
    for user in &users {
        agents.push(agent(&instance, user).await);
    }
    let drain = tokio::spawn(instance.drain());
    for mut agent in agents {
        assert_eq!(agent.closed().await.0, 1012);
    }
    drain.await.unwrap();
    for user in &users {
        assert!(!site.exists(&format!("agent:{user}:server")), "{user}");
        let status = site.server.call(&["GET", &format!("agent:{user}:status")]);
        assert_eq!(status, Answer::Text("disconnected".into()), "{user}");
        wait_row(&site, user, "disconnected").await;
    }
    assert!(!site.exists("ws:server:one:agents") && !site.exists("ws:server:one"));
}
