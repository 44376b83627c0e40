//! The contract of histories in bus and store, the same over every backend.

use std::time::Duration;

use bytes::Bytes;
use wsproxy::{
    bus::publish::{History, Keep, Outcome, Publish},
    store::{
        command::{SnapshotOf, StoreError},
        not_done::NotDone,
    },
};
use wsproxy_proto::history::{
    After, Entry, Envelope, HistoryLimits, Log, Position, Resolved, Snapshot,
};

use crate::support::{
    bus::{TestBus, contract, kept_message, message},
    eventually_ok, eventually_yes,
};

contract!(
    a_message_with_history_is_enveloped_and_logged,
    every_entry_names_the_one_before_it,
    a_log_holds_no_more_entries_than_it_may,
    a_log_is_bounded_in_bytes_but_keeps_the_newest,
    entries_that_are_too_old_are_removed,
    a_log_expires_after_its_last_entry,
    what_was_published_once_is_not_published_again,
    an_idempotency_key_can_be_reused_after_expiry,
    logs_of_one_clock_have_one_order,
    an_event_id_is_a_position,
    a_log_is_read_in_pages,
    large_entries_end_a_page,
    entries_behind_an_unknown_position_are_read,
    without_a_position_only_the_ends_are_read,
    a_log_of_which_nothing_is_known_gets_a_head,
    a_log_that_is_removed_goes_on_behind_its_head,
    a_key_of_another_kind_is_neither_read_nor_written,
    payloads_and_ids_are_stored_verbatim,
);

fn stored(channel: &str, payload: impl Into<Bytes>) -> Publish {
    with(channel, payload, |_| {})
}

/// The tests' channels all share a slot, so that they may share a clock.
fn log_of(channel: &str) -> String {
    format!("{{tests}}:{channel}:log")
}

fn with(channel: &str, payload: impl Into<Bytes>, change: impl FnOnce(&mut History)) -> Publish {
    let mut history = History {
        log: log_of(channel).into(),
        clock: None,
        event_id: None,
        dedup: None,
        unique: false,
        limits: LIMITS,
    };
    change(&mut history);
    Publish { keep: Keep::History(Box::new(history)), ..message(channel, payload) }
}

fn at(position: Position) -> Option<After> {
    Some(After::Position(position))
}

impl TestBus {
    /// Publishes what must be stored; answers its id.
    async fn store(&self, publish: Publish) -> Position {
        match self.outcome(publish).await {
            Outcome::Stored { id, duplicate: false, .. } => id,
            outcome => panic!("{outcome:?}"),
        }
    }

    async fn read_pages(
        &self,
        channels: &[&str],
        after: Option<After>,
        entries_max: usize,
    ) -> Result<Snapshot, StoreError> {
        let of = SnapshotOf {
            logs: channels.iter().map(|channel| log_of(channel).into()).collect(),
            clock: None,
            head_ttl: None,
            after,
            entries_max,
            streams_of: None,
        };
        Ok(self.store.snapshot(of).await?.0)
    }

    async fn read(&self, channel: &str, after: Option<After>) -> Log {
        let mut snapshot = self.read_pages(&[channel], after, 1000).await.unwrap();
        snapshot.logs.remove(0)
    }

    async fn read_all(&self, channel: &str) -> Log {
        let log = self.read(channel, at(Position::START)).await;
        assert!(log.complete && log.is_chain());
        let last = log.entries.last().map(|entry| entry.id);
        assert!(last.is_none() || log.head == last);
        log
    }
}

fn data(entries: &[Entry]) -> Vec<&[u8]> {
    entries.iter().map(|entry| &entry.data[..]).collect()
}

