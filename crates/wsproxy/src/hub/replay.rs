//! How a client comes to what it missed: live messages wait behind a fence while its logs are read.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tracing::debug;
use wsproxy_conn::clock;
use wsproxy_proto::{
    history::{After, Entry, Fence, Log, Lost, Position, Snapshot, rule},
    names::Id,
};

use crate::{
    hub::{
        Histories, Hub, Name, Sink,
        audience::Round,
        message::{self, Fanout, Message},
        notice,
    },
    store::{SnapshotOf, Store, StoreError, StreamState},
};

/// A client whose messages wait.
#[derive(Debug)]
pub struct Gate {
    /// The client.
    pub(super) target: Sink,
    /// What waits is encoded for it.
    pub(super) fence: Mutex<Fence<Bytes>>,
}

impl Gate {
    pub(super) fn new(target: Sink) -> Arc<Self> {
        let bytes_max = target.buffer_bytes();
        Arc::new(Self { target, fence: Mutex::new(Fence::new(bytes_max)) })
    }
}

impl Sink {
    /// What may wait for it.
    pub(super) fn buffer_bytes(&self) -> usize {
        match self {
            Self::Client { link, .. } | Self::Handler { link, .. } => {
                link.profile().send_buffer_bytes
            }
            Self::EventStream { tap, .. } | Self::Tap(tap) => tap.limit(),
            Self::Gated(gate) => gate.target.buffer_bytes(),
        }
    }
}

/// What a client wants to see before what is live.
#[derive(Debug, Default)]
pub struct Wish {
    /// Behind which position; `None`: nothing.
    pub after: Option<After>,
    /// The session whose token streams the client is shown where it does not resume.
    pub streams_of: Option<Id>,
}

/// What became of a client's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It wished for nothing.
    Fresh,
    /// It got so many messages, and has missed none.
    Resumed(usize),
    /// It was told that something is missing.
    Lost(Lost),
}

/// A client that is subscribed but gets nothing until this has run.
pub struct Replay {
    hub: Arc<Hub>,
    gate: Arc<Gate>,
    topics: Vec<Arc<str>>,
    histories: Arc<Histories>,
}

/// What was read for one client.
struct Found {
    /// The moment up to which everything was read.
    last: Snapshot,
    /// What was missed, in order.
    entries: Vec<Entry>,
    streams: Vec<StreamState>,
    outcome: Outcome,
}

impl Replay {
    pub(super) const fn new(
        hub: Arc<Hub>,
        gate: Arc<Gate>,
        topics: Vec<Arc<str>>,
        histories: Arc<Histories>,
    ) -> Self {
        Self { hub, gate, topics, histories }
    }

    /// Reads what the client missed, and lets live messages follow it. `hello` makes what the client is told
    /// first, given what became of its wish and, unless it resumes, its position.
    ///
    /// # Errors
    /// The store did not answer; the client still gets nothing.
    pub async fn run(
        &self,
        store: &Store,
        wish: Wish,
        hello: impl FnOnce(Outcome, Option<Position>) -> Option<String>,
    ) -> Result<Outcome, StoreError> {
        let mut found = self.read(store, &wish).await?;
        for (topic, log) in self.topics.iter().zip(&found.last.logs) {
            self.hub.begin(topic, log.last.unwrap_or(Position::nothing_at(found.last.now_ms)));
        }
        let bytes: usize = found.entries.iter().map(|entry| entry.data.len()).sum();
        if bytes > self.gate.target.buffer_bytes() {
            found.lose(Lost::Overflow);
        }
        self.release(&found, wish.after.as_ref(), hello);
        self.hub.count(found.outcome);
        debug!(outcome = ?found.outcome, "A client's history was read.");
        Ok(found.outcome)
    }

    async fn read(&self, store: &Store, wish: &Wish) -> Result<Found, StoreError> {
        let (snapshot, streams) = store.snapshot(self.of(wish.after.clone(), wish)).await?;
        let Some(after) = &wish.after else {
            return Ok(Found { last: snapshot, entries: vec![], streams, outcome: Outcome::Fresh });
        };
        let retention = retention_ms(&self.histories);
        let judged = match snapshot.after {
            Some(after) => rule::resume(after, retention, &snapshot),
            None => Err(Lost::Unknown),
        };
        let mut found = Found { last: snapshot, entries: vec![], streams, outcome: Outcome::Fresh };
        if let Err(lost) = judged {
            found.lose(lost);
            return Ok(found);
        }
        let mut chains = vec![Log::default(); self.topics.len()];
        loop {
            let Some(behind) = merge(&mut found.last.logs, &mut chains) else { break };
            let of = self.of(Some(After::Position(behind)), &Wish::default());
            (found.last, _) = store.snapshot(of).await?;
        }
        let is_whole = chains.iter().all(Log::is_chain);
        let mut entries: Vec<_> = chains.into_iter().flat_map(|log| log.entries).collect();
        entries.sort_unstable_by_key(|entry| entry.id);
        debug!(%after, count = entries.len(), is_whole, "A client resumes.");
        if is_whole {
            found.outcome = Outcome::Resumed(entries.len());
            found.entries = entries;
        } else {
            found.lose(Lost::Trimmed);
        }
        Ok(found)
    }

