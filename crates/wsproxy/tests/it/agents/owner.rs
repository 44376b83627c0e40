//! The place of a user's agent, over both backends: claims, refreshes, releases, their markers.

use std::time::Duration;

use uuid::Uuid;
use wsproxy::endpoint::agents::owner::{Claim, Claimed, Kept};

use super::node::{Node, former, marker, owner};
use crate::support::{
    bus::config,
    eventually_yes,
    gateway::{Backend, id, over_both},
    redis_server::{Answer, RedisServer},
};

over_both!(
    newer_connection_takes_the_place_and_a_late_release_changes_nothing,
    released_place_keeps_its_generation_for_a_while,
    refresh_publishes_a_marker_only_when_announced,
    place_that_replaces_too_often_stays,
    commands_before_a_marker_come_before_it,
    places_of_users_are_independent,
    places_are_kept_together_also_after_scripts_are_lost,
);

fn ids<const N: usize>() -> [Uuid; N] {
    [(); N].map(|()| Uuid::now_v7())
}

async fn newer_connection_takes_the_place_and_a_late_release_changes_nothing(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let (heard, _subscription) = node.listen("u1").await;
    let [a, b] = ids();
    let claim = |connection| Claim { connection, held: None, announce: false };
    let Claimed::Held { generation: first, replaced: None, is_alone: true } =
        node.try_claim("u1", claim(a)).await.unwrap()
    else {
        panic!("the place is free")
    };
    // The same instance: no other one listens.
    let taken = node.try_claim("u1", claim(b)).await.unwrap();
    let Claimed::Held { generation: second, replaced, is_alone: true } = taken else {
        panic!("{taken:?}")
    };
    assert_eq!(replaced, Some(owner(a, &node)));
    assert!(second > first);
    assert!(!node.release("u1", a).await, "the place is not its own any more");
    let lost = node.refresh("u1", a, first).await;
    assert_eq!(lost, Claimed::Lost { owner: Some(owner(b, &node)), generation: second });
    assert!(
        matches!(node.refresh("u1", b, second).await, Claimed::Held { generation, .. } if generation == second)
    );
    let markers: Vec<_> = heard.wait(2).await.iter().map(|text| marker(text)).collect();
    assert_eq!(markers, [(Some(a), first), (Some(b), second)]);
    assert_eq!(former(&heard.all()), [None, Some(a)]);
}

async fn released_place_keeps_its_generation_for_a_while(backend: Backend) {
    let config = config(backend.url().as_deref());
    let node =
        Node::with(config, "s1", |settings| settings.offline_wait = Duration::from_millis(300))
            .await;
    let (heard, _subscription) = node.listen("u1").await;
    let [a, b, c] = ids();
    assert!(!node.is_awaited("u1").await);
    let (first, _) = node.take("u1", a).await;
    let (second, _) = node.take("u1", b).await;
    assert!(node.release("u1", b).await);
    assert!(!node.release("u1", b).await, "once only");
    assert!(node.is_awaited("u1").await);
    let lost = node.refresh("u1", a, first).await;
    assert_eq!(lost, Claimed::Lost { owner: None, generation: second });
    let lost = node.refresh("u1", b, second).await;
    assert_eq!(lost, Claimed::Lost { owner: None, generation: second });
    let (third, replaced) = node.take("u1", c).await;
    assert!(third > second && replaced.is_none());
    let markers: Vec<_> = heard.wait(4).await.iter().map(|text| marker(text)).collect();
    assert_eq!(markers[2..], [(None, second), (Some(c), third)]);
    assert_eq!(former(&heard.all()), [None, Some(a), Some(b), None]);
    assert!(node.release("u1", c).await);
    eventually_yes("the generation is forgotten", async || !node.is_awaited("u1").await).await;
    // The place was free for long: the connection that held the place last may have it again.
    assert!(
        matches!(node.refresh("u1", c, third).await, Claimed::Held { generation, .. } if generation == third)
    );
}

