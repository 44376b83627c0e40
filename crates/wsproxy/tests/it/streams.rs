//! The contract of token streams, the same over every backend.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use wsproxy::store::{
    command::SnapshotOf,
    token_streams::{StreamCommand, StreamError, StreamOp, StreamOutcome, StreamState},
};
use wsproxy_proto::{
    history::{After, Envelope, HistoryLimits, Position, Snapshot},
    names::Id,
};

use crate::support::{
    bus::{TestBus, contract},
    eventually_ok, eventually_yes,
};

contract!(
    a_stream_is_opened_appended_to_and_finished,
    every_change_is_a_message_of_the_session_with_history,
    what_was_said_already_may_be_said_again,
    what_does_not_fit_is_refused_and_changes_nothing,
    text_of_every_kind_is_kept_and_told,
    a_text_that_would_be_too_long_is_refused,
    a_stream_whose_worker_is_silent_is_lost,
    a_stream_whose_worker_is_alive_is_not_lost,
    the_newest_sixteen_streams_of_a_session_are_held,
    a_snapshot_holds_position_and_streams_of_one_moment,
    a_stream_expires_after_its_last_change,
);

fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

fn open(meta: &str) -> StreamOp {
    StreamOp::Open { meta: Bytes::copy_from_slice(meta.as_bytes()), lease: LEASE }
}

fn append(text: &str, seq: Option<u64>) -> StreamOp {
    StreamOp::Append { text: Bytes::copy_from_slice(text.as_bytes()), seq, lease: LEASE }
}

fn end(outcome: StreamOutcome, error: &str) -> StreamOp {
    StreamOp::End { outcome, error: Bytes::copy_from_slice(error.as_bytes()) }
}

impl TestBus {
    async fn stream(&self, stream: &str, op: StreamOp) -> Result<(u64, Position), StreamError> {
        self.stream_for(Duration::from_secs(60), stream, op).await
    }

    async fn stream_for(
        &self,
        ttl: Duration,
        stream: &str,
        op: StreamOp,
    ) -> Result<(u64, Position), StreamError> {
        let limits = HistoryLimits { entries_max: 10_000, bytes_max: 10_000_000, ttl };
        let command = StreamCommand { session: id("s"), stream: id(stream), op, limits };
        self.store.stream(command).await.map(|head| (head.seq, head.id))
    }

    async fn refused(&self, stream: &str, op: StreamOp, error: StreamError) {
        assert_eq!(self.stream(stream, op).await, Err(error));
    }

    async fn snapshot(&self) -> (Snapshot, Vec<StreamState>) {
        let of = SnapshotOf {
            logs: vec!["{session:s:down}:log".into()],
            clock: None,
            head_ttl: None,
            after: Some(After::Position(Position::START)),
            entries_max: 100_000,
            streams_of: Some(id("s")),
        };
        self.store.snapshot(of).await.unwrap()
    }

    /// Returns the messages to clients, with their positions.
    async fn told(&self) -> Vec<(Position, Value)> {
        let (snapshot, _) = self.snapshot().await;
        assert!(snapshot.logs[0].is_chain() && snapshot.logs[0].complete);
        let message = |data: &Bytes| serde_json::from_slice(data).unwrap();
        let entries = &snapshot.logs[0].entries;
        entries.iter().map(|entry| (entry.id, message(&entry.data))).collect()
    }

    async fn last_told(&self) -> Value {
        self.told().await.pop().unwrap().1
    }

    async fn state(&self, stream: &str) -> Option<StreamState> {
        let (_, streams) = self.snapshot().await;
        streams.into_iter().find(|state| &*state.stream == stream)
    }
}

