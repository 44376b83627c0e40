//! The bus on Redis when servers and networks fail. Every fault here broke some client library.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::time::timeout;
use wsproxy::{
    bus::publish::{BusError, Outcome},
    config,
    store::command::StoreError,
};

use crate::support::{
    bus::{Receipts, TestBus, config, message},
    eventually,
    fault_proxy::{Cut, FaultProxy, Faults},
    redis_server::{Answer, Options, RedisServer, free_port},
    soon,
};

#[tokio::test]
async fn a_server_that_is_absent_at_start_is_waited_for() {
    let mut server = RedisServer::absent();
    let bus = TestBus::on(&config(Some(&server.url())));
    let subscribing = tokio::task::spawn({
        let bus = bus.bus.clone();
        async move { bus.subscribe(vec!["a".into()]).await }
    });
    let (receipt, mut outcomes) = Receipts::channel();
    let publish =
        wsproxy::bus::publish::Publish { receipt: Some(receipt), ..message("nobody", "x") };
    assert!(bus.bus.publish(publish).is_ok());
    eventually("the trouble is told", || bus.bus.status().last_error.is_some()).await;
    assert!(!bus.bus.status().connected);
    assert!(!subscribing.is_finished() && outcomes.try_recv().is_err());
    let store = bus.store.clone();
    let loading = tokio::task::spawn(async move { store.load("key").await });
    tokio::task::yield_now().await;
    server.restart();
    soon("the subscription", subscribing).await.unwrap().unwrap();
    assert_eq!(soon("the outcome", outcomes.recv()).await, Some(Outcome::Received(0)));
    assert_eq!(soon("the value", loading).await.unwrap(), Ok(None));
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    bus.ready().await;
    assert_eq!(bus.bus.status().last_error, None);
    bus.seen.notes(|notes| assert!(notes.lost.is_empty() && notes.recovered.is_empty()));
}

