//! Delivery, audience, replay and healer without sockets: the embedded bus, and sinks that are outboxes.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_conn::{Runtime, clock::Micros};
use wsproxy_proto::{
    history::{After, HistoryLimits, Lost, Position},
    names::Names,
};

use crate::{
    bus::{
        Bus,
        deliver::{Deliver, Missed},
        publish::{History, Keep, Outcome, Publish, awaited},
    },
    client::{
        Client,
        event::Event,
        event_stream_outbox::{EventStreamEntry, EventStreamOutbox},
    },
    config::{Config, DownFrames, OnBusLoss},
    hub::{
        Hub,
        audience::{Audience, DeliveryRound},
        delivery::Delivery,
        fanout::Fanout,
        follower::{Followed, FollowerQueue},
        form::{Form, Ids},
        inbox::Inbox,
        message::Message,
        replay::{self, Replay, Wish},
        sink::Sink,
        subscription::Subscription,
        track::Histories,
    },
    store::Store,
};

/// A hub on the embedded bus.
struct TestHub {
    hub: Arc<Hub>,
    bus: Bus,
    store: Store,
    wire: Wire,
    runtime: Arc<Runtime>,
    histories: Arc<Histories>,
    end: CancellationToken,
}

/// The reader of the bus, which a test can make deaf.
#[derive(Clone)]
struct Wire(Arc<Mutex<(Delivery, bool)>>);

