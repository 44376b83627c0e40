//! The contract of the store, the same over every backend.

use std::time::Duration;

use wsproxy::{
    bus::{Outcome, not_done::NotDone},
    store::{Store, StoreError},
};

use crate::support::{
    PATIENCE,
    bus::{TestBus, contract, kept_message},
    soon,
};

contract!(
    values_are_saved_loaded_and_removed,
    values_expire,
    of_many_who_take_one_wins_and_a_wrong_one_takes_nothing,
    a_log_is_read_on_from_any_position,
    a_key_of_another_kind_is_refused,
    the_store_answers,
);

const MINUTE: Duration = Duration::from_secs(60);

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
    let deadline = std::time::Instant::now() + PATIENCE;
    while store.load(key).await.unwrap().is_some() {
        assert!(std::time::Instant::now() < deadline, "{key} does not expire");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn of_many_who_take_one_wins_and_a_wrong_one_takes_nothing(bus: TestBus) {
    bus.store.save("token", b"secret", MINUTE).await.unwrap();
    for wrong in [&b"secre"[..], b"secret ", b"", b"SECRET"] {
        assert_eq!(bus.store.take_if_equal("token", wrong).await, Ok(false));
    }
    let takers = (0..100).map(|_| bus.store.take_if_equal("token", b"secret"));
    let won = soon("all takers", futures_util::future::join_all(takers)).await;
    assert_eq!(won.into_iter().filter(|won| *won == Ok(true)).count(), 1);
    assert_eq!(bus.store.load("token").await, Ok(None));
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
