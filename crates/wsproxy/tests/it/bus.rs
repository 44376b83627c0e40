//! The contract of the bus, the same over every backend.

use std::{sync::Arc, task::Poll};

use bytes::Bytes;
use wsproxy::bus::publish::{BusError, Outcome};

use crate::support::{
    bus::{Receipts, TestBus, config, contract, kept_message, message},
    eventually, eventually_yes,
    redis_server::RedisServer,
    soon,
};

contract!(
    a_message_reaches_a_subscriber_and_the_receipt_counts_it,
    what_nobody_hears_is_gone_and_the_receipt_says_so,
    what_nobody_hears_is_kept_where_that_is_wanted,
    a_log_stays_within_its_bound,
    order_is_kept_over_many_messages,
    payloads_and_channels_arrive_verbatim,
    an_unsubscribed_channel_is_silent_and_can_be_resubscribed,
    subscribing_again_changes_nothing,
    many_callers_are_confirmed_together,
    what_is_queued_at_shutdown_is_still_published,
    a_message_that_nobody_asked_for_needs_no_receipt,
);

async fn a_message_reaches_a_subscriber_and_the_receipt_counts_it(bus: TestBus) {
    bus.subscribe(&["a", "b"]).await;
    assert_eq!(bus.outcome(message("a", "hello")).await, Outcome::Received(1));
    bus.seen.wait_for(1).await;
    assert_eq!(bus.seen.payloads("a"), ["hello"]);
    assert_eq!(bus.bus.status().channels, 2);
    assert_eq!(bus.bus.counters().messages_in.value(), 1);
}

async fn what_nobody_hears_is_gone_and_the_receipt_says_so(bus: TestBus) {
    bus.subscribe(&["a"]).await;
    assert_eq!(bus.outcome(message("b", "hello")).await, Outcome::Received(0));
    assert_eq!(bus.outcome(message("a", "last")).await, Outcome::Received(1));
    bus.seen.wait_for(1).await;
}

async fn what_nobody_hears_is_kept_where_that_is_wanted(bus: TestBus) {
    assert_eq!(bus.outcome(kept_message("up", "one", "log", 10)).await, Outcome::Kept);
    assert_eq!(bus.outcome(kept_message("up", "two", "log", 10)).await, Outcome::Kept);
    bus.subscribe(&["up"]).await;
    assert_eq!(bus.outcome(kept_message("up", "three", "log", 10)).await, Outcome::Received(1));
    let log = bus.store.read_log("log", "", 10).await.unwrap();
    assert_eq!(log.iter().map(|entry| &entry.data[..]).collect::<Vec<_>>(), [b"one", b"two"]);
    assert_eq!(bus.bus.counters().publish_kept.value(), 2);
}

async fn a_log_stays_within_its_bound(bus: TestBus) {
    for n in 0..500 {
        bus.publish_kept(n);
    }
    assert_eq!(bus.outcome(kept_message("up", "last", "log", 10)).await, Outcome::Kept);
    let log = bus.store.read_log("log", "", 1000).await.unwrap();
    // Redis trims whole nodes of a hundred entries.
    assert!((10..=120).contains(&log.len()), "{}", log.len());
    assert_eq!(log.last().unwrap().data, "last");
}

async fn order_is_kept_over_many_messages(bus: TestBus) {
    bus.subscribe(&["a", "b"]).await;
    for n in 0..3000 {
        bus.publish(if n % 3 == 0 { "b" } else { "a" }, n.to_string());
    }
    bus.seen.wait_for(3000).await;
    let order: Vec<usize> = bus.seen.notes(|notes| {
        let number = |payload: &Bytes| std::str::from_utf8(payload).unwrap().parse().unwrap();
        notes.messages.iter().map(|(_, payload)| number(payload)).collect()
    });
    // The nodes of a Cluster keep the order of each channel only.
    let (of_b, of_a): (Vec<usize>, Vec<usize>) = order.iter().partition(|number| *number % 3 == 0);
    assert!(of_a.is_sorted() && of_b.is_sorted());
    assert!(bus.is_on_cluster || order.is_sorted());
}

async fn payloads_and_channels_arrive_verbatim(bus: TestBus) {
    let odd = "sitzung:ä b\r\n*3\r\n";
    let large: Bytes = (0..2_000_000u32).map(|n| n as u8).collect::<Vec<_>>().into();
    bus.subscribe(&[odd]).await;
    let payloads: [Bytes; 4] =
        [Bytes::new(), Bytes::from_static(b"\r\n$5\r\n\0\xff"), large, "end".into()];
    for payload in &payloads {
        assert_eq!(bus.outcome(message(odd, payload.clone())).await, Outcome::Received(1));
    }
    bus.seen.wait_for(4).await;
    assert_eq!(bus.seen.payloads(odd), payloads);
}

async fn an_unsubscribed_channel_is_silent_and_can_be_resubscribed(bus: TestBus) {
    bus.subscribe(&["a", "b"]).await;
    bus.bus.unsubscribe(vec!["a".into(), "b".into(), "never".into()]);
    for _ in 0..50 {
        bus.subscribe(&["a"]).await;
        bus.bus.unsubscribe(vec!["a".into()]);
        tokio::task::yield_now().await;
    }
    bus.subscribe(&["a"]).await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    assert_eq!(bus.outcome(message("b", "x")).await, Outcome::Received(0));
    bus.bus.unsubscribe(vec!["a".into()]);
    let is_left = async || bus.outcome(message("a", "x")).await == Outcome::Received(0);
    eventually_yes("the channel is left", is_left).await;
    assert_eq!(bus.bus.status().channels, 0);
}