async fn refresh_publishes_a_marker_only_when_announced(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let (heard, _subscription) = node.listen("u1").await;
    let [a] = ids();
    let (held, _) = node.take("u1", a).await;
    for announce in [false, true, false] {
        let claim = Claim { connection: a, held: Some(held), announce };
        let claimed = node.try_claim("u1", claim).await.unwrap();
        assert!(
            matches!(claimed, Claimed::Held { generation, replaced: None, .. } if generation == held)
        );
    }
    assert!(node.release("u1", a).await);
    let markers: Vec<_> = heard.wait(3).await.iter().map(|text| marker(text)).collect();
    assert_eq!(markers, [(Some(a), held), (Some(a), held), (None, held)]);
    assert_eq!(former(&heard.all()), [None, Some(a), Some(a)]);
}

async fn place_that_replaces_too_often_stays(backend: Backend) {
    let first = Node::on(&backend, "s1").await;
    // Two instances of the embedded bus would share nothing.
    let second = match &backend {
        Backend::Memory => None,
        _ => Some(Node::on(&backend, "s2").await),
    };
    let mut last = None;
    for number in 0..23 {
        let node = second.as_ref().filter(|_| number % 2 == 1).unwrap_or(&first);
        let [connection] = ids();
        let claim = Claim { connection, held: None, announce: false };
        match node.try_claim("u1", claim).await.unwrap() {
            Claimed::Held { replaced, .. } => {
                assert!(number < 21, "{number}");
                assert_eq!(replaced, last);
                last = Some(owner(connection, node));
            }
            Claimed::Flapping { retry_after, owner } => {
                assert!(number >= 21, "{number}");
                assert_eq!(Some(owner), last);
                assert!((50..=60).contains(&retry_after.as_secs()), "{retry_after:?}");
            }
            other => panic!("{other:?}"),
        }
    }
    // The holder is not counted, and after its end the place is free.
    let holder = last.unwrap().connection;
    assert!(matches!(first.refresh("u1", holder, 1).await, Claimed::Held { .. }));
    assert!(first.release("u1", holder).await);
    let [free] = ids();
    assert_eq!(first.take("u1", free).await.1, None);
}

async fn commands_before_a_marker_come_before_it(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let (heard, _subscription) = node.listen("u1").await;
    let [a, b] = ids();
    node.take("u1", a).await;
    let topic = node.names.agent_commands(&id("u1"));
    let publish = async |text: &'static str| {
        let (receipt, outcome) = wsproxy::bus::publish::awaited();
        let message = crate::support::bus::message(&topic, text);
        let publish = wsproxy::bus::publish::Publish { receipt: Some(receipt), ..message };
        node.hub.publish(publish).unwrap();
        outcome.await.unwrap();
    };
    publish("before").await;
    node.take("u1", b).await;
    publish("behind").await;
    let all = heard.wait(4).await;
    assert_eq!(marker(&all[0]).0, Some(a));
    assert_eq!((&*all[1], &*all[3]), ("before", "behind"));
    assert_eq!(marker(&all[2]).0, Some(b));
}

async fn places_of_users_are_independent(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let [a, b] = ids();
    node.take("u1", a).await;
    assert_eq!(node.take("u2", b).await.1, None);
    assert!(!node.release("u2", a).await);
    assert!(node.is_awaited("u1").await && !node.is_awaited("u3").await);
}

async fn places_are_kept_together_also_after_scripts_are_lost(backend: Backend) {
    let node = Node::on(&backend, "s1").await;
    let [a, b, c] = ids();
    let (first, _) = node.take("u1", a).await;
    let (second, _) = node.take("u2", b).await;
    let (third, _) = node.take("u2", c).await;
    if let Backend::Redis(server) = &backend {
        server.call(&["SCRIPT", "FLUSH"]);
    }
    let (u1, u2) = (id("u1"), id("u2"));
    let kept = [
        Kept { user: &u1, connection: a, generation: first },
        Kept { user: &u2, connection: b, generation: second },
        Kept { user: &u2, connection: c, generation: third },
    ];
    let [one, two, three] = &node.owners.keep(&kept).await[..] else { panic!("three answers") };
    let held = |claimed: &Result<Claimed, _>| match claimed {
        Ok(Claimed::Held { generation, replaced: None, .. }) => Some(*generation),
        _ => None,
    };
    assert_eq!((held(one), held(three)), (Some(first), Some(third)), "{one:?} {three:?}");
    let lost = Claimed::Lost { owner: Some(owner(c, &node)), generation: third };
    assert_eq!(two.as_ref().unwrap(), &lost);
}