async fn a_message_with_history_is_enveloped_and_logged(bus: TestBus) {
    bus.subscribe(&["c"]).await;
    let outcome = bus.outcome(with("c", "one", |it| it.event_id = Some("e-1".into()))).await;
    let Outcome::Stored { receivers: 1, id: first, duplicate: false } = outcome else {
        panic!("{outcome:?}")
    };
    let second = bus.store(stored("c", "two")).await;
    assert!(!first.is_beginning() && first.is_before(second));
    bus.seen.wait_for(2).await;
    let messages = bus.seen.payloads("c");
    let envelope =
        Envelope { id: first, prev: Position::START, event_id: Some("e-1"), payload: b"one" };
    assert_eq!(Envelope::parse(&messages[0]), Some(envelope));
    let envelope = Envelope { id: second, prev: first, event_id: None, payload: b"two" };
    assert_eq!(Envelope::parse(&messages[1]), Some(envelope));
    let log = bus.read_all("c").await;
    assert_eq!(data(&log.entries), [b"one", b"two"]);
    assert_eq!(log.entries[0].event_id.as_deref(), Some("e-1"));
    assert_eq!(log.entries[1].event_id, None);
    assert_eq!(bus.bus.counters().publish_stored.value(), 2);
    assert_eq!(bus.bus.counters().published.value(), 2);
    let unheard = bus.outcome(stored("other", "x")).await;
    assert!(matches!(unheard, Outcome::Stored { receivers: 0, .. }), "{unheard:?}");
}

async fn every_entry_names_the_one_before_it(bus: TestBus) {
    let mut prev = Position::START;
    for n in 0..50 {
        let id = bus.store(stored("c", n.to_string())).await;
        assert!(prev.is_before(id));
        let log = bus.read("c", at(prev)).await;
        assert_eq!(log.entries, [Entry { id, prev, event_id: None, data: n.to_string().into() }]);
        prev = id;
    }
    let log = bus.read_all("c").await;
    assert!(log.is_from_start && log.entries[0].prev == Position::START);
}

async fn a_log_holds_no_more_entries_than_it_may(bus: TestBus) {
    let mut ids = Vec::new();
    for n in 0..300 {
        let publish = with("c", n.to_string(), |it| it.limits.entries_max = 7);
        ids.push(bus.store(publish).await);
    }
    let log = bus.read_all("c").await;
    assert_eq!(log.entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[293..]);
    assert!(!log.is_from_start && log.entries[0].prev == ids[292]);
    bus.store(with("c", "x", |it| it.limits.entries_max = 0)).await;
    assert_eq!(data(&bus.read_all("c").await.entries), [b"x"]);
}

async fn a_log_is_bounded_in_bytes_but_keeps_the_newest(bus: TestBus) {
    let publish = |bytes: usize, bytes_max| {
        with("c", vec![b'x'; bytes], |it| {
            (it.limits.bytes_max, it.limits.entries_max) = (bytes_max, 20)
        })
    };
    // Every entry weighs one more than its data.
    let weight = |held: &[usize]| held.iter().sum::<usize>() + held.len();
    let mut held: Vec<usize> = Vec::new();
    // Sizes and bounds that change from one to the next, some larger than everything.
    for n in 0..400_usize {
        let (bytes, bytes_max) = (n * 7919 % 113, if n % 50 < 40 { 1000 } else { 100 + n });
        bus.store(publish(bytes, bytes_max as u64)).await;
        held.push(bytes);
        while held.len() > 1 && (weight(&held) > bytes_max || held.len() > 20) {
            held.remove(0);
        }
        if n % 7 == 0 || n > 380 {
            let log = bus.read_all("c").await;
            let sizes: Vec<usize> = log.entries.iter().map(|entry| entry.data.len()).collect();
            assert_eq!(sizes, held, "message {n}");
        }
    }
    bus.store(publish(5000, 1000)).await;
    assert_eq!(bus.read_all("c").await.entries.len(), 1);
    bus.store(publish(0, 0)).await;
    assert_eq!(bus.read_all("c").await.entries.len(), 1);
}

async fn entries_that_are_too_old_are_removed(bus: TestBus) {
    let ttl = Duration::from_millis(500);
    let publish = |payload: String| with("c", payload, |it| it.limits.ttl = ttl);
    let first = bus.store(publish("first".into())).await;
    // It goes while others keep the log alive.
    let prev = eventually_ok("the first entry goes", async || {
        bus.store(publish("another".into())).await;
        let log = bus.read_all("c").await;
        let Entry { id: oldest, prev, .. } = log.entries[0];
        let age = log.head.unwrap().milliseconds - oldest.milliseconds;
        // One 64th and what a test may wait between two messages.
        assert!(age <= 500 + 8 || log.entries.len() == 1, "{age} ms");
        if oldest == first { Err(age) } else { Ok(prev) }
    });
    assert!(!prev.await.is_before(first));
}

