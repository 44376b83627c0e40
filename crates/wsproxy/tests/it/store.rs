//! The contract of the store, the same over every backend.

use std::time::Duration;

use wsproxy::{
    bus::publish::Outcome,
    store::{Store, command::StoreError, not_done::NotDone},
};

use crate::support::{
    bus::{TestBus, contract, kept_message},
    eventually_yes, soon,
};

contract!(
    values_are_saved_loaded_and_removed,
    values_expire,
    one_of_many_takes_the_value_and_wrong_ones_none,
    of_several_owners_the_newest_has_the_key,
    an_owner_that_renews_keeps_its_key_and_one_that_does_not_loses_it,
    the_first_of_many_adds_a_key,
    a_log_is_read_on_from_any_position,
    a_key_of_another_kind_is_refused,
    the_store_answers,
);

async fn values_are_saved_loaded_and_removed(bus: TestBus) {
    let store = &bus.store;
    assert_eq!(store.load("key").await, Ok(None));
    store.save("key", b"one", MINUTE).await.unwrap();
    store.save("key", b"\r\n\0\xff", MINUTE).await.unwrap();
    store.save("empty", b"", MINUTE).await.unwrap();
    assert_eq!(store.load("key").await.unwrap().unwrap(), &b"\r\n\0\xff"[..]);
    assert_eq!(store.load("empty").await.unwrap().unwrap(), &b""[..]);
    assert_eq!(store.remove("key").await, Ok(true));
    assert_eq!(store.remove("key").await, Ok(false));
    assert_eq!(store.load("key").await, Ok(None));
}

async fn values_expire(bus: TestBus) {
    bus.store.save("short", b"x", Duration::from_millis(30)).await.unwrap();
    bus.store.save("nothing", b"x", Duration::ZERO).await.unwrap();
    bus.store.save("long", b"x", Duration::MAX).await.unwrap();
    bus.store.save("renewed", b"x", Duration::from_millis(30)).await.unwrap();
    bus.store.save("renewed", b"y", MINUTE).await.unwrap();
    gone(&bus.store, "short").await;
    gone(&bus.store, "nothing").await;
    assert!(bus.store.load("long").await.unwrap().is_some());
    assert!(bus.store.load("renewed").await.unwrap().is_some());
    assert_eq!(bus.store.take_if_equal("short", b"x").await, Ok(false));
}

async fn gone(store: &Store, key: &str) {
    let is_gone = async || store.load(key).await.unwrap().is_none();
    eventually_yes(&format!("{key} expires"), is_gone).await;
}

async fn one_of_many_takes_the_value_and_wrong_ones_none(bus: TestBus) {
    bus.store.save("token", b"secret", MINUTE).await.unwrap();
    for wrong in [&b"secre"[..], b"secret ", b"", b"SECRET"] {
        assert_eq!(bus.store.take_if_equal("token", wrong).await, Ok(false));
    }
    let takers = (0..100).map(|_| bus.store.take_if_equal("token", b"secret"));
    let won = soon("all takers", futures_util::future::join_all(takers)).await;
    assert_eq!(won.into_iter().filter(|won| *won == Ok(true)).count(), 1);
    assert_eq!(bus.store.load("token").await, Ok(None));
}

/// A key with one owner: the newest takes it, renews it, and an earlier owner can do nothing to it.
async fn of_several_owners_the_newest_has_the_key(bus: TestBus) {
    let store = &bus.store;
    assert_eq!(store.replace("owner", b"a", MINUTE).await, Ok(None));
    assert_eq!(store.replace("owner", b"b", MINUTE).await.unwrap().unwrap(), "a");
    assert_eq!(store.save_if_equal("owner", b"a", b"a", MINUTE).await, Ok(false));
    assert_eq!(store.take_if_equal("owner", b"a").await, Ok(false));
    assert_eq!(store.load("owner").await.unwrap().unwrap(), "b");
    assert_eq!(store.save_if_equal("owner", b"b", b"b", MINUTE).await, Ok(true));
    assert_eq!(store.save_if_equal("owner", b"b", b"b2", MINUTE).await, Ok(true));
    assert_eq!(store.take_if_equal("owner", b"b2").await, Ok(true));
    assert_eq!(store.save_if_equal("owner", b"b2", b"b2", MINUTE).await, Ok(false));
    assert_eq!(store.load("owner").await, Ok(None));
}

