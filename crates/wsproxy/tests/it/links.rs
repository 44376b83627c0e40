//! The links of an instance end at one server: where they differ they are made again, and the hub is told.

use std::time::{Duration, Instant};

use wsproxy::bus::publish::Outcome;

use crate::support::{
    bus::{TestBus, config, message},
    eventually,
    fault_proxy::FaultProxy,
    gateway::{self, TestInstance},
    redis_server::{Answer, RedisServer},
    soon,
};

/// The id of a link's connection at a server, if it has one there.
fn link_at(server: &RedisServer, name: &str) -> Option<String> {
    let Answer::Text(clients) = server.call(&["CLIENT", "LIST"]) else { return None };
    let line = clients.lines().find(|line| line.contains(&format!("{name} ")))?;
    let id = line.split(' ').find_map(|word| word.strip_prefix("id="))?;
    Some(id.to_owned())
}

fn kill(server: &RedisServer, name: &str) {
    let id = link_at(server, name).unwrap();
    assert_eq!(server.call(&["CLIENT", "KILL", "ID", &id]).integer(), 1);
}

/// Two servers behind one name, and a bus at the first.
async fn switched() -> (RedisServer, RedisServer, FaultProxy, TestBus) {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = FaultProxy::start(old.port()).await;
    let bus = TestBus::on(&config(Some(&old.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    proxy.retarget(new.port());
    (old, new, proxy, bus)
}

async fn assert_all_at(bus: &TestBus, server: &RedisServer) {
    eventually("all links end at the newer server", || {
        LINKS.iter().all(|name| link_at(server, name).is_some())
    })
    .await;
    bus.ready().await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    bus.store.save("key", b"value", Duration::from_secs(60)).await.unwrap();
    assert_eq!(server.call(&["EXISTS", "key"]).integer(), 1);
}

#[tokio::test]
async fn one_link_at_another_server_takes_all_others_there() {
    for moved in LINKS {
        let (old, new, _proxy, bus) = switched().await;
        kill(&old, moved);
        let killed = Instant::now();
        assert_all_at(&bus, &new).await;
        let took = killed.elapsed();
        println!("{moved} moved: all well after {took:?}");
        assert!(took < Duration::from_secs(3), "{moved}: {took:?}");
        // Once for the link that was killed or differed, and perhaps again for its finding.
        bus.seen.notes(|notes| {
            assert!(!notes.lost.is_empty(), "{moved}: the hub must read histories again");
            assert_eq!(notes.recovered.len(), 1, "{moved}: {:?}", notes.lost);
        });
        assert!(bus.bus.counters().probe_failures.value() > 0, "{moved}");
        assert!(LINKS.iter().all(|name| link_at(&old, name).is_none()), "{moved}");
    }
}

#[tokio::test]
async fn a_store_at_another_server_is_not_ready_and_not_recovered() {
    let (old, _new, _proxy, bus) = switched().await;
    kill(&old, "server-subscribe");
    eventually("the loss is told", || bus.seen.notes(|notes| !notes.lost.is_empty())).await;
    // Whenever the bus says that it is subscribed, or tells the hub so, the store is at the same server.
    let deadline = Instant::now() + Duration::from_secs(3);
    while bus.seen.notes(|notes| notes.recovered.is_empty()) {
        let status = bus.bus.status();
        assert!(!(status.connected && status.subscribed) || link_at(&old, LINKS[1]).is_none());
        assert!(Instant::now() < deadline, "never recovered");
        tokio::task::yield_now().await;
    }
    assert_eq!(link_at(&old, "server-command"), None);
}

#[tokio::test]
async fn a_changed_address_is_noticed_though_all_links_agree() {
    let (old, new, _proxy, bus) = switched().await;
    let switched = Instant::now();
    assert_all_at(&bus, &new).await;
    let took = switched.elapsed();
    println!("no link lost: all well after {took:?}");
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert!(LINKS.iter().all(|name| link_at(&old, name).is_none()));
    bus.seen.notes(|notes| {
        assert_eq!((notes.lost.len(), notes.recovered.len()), (1, 1));
        // Others may have published at the newer server all the time.
        assert!(notes.recovered[0] >= took - Duration::from_secs(2), "{:?}", notes.recovered);
    });
}

#[tokio::test]
async fn a_killed_link_to_the_same_server_reconnects_alone() {
    let server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    for (n, name) in LINKS.into_iter().enumerate() {
        let connects = bus.bus.counters().connects.value();
        kill(&server, name);
        eventually("it is made again", || bus.bus.counters().connects.value() > connects).await;
        bus.ready().await;
        assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
        soon("the store", bus.store.ping()).await.unwrap();
        assert_eq!(bus.bus.counters().links_lost.value(), n as u64 + 1);
    }
    assert_eq!(bus.bus.counters().probe_failures.value(), 0);
    bus.seen.notes(|notes| assert_eq!(notes.lost.len(), 1, "only its own subscriptions matter"));
}

#[tokio::test]
async fn a_denied_probe_channel_is_not_ready_but_recovers() {
    let mut server = RedisServer::start();
    let rules = ["ACL", "SETUSER", "gateway", "on", ">pw", "~*", "&*", "+@all", "-publish"];
    server.call(&rules);
    let bus =
        TestBus::on(&config(Some(&format!("redis://gateway:pw@127.0.0.1:{}", server.port()))));
    bus.subscribe(&["a"]).await;
    server.kill();
    bus.broken().await;
    server.restart();
    server.call(&rules);
    bus.seen.wait_for_recoveries(1).await;
    assert!(!bus.bus.status().subscribed);
    server.call(&["ACL", "SETUSER", "gateway", "+publish"]);
    bus.ready().await;
}

#[tokio::test]
async fn clients_get_what_was_published_at_the_newer_server_meanwhile() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = FaultProxy::start(old.port()).await;
    let mut config = gateway::config(Some(&old.url_on(proxy.port())));
    config.sessions.history = true;
    let instance = TestInstance::start(config).await;
    instance.keep("s", "\"c0\"").await;
    let mut client = instance.client_with("s", "&last_event_id=0").await;
    assert_eq!(client.json().await["type"], "resumed");
    assert_eq!(client.text().await, "\"c0\"");
    new.replica_of(old.port());
    eventually("the replica has it all", || {
        new.call(&["EXISTS", "{session:s:down}:log"]).integer() == 1
    })
    .await;
    new.replica_of_no_one();
    proxy.retarget(new.port());
    for payload in ["\"b0\"", "\"b1\""] {
        new.keep("session:s:down", payload);
    }
    old.call(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    for payload in ["\"b0\"", "\"b1\""] {
        assert_eq!(client.text().await, payload);
    }
    instance.ready().await;
    new.keep("session:s:down", "\"b2\"");
    assert_eq!(client.text().await, "\"b2\"");
}

/// The links of an instance, as they end their names in a server's list of clients.
const LINKS: [&str; 3] = ["server-publish", "server-command", "server-subscribe"];