async fn subscribing_again_changes_nothing(bus: TestBus) {
    for _ in 0..3 {
        bus.subscribe(&["a", "a", "b"]).await;
    }
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    bus.seen.wait_for(1).await;
    bus.bus.unsubscribe(vec!["a".into()]);
    assert_eq!(bus.outcome(message("b", "x")).await, Outcome::Received(1));
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(0));
}

async fn many_callers_are_confirmed_together(bus: TestBus) {
    let callers = (0..2000).map(|n| {
        let (bus, channel) = (bus.bus.clone(), Arc::from(format!("session:{n}:down")));
        async move { bus.subscribe(vec![channel, "shared".into()]).await }
    });
    let results = soon("2,000 callers", futures_util::future::join_all(callers)).await;
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(bus.bus.status().channels, 2001);
    for n in [0, 777, 1999] {
        let sent = message(&format!("session:{n}:down"), "x");
        assert_eq!(bus.outcome(sent).await, Outcome::Received(1));
    }
}

async fn what_is_queued_at_shutdown_is_still_published(bus: TestBus) {
    bus.subscribe(&["a"]).await;
    bus.ready_if_redis().await;
    let (receipt, mut outcomes) = Receipts::channel();
    for n in 0..100 {
        let publish = wsproxy::bus::publish::Publish {
            receipt: Some(receipt.clone()),
            ..message("a", n.to_string())
        };
        assert!(bus.bus.publish(publish).is_ok());
    }
    drop(receipt);
    bus.shutdown.cancel();
    bus.tasks.close();
    soon("the tasks end", bus.tasks.wait()).await;
    let mut count = 0;
    while let Some(outcome) = outcomes.recv().await {
        assert!(matches!(outcome, Outcome::Received(_)), "{outcome:?}");
        count += 1;
    }
    assert_eq!(count, 100);
    assert!(matches!(bus.bus.publish(message("a", "x")), Err((BusError::Closed, _))));
}

async fn a_message_that_nobody_asked_for_needs_no_receipt(bus: TestBus) {
    bus.subscribe(&["a"]).await;
    bus.publish("nobody", "x");
    bus.publish("a", "x");
    bus.seen.wait_for(1).await;
}

impl TestBus {
    fn publish_kept(&self, n: usize) {
        assert!(self.bus.publish(kept_message("up", n.to_string(), "log", 10)).is_ok());
    }

    async fn ready_if_redis(&self) {
        eventually("the bus is ready", || self.bus.status().connected).await;
    }
}

/// One thread and no await between the publishes: the bus cannot take any of them meanwhile.
async fn a_full_queue_refuses_asks_to_pause_and_wakes(bus: TestBus) {
    bus.subscribe(&["a"]).await;
    bus.ready_if_redis().await;
    let publishable = || {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        bus.bus.poll_publishable(&mut cx)
    };
    assert_eq!(publishable(), Poll::Ready(()));
    let payload = Bytes::from(vec![b'x'; 1000]);
    let mut accepted = 0;
    let back = loop {
        match bus.bus.publish(message("a", payload.clone())) {
            Ok(()) => accepted += 1,
            Err((error, back)) => {
                assert_eq!(error, BusError::Full);
                break back;
            }
        }
    };
    assert_eq!(back.payload, payload);
    assert!((50..60).contains(&accepted), "{accepted}");
    assert!(bus.bus.status().queued_bytes > 60_000);
    assert_eq!(publishable(), Poll::Pending);
    soon("there is room again", bus.bus.publishable()).await;
    assert!(bus.bus.publish(back).is_ok());
    bus.seen.wait_for(accepted + 1).await;
    assert_eq!(bus.bus.counters().publish_full.value(), 1);
}

#[tokio::test]
async fn a_full_queue_in_memory() {
    let config = wsproxy::config::RedisConfig { publish_queue_bytes: 64 * 1024, ..config(None) };
    a_full_queue_refuses_asks_to_pause_and_wakes(TestBus::memory_with(&config)).await;
}

#[tokio::test]
async fn a_full_queue_before_redis() {
    let server = RedisServer::start();
    let config = wsproxy::config::RedisConfig {
        publish_queue_bytes: 64 * 1024,
        ..config(Some(&server.url()))
    };
    a_full_queue_refuses_asks_to_pause_and_wakes(TestBus::on(&config)).await;
}

#[tokio::test]
async fn a_log_expires_after_its_last_entry() {
    let bus = TestBus::redis();
    assert_eq!(bus.outcome(kept_message("up", "x", "log", 10)).await, Outcome::Kept);
    let ttl = bus.server.as_ref().unwrap().call(&["PTTL", "log"]).integer();
    assert!((1..=60_000).contains(&ttl), "{ttl}");
}

#[tokio::test]
async fn twenty_thousand_subscriptions_are_confirmed() {
    let bus = TestBus::redis();
    bus.ready().await;
    let channels: Vec<Arc<str>> = (0..20_000).map(|n| format!("session:{n}:down").into()).collect();
    let callers = channels.chunks(1).map(|channel| bus.bus.subscribe(channel.to_vec()));
    let results = soon("20,000 callers", futures_util::future::join_all(callers)).await;
    assert!(results.iter().all(Result::is_ok));
    let server = bus.server.as_ref().unwrap();
    let answer = format!("{:?}", server.call(&["CLIENT", "LIST", "TYPE", "pubsub"]));
    assert!(answer.contains("sub=20001"), "{answer}");
    assert!(answer.contains("name=wsproxy-test_server-subscribe"), "{answer}");
}
