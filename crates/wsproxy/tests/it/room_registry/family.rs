//! Members of rooms where instances die or freeze, and where Redis loses its data: as other members see it.

use serde_json::Value;
use wsproxy::config::rooms::Development;

use super::members;
use crate::support::{
    client::Client,
    eventually,
    gateway::{Backend, TestInstance, config},
    killable::Killable,
    redis_server::{Answer, RedisServer},
};

async fn instance(redis: &RedisServer, name: &str) -> TestInstance {
    let mut config = config(Some(&redis.url()));
    config.server.server_id = Some(name.into());
    config.endpoints.rooms = true;
    config.rooms.development = Development::Loopback;
    TestInstance::start(config).await
}

/// Joins the lobby, and reads the state of the room.
async fn join(instance: &TestInstance, client: &str) -> Client {
    let path = format!("/ws/lobby?user_id={client}&client_id={client}");
    let mut member = Client::connect(instance.address(), &path, &[]).await.unwrap();
    member.send(r#"{"clientHello":{}}"#).await;
    let hello = member.json().await;
    assert!(hello["serverHello"].is_object(), "{hello}");
    member
}

/// Reads messages up to a chat message with this text.
async fn read_to_chat(member: &mut Client, text: &str) -> Vec<Value> {
    let mut seen = Vec::new();
    loop {
        let message = member.json().await;
        if message["chatMessage"]["message"] == text {
            return seen;
        }
        seen.push(message);
    }
}

fn is_member(redis: &RedisServer, client: &str) -> bool {
    redis.call(&["HEXISTS", &members("lobby"), client]) == Answer::Integer(1)
}

#[tokio::test]
async fn members_join_again_with_their_entities_where_redis_was_emptied() {
    let redis = RedisServer::start();
    let (one, two) = (instance(&redis, "one").await, instance(&redis, "two").await);
    let mut hears = join(&two, "b").await;
    let mut speaks = join(&one, "a").await;
    speaks.send(r#"{"entitySpawn":{"entityId":"e1","templateId":"box"}}"#).await;
    speaks.send(r#"{"chatMessage":{"message":"before"}}"#).await;
    let seen = read_to_chat(&mut hears, "before").await;
    assert!(seen.iter().any(|message| message["entitySpawn"]["entityId"] == "e1"), "{seen:?}");
    redis.call(&["FLUSHALL"]);
    let is_back = || {
        is_member(&redis, "a")
            && is_member(&redis, "b")
            && redis.call(&["HEXISTS", "{room:lobby}:entities", "a e1"]) == Answer::Integer(1)
    };
    eventually("all have joined again", is_back).await;
    for server in ["one", "two"] {
        let rooms = redis.call(&["HLEN", &format!("ws:server:{server}:rooms")]);
        assert_eq!(rooms, Answer::Integer(1), "{server}");
    }
    speaks.send(r#"{"chatMessage":{"message":"after"}}"#).await;
    let seen = read_to_chat(&mut hears, "after").await;
    let is_end = |message: &Value| {
        message["presenceEvent"]["eventType"] == "LEAVE" || message["entityDespawn"].is_object()
    };
    assert!(!seen.iter().any(is_end), "{seen:?}");
    speaks.close().await;
    eventually("the member has left", || !is_member(&redis, "a")).await;
    drop(hears);
    one.drain().await;
    two.drain().await;
    assert_eq!(redis.call(&["KEYS", "ws:server:*:rooms"]), Answer::Array(vec![]));
}

#[tokio::test]
async fn member_of_a_killed_instance_leaves_once() {
    let backend = Backend::redis();
    let Backend::Redis(redis) = &backend else { unreachable!() };
    let stays = instance(redis, "stays").await;
    let mut hears = join(&stays, "b").await;
    let url = redis.url();
    let start = async move || {
        let mut config = config(Some(&url));
        config.server.server_id = Some("killed".into());
        config.endpoints.rooms = true;
        config.rooms.development = Development::Loopback;
        let instance = TestInstance::start(config).await;
        let member = join(&instance, "a").await;
        // Neither is dropped: nothing is said at the end.
        std::mem::forget((instance, member));
    };
    let (killed, ()) = Killable::start(start).await;
    let joined = hears.json().await;
    assert_eq!(joined["presenceEvent"]["clientId"], "a", "{joined}");
    killed.kill();
    let left = hears.json().await;
    assert_eq!(left["presenceEvent"]["eventType"], "LEAVE", "{left}");
    assert_eq!(left["presenceEvent"]["clientId"], "a", "{left}");
    let mut back = join(&stays, "a").await;
    back.send(r#"{"chatMessage":{"message":"back"}}"#).await;
    let seen = read_to_chat(&mut hears, "back").await;
    assert_eq!(seen.len(), 1, "a join: {seen:?}");
    drop((hears, back));
    stays.drain().await;
}
