//! How a client comes to what it missed: live messages wait behind a fence while its logs are read.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tracing::debug;
use wsproxy_conn::{clock, outbox::FRAME_OVERHEAD};
use wsproxy_proto::{
    history::{
        After, Entry, Fence, Log, Lost, Pages, Position, Resolved, Snapshot, fence::Released,
        pages::Since,
    },
    names::Id,
};

use crate::{
    hub::{
        Histories, Hub, Name, ShardLocks, Sink,
        audience::Round,
        message::{Fanout, Message},
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

    /// One for a client that has everything up to `seen`, on all its topics.
    pub(super) fn open(target: Sink, seen: Position) -> Arc<Self> {
        Arc::new(Self { target, fence: Mutex::new(Fence::opened(seen)) })
    }
}

impl Sink {
    /// What may wait for it.
    pub(super) fn buffer_bytes(&self) -> usize {
        match self {
            Self::Client { link, .. } | Self::Handler { link, .. } => {
                link.profile().send_buffer_bytes
            }
            Self::EventStream { tap, .. } | Self::StreamHandler { tap, .. } | Self::Tap(tap) => {
                tap.limit()
            }
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
    /// What the entries weigh where they wait, at most.
    bytes: usize,
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
    /// Waits while the bus is lost or holes are being filled: set a deadline.
    ///
    /// # Errors
    /// The store did not answer; the client still gets nothing.
    pub async fn run(
        &self,
        store: &Store,
        wish: Wish,
        hello: impl FnOnce(Outcome, Option<Position>) -> Option<String>,
    ) -> Result<Outcome, StoreError> {
        let (mut lost, mut early) = (None, 0);
        let found = loop {
            let Some(turns) = self.turns() else {
                tokio::time::sleep(AGAIN).await;
                continue;
            };
            let found = self.read(store, &wish, lost).await?;
            let encoded = self.encode(&found.entries).await;
            match self.join(&found, &turns) {
                Joined::Now(shards, fence, held) => {
                    let after = wish.after.as_ref();
                    let mut round = Round::default();
                    self.tell(&found, (encoded, held), after, hello, &mut round);
                    drop((fence, shards));
                    round.flush(clock::now());
                    break found;
                }
                Joined::Lost(why) => lost = Some(why),
                Joined::Not => {}
                Joined::Early if early == 0 => early += 1,
                // What is early again is of another life of a log than what was delivered.
                Joined::Early => self.interrupt(),
            }
            tokio::time::sleep(AGAIN).await;
        };
        self.hub.count(found.outcome);
        debug!(outcome = ?found.outcome, "A client's history was read.");
        Ok(found.outcome)
    }

    /// How often each topic had a hole; `None` while one has.
    fn turns(&self) -> Option<Vec<u64>> {
        let turns = self.topics.iter().map(|topic| {
            let shard = self.hub.shard(topic.as_bytes()).lock();
            let track = shard.get(&Name(topic.as_bytes()))?.track.as_ref()?;
            (!track.reader.has_hole()).then_some(track.turns)
        });
        let turns = turns.collect();
        if self.hub.is_linked() { turns } else { None }
    }

    /// `lost`: something is missing already, and the client is to be told so.
    async fn read(
        &self,
        store: &Store,
        wish: &Wish,
        lost: Option<Lost>,
    ) -> Result<Found, StoreError> {
        let after = if lost.is_none() { wish.after.clone() } else { None };
        let (last, streams) = store.snapshot(self.of(after.clone(), wish)).await?;
        self.hub.store_clock.seen(last.now_ms, clock::now());
        let mut found = Found { last, entries: vec![], streams, outcome: Outcome::Fresh, bytes: 0 };
        if let Some(lost) = lost {
            found.lose(lost);
        }
        if after.is_none() {
            return Ok(found);
        }
        let mut pages = Pages::default();
        let ttl_ms = u64::try_from(self.histories.limits.ttl.as_millis()).unwrap_or(u64::MAX);
        let mut resolved = found.last.after;
        if let (Some(After::Event(_)), Resolved::At(at)) = (&after, resolved)
            && self.hub.doubts.concern(at.milliseconds)
        {
            resolved = Resolved::Ambiguous;
        }
        loop {
            let pushed = resolved
                .position()
                .and_then(|after| pages.push(Since::Client(after), ttl_ms, &mut found.last));
            let further = match pushed {
                Ok(Some(further)) => further,
                Ok(None) => break,
                Err(lost) => {
                    found.lose(lost);
                    return Ok(found);
                }
            };
            let of = self.of(Some(After::Position(further)), &Wish::default());
            (found.last, _) = store.snapshot(of).await?;
        }
        let mut entries: Vec<_> =
            pages.into_logs().into_iter().flat_map(|log| log.entries).collect();
        entries.sort_unstable_by_key(|entry| entry.id.id());
        found.outcome = Outcome::Resumed(entries.len());
        found.bytes = entries.iter().map(|entry| entry.data.len() + MISSED_BYTES).sum();
        found.entries = entries;
        if found.bytes > self.gate.target.buffer_bytes() {
            found.lose(Lost::Overflow);
        }
        Ok(found)
    }

    fn of(&self, after: Option<After>, wish: &Wish) -> SnapshotOf {
        SnapshotOf {
            logs: self.topics.iter().map(|topic| self.histories.names.log(topic).into()).collect(),
            clock: self.histories.clock.clone(),
            head_ttl: Some(self.histories.limits.head_ttl()),
            after,
            entries_max: PAGE_ENTRIES,
            streams_of: wish.streams_of.clone(),
        }
    }

    /// Joins what was read with what waited. As long as the locks are held nothing comes between.
    fn join(&self, found: &Found, turns: &[u64]) -> Joined<'_> {
        let mut shards = self.hub.lock_for(&self.topics);
        if !self.hub.is_linked() {
            return Joined::Not;
        }
        let mut passed = Vec::new();
        for ((topic, turn), log) in self.topics.iter().zip(turns).zip(&found.last.logs) {
            let Some(track) = shards.track(topic) else { return Joined::Not };
            if track.turns != *turn || track.reader.has_hole() {
                return Joined::Not;
            }
            if !track.reader.begin(log.position()) {
                return Joined::Early;
            }
            if track.reader.has_passed(log.position()) {
                passed.push(topic);
            }
        }
        let mut fence = self.gate.fence.lock();
        let bytes_max = self.gate.target.buffer_bytes();
        // Both wait for the client together. One that was closed for it would come back to the same.
        let fits = |held: &Vec<Bytes>| {
            let bytes: usize = held.iter().map(|message| message.len() + FRAME_OVERHEAD).sum();
            found.bytes + bytes <= bytes_max
        };
        let heads: Vec<_> = found.last.logs.iter().map(Log::position).collect();
        let lost = match fence.release(&heads) {
            Released::Open(held) if fits(&held) => {
                // Nothing that comes for these topics can be among what was read.
                for topic in passed {
                    shards.ungate(topic, &self.gate);
                }
                return Joined::Now(shards, fence, held);
            }
            Released::Open(_) => Lost::Overflow,
            Released::Torn => {
                // What waits is in what is read from now on, or of a life of a log that has ended.
                *fence = Fence::new(bytes_max);
                return Joined::Not;
            }
            Released::Lost(lost) => lost,
        };
        // What is read from now on has what could not wait.
        *fence = Fence::new(bytes_max);
        Joined::Lost(lost)
    }

    /// The logs do not belong together with what was delivered of them: they are read again, for everybody.
    fn interrupt(&self) {
        let mut shards = self.hub.lock_for(&self.topics);
        for topic in &self.topics {
            if let Some(track) = shards.track(topic) {
                track.interrupt();
            }
        }
        drop(shards);
        self.hub.open_hole(&self.histories);
    }

    /// What the client gets of entries, made before anything is locked, and with pauses: a long history, or
    /// many clients with one, must not keep others waiting.
    async fn encode(&self, entries: &[Entry]) -> Vec<Option<Bytes>> {
        let mut encoded = Vec::with_capacity(entries.len());
        for entries in entries.chunks(ENCODED_AT_ONCE) {
            let one = |entry| Fanout::new(missed(entry)).encode(&self.gate.target, &self.hub);
            encoded.extend(entries.iter().map(one));
            tokio::task::yield_now().await;
        }
        encoded
    }

    /// Everything in its order.
    fn tell(
        &self,
        found: &Found,
        (encoded, held): (Vec<Option<Bytes>>, Vec<Bytes>),
        after: Option<&After>,
        hello: impl FnOnce(Outcome, Option<Position>) -> Option<String>,
        round: &mut Round,
    ) {
        let seen = found.last.position();
        let mut told = Telling { replay: self, round };
        let outcome = found.outcome;
        match (outcome, after) {
            (Outcome::Resumed(count), Some(after)) => {
                let notices = [hello(outcome, None), Some(notice::resumed(count, after))];
                told.notices(notices, None);
            }
            (Outcome::Lost(lost), _) => {
                let notice = notice::history_lost(lost, seen);
                told.notices([hello(outcome, Some(seen)), Some(notice)], Some(seen));
            }
            _ => {
                told.position(seen);
                told.notices([hello(outcome, Some(seen))], Some(seen));
            }
        }
        if !matches!(outcome, Outcome::Resumed(_)) {
            let streams = found.streams.iter().map(|stream| Some(notice::stream_snapshot(stream)));
            told.notices(streams, Some(seen));
        }
        let target = &self.gate.target;
        for (entry, bytes) in found.entries.iter().zip(encoded) {
            if let Some(bytes) = bytes {
                Fanout::new(missed(entry)).announce_to(target);
                told.round.send_missed(target, bytes);
            }
        }
        for bytes in held {
            told.round.send_missed(&self.gate.target, bytes);
        }
    }
}

/// Whether a client could be let through.
enum Joined<'a> {
    /// It can, while these locks are held; this is what waited.
    Now(ShardLocks<'a>, MutexGuard<'a, Fence<Bytes>>, Vec<Bytes>),
    /// Something is missing.
    Lost(Lost),
    /// What was read is not enough: it has to be read again.
    Not,
    /// What was read ends before the instance began to read.
    Early,
}

/// Writes to the client of a replay.
struct Telling<'a> {
    replay: &'a Replay,
    round: &'a mut Round,
}