async fn a_log_expires_after_its_last_entry(bus: TestBus) {
    let publish = with("c", "x", |it| it.limits.ttl = Duration::from_millis(100));
    let first = bus.store(publish).await;
    let is_gone = async || bus.read("c", at(Position::START)).await.entries.is_empty();
    eventually_yes("the log expires", is_gone).await;
    // What came last is known all the same.
    let empty = bus.read("c", at(first)).await;
    assert_eq!(empty, Log { head: Some(first), complete: true, ..empty.clone() });
    assert!(!bus.read("c", at(Position::START)).await.is_from_start);
    let second = bus.store(stored("c", "y")).await;
    assert!(first.is_before(second));
    assert_eq!(bus.read_all("c").await.entries[0].prev, first);
}

async fn what_was_published_once_is_not_published_again(bus: TestBus) {
    let publish = |payload: &'static str| {
        with("c", payload, |it| it.dedup = Some(("{tests}:key".into(), Duration::from_secs(60))))
    };
    bus.subscribe(&["c"]).await;
    let first = bus.store(publish("one")).await;
    for _ in 0..3 {
        let again = bus.outcome(publish("two")).await;
        assert_eq!(again, Outcome::Stored { receivers: 0, id: first, duplicate: true });
    }
    let other =
        with("c", "three", |it| it.dedup = Some(("{tests}:key-3".into(), Duration::from_secs(60))));
    bus.store(other).await;
    bus.seen.wait_for(2).await;
    assert_eq!(data(&bus.read_all("c").await.entries), [&b"one"[..], b"three"]);
    bus.store.save("{tests}:taken", b"no position", Duration::from_secs(60)).await.unwrap();
    let taken =
        with("c", "x", |it| it.dedup = Some(("{tests}:taken".into(), Duration::from_secs(60))));
    let outcome = bus.outcome(taken).await;
    assert!(matches!(outcome, Outcome::Lost | Outcome::Refused(NotDone::WrongType)), "{outcome:?}");
    assert_eq!(bus.read_all("c").await.entries.len(), 2);
}

async fn an_idempotency_key_can_be_reused_after_expiry(bus: TestBus) {
    let publish =
        || with("c", "x", |it| it.dedup = Some(("{tests}:key".into(), Duration::from_millis(50))));
    let first = bus.store(publish()).await;
    let again = eventually_ok("the key expires", async || match bus.outcome(publish()).await {
        Outcome::Stored { id, duplicate: true, .. } => {
            assert_eq!(id, first);
            Err("it is a duplicate")
        }
        Outcome::Stored { id, .. } => Ok(id),
        outcome => panic!("{outcome:?}"),
    });
    assert!(first.is_before(again.await));
}

async fn logs_of_one_clock_have_one_order(bus: TestBus) {
    let channels = ["broadcast", "user", "connection"];
    let publish = |channel: &str| with(channel, "x", |it| it.clock = Some("{tests}:clock".into()));
    let mut ids = Vec::new();
    for n in 0..200 {
        ids.push(bus.store(publish(channels[n * 7 % 3])).await);
    }
    assert!(ids.is_sorted_by(|a, b| a.is_before(*b)));
    let after = ids[99];
    let snapshot = bus.read_pages(&channels, at(after), 1000).await.unwrap();
    assert_eq!(snapshot.position(), ids[199]);
    assert_eq!(snapshot.after, Resolved::At(after));
    let entries = snapshot.logs.iter().flat_map(|log| &log.entries).map(|entry| entry.id);
    let mut read: Vec<Position> = entries.collect();
    read.sort_unstable_by_key(|position| position.id());
    assert_eq!(read, ids[100..]);
    // Without the clock (it was evicted) ids of a log still grow.
    bus.store.remove("{tests}:clock").await.unwrap();
    for channel in channels {
        let last = bus.read(channel, None).await.head.unwrap();
        assert!(last.is_before(bus.store(publish(channel)).await));
    }
}

