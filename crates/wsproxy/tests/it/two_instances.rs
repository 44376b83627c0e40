//! Several instances on one Redis: a session's two ends may be at different ones.

use crate::support::{
    eventually,
    gateway::{Backend, TestInstance, config},
    redis_server::{Answer, RedisServer},
};

#[tokio::test]
async fn two_instances_serve_the_two_ends_of_a_session() {
    let backend = Backend::redis();
    let first = TestInstance::start(backend.config()).await;
    let second = TestInstance::start(backend.config()).await;
    let mut events = second.follow("agent:agent:sessions").await;
    let mut worker = second.follow("session:s:up").await;
    // The token is made by one instance and used at the other.
    let token = second.token("s").await;
    let mut here = first.connect("s", &token).await.unwrap();
    let opened = events.json().await;
    assert_eq!(opened["server_id"], &*first.gateway().server_id);
    let mut there = second.client("s").await;
    assert_eq!(events.json().await["server_id"], &*second.gateway().server_id);
    here.send("[\"from here\"]").await;
    assert_eq!(worker.next().await, "[\"from here\"]");
    second.publish("session:s:down", "to both");
    assert_eq!(here.text().await, "to both");
    assert_eq!(there.text().await, "to both");
    first.publish("session:s:control", r#"{"op":"close","code":4100,"reason":"done"}"#);
    assert_eq!(here.closed().await, (4100, "done".into()));
    assert_eq!(there.closed().await, (4100, "done".into()));
    for _ in 0..2 {
        assert_eq!(events.json().await["event"], "closed");
    }
    drop((events, worker));
    first.wait_empty().await;
    second.wait_empty().await;
}

/// A backend without wsproxy's packages: plain commands on plain channels.
#[tokio::test]
async fn a_worker_needs_plain_redis_commands_only() {
    let server = RedisServer::start();
    let instance = TestInstance::start(config(Some(&server.url()))).await;
    server.call(&["SET", "session:s:auth", "a-token", "EX", "60"]);
    let mut client = instance.connect("s", "a-token").await.unwrap();
    assert_eq!(server.call(&["EXISTS", "session:s:auth"]), Answer::Integer(0));
    assert_eq!(server.call(&["PUBLISH", "session:s:down", "hello"]), Answer::Integer(1));
    assert_eq!(client.text().await, "hello");
    assert_eq!(
        server.call(&["PUBSUB", "NUMSUB", "session:s:down", "session:s:control"]),
        Answer::Array(vec![
            Answer::Text("session:s:down".into()),
            Answer::Integer(1),
            Answer::Text("session:s:control".into()),
            Answer::Integer(1),
        ])
    );
    server.call(&["PUBLISH", "session:s:control", r#"{"op":"close"}"#]);
    assert_eq!(client.closed().await.0, 4004);
    let subscribed = || server.call(&["PUBSUB", "NUMSUB", "session:s:down"]);
    let nobody = Answer::Array(vec![Answer::Text("session:s:down".into()), Answer::Integer(0)]);
    eventually("nobody is subscribed", || subscribed() == nobody).await;
    instance.wait_empty().await;
}

#[tokio::test]
async fn one_instance_that_ends_leaves_the_other_undisturbed() {
    let backend = Backend::redis();
    let first = TestInstance::start(backend.config()).await;
    let second = TestInstance::start(backend.config()).await;
    let mut here = first.client("s").await;
    let mut there = second.client("s").await;
    let (end, ()) = tokio::join!(here.closed(), first.drain());
    assert_eq!(end.0, 1012);
    second.assert_serves(&mut there, "s").await;
    let token = second.token("s").await;
    let mut back = second.connect("s", &token).await.unwrap();
    second.publish("session:s:down", "welcome back");
    assert_eq!(back.text().await, "welcome back");
}