    fn of(&self, after: Option<After>, wish: &Wish) -> SnapshotOf {
        SnapshotOf {
            logs: self
                .topics
                .iter()
                .map(|topic| wsproxy_proto::names::Names::log(topic).into())
                .collect(),
            epoch: Arc::clone(&self.histories.epoch),
            after,
            entries_max: PAGE_ENTRIES,
            streams_of: wish.streams_of.clone(),
        }
    }

    /// Everything in its order, while no live message can come between.
    fn release(
        &self,
        found: &Found,
        after: Option<&After>,
        hello: impl FnOnce(Outcome, Option<Position>) -> Option<String>,
    ) {
        let seen = found.last.position();
        let mut round = Round::default();
        let mut fence = self.gate.fence.lock();
        let held = match fence.release(seen) {
            Ok(held) => held,
            Err(lost) => {
                drop(fence);
                return self.release_overflowed(lost, hello);
            }
        };
        let mut told = Telling { replay: self, round: &mut round };
        match (found.outcome, after) {
            (Outcome::Resumed(count), Some(after)) => {
                told.notices(
                    [hello(found.outcome, None), Some(notice::resumed(count, after))],
                    None,
                );
            }
            (Outcome::Lost(lost), _) => {
                let notices =
                    [hello(found.outcome, Some(seen)), Some(notice::history_lost(lost, seen))];
                told.notices(notices, Some(seen));
            }
            _ => {
                told.position(seen);
                told.notices([hello(found.outcome, Some(seen)), None], Some(seen));
            }
        }
        if !matches!(found.outcome, Outcome::Resumed(_)) {
            let streams = found.streams.iter().map(|stream| Some(notice::stream_snapshot(stream)));
            told.notices(streams, Some(seen));
        }
        for entry in &found.entries {
            let carries_id = entry.event_id.is_some();
            told.tell(Message { id: Some(entry.id), carries_id, payload: &entry.data });
        }
        for frame in VecDeque::from(held) {
            round.send(&self.gate.target, frame, clock::now());
        }
        drop(fence);
        round.flush(clock::now());
    }

    /// More came than could wait: the client begins anew where its topics are now.
    fn release_overflowed(
        &self,
        lost: Lost,
        hello: impl FnOnce(Outcome, Option<Position>) -> Option<String>,
    ) {
        self.hub.counters.history_lost[lost as usize].add(1);
        // With all shards locked nothing can come between the position and the opening at it.
        let shards = self.hub.lock_all();
        let position = self.topics.iter().filter_map(|topic| {
            let shard = &shards[self.hub.shard_number(topic.as_bytes())];
            shard.get(&Name(topic.as_bytes()))?.track.as_ref()?.reader.position()
        });
        let seen = position.max().unwrap_or_default();
        let mut round = Round::default();
        self.gate.fence.lock().reopen(seen);
        let mut told = Telling { replay: self, round: &mut round };
        let notices =
            [hello(Outcome::Lost(lost), Some(seen)), Some(notice::history_lost(lost, seen))];
        told.notices(notices, Some(seen));
        drop(shards);
        round.flush(clock::now());
    }
}

/// Writes to the client of a replay.
struct Telling<'a> {
    replay: &'a Replay,
    round: &'a mut Round,
}

impl Telling<'_> {
    fn tell(&mut self, message: Message<'_>) {
        let target = &self.replay.gate.target;
        if let Some(bytes) = Fanout::new(message).encode(target, &self.replay.hub) {
            self.round.send(target, bytes, clock::now());
        }
    }

    fn notices(&mut self, notices: impl IntoIterator<Item = Option<String>>, id: Option<Position>) {
        for notice in notices.into_iter().flatten() {
            // A notice names its position itself, where it does.
            self.tell(Message { id, carries_id: true, payload: notice.as_bytes() });
        }
    }

    /// An event stream remembers its position from the start, although nothing has happened yet.
    fn position(&mut self, position: Position) {
        let target = &self.replay.gate.target;
        if matches!(target, Sink::EventStream { .. }) {
            self.round.send(target, message::event_position(position), clock::now());
        }
    }
}

impl Found {
    fn lose(&mut self, lost: Lost) {
        self.outcome = Outcome::Lost(lost);
        self.entries = Vec::new();
    }
}

/// Appends a page to what was read before. Answers behind which position the next one begins, if there is one.
pub(super) fn merge(page: &mut [Log], chains: &mut [Log]) -> Option<Position> {
    let ends = page.iter().filter(|log| !log.complete);
    let behind = ends.filter_map(|log| log.entries.last().map(|entry| entry.id)).min();
    for (log, chain) in page.iter_mut().zip(chains) {
        chain.last = log.last;
        chain.first = chain.first.or(log.first);
        let is_within = |entry: &Entry| behind.is_none_or(|behind| entry.id <= behind);
        chain.entries.extend(std::mem::take(&mut log.entries).into_iter().filter(is_within));
    }
    behind
}

/// How long an entry is held at least.
pub(super) fn retention_ms(histories: &Histories) -> u64 {
    u64::try_from(histories.limits.ttl.as_millis()).unwrap_or(u64::MAX)
}

/// Most entries of a log that are read at once.
pub(super) const PAGE_ENTRIES: usize = 500;