impl Deliver for Wire {
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool) {
        let (delivery, is_deaf) = &mut *self.0.lock();
        if !*is_deaf {
            delivery.message(channel, payload, last);
        }
    }

    fn flush(&mut self) {
        self.0.lock().0.flush();
    }

    fn proceed(&mut self) -> bool {
        self.0.lock().0.proceed()
    }

    fn lost(&mut self, cause: &str, missed: &Missed) {
        self.0.lock().0.lost(cause, missed);
    }

    fn recovered(&mut self, gap: Duration) {
        self.0.lock().0.recovered(gap);
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl TestHub {
    /// Logs with one order, of so many entries.
    fn new(entries_max: u64) -> Self {
        let (hub, mut config, end) = (Hub::new(), Config::default(), CancellationToken::new());
        config.limits.store_bytes = 1 << 30;
        let wire = Wire(Arc::new(Mutex::new((Delivery::new(Arc::clone(&hub)), false))));
        let deliver = Box::new(wire.clone());
        let tasks = TaskTracker::new();
        let bus = Bus::embedded(&config.redis, &config.limits, deliver, &tasks, end.clone());
        hub.connect(bus.clone());
        let ttl = Duration::from_secs(60);
        let histories = Histories {
            limits: HistoryLimits { entries_max, bytes_max: 1 << 30, ttl },
            names: Names::new(""),
            clock: Some("clock".into()),
            unresumable_prefix: None,
            adopt_plain: false,
        };
        let (store, runtime) = (bus.store(), Runtime::new(1 << 30, Micros(0)));
        Self { hub, bus, store, wire, runtime, histories: Arc::new(histories), end }
    }

    fn client(&self) -> TestClient {
        let (id, runtime) = (Uuid::now_v7(), Arc::clone(&self.runtime));
        TestClient(EventStreamOutbox::new(id, 1 << 30, runtime, None))
    }

    /// Publishes with history.
    async fn publish(&self, topic: &str, payload: &str) -> Position {
        let history = History {
            log: self.histories.names.log(topic).into(),
            clock: self.histories.clock.clone(),
            event_id: None,
            dedup: None,
            unique: false,
            limits: self.histories.limits,
        };
        match self.send(topic, payload, Keep::History(Box::new(history))).await {
            Outcome::Stored { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    async fn send(&self, topic: &str, payload: &str, keep: Keep) -> Outcome {
        let (receipt, outcome) = awaited();
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        let publish = Publish { channel: topic.into(), payload, keep, receipt: Some(receipt) };
        self.hub.publish(publish).unwrap();
        outcome.await.unwrap()
    }

    async fn open(&self, client: &TestClient, topics: &[&str]) -> (Subscription, Replay) {
        let topics = topics.iter().map(|topic| Arc::from(*topic)).collect();
        let (sink, histories) = (client.sink(), Arc::clone(&self.histories));
        replay::subscribe_behind_fence(&self.hub, sink, topics, histories, None).await.unwrap()
    }

    async fn run(&self, replay: &Replay, after: Option<Position>) -> replay::ResumeOutcome {
        let wish = Wish { after: after.map(After::Position), streams_of: None };
        replay.run(&self.store, wish, |_, _| None).await.unwrap()
    }

    /// A client that is where its topics are.
    async fn connected(&self, topics: &[&str]) -> (TestClient, Subscription) {
        let client = self.client();
        let (subscription, replay) = self.open(&client, topics).await;
        assert_eq!(self.run(&replay, None).await, replay::ResumeOutcome::Fresh);
        client.texts();
        (client, subscription)
    }

    fn set_deaf(&self, is_deaf: bool) {
        self.wire.0.lock().1 = is_deaf;
    }

    /// Loses and recovers the bus, without healing.
    fn lose(&self) {
        self.wire.clone().lost("a test", &Missed::All);
        self.set_deaf(false);
        self.wire.clone().recovered(Duration::from_secs(1));
    }

    async fn heal(&self) {
        for _ in 0..20 {
            let holes = self.hub.holes();
            if holes.is_empty() {
                return;
            }
            self.hub.fill(&self.store, holes, self.hub.outage(), true).await;
        }
        panic!("It is never whole.");
    }
}

/// A client with an event stream.
struct TestClient(Arc<EventStreamOutbox>);

impl TestClient {
    fn sink(&self) -> Sink {
        let client = Client::EventStream(Arc::clone(&self.0));
        let form = Form { frames: DownFrames::Auto, ids: Ids::Json, acks: false };
        Sink::Client { client, form, on_loss: OnBusLoss::Notice }
    }

    fn handler(&self) -> Sink {
        Sink::Handler { client: Client::EventStream(Arc::clone(&self.0)), tag: 7 }
    }

    /// Data of each event that has come, and tags of events for its logic.
    fn texts(&self) -> Vec<String> {
        let mut texts = Vec::new();
        while let Some(Some(entry)) = self.0.next().now_or_never() {
            match entry {
                EventStreamEntry::Message(bytes, _) => {
                    let text = String::from_utf8(bytes.to_vec()).unwrap();
                    let data = text.lines().find_map(|line| line.strip_prefix("data: "));
                    texts.push(data.unwrap().to_owned());
                }
                EventStreamEntry::Event(Event::Message { tag, .. }) => {
                    texts.push(format!("event {tag}"))
                }
                EventStreamEntry::Event(other) => texts.push(format!("{other:?}")),
                EventStreamEntry::Position(_) | EventStreamEntry::End(_) => {}
            }
        }
        texts
    }
}

#[tokio::test]
async fn delivery_reaches_every_sink_of_a_topic() {
    let test = TestHub::new(100);
    let (client, follower) = (test.client(), FollowerQueue::new(1000));
    let sinks = [client.sink(), client.handler(), Sink::Follower(Arc::clone(&follower))];
    let sinks = sinks.map(|sink| ("topic".into(), sink));
    let subscription = test.hub.subscribe(sinks).await.unwrap();
    test.send("topic", "1", Keep::Nothing).await;
    test.send("other", "2", Keep::Nothing).await;
    let mut texts = client.texts();
    texts.sort();
    assert_eq!(texts, ["1", "event 7"]);
    assert_eq!(follower.next_message().await.unwrap(), "1");
    drop(subscription);
    assert_eq!(test.hub.topics(), 0);
    let delivery = &mut test.wire.clone();
    delivery.message(b"topic", b"3", true);
    assert_eq!((test.hub.counters.unwanted.value(), client.texts().len()), (1, 0));
}

/// An inbox that keeps what it was told.
#[derive(Debug, Default)]
struct TestInbox(Mutex<Vec<String>>);

impl Inbox for TestInbox {
    fn message(&self, payload: &[u8]) {
        self.0.lock().push(String::from_utf8(payload.to_vec()).unwrap());
    }

    fn lost(&self) {
        self.0.lock().push("lost".to_owned());
    }

    fn recovered(&self) {
        self.0.lock().push("recovered".to_owned());
    }
}

#[tokio::test]
async fn inboxes_learn_of_a_loss_between_the_messages_around_it() {
    let test = TestHub::new(100);
    let inboxes = [(); 3].map(|()| Arc::new(TestInbox::default()));
    let sinks: Vec<_> = inboxes
        .iter()
        .zip(["topic", "topic", "other"])
        .map(|(inbox, topic)| (topic.into(), Sink::Inbox(Arc::clone(inbox) as Arc<dyn Inbox>)))
        .collect();
    let subscription = test.hub.subscribe(sinks).await.unwrap();
    test.send("topic", "1", Keep::Nothing).await;
    test.wire.clone().lost("a test", &Missed::All);
    test.send("topic", "2", Keep::Nothing).await;
    test.wire.clone().recovered(Duration::from_secs(1));
    test.send("topic", "3", Keep::Nothing).await;
    test.wire.clone().lost("a test", &Missed::All);
    test.wire.clone().lost("another one", &Missed::All);
    for inbox in &inboxes[..2] {
        assert_eq!(*inbox.0.lock(), ["1", "lost", "2", "recovered", "3", "lost", "lost"]);
    }
    assert_eq!(*inboxes[2].0.lock(), ["lost", "recovered", "lost", "lost"]);
    drop(subscription);
    test.wire.clone().recovered(Duration::from_secs(1));
    assert_eq!((inboxes[0].0.lock().len(), test.hub.topics()), (7, 0));
}

#[tokio::test]
async fn origin_does_not_get_its_own_message() {
    let test = TestHub::new(100);
    let (sender, other, gated) = (test.client(), test.client(), test.client());
    let sinks = [sender.sink(), sender.handler(), other.sink()].map(|s| ("room".into(), s));
    let _subscription = test.hub.subscribe(sinks).await.unwrap();
    let (_gated, replay) = test.open(&gated, &["room"]).await;
    let send = |origin: &TestClient| {
        let message = Message { origin: Some(origin.0.id()), ..Message::plain(b"moved") };
        let mut topics = test.hub.shards.lock(b"room");
        let topic = topics.get_mut(b"room").unwrap();
        let mut fanout = Fanout::new(message);
        DeliveryRound::default().deliver(topic, Audience::All, &mut fanout, &test.hub, Micros(1));
    };
    send(&sender);
    send(&gated);
    test.run(&replay, None).await;
    assert_eq!(sender.texts().len(), 2, "the one of the other, and its event");
    assert_eq!(other.texts(), ["moved", "moved"]);
    assert_eq!(gated.texts(), ["moved"]);
}

#[tokio::test]
async fn duplicates_go_to_gated_clients_only() {
    let test = TestHub::new(100);
    let (client, _subscription) = test.connected(&["topic"]).await;
    let gated = test.client();
    let (_gated, replay) = test.open(&gated, &["topic"]).await;
    let message = Message { id: Some(Position::START), ..Message::plain(b"again") };
    let mut topics = test.hub.shards.lock(b"topic");
    let topic = topics.get_mut(b"topic").unwrap();
    let mut fanout = Fanout::new(message);
    DeliveryRound::default().deliver(topic, Audience::Gated, &mut fanout, &test.hub, Micros(1));
    drop(topics);
    assert_eq!(client.texts(), [""; 0]);
    assert!(!replay_gate_is_open(&replay) && gated.texts().is_empty());
}

fn replay_gate_is_open(replay: &Replay) -> bool {
    replay.gate().fence.lock().is_open()
}

#[tokio::test]
async fn replay_gives_what_was_missed_and_then_what_came_meanwhile() {
    let test = TestHub::new(100);
    let (_other, _subscription) = test.connected(&["topic", "another"]).await;
    let first = test.publish("topic", "1").await;
    test.publish("topic", "2").await;
    let client = test.client();
    let (_subscription, replay) = test.open(&client, &["topic", "another"]).await;
    test.publish("topic", "3").await;
    test.publish("another", "4").await;
    assert_eq!(client.texts(), [""; 0], "nothing comes before the replay");
    let outcome = test.run(&replay, Some(first)).await;
    test.publish("topic", "5").await;
    let texts = client.texts();
    assert_eq!(outcome, replay::ResumeOutcome::Resumed(3));
    assert_eq!(&texts[1..], ["2", "3", "4", "5"], "{texts:?}");
}

#[tokio::test]
async fn replay_behind_removed_entries_is_history_lost() {
    let test = TestHub::new(2);
    let (_other, _subscription) = test.connected(&["topic"]).await;
    let first = test.publish("topic", "1").await;
    for payload in ["2", "3", "4"] {
        test.publish("topic", payload).await;
    }
    let client = test.client();
    let (_subscription, replay) = test.open(&client, &["topic"]).await;
    let outcome = test.run(&replay, Some(first)).await;
    assert_eq!(outcome, replay::ResumeOutcome::Lost(Lost::Trimmed));
    let texts = client.texts();
    assert!(texts.len() == 1 && texts[0].contains("history_lost"), "{texts:?}");
}

#[tokio::test]
async fn healer_delivers_logs_with_one_order_as_one() {
    let test = TestHub::new(100);
    let (client, _one) = test.connected(&["all", "mine"]).await;
    let (other, _two) = test.connected(&["all", "theirs"]).await;
    test.publish("all", "0").await;
    test.set_deaf(true);
    for (number, topic) in ["mine", "all", "theirs", "mine", "all"].into_iter().enumerate() {
        test.publish(topic, &(number + 1).to_string()).await;
    }
    test.lose();
    test.publish("mine", "6").await;
    assert_eq!(client.texts(), ["0"], "it waits until the hole is filled");
    test.heal().await;
    test.publish("all", "7").await;
    assert_eq!(client.texts(), ["1", "2", "4", "5", "6", "7"]);
    assert_eq!(other.texts(), ["0", "2", "3", "5", "7"]);
}

#[tokio::test]
async fn healer_tells_a_lost_history_once() {
    let test = TestHub::new(1);
    let (client, _subscription) = test.connected(&["all", "mine"]).await;
    test.publish("all", "0").await;
    test.publish("mine", "0").await;
    test.set_deaf(true);
    for topic in ["all", "all", "mine", "mine"] {
        test.publish(topic, "missed").await;
    }
    test.lose();
    test.heal().await;
    test.publish("all", "1").await;
    let texts = client.texts();
    let (lost, others): (Vec<_>, Vec<_>) =
        texts.into_iter().partition(|text| text.contains("history_lost"));
    assert_eq!((lost.len(), others), (1, ["0", "0", "1"].map(String::from).to_vec()));
    assert_eq!(test.bus.status().refusal, None);
}

#[tokio::test]
async fn follower_of_a_lost_history_gets_what_comes() {
    let test = TestHub::new(1);
    let (client, _subscription) = test.connected(&["all"]).await;
    let queue = FollowerQueue::new(1 << 20);
    let follower = [("all".into(), Sink::Follower(Arc::clone(&queue)))];
    let _following = test.hub.subscribe(follower).await.unwrap();
    test.publish("all", "0").await;
    test.set_deaf(true);
    test.publish("all", "missed").await;
    test.publish("all", "missed").await;
    test.lose();
    test.heal().await;
    test.publish("all", "1").await;
    let texts = client.texts();
    assert!(texts.len() == 3 && texts[1].contains("history_lost") && texts[2] == "1", "{texts:?}");
    let mut followed = Vec::new();
    while let Some(Some(one)) = queue.next().now_or_never() {
        followed.extend(match one {
            Followed::Message(payload) => Some(payload),
            Followed::Gap(_) => None,
        });
    }
    assert_eq!(followed, ["0", "1"]);
    assert_eq!(test.hub.counters.history_lost[Lost::Trimmed as usize].value(), 1);
}

#[tokio::test]
async fn topic_that_is_wanted_anew_does_not_keep_others_waiting() {
    let test = TestHub::new(100);
    let (client, _one) = test.connected(&["all", "mine"]).await;
    let (other, two) = test.connected(&["theirs"]).await;
    test.publish("all", "0").await;
    test.publish("theirs", "0").await;
    test.lose();
    let holes = test.hub.holes();
    drop((other, two));
    let other = test.client();
    let (_two, _replay) = test.open(&other, &["theirs"]).await;
    let healed = test.hub.fill(&test.store, holes, test.hub.outage(), true).await;
    assert_eq!((healed, test.hub.holes().len()), (2, 0));
    test.publish("all", "1").await;
    assert_eq!(client.texts(), ["0", "1"]);
}

#[tokio::test]
async fn healer_keeps_the_order_of_what_comes_while_it_delivers_in_turns() {
    let test = TestHub::new(1000);
    let (client, _subscription) = test.connected(&["all", "mine"]).await;
    test.publish("all", "begin").await;
    test.publish("mine", "begin").await;
    client.texts();
    test.set_deaf(true);
    let text = |number: usize| format!("{number} {}", "x".repeat(100_000));
    for number in 0..60 {
        test.publish(["all", "mine"][number % 2], &text(number)).await;
    }
    test.lose();
    let live = async {
        for number in 60..80 {
            test.publish(["mine", "all"][number % 2], &text(number)).await;
        }
    };
    tokio::join!(test.heal(), live);
    let numbers = |text: String| text.split(' ').next().unwrap().parse::<usize>().unwrap();
    let numbers: Vec<_> = client.texts().into_iter().map(numbers).collect();
    assert_eq!(numbers, (0..80).collect::<Vec<_>>());
}

/// Prints the longest time that a task has to wait for a shard meanwhile.
#[tokio::test]
#[ignore = "a measurement"]
async fn healer_holds_locks_for_a_short_time_while_it_delivers_256_mib() {
    const TOPICS: usize = 64;
    let test = TestHub::new(10_000);
    let mut clients = Vec::new();
    for number in 0..TOPICS {
        let topic = format!("topic{number}");
        clients.push(test.connected(&[&topic]).await);
        test.publish(&topic, "begin").await;
    }
    test.set_deaf(true);
    let payload = format!(r#"{{"text":"{}"}}"#, "x".repeat(4096));
    for number in 0..(256 << 20) / payload.len() {
        test.publish(&format!("topic{}", number % TOPICS), &payload).await;
    }
    test.lose();
    let (hub, end) = (Arc::clone(&test.hub), CancellationToken::new());
    let ended = end.clone();
    let waiter = std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while !ended.is_cancelled() {
            let begun = wsproxy_conn::clock::now();
            drop(hub.shards.lock(b"topic1"));
            longest = longest.max(wsproxy_conn::clock::now().since(begun).into());
            std::thread::sleep(Duration::from_micros(100));
        }
        longest
    });
    let begun = wsproxy_conn::clock::now();
    test.heal().await;
    let took = Duration::from(wsproxy_conn::clock::now().since(begun));
    end.cancel();
    println!("healed in {took:?}, longest wait for a shard {:?}", waiter.join().unwrap());
    assert!(clients.iter().all(|(client, _)| client.texts().len() > 900));
}