impl Telling<'_> {
    fn tell(&mut self, message: Message<'_>) {
        let target = &self.replay.gate.target;
        let mut fanout = Fanout::new(message);
        if let Some(bytes) = fanout.encode(target, &self.replay.hub) {
            fanout.announce_to(target);
            self.round.send_missed(target, bytes);
        }
    }

    fn notices(&mut self, notices: impl IntoIterator<Item = Option<String>>, id: Option<Position>) {
        for notice in notices.into_iter().flatten() {
            // A notice names its position itself, where it does.
            self.tell(Message { id, carries_id: true, ..Message::plain(notice.as_bytes()) });
        }
    }

    /// An event stream remembers its position from the start, although nothing has happened yet.
    fn position(&self, position: Position) {
        let target = &self.replay.gate.target;
        if let Sink::EventStream { tap, .. } = target {
            tap.place(position);
        }
    }
}

impl Found {
    fn lose(&mut self, lost: Lost) {
        self.outcome = Outcome::Lost(lost);
        (self.entries, self.bytes) = (Vec::new(), 0);
    }
}

/// An entry as a message.
fn missed(entry: &Entry) -> Message<'_> {
    let carries_id = entry.event_id.is_some();
    let Entry { id, prev, ref data, .. } = *entry;
    Message { id: Some(id), prev, carries_id, is_private: false, payload: data }
}

/// So many entries are encoded before others have their turn.
const ENCODED_AT_ONCE: usize = 32;

/// When to look again whether a client can be let through.
const AGAIN: Duration = Duration::from_millis(20);

/// What a missed message weighs beside its data where it waits: its place, its frame's head and its id.
const MISSED_BYTES: usize = FRAME_OVERHEAD + 96;

/// Most entries of a log that are read at once.
pub(super) const PAGE_ENTRIES: usize = 500;