async fn an_owner_that_renews_keeps_its_key_and_one_that_does_not_loses_it(bus: TestBus) {
    let (store, soon) = (&bus.store, Duration::from_millis(40));
    store.replace("renewed", b"a", soon).await.unwrap();
    assert_eq!(store.save_if_equal("renewed", b"a", b"a", MINUTE).await, Ok(true));
    store.replace("left", b"a", MINUTE).await.unwrap();
    assert_eq!(store.replace("left", b"b", soon).await.unwrap().unwrap(), "a");
    gone(store, "left").await;
    assert!(store.load("renewed").await.unwrap().is_some());
    assert_eq!(store.save_if_equal("left", b"b", b"b", MINUTE).await, Ok(false));
}

async fn the_first_of_many_adds_a_key(bus: TestBus) {
    let store = &bus.store;
    assert_eq!(store.load_expiring("added").await, Ok(None));
    let values: Vec<_> = (0..50).map(|n| format!("v{n}")).collect();
    let adders = values.iter().map(|value| store.add("added", value.as_bytes(), MINUTE));
    let held = soon("all adders", futures_util::future::join_all(adders)).await;
    let held: Vec<_> = held.into_iter().map(Result::unwrap).collect();
    assert_eq!(held.iter().filter(|held| held.is_none()).count(), 1);
    let (value, ttl) = store.load_expiring("added").await.unwrap().unwrap();
    assert!(held.iter().flatten().all(|other| *other == value), "{held:?}");
    assert!(ttl <= MINUTE && ttl > MINUTE / 2, "{ttl:?}");
    assert_eq!(store.add("brief", b"x", Duration::from_millis(30)).await, Ok(None));
    gone(store, "brief").await;
    assert_eq!(store.add("brief", b"y", MINUTE).await, Ok(None));
}

async fn a_log_is_read_on_from_any_position(bus: TestBus) {
    assert_eq!(bus.store.read_log("log", "", 10).await, Ok(vec![]));
    for n in 0..20 {
        let sent = kept_message("up", n.to_string(), "log", 1000);
        assert_eq!(bus.outcome(sent).await, Outcome::Kept);
    }
    let (mut after, mut read) = (String::new(), Vec::new());
    loop {
        let entries = bus.store.read_log("log", &after, 7).await.unwrap();
        assert!(entries.len() <= 7);
        let Some(last) = entries.last() else { break };
        after = last.id.clone();
        read.extend(entries.into_iter().map(|entry| entry.data));
    }
    assert_eq!(read, (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(bus.store.read_log("log", "0-0", 100).await.unwrap().len(), 20);
    assert_eq!(bus.store.remove("log").await, Ok(true));
    assert_eq!(bus.store.read_log("log", "", 10).await, Ok(vec![]));
    let odd = bus.store.read_log("log", "x y", 10).await;
    assert!(matches!(odd, Err(StoreError::Refused(_))), "{odd:?}");
}

async fn a_key_of_another_kind_is_refused(bus: TestBus) {
    bus.store.save("plain", b"x", MINUTE).await.unwrap();
    assert_eq!(bus.outcome(kept_message("up", "x", "log", 9)).await, Outcome::Kept);
    let refused = bus.outcome(kept_message("up", "x", "plain", 9)).await;
    assert_eq!(refused, Outcome::Refused(NotDone::WrongType));
    for refused in [
        bus.store.load("log").await.map(drop),
        bus.store.take_if_equal("log", b"x").await.map(drop),
        bus.store.replace("log", b"x", MINUTE).await.map(drop),
        bus.store.add("log", b"x", MINUTE).await.map(drop),
        bus.store.load_expiring("log").await.map(drop),
        bus.store.save_if_equal("log", b"x", b"y", MINUTE).await.map(drop),
        bus.store.read_log("plain", "", 9).await.map(drop),
    ] {
        let Err(StoreError::NotDone { refusal, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(refusal, NotDone::WrongType);
    }
    assert_eq!(bus.store.load("plain").await.unwrap().unwrap(), "x");
    bus.store.save("log", b"now plain", MINUTE).await.unwrap();
    assert_eq!(bus.store.load("log").await.unwrap().unwrap(), "now plain");
}

async fn the_store_answers(bus: TestBus) {
    soon("the ping", bus.store.ping()).await.unwrap();
}

const MINUTE: Duration = Duration::from_secs(60);
