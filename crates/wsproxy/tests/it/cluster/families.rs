//! Each family at two instances: what begins at one of them ends at the other, with keys on every master.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use serde_json::{Value, json};
use wsproxy::config::rooms::Development;
use wsproxy_conn::lane::LaneSettings;

use super::Pair;
use crate::{
    agents::stage::{Stage, TestAgent, call, echo},
    rooms::room_client::{RoomClient, position},
    support::{
        client::Client,
        cluster::{Cluster, MASTERS},
        cluster_agent::{self, ClusterAgent, Name, ask, head, hello},
        eventually_yes,
        gateway::{Backend, TestInstance, bearer},
        issuer::now,
        redis_server::{Answer, free_port},
    },
};

#[tokio::test]
async fn sessions_of_every_part_meet_over_two_instances() {
    let pair = Pair::with(|config| config.sessions.history = true).await;
    let Pair { cluster, one, two } = &pair;
    let mut events = two.follow("agent:agent:sessions").await;
    let mut owners = BTreeSet::new();
    for number in 0..12 {
        // Names that differ in their last byte only have slots side by side.
        let session = format!("s-{}", number * 7919);
        owners.insert(cluster.owner_of(&format!("{{session:{session}:down}}:log")));
        // Of many handshakes with one token exactly one wins.
        let token = two.token(&session).await;
        let attempts = (0..6).map(|n| [one, two][n % 2].connect(&session, &token));
        let clients: Vec<_> = join_all(attempts).await.into_iter().filter_map(Result::ok).collect();
        assert_eq!(clients.len(), 1, "{session}");
        assert_eq!(events.json().await["session_id"], *session);
        let mut client = clients.into_iter().next().unwrap();
        let mut worker = two.follow(&format!("session:{session}:up")).await;
        client.send(r#"{"from":"client"}"#).await;
        assert_eq!(worker.next().await, r#"{"from":"client"}"#);
        let first = one.keep(&session, r#"{"n":1}"#).await;
        assert_eq!(client.json().await["n"], 1);
        let mut back = two.client_with(&session, &format!("&last_event_id={first}")).await;
        assert_eq!(back.json().await["type"], "resumed");
        drop(client);
        one.keep(&session, r#"{"n":2}"#).await;
        one.publish(&format!("session:{session}:down"), r#"{"n":3}"#);
        assert_eq!(
            (back.json().await["n"].clone(), back.json().await["n"].clone()),
            (2.into(), 3.into())
        );
        back.close().await;
        // Opened by the second client, and two ends.
        for _ in 0..3 {
            events.json().await;
        }
    }
    assert_eq!(owners.len(), MASTERS, "sessions on every master");
    drop(events);
    pair.drain().await;
}

fn token(user: &str) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    let claims = json!({ "sub": user, "exp": now() + 600 });
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

async fn event_client(instance: &TestInstance, user: &str, parameters: &str) -> (Client, Value) {
    let path = format!("/ws?{parameters}");
    let mut client =
        Client::connect(instance.address(), &path, &bearer(&token(user))).await.unwrap();
    let connected = client.json().await;
    assert_eq!(connected["type"], "connected");
    (client, connected)
}

#[tokio::test]
async fn events_reach_users_at_both_instances_and_are_resumed() {
    let pair = Pair::with(|config| {
        config.endpoints.events = true;
        config.events.history = true;
        config.jwt.secret_key = Some(SECRET.into());
    })
    .await;
    let Pair { one, two, .. } = &pair;
    let (mut here, _) = event_client(one, "u-1", "").await;
    let (mut there, _) = event_client(two, "u-1", "").await;
    let (mut other, connected) = event_client(two, "u-2", "").await;
    let send = async |instance: &TestInstance, to: &str, number: u32| {
        let event = json!({ "type": "news", "data": { "n": number } }).to_string();
        let sent = instance.api("POST", &format!("/api/v1/events/{to}"), &event).await;
        assert_eq!(sent.status, 200, "{sent:?}");
        sent.json()
    };
    let number = |event: Value| event["data"]["n"].as_u64().unwrap_or_else(|| panic!("{event}"));
    let first = send(one, "users/u-1", 1).await["event_id"].as_str().unwrap().to_owned();
    send(two, "broadcast", 2).await;
    let connection = connected["connection_id"].as_str().unwrap();
    send(one, &format!("connections/{connection}"), 3).await;
    for client in [&mut here, &mut there] {
        assert_eq!((number(client.json().await), number(client.json().await)), (1, 2));
    }
    assert_eq!((number(other.json().await), number(other.json().await)), (2, 3));
    drop(here);
    send(two, "users/u-1", 4).await;
    let (mut back, _) = event_client(two, "u-1", &format!("last_event_id={first}")).await;
    let mut seen = Vec::new();
    while seen.last() != Some(&4) {
        seen.extend(back.json().await["data"]["n"].as_u64());
    }
    assert_eq!(seen, [2, 4]);
    // The registry knows both instances' connections.
    eventually_yes("both are counted", async || {
        let health = one.get("/ws/health").await.json();
        health["connections"]["alive"] == 3
    })
    .await;
    let ended = one.api("POST", "/api/v1/events/disconnect", r#"{"user_id":"u-2"}"#).await;
    assert_eq!((ended.status, &ended.json()["instances"]), (200, &json!(2)));
    assert_eq!(other.closed().await.0, 4004);
    pair.drain().await;
}

#[tokio::test]
async fn members_at_two_instances_share_their_rooms() {
    let pair = Pair::with(|config| {
        config.endpoints.rooms = true;
        config.rooms.development = Development::Loopback;
        config.rate_limit.max_requests_is_set = true;
        config.rooms.leave_grace = Duration::from_millis(300);
    })
    .await;
    let Pair { cluster, one, two } = &pair;
    let mut owners = BTreeSet::new();
    for number in 0..6 {
        let room = format!("room-{}", number * 7919);
        owners.insert(cluster.owner_of(&format!("{{room:{room}}}:members")));
        let join =
            |instance, client| RoomClient::join_as(instance, &room, client, client, json!({}));
        let mut ann = join(one, "ann").await;
        let mut bob = join(two, "bob").await;
        assert_eq!(bob.members(), ["ann", "bob"]);
        assert_eq!(ann.told().await, "join bob");
        bob.say("hi").await;
        assert_eq!(ann.told().await, "bob: hi");
        ann.send(json!({ "entitySpawn": { "entityId": "e", "templateId": "t" } })).await;
        assert_eq!(bob.told().await, "spawn e of ann");
        ann.send(position("e", 7.0)).await;
        assert_eq!(bob.told().await, "move e of ann to 7");
        let mut cat = join(two, "cat").await;
        assert!(cat.hello["initialState"].to_string().contains("\"e\""), "{}", cat.hello);
        assert_eq!(ann.told().await, "join cat");
        ann.client.close().await;
        assert_eq!(cat.told_until("leave ann").await, ["despawn e of ann"]);
    }
    assert!(owners.len() > 1, "rooms on several masters");
    pair.drain().await;
}

#[tokio::test]
async fn calls_reach_an_agent_at_the_other_instance() {
    let cluster = Cluster::shared().await;
    let url = cluster.url();
    let stage = Stage::with(Backend::Cluster(cluster.clone()), |config| {
        config.redis.url = Some(url.clone().into());
    })
    .await;
    for number in 0..6 {
        let user = format!("u-{number}");
        let mut agent = stage.agent(&user).await;
        let body = json!({ "tool": "echo", "params": { "n": number } });
        let (answer, _) = tokio::join!(call(stage.caller(), &user, &body), agent.echo());
        assert_eq!((answer.status, &answer.json()["result"]["n"]), (200, &json!(number)));
        let server = format!("agent:{user}:server");
        let owner = &cluster.nodes[cluster.owner_of(&server)];
        assert_eq!(owner.call(&["EXISTS", &server]), Answer::Integer(1));
        // A worker publishes at any node, and waits at any other one.
        let mut waiting = cluster.nodes[number % 6].subscribe(&format!("response:q-{number}"));
        let command = json!({
            "type": "tool_call", "requestId": format!("q-{number}"), "tool": "echo", "params": {},
        });
        cluster.nodes[(number + 1) % 6].call(&[
            "PUBLISH",
            &format!("agent:{user}:commands"),
            &command.to_string(),
        ]);
        let taken = agent.call().await;
        agent.respond(&taken, json!("done")).await;
        let answer = tokio::task::spawn_blocking(move || waiting.next()).await.unwrap();
        assert!(answer.contains("done"), "{answer}");
        // The newer connection, at the other instance, has the place.
        let secret = agent.secret.clone();
        let newer = TestAgent::connect(stage.caller(), &user, &secret, "").await;
        assert_eq!(agent.client.closed().await.0, 4001);
        drop(newer);
    }
    let offline = call(stage.caller(), "u-absent", &echo(Duration::from_secs(2))).await;
    assert_eq!((offline.status, &offline.json()["error"]["code"]), (503, &json!("agent_offline")));
}

#[tokio::test]
async fn requests_reach_a_cluster_agent_at_the_other_instance() {
    let cluster = Cluster::shared().await;
    let configured = |name: &str| {
        let mut config = cluster_agent::config(Some(&cluster.url()));
        config.server.server_id = Some(name.into());
        config.tunnel.peer_bind = Some(([127, 0, 0, 1], free_port()).into());
        config.tunnel.peer_secret = Some("secret-of-the-instances-0123456789".into());
        config.tunnel.reconnect_grace = Duration::from_millis(100);
        config
    };
    let one = TestInstance::start(configured("s1")).await;
    let two = TestInstance::start(configured("s2")).await;
    for (number, at, from) in [(1, &two, &one), (2, &one, &two)] {
        let name = Name { number, ..Name::default() };
        let agent =
            ClusterAgent::named(at.address(), name, LaneSettings::default(), hello).await.unwrap();
        for instance in [from, at] {
            eventually_yes("the agent is found", async || {
                ask(instance, &head("GET", "/x", "")).await.status == 200
            })
            .await;
        }
        agent.cut();
        eventually_yes("it is lost", async || {
            ask(from, &head("GET", "/x", "")).await.status != 200
        })
        .await;
    }
    one.drain().await;
    two.drain().await;
}

const SECRET: &str = "secret-of-the-cluster-0123456789abcdef";