#[tokio::test]
async fn keys_are_those_that_workers_know_and_expire() {
    let server = RedisServer::start();
    let mut with_prefix = config(Some(&server.url()));
    with_prefix.channel_prefix = "eu".into();
    let node = Node::with(with_prefix, "s1", |_| {}).await;
    let [a, b] = ids();
    let (generation, _) = node.take("u1", a).await;
    let text = |answer: Answer| match answer {
        Answer::Text(text) => text,
        other => panic!("{other:?}"),
    };
    let (key, owner_key) = ("eu:agent:u1:server", "{eu:agent:u1:server}:owner");
    assert_eq!(text(server.call(&["GET", key])), "s1");
    assert_eq!(text(server.call(&["HGET", owner_key, "gen"])), generation.to_string());
    assert_eq!(text(server.call(&["HGET", owner_key, "connection"])), a.to_string());
    for key in [key, owner_key] {
        let ttl = server.call(&["PTTL", key]).integer();
        assert!((110_000..=120_000).contains(&ttl), "{ttl}");
    }
    assert!(!node.release("u1", b).await);
    assert_eq!(server.call(&["EXISTS", key]).integer(), 1);
    assert!(node.release("u1", a).await);
    assert_eq!(server.call(&["EXISTS", key]).integer(), 0);
    let ttl = server.call(&["PTTL", owner_key]).integer();
    assert!((4000..=5000).contains(&ttl), "{ttl}");
    let (_, replaced) = node.take("u1", b).await;
    assert_eq!(replaced, None);
    let ttl = server.call(&["PTTL", owner_key]).integer();
    assert!((110_000..=120_000).contains(&ttl), "{ttl}");
    let Answer::Array(keys) = server.call(&["KEYS", "*agent:u1*"]) else { panic!("no keys") };
    assert_eq!(keys.len(), 2);
}

#[tokio::test]
async fn after_redis_lost_everything_the_highest_generation_stays() {
    let backend = Backend::redis();
    let Backend::Redis(server) = &backend else { unreachable!() };
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    let (heard, _subscription) = one.listen("u1").await;
    let [a, b] = ids();
    server.call(&["FLUSHALL"]);
    assert!(matches!(
        one.refresh("u1", a, 100).await,
        Claimed::Held { generation: 100, replaced: None, .. }
    ));
    let taken = two.refresh("u1", b, 200).await;
    let Claimed::Held { generation: 200, replaced, is_alone: true } = taken else {
        panic!("{taken:?}")
    };
    assert_eq!(replaced, Some(owner(a, &one)));
    let lost = one.refresh("u1", a, 100).await;
    assert_eq!(lost, Claimed::Lost { owner: Some(owner(b, &two)), generation: 200 });
    let markers: Vec<_> = heard.wait(2).await.iter().map(|text| marker(text)).collect();
    assert_eq!(markers, [(Some(a), 100), (Some(b), 200)]);
}

#[tokio::test]
async fn claim_tells_whether_other_instances_listen() {
    let backend = Backend::redis();
    let (one, two) = (Node::on(&backend, "s1").await, Node::on(&backend, "s2").await);
    let [a, b] = ids();
    let alone = async |node: &Node, connection| {
        let claim = Claim { connection, held: None, announce: false };
        match node.try_claim("u1", claim).await.unwrap() {
            Claimed::Held { is_alone, .. } => is_alone,
            other => panic!("{other:?}"),
        }
    };
    let _one = one.listen("u1").await;
    assert!(alone(&one, a).await);
    let _two = two.listen("u1").await;
    assert!(!alone(&two, b).await);
}

#[tokio::test]
async fn without_permission_for_pubsub_a_claim_works_and_knows_less() {
    let server = RedisServer::start();
    server.call(&["ACL", "SETUSER", "gateway", "on", ">secret", "~*", "&*", "+@all", "-pubsub"]);
    let url = server.url().replace("redis://", "redis://gateway:secret@");
    let node = Node::with(config(Some(&url)), "s1", |_| {}).await;
    let (heard, _subscription) = node.listen("u1").await;
    let [a] = ids();
    let claim = Claim { connection: a, held: None, announce: false };
    let claimed = node.try_claim("u1", claim).await.unwrap();
    assert!(matches!(claimed, Claimed::Held { is_alone: false, .. }), "{claimed:?}");
    assert_eq!(marker(&heard.wait(1).await[0]).0, Some(a));
}