async fn an_event_id_is_a_position(bus: TestBus) {
    let mut ids = Vec::new();
    for n in 0..150 {
        let publish = with("c", n.to_string(), |it| it.event_id = Some(format!("e-{n}").into()));
        ids.push(bus.store(publish).await);
    }
    let of = |id: &str| Some(After::Event(id.into()));
    for n in [0, 5, 84, 148, 149] {
        let snapshot = bus.read_pages(&["other", "c"], of(&format!("e-{n}")), 1000).await.unwrap();
        assert_eq!(snapshot.after, Resolved::At(ids[n]));
        assert_eq!(snapshot.logs[1].entries.len(), 149 - n);
        let nothing = Log { complete: true, is_from_start: true, ..Log::default() };
        assert_eq!(snapshot.logs[0], nothing);
    }
    for unknown in ["e-150", "e", "17", "*", "-", "+", "01-5"] {
        let snapshot = bus.read_pages(&["c"], of(unknown), 1000).await.unwrap();
        assert_eq!(
            (snapshot.after, snapshot.logs[0].entries.len()),
            (Resolved::Nothing, 0),
            "{unknown}"
        );
        assert_eq!(snapshot.logs[0].head, ids.last().copied());
    }
    // Of two messages with one id it is unknown which one a client has seen, also where one is held no more.
    for (id, entries_max) in [("e-3", 1000), ("e-149", 1)] {
        let again = with("c", "x", |it| {
            (it.event_id, it.limits.entries_max) = (Some(id.into()), entries_max);
        });
        bus.store(again).await;
        let snapshot = bus.read_pages(&["c"], of(id), 1000).await.unwrap();
        assert_eq!(snapshot.after, Resolved::Ambiguous, "{id}");
    }
    let other = bus.store(with("other", "x", |it| it.event_id = Some("e-148".into()))).await;
    let both = bus.read_pages(&["c", "other"], of("e-148"), 1000).await.unwrap();
    assert_eq!(both.after, Resolved::Ambiguous, "{other}");
}