async fn a_stream_is_opened_appended_to_and_finished(bus: TestBus) {
    assert_eq!(bus.snapshot().await.1, []);
    assert_eq!(bus.stream("a", open(r#"{"model":"m"}"#)).await.unwrap().0, 0);
    assert_eq!(bus.stream("a", append("Hello", None)).await.unwrap().0, 1);
    assert_eq!(bus.stream("a", append(", world", Some(2))).await.unwrap().0, 2);
    let open = StreamState {
        stream: "a".into(),
        state: "open".into(),
        seq: 2,
        text: "Hello, world".into(),
        meta: r#"{"model":"m"}"#.into(),
        error: Bytes::new(),
    };
    assert_eq!(bus.snapshot().await.1, std::slice::from_ref(&open));
    assert_eq!(bus.stream("a", end(StreamOutcome::Finish, "")).await.unwrap().0, 2);
    assert_eq!(bus.snapshot().await.1, [StreamState { state: "finish".into(), ..open }]);
}

async fn every_change_is_a_message_of_the_session_with_history(bus: TestBus) {
    bus.subscribe(&["session:s:down"]).await;
    let mut answered = Vec::new();
    let error = r#"{"code":"overloaded","message":"Later."}"#;
    for op in [
        open(r#"{"model":{"n":1}}"#),
        append("x", None),
        append("y", None),
        StreamOp::Renew { lease: LEASE },
        end(StreamOutcome::Error, error),
    ] {
        let is_told = !matches!(op, StreamOp::Renew { .. });
        let (_, position) = bus.stream("a", op).await.unwrap();
        if is_told {
            answered.push(position);
        } else {
            assert_eq!(answered.last(), Some(&position));
        }
    }
    let told = bus.told().await;
    assert_eq!(told.iter().map(|(position, _)| *position).collect::<Vec<_>>(), answered);
    let expected = [
        json!({"type": "stream_open", "stream": "a", "meta": {"model": {"n": 1}}}),
        json!({"type": "stream_append", "stream": "a", "seq": 1, "text": "x"}),
        json!({"type": "stream_append", "stream": "a", "seq": 2, "text": "y"}),
        json!({"type": "stream_end", "stream": "a", "outcome": "error", "seq": 2,
            "error": {"code": "overloaded", "message": "Later."}}),
    ];
    assert_eq!(told.into_iter().map(|(_, message)| message).collect::<Vec<_>>(), expected);
    bus.seen.wait_for(4).await;
    for ((message, position), expected) in
        bus.seen.payloads("session:s:down").iter().zip(&answered).zip(&expected)
    {
        let envelope = Envelope::parse(message).unwrap();
        assert_eq!(envelope.id, *position);
        assert_eq!(serde_json::from_slice::<Value>(envelope.payload).unwrap(), *expected);
    }
    assert_eq!(bus.state("a").await.unwrap().error, error);
}

async fn what_was_said_already_may_be_said_again(bus: TestBus) {
    let opened = bus.stream("a", open("")).await;
    assert_eq!(bus.stream("a", open("")).await, opened);
    assert_eq!(bus.stream("a", open("{}")).await, opened);
    bus.refused("a", open(r#"{"another":1}"#), StreamError::Exists).await;
    let first = bus.stream("a", append("one", Some(1))).await;
    assert_eq!(bus.stream("a", append("one", Some(1))).await, first);
    bus.refused("a", append("another", Some(1)), StreamError::WrongSeq { last: 1 }).await;
    bus.refused("a", open(""), StreamError::Exists).await;
    let second = bus.stream("a", append("two", Some(2))).await;
    assert_eq!(bus.stream("a", append("two", Some(2))).await, second);
    bus.refused("a", append("one", Some(1)), StreamError::WrongSeq { last: 2 }).await;
    // Without a number it is another one.
    assert_eq!(bus.stream("a", append("two", None)).await.unwrap().0, 3);
    let ended = bus.stream("a", end(StreamOutcome::Cancelled, "")).await;
    assert_eq!(bus.stream("a", end(StreamOutcome::Cancelled, "")).await, ended);
    let cancelled = StreamError::Ended(StreamOutcome::Cancelled);
    bus.refused("a", end(StreamOutcome::Cancelled, "{}"), cancelled.clone()).await;
    bus.refused("a", end(StreamOutcome::Finish, ""), cancelled).await;
    assert_eq!(bus.told().await.len(), 5);
    assert_eq!(bus.state("a").await.unwrap().text, "onetwotwo");
}

async fn what_does_not_fit_is_refused_and_changes_nothing(bus: TestBus) {
    bus.refused("a", append("x", None), StreamError::NotFound).await;
    bus.refused("a", StreamOp::Renew { lease: LEASE }, StreamError::NotFound).await;
    bus.refused("a", end(StreamOutcome::Finish, ""), StreamError::NotFound).await;
    bus.refused("a", StreamOp::Lost, StreamError::NotFound).await;
    for bad in ["x", "[]", "{", "\"{}\"", "{}}", "null"] {
        bus.refused("a", open(bad), StreamError::BadJson).await;
    }
    bus.stream("a", open("")).await.unwrap();
    bus.refused("a", append("x", Some(2)), StreamError::WrongSeq { last: 0 }).await;
    bus.refused("a", append("x", Some(0)), StreamError::WrongSeq { last: 0 }).await;
    bus.refused("a", end(StreamOutcome::Error, "x"), StreamError::BadJson).await;
    bus.refused("a", StreamOp::Lost, StreamError::LeaseRuns).await;
    bus.stream("a", end(StreamOutcome::Finish, "")).await.unwrap();
    bus.refused("a", append("x", None), StreamError::Ended(StreamOutcome::Finish)).await;
    bus.refused("a", StreamOp::Renew { lease: LEASE }, StreamError::Ended(StreamOutcome::Finish))
        .await;
    bus.refused("a", StreamOp::Lost, StreamError::Ended(StreamOutcome::Finish)).await;
    assert_eq!(bus.told().await.len(), 2);
    assert_eq!(bus.store.lapsed_streams(10).await, Ok(vec![]));
    // Another one of the session knows nothing of it.
    bus.stream("b", open("")).await.unwrap();
    bus.stream("b", append("x", Some(1))).await.unwrap();
}

async fn text_of_every_kind_is_kept_and_told(bus: TestBus) {
    let texts =
        ["ä\u{1F600}\u{2028}", "\"\\/\r\n\t\u{0}\u{1f}\u{7f}", "", "</script>", "%s%1", "\u{feff}"];
    bus.stream("a", open(r#"{ "ü" : "\u0000\"" }"#)).await.unwrap();
    for (n, text) in texts.iter().enumerate() {
        let (seq, _) = bus.stream("a", append(text, None)).await.unwrap();
        assert_eq!(seq, n as u64 + 1);
        assert_eq!(bus.last_told().await["text"], **text);
    }
    assert_eq!(bus.state("a").await.unwrap().text, texts.concat());
    assert_eq!(bus.told().await[0].1["meta"], json!({"ü": "\u{0}\""}));
    let error = r#"{"code":"x","message":"\"%1\\"}"#;
    bus.stream("a", end(StreamOutcome::Error, error)).await.unwrap();
    assert_eq!(bus.last_told().await["error"], json!({"code": "x", "message": "\"%1\\"}));
}

async fn a_text_that_would_be_too_long_is_refused(bus: TestBus) {
    bus.stream("a", open("")).await.unwrap();
    let megabyte = "x".repeat(1024 * 1024);
    for _ in 0..4 {
        bus.stream("a", append(&megabyte, None)).await.unwrap();
    }
    bus.refused("a", append("x", None), StreamError::TooLarge).await;
    bus.stream("a", append("", None)).await.unwrap();
    assert_eq!(bus.state("a").await.unwrap().text.len(), 4 * 1024 * 1024);
    bus.stream("a", end(StreamOutcome::Finish, "")).await.unwrap();
}

async fn a_stream_whose_worker_is_silent_is_lost(bus: TestBus) {
    let lease = Duration::from_millis(40);
    bus.stream("a", StreamOp::Open { meta: Bytes::new(), lease }).await.unwrap();
    bus.stream("b", open("")).await.unwrap();
    bus.stream("a", StreamOp::Append { text: "half".into(), seq: None, lease }).await.unwrap();
    assert_eq!(lost(&bus, "a").await, 1);
    assert_eq!(bus.store.lapsed_streams(10).await, Ok(vec![]));
    bus.refused("a", StreamOp::Lost, StreamError::Ended(StreamOutcome::Error)).await;
    bus.refused("a", append("x", None), StreamError::Ended(StreamOutcome::Error)).await;
    let told = bus.last_told().await;
    assert_eq!((&told["type"], &told["outcome"]), (&json!("stream_end"), &json!("error")));
    assert_eq!((&told["seq"], &told["error"]["code"]), (&json!(1), &json!("worker_lost")));
    let state = bus.state("a").await.unwrap();
    assert_eq!((&*state.state, &state.text[..]), ("error", &b"half"[..]));
    assert_eq!(serde_json::from_slice::<Value>(&state.error).unwrap(), told["error"]);
    assert_eq!(&*bus.state("b").await.unwrap().state, "open");
}

/// Ends it as an instance does that finds its lease lapsed: the stream itself may know better.
async fn lost(bus: &TestBus, stream: &str) -> u64 {
    eventually_ok("the lease runs out", async || {
        lapsed(bus, stream).await;
        match bus.stream(stream, StreamOp::Lost).await {
            Ok((seq, _)) => Ok(seq),
            Err(error @ StreamError::LeaseRuns) => Err(error.to_string()),
            other => panic!("{other:?}"),
        }
    })
    .await
}

async fn lapsed(bus: &TestBus, stream: &str) {
    let lapsed = eventually_ok("the lease runs out", async || {
        let lapsed = bus.store.lapsed_streams(10).await.unwrap();
        if lapsed.is_empty() { Err(()) } else { Ok(lapsed) }
    });
    assert_eq!(lapsed.await, [(id("s"), id(stream))]);
}

async fn a_stream_whose_worker_is_alive_is_not_lost(bus: TestBus) {
    let short = Duration::from_millis(1);
    bus.stream("a", StreamOp::Open { meta: Bytes::new(), lease: short }).await.unwrap();
    lapsed(&bus, "a").await;
    // The worker was only slow: an instance that wants to end the stream now comes too late.
    bus.stream("a", StreamOp::Renew { lease: LEASE }).await.unwrap();
    assert_eq!(bus.store.lapsed_streams(10).await, Ok(vec![]));
    bus.refused("a", StreamOp::Lost, StreamError::LeaseRuns).await;
    bus.stream("a", StreamOp::Renew { lease: short }).await.unwrap();
    lapsed(&bus, "a").await;
    bus.stream("a", append("x", None)).await.unwrap();
    bus.refused("a", StreamOp::Lost, StreamError::LeaseRuns).await;
    // It is looked at again when its lease ends, not before.
    assert_eq!(bus.store.lapsed_streams(10).await, Ok(vec![]));
    bus.stream("a", StreamOp::Renew { lease: short }).await.unwrap();
    lapsed(&bus, "a").await;
    bus.stream("a", end(StreamOutcome::Finish, "")).await.unwrap();
    assert_eq!(bus.store.lapsed_streams(10).await, Ok(vec![]));
}

async fn the_newest_sixteen_streams_of_a_session_are_held(bus: TestBus) {
    for n in 0..16 {
        // Redis tells those of one millisecond apart by their names.
        bus.stream(&format!("stream-{n:02}"), open("")).await.unwrap();
    }
    bus.stream("stream-00", append("x", None)).await.unwrap();
    bus.stream("stream-01", end(StreamOutcome::Finish, "")).await.unwrap();
    for n in 16..18 {
        bus.stream(&format!("stream-{n:02}"), open("")).await.unwrap();
    }
    let (_, streams) = bus.snapshot().await;
    let held: Vec<String> = streams.into_iter().map(|state| state.stream.into()).collect();
    assert_eq!(held, (2..18).map(|n| format!("stream-{n:02}")).collect::<Vec<_>>());
    // Who followed one that was open is told its end.
    let ends = bus.told().await.into_iter().filter(|(_, told)| told["type"] == "stream_end");
    let ends: Vec<Value> = ends.map(|(_, told)| told).collect();
    assert_eq!(ends.len(), 2);
    let replaced = ends.iter().find(|told| told["stream"] == "stream-00").unwrap();
    assert_eq!((&replaced["error"]["code"], &replaced["seq"]), (&json!("replaced"), &json!(1)));
    bus.refused("stream-00", append("x", None), StreamError::NotFound).await;
    bus.stream("stream-00", open("")).await.unwrap();
}

async fn a_snapshot_holds_position_and_streams_of_one_moment(bus: TestBus) {
    bus.stream("a", open("")).await.unwrap();
    let (writer, store) = (
        async {
            for _ in 0..300 {
                bus.stream("a", append("x", None)).await.unwrap();
            }
        },
        async {
            loop {
                tokio::task::yield_now().await;
                let (snapshot, streams) = bus.snapshot().await;
                let last = snapshot.logs[0].entries.last().unwrap();
                let told: Value = serde_json::from_slice(&last.data).unwrap();
                let seq = told["seq"].as_u64().unwrap_or_default();
                assert_eq!((snapshot.logs[0].head, streams[0].seq), (Some(last.id), seq));
                assert_eq!(streams[0].text.len() as u64, seq);
                if seq == 300 {
                    return;
                }
            }
        },
    );
    tokio::join!(writer, store);
}

async fn a_stream_expires_after_its_last_change(bus: TestBus) {
    let ttl = Duration::from_millis(300);
    bus.stream_for(ttl, "a", open("")).await.unwrap();
    bus.stream_for(ttl, "a", append("x", None)).await.unwrap();
    eventually_yes("the stream expires", async || bus.state("a").await.is_none()).await;
    bus.refused("a", append("x", None), StreamError::NotFound).await;
    assert_eq!(bus.stream("a", open("")).await.unwrap().0, 0);
    assert_eq!(bus.state("a").await.unwrap().text, "");
}

const LEASE: Duration = Duration::from_secs(60);