/// The answers of commands must stay with their callers while thousands of confirmations come in.
#[tokio::test]
async fn resubscribes_after_server_kill_and_mixes_up_no_answer() {
    let mut bus = TestBus::redis();
    let channels: Vec<Arc<str>> = (0..5000).map(|n| format!("session:{n}:down").into()).collect();
    soon("5,000 channels", bus.bus.subscribe(channels.clone())).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..20)
        .map(|n| {
            let (store, stop) = (bus.store.clone(), stop.clone());
            let key = format!("session:{n}:auth");
            tokio::task::spawn(async move {
                let mut answers = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let saved = store.save(&key, key.as_bytes(), Duration::from_secs(60)).await;
                    match store.load(&key).await {
                        Ok(Some(value)) => assert_eq!(value, key),
                        // Redis may still be loading.
                        Ok(None) | Err(StoreError::Lost(_) | StoreError::NotDone { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    let passing = matches!(
                        saved,
                        Ok(()) | Err(StoreError::Lost(_) | StoreError::NotDone { .. })
                    );
                    assert!(passing, "{saved:?}");
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    bus.server().kill();
    bus.broken().await;
    // A subscription that a caller waits for across the outage is confirmed by the same recovery.
    let late = bus.bus.clone();
    let waiting = tokio::task::spawn(async move { late.subscribe(vec!["late".into()]).await });
    bus.server().restart();
    soon("the late channel", waiting).await.unwrap().unwrap();
    bus.seen.wait_for_recoveries(1).await;
    bus.ready().await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        assert!(soon("a reader", reader).await.unwrap() > 0);
    }
    for channel in channels.iter().step_by(50) {
        assert_eq!(bus.outcome(message(channel, "x")).await, Outcome::Received(1));
    }
    bus.seen.wait_for(100).await;
    let count = bus.server().call(&["PUBSUB", "NUMSUB", "session:4999:down"]);
    assert_eq!(
        count,
        Answer::Array(vec![Answer::Text("session:4999:down".into()), Answer::Integer(1)])
    );
    assert_eq!(bus.bus.counters().subscribe_errors.value(), 0);
}

#[tokio::test]
async fn a_stopped_server_bounds_its_callers_and_is_left() {
    let mut bus = TestBus::redis();
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    bus.server().stop();
    let start = Instant::now();
    // Nothing is confirmed by a server that does not answer.
    let early = timeout(Duration::from_millis(300), bus.bus.subscribe(vec!["b".into()])).await;
    assert!(early.is_err());
    let lost = soon("the command fails", bus.store.load("key")).await;
    assert!(matches!(lost, Err(StoreError::Lost(_))), "{lost:?}");
    bus.broken().await;
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    eventually("the hub is told", || bus.seen.notes(|notes| notes.lost.len() == 1)).await;
    // The kernel accepts connections for a stopped server: that must not look like a recovery.
    let (failed, told) = (bus.bus.counters().connects_failed.value(), Instant::now());
    let failed_since = || bus.bus.counters().connects_failed.value() - failed;
    eventually("attempts fail", || failed_since() > 2).await;
    bus.seen.notes(|notes| assert!(notes.recovered.is_empty()));
    let silence = told.elapsed();
    bus.server().cont();
    bus.seen.wait_for_recoveries(1).await;
    let gap = bus.seen.notes(|notes| notes.recovered[0]);
    assert!((silence..Duration::from_secs(30)).contains(&gap), "{gap:?}");
    bus.subscribe(&["b"]).await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    assert_eq!(bus.outcome(message("b", "x")).await, Outcome::Received(1));
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_stopped_server() {
    for stopped in [true, false] {
        let mut bus = TestBus::redis();
        bus.subscribe(&["a"]).await;
        bus.ready().await;
        if stopped {
            bus.server().stop();
        } else {
            bus.server().kill();
            eventually("every link is missed", || bus.bus.counters().links_lost.value() == 3).await;
        }
        let (receipt, mut outcomes) = Receipts::channel();
        let publish =
            wsproxy::bus::publish::Publish { receipt: Some(receipt), ..message("a", "x") };
        assert!(bus.bus.publish(publish).is_ok());
        bus.shutdown.cancel();
        bus.tasks.close();
        soon("the tasks end", bus.tasks.wait()).await;
        assert_eq!(outcomes.recv().await, Some(Outcome::Lost));
        let late = bus.bus.subscribe(vec!["b".into()]).await;
        assert_eq!(late, Err(BusError::Closed));
        assert_eq!(bus.store.load("key").await, Err(StoreError::Closed));
    }
}

#[tokio::test]
async fn a_slow_network_in_small_pieces_only_slows() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let slow = Faults { delay: Duration::from_millis(20), ..Faults::default() };
    proxy.set(slow);
    let bus = TestBus::on(&config(Some(&server.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    proxy.set(Faults { piece_bytes: 1, ..Faults::default() });
    let payload = Bytes::from(vec![b'\n'; 3000]);
    for _ in 0..5 {
        assert_eq!(bus.outcome(message("a", payload.clone())).await, Outcome::Received(1));
        assert_eq!(soon("a value", bus.store.load("key")).await, Ok(None));
    }
    bus.seen.wait_for(5).await;
    assert!(bus.seen.payloads("a").iter().all(|got| *got == payload));
    assert_eq!(bus.bus.counters().links_lost.value(), 0);
}

#[tokio::test]
async fn a_stalled_network_is_noticed_in_either_direction() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let bus = TestBus::on(&config(Some(&server.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    for (round, faults) in [
        Faults { stall_up: true, ..Faults::default() },
        Faults { stall_down: true, ..Faults::default() },
    ]
    .into_iter()
    .enumerate()
    {
        proxy.set(faults);
        let (receipt, mut outcomes) = Receipts::channel();
        let publish =
            wsproxy::bus::publish::Publish { receipt: Some(receipt), ..message("a", "x") };
        assert!(bus.bus.publish(publish).is_ok());
        eventually("the hub is told", || bus.seen.notes(|notes| notes.lost.len() == round + 1))
            .await;
        assert_eq!(soon("the outcome", outcomes.recv()).await, Some(Outcome::Lost));
        proxy.set(Faults::default());
        bus.seen.wait_for_recoveries(round + 1).await;
        bus.ready().await;
        assert_eq!(bus.outcome(message("a", "y")).await, Outcome::Received(1));
    }
}

#[tokio::test]
async fn cut_connections_are_made_again() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let bus = TestBus::on(&config(Some(&server.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    for (round, cut) in [Cut::Reset, Cut::HalfClose, Cut::Reset].into_iter().enumerate() {
        bus.ready().await;
        let connects = bus.bus.counters().connects.value();
        proxy.cut(cut);
        bus.seen.wait_for_recoveries(round + 1).await;
        eventually("all links are new", || bus.bus.counters().connects.value() >= connects + 3)
            .await;
        assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
        soon("the store", bus.store.ping()).await.unwrap();
    }
    proxy.set(Faults { refuse: true, ..Faults::default() });
    proxy.cut(Cut::Reset);
    bus.broken().await;
    eventually("attempts fail", || bus.bus.counters().connects_failed.value() > 5).await;
    proxy.set(Faults::default());
    bus.seen.wait_for_recoveries(4).await;
}

#[tokio::test]
async fn killed_clients_come_back_each_on_its_own() {
    let mut bus = TestBus::redis();
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    assert_eq!(bus.server().call(&["CLIENT", "KILL", "TYPE", "pubsub"]).integer(), 1);
    bus.seen.wait_for_recoveries(1).await;
    assert_eq!(bus.bus.counters().links_lost.value(), 1);
    bus.ready().await;
    // Publishing and commands: nothing is missed, hence the hub is not bothered.
    assert_eq!(bus.server().call(&["CLIENT", "KILL", "TYPE", "normal"]).integer(), 2);
    eventually("both links are lost", || bus.bus.counters().links_lost.value() == 3).await;
    bus.ready().await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
    soon("the store", bus.store.ping()).await.unwrap();
    bus.seen.notes(|notes| assert_eq!(notes.lost.len(), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_too_slow_for_redis_reports_a_gap() {
    let arguments = ["--client-output-buffer-limit", "pubsub 1mb 1mb 1"].map(String::from).to_vec();
    let server = RedisServer::start_with(Options { arguments, ..Options::default() });
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    bus.seen.notes(|notes| (notes.only_count, notes.slowness) = (true, Duration::from_millis(10)));
    let publisher = TestBus::on(&config(Some(&server.url())));
    let payload = Bytes::from(vec![b'x'; 200_000]);
    for _ in 0..150 {
        publisher.bus.publishable().await;
        publisher.publish("a", payload.clone());
    }
    bus.seen.wait_for_recoveries(1).await;
    bus.seen.notes(|notes| notes.slowness = Duration::ZERO);
    bus.ready().await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
}

#[tokio::test]
async fn a_demoted_master_is_left_until_promoted_again() {
    let mut bus = TestBus::redis();
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    bus.server().replica_of(free_port());
    bus.broken().await;
    eventually("the hub is told", || bus.seen.notes(|notes| notes.lost.len() == 1)).await;
    eventually("the role is told", || {
        bus.bus.status().last_error.is_some_and(|error| error.contains("no master"))
    })
    .await;
    assert!(bus.bus.counters().role_refused.value() > 0);
    bus.server().replica_of_no_one();
    bus.seen.wait_for_recoveries(1).await;
    bus.ready().await;
    assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1));
}

#[tokio::test]
async fn publishes_queue_in_an_outage_and_leave_in_order() {
    let mut server = RedisServer::start();
    let config =
        config::RedisConfig { publish_queue_bytes: 64 * 1024, ..config(Some(&server.url())) };
    let bus = TestBus::on(&config);
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    server.kill();
    bus.broken().await;
    eventually("every link is missed", || bus.bus.counters().links_lost.value() == 3).await;
    let mut accepted = 0;
    while bus.bus.publish(message("a", format!("{accepted:0500}"))).is_ok() {
        accepted += 1;
    }
    assert!((90..110).contains(&accepted), "{accepted}");
    assert!(timeout(Duration::from_millis(50), bus.bus.publishable()).await.is_err());
    server.restart();
    soon("there is room again", bus.bus.publishable()).await;
    bus.ready().await;
    // The publishing link may be back before the subscribing one: ask the server, not the recorder.
    eventually("the queue is empty", || bus.bus.status().queued_bytes == 0).await;
    assert_eq!(bus.bus.counters().publish_lost.value(), 0);
    eventually("all are answered", || bus.bus.counters().published.value() == accepted).await;
    let order = bus.seen.payloads("a");
    assert!(order.is_sorted());
}

#[tokio::test]
async fn as_many_arrive_as_the_server_says_it_delivered() {
    let server = RedisServer::start();
    let (bus, publisher) =
        (TestBus::on(&config(Some(&server.url()))), TestBus::on(&config(Some(&server.url()))));
    let channels: Vec<Arc<str>> = (0..100).map(|n| format!("c:{n}").into()).collect();
    bus.bus.subscribe(channels).await.unwrap();
    bus.seen.notes(|notes| notes.only_count = true);
    let (receipt, mut outcomes) = Receipts::channel();
    for n in 0..20_000 {
        publisher.bus.publishable().await;
        let sent = message(&format!("c:{}", n % 110), vec![b'x'; 200]);
        let sent = wsproxy::bus::publish::Publish { receipt: Some(receipt.clone()), ..sent };
        assert!(publisher.bus.publish(sent).is_ok());
    }
    let mut received = 0;
    for _ in 0..20_000 {
        match soon("an outcome", outcomes.recv()).await.unwrap() {
            Outcome::Received(count) => received += count as usize,
            outcome => panic!("{outcome:?}"),
        }
    }
    assert!((18_000..20_000).contains(&received), "{received}");
    bus.seen.wait_for(received).await;
}

#[tokio::test]
async fn links_that_end_at_different_servers_are_found_out() {
    let (one, other) = (RedisServer::start(), RedisServer::start());
    let proxy = FaultProxy::start(one.port()).await;
    let bus = TestBus::on(&config(Some(&one.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    // The publishing link goes elsewhere, then the subscribing one does.
    for (n, (from, to, kind)) in
        [(&one, &other, "normal"), (&other, &one, "pubsub")].into_iter().enumerate()
    {
        let failures = bus.bus.counters().probe_failures.value();
        proxy.retarget(to.port());
        assert!(from.call(&["CLIENT", "KILL", "TYPE", kind]).integer() > 0);
        eventually("it is found out", || bus.bus.counters().probe_failures.value() > failures)
            .await;
        eventually("all links end there", || {
            let clients = format!("{:?}", to.call(&["CLIENT", "LIST"]));
            clients.contains("server-publish") && clients.contains("server-subscribe")
        })
        .await;
        bus.ready().await;
        assert_eq!(bus.outcome(message("a", "x")).await, Outcome::Received(1), "{n}");
    }
}

#[tokio::test]
async fn recovery_is_told_only_after_the_last_resubscription() {
    let server = RedisServer::start();
    let proxy = FaultProxy::start(server.port()).await;
    let bus = TestBus::on(&config(Some(&server.url_on(proxy.port()))));
    bus.subscribe(&["a"]).await;
    bus.ready().await;
    // Greeting and subscribing take one round trip each.
    proxy.set(Faults { delay: Duration::from_millis(100), ..Faults::default() });
    server.call(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    bus.seen.wait_for_recoveries(1).await;
    let gap = bus.seen.notes(|notes| notes.recovered[0]);
    assert!(gap >= Duration::from_millis(400), "{gap:?}");
}

#[tokio::test]
async fn callers_that_gave_up_in_an_outage_leave_nothing() {
    let mut server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.ready().await;
    server.kill();
    eventually("every link is missed", || bus.bus.counters().links_lost.value() == 3).await;
    for n in 0..100 {
        let channel: Arc<str> = format!("session:{n}:down").into();
        let given_up = timeout(Duration::ZERO, bus.bus.subscribe(vec![channel.clone()])).await;
        assert!(given_up.is_err());
        bus.bus.unsubscribe(vec![channel]);
    }
    assert_eq!(bus.bus.status().channels, 0);
    // A token must not be used up for a client that has left.
    let taking = bus.store.take_if_equal("token", b"secret");
    assert!(timeout(Duration::from_millis(20), taking).await.is_err());
    let store = bus.store.clone();
    let waiting = tokio::task::spawn(async move { store.load("token").await });
    tokio::task::yield_now().await;
    server.restart();
    server.call(&["SET", "token", "secret"]);
    let _ = soon("a later command", waiting).await;
    assert_eq!(bus.store.take_if_equal("token", b"secret").await, Ok(true));
}