async fn a_log_is_read_in_pages(bus: TestBus) {
    for n in 0..100 {
        bus.store(stored("c", n.to_string())).await;
    }
    for page in [1, 7, 50, 99, 100, 101] {
        let (mut after, mut read) = (Position::START, Vec::new());
        loop {
            let snapshot = bus.read_pages(&["c"], at(after), page).await.unwrap();
            let log = &snapshot.logs[0];
            assert!(log.entries.len() <= page && log.is_chain());
            assert_eq!(log.complete, read.len() + log.entries.len() == 100, "{page}");
            read.extend(log.entries.iter().map(|entry| entry.data.clone()));
            if log.complete {
                break;
            }
            assert_eq!(log.entries[0].prev, after);
            after = log.entries.last().unwrap().id;
        }
        assert_eq!(read, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}

async fn large_entries_end_a_page(bus: TestBus) {
    for bytes in [400_000, 400_000, 400_000, 3_000_000, 10] {
        let publish = with("c", vec![b'x'; bytes], |it| it.limits.bytes_max = 10_000_000);
        bus.store(publish).await;
    }
    let (mut after, mut pages) = (Position::START, Vec::new());
    loop {
        let log = bus.read("c", at(after)).await;
        pages.push(log.entries.len());
        if log.complete {
            break;
        }
        after = log.entries.last().unwrap().id;
    }
    assert_eq!(pages, [2, 1, 1, 1]);
}

async fn entries_behind_an_unknown_position_are_read(bus: TestBus) {
    let first = bus.store(stored("c", "one")).await;
    let second = bus.store(stored("c", "two")).await;
    let count = async |after| bus.read("c", at(after)).await.entries.len();
    assert_eq!(count(Position { milliseconds: 1, sequence: 7, tag: 0 }).await, 2);
    assert_eq!(count(first).await, 1);
    assert_eq!(count(second).await, 0);
    assert_eq!(count(Position { milliseconds: u64::MAX, sequence: u64::MAX, tag: 0 }).await, 0);
    assert_eq!(count(Position { milliseconds: 1, sequence: u64::MAX, tag: 0 }).await, 2);
}

async fn without_a_position_only_the_ends_are_read(bus: TestBus) {
    let first = bus.store(stored("c", "one")).await;
    let second = bus.store(stored("c", "two")).await;
    let log = bus.read("c", None).await;
    assert!(first.is_before(second));
    assert_eq!(log.head, Some(second));
    assert!(log.complete && log.entries.is_empty());
}

async fn a_log_of_which_nothing_is_known_gets_a_head(bus: TestBus) {
    let open = async || {
        let of = SnapshotOf {
            logs: vec![log_of("c").into()],
            clock: None,
            head_ttl: Some(Duration::from_secs(60)),
            after: None,
            entries_max: 10,
            streams_of: None,
        };
        bus.store.snapshot(of).await.unwrap().0.logs.remove(0)
    };
    assert_eq!(bus.read("c", None).await.head, None);
    let made = open().await;
    let head = made.head.unwrap();
    assert!(made.is_new && made.is_from_start && head.is_beginning());
    let again = open().await;
    assert_eq!((again.head, again.is_new), (Some(head), false));
    // The first entry follows it, and is the first of the log's life.
    let id = bus.store(stored("c", "x")).await;
    let log = bus.read_all("c").await;
    assert_eq!((log.entries[0].prev, log.head, log.is_from_start), (head, Some(id), true));
    assert_eq!(bus.read("c", at(head)).await.entries.len(), 1);
    let logs = ["c", "other"].map(|channel| log_of(channel).into());
    let kept = bus.store.keep_heads(&logs, Duration::from_secs(60)).await.unwrap();
    assert_eq!(kept, [true, false]);
}

async fn a_log_that_is_removed_goes_on_behind_its_head(bus: TestBus) {
    let first = bus.store(stored("c", "one")).await;
    if bus.server.is_none() {
        return; // The embedded store keeps both in one place.
    }
    assert_eq!(bus.store.remove(&log_of("c")).await, Ok(true));
    let second = bus.store(stored("c", "two")).await;
    assert!(first.is_before(second));
    let log = bus.read_all("c").await;
    assert_eq!((log.entries[0].prev, log.is_from_start), (first, false));
    // Without both a new life begins, of which no position is one of the old.
    for what in ["log", "head"] {
        bus.store.remove(&format!("{{tests}}:c:{what}")).await.unwrap();
    }
    let third = bus.store(stored("c", "three")).await;
    assert_eq!(bus.read_all("c").await.entries[0].prev, Position::START);
    assert!(third != first && third != second);
}

async fn a_key_of_another_kind_is_neither_read_nor_written(bus: TestBus) {
    bus.store.save("{tests}:plain:log", b"x", Duration::from_secs(60)).await.unwrap();
    let refused = bus.outcome(stored("plain", "x")).await;
    assert_eq!(refused, Outcome::Refused(NotDone::WrongType));
    let read = bus.read_pages(&["plain"], None, 1).await;
    let Err(StoreError::NotDone { refusal: NotDone::WrongType, .. }) = read else {
        panic!("{read:?}")
    };
    let counters = bus.bus.counters();
    assert_eq!(counters.publish_refused[NotDone::WrongType as usize].value(), 1);
    assert_eq!(counters.publish_lost.value(), 0);
    // The next one is none the worse for it.
    bus.store(stored("c", "x")).await;
    assert_eq!(bus.outcome(kept_message("up", "x", "up:log", 9)).await, Outcome::Kept);
}

async fn payloads_and_ids_are_stored_verbatim(bus: TestBus) {
    let large: Bytes = (0..300_000_u32).map(|n| n as u8).collect::<Vec<_>>().into();
    let payloads = [Bytes::new(), b"\r\n$5\r\n\0\xff".to_vec().into(), large, "{\"a\":1}".into()];
    bus.subscribe(&["sitzung:ä"]).await;
    for payload in &payloads {
        let event_id = Some("Ä*?%s%1\\".into());
        bus.store(with("sitzung:ä", payload.clone(), |it| it.event_id = event_id)).await;
    }
    bus.seen.wait_for(4).await;
    for (message, payload) in bus.seen.payloads("sitzung:ä").iter().zip(&payloads) {
        let envelope = Envelope::parse(message).unwrap();
        assert_eq!((envelope.payload, envelope.event_id), (&payload[..], Some("Ä*?%s%1\\")));
    }
    let log = bus.read_all("sitzung:ä").await;
    assert_eq!(data(&log.entries), payloads);
    assert!(log.entries.iter().all(|entry| entry.event_id.as_deref() == Some("Ä*?%s%1\\")));
}

const LIMITS: HistoryLimits =
    HistoryLimits { entries_max: 1000, bytes_max: 1_000_000, ttl: Duration::from_secs(60) };
