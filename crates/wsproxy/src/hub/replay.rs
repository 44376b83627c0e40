//! Replay of missed messages: live messages wait behind a client's fence while its logs are read.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::MutexGuard;
use tracing::debug;
use wsproxy_conn::{
    clock::{self, Micros},
    outbox::FRAME_OVERHEAD,
};
use wsproxy_proto::{
    history::{
        After, Entry, Fence, Log, Lost, Pages, Position, Resolved, Snapshot, fence::Released,
        pages::Since,
    },
    names::Id,
};

use crate::{
    bus::publish::BusError,
    client::Client,
    hub::{
        Hub, audience::DeliveryRound, fanout::Fanout, gate::Gate, message::Message, notice,
        sink::Sink, subscription::Subscription, topic::LockedShards, track::Histories,
    },
    store::{
        Store,
        command::{SnapshotOf, StoreError},
        token_streams::StreamState,
    },
};

/// Subscribes a client to topics with histories, in addition to a reserved subscription, and waits until
/// the bus has confirmed all topics. Live messages wait behind a fence until the returned replay has run.
///
/// # Errors
/// As [`Hub::subscribe`].
pub async fn subscribe_behind_fence(
    hub: &Arc<Hub>,
    client: Sink,
    topics: Vec<Arc<str>>,
    histories: Arc<Histories>,
    reserved: Option<Subscription>,
) -> Result<(Subscription, Replay), BusError> {
    let mut subscription = reserved.unwrap_or_else(|| Subscription::new(Arc::clone(hub)));
    let gate = Gate::new(client);
    for topic in &topics {
        let sink = Sink::Gated(Arc::clone(&gate));
        hub.add(Arc::clone(topic), sink, Some(&histories), &mut subscription);
    }
    hub.confirm(&mut subscription).await?;
    Ok((subscription, Replay { hub: Arc::clone(hub), gate, topics, histories }))
}

/// Sends a client without history its first message, and the notice that a history it asked for is lost.
pub fn send_hello(hub: &Hub, client: &Sink, hello: Option<String>, lost: Option<Lost>) {
    let mut round = DeliveryRound::default();
    let lost = lost.inspect(|lost| hub.counters.history_lost[*lost as usize].add(1));
    let lost = lost.map(|lost| notice::history_lost(lost, Position::START));
    for notice in [hello, lost].into_iter().flatten() {
        let mut fanout = Fanout::new(Message::plain(notice.as_bytes()));
        if let Some(bytes) = fanout.encode(client, hub) {
            round.send(client, bytes, Micros::UNTIMED);
        }
    }
    round.flush(clock::now());
}

/// Messages that a client wants before live ones.
#[derive(Debug, Default)]
pub struct Wish {
    /// Position behind which the client resumes; `None`: the client does not resume.
    pub after: Option<After>,
    /// Session whose token streams a client gets that does not resume.
    pub streams_of: Option<Id>,
}

/// Outcome of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeOutcome {
    /// The client does not resume.
    Fresh,
    /// The client got all missed messages; this is their number.
    Resumed(usize),
    /// The client was told that messages are missing.
    Lost(Lost),
}

/// Replay for a subscribed client, which gets no message until the replay has run.
pub struct Replay {
    hub: Arc<Hub>,
    gate: Arc<Gate>,
    topics: Vec<Arc<str>>,
    histories: Arc<Histories>,
}

/// Result of reading the logs for one client.
struct Backlog {
    /// Last snapshot: all entries up to its positions were read.
    last: Snapshot,
    /// Missed entries, in order.
    entries: Vec<Entry>,
    streams: Vec<StreamState>,
    outcome: ResumeOutcome,
    /// Upper bound of the entries' bytes in the client's outbox.
    bytes: usize,
}

impl Replay {
    /// Returns the gate of the client.
    #[cfg(test)]
    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Reads the messages that the client missed, sends them, and opens the gate for live messages. `hello` makes
    /// the client's first message from the outcome and, unless the client resumes, its position.
    ///
    /// Waits while the bus is lost or holes are being filled: set a deadline.
    ///
    /// # Errors
    /// The store did not answer. The gate stays closed.
    pub async fn run(
        &self,
        store: &Store,
        wish: Wish,
        hello: impl FnOnce(ResumeOutcome, Option<Position>) -> Option<String>,
    ) -> Result<ResumeOutcome, StoreError> {
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
                    let mut round = DeliveryRound::default();
                    self.tell(&found, (encoded, held), after, hello, &mut round);
                    drop((fence, shards));
                    round.flush(clock::now());
                    break found;
                }
                Joined::Lost(why) => lost = Some(why),
                Joined::Not => {}
                Joined::Early if early == 0 => early += 1,
                // The second time, the log is not the one whose entries were delivered: the store lost its data.
                Joined::Early => self.interrupt(),
            }
            tokio::time::sleep(AGAIN).await;
        };
        self.count(found.outcome);
        debug!(outcome = ?found.outcome, "A client's history was read.");
        Ok(found.outcome)
    }

    /// Returns the turns of each topic's track; `None` while a topic has a hole or the bus is lost.
    fn turns(&self) -> Option<Vec<u32>> {
        let turns = self.topics.iter().map(|topic| {
            let shard = self.hub.shards.lock(topic.as_bytes());
            let track = shard.get(topic.as_bytes())?.track.as_ref()?;
            (!track.reader.has_hole()).then_some(track.turns)
        });
        let turns = turns.collect();
        if self.hub.is_linked() { turns } else { None }
    }

    /// Reads the logs. With `lost` the client does not resume, but is told that messages are missing.
    ///
    /// # Errors
    /// The store did not answer.
    async fn read(
        &self,
        store: &Store,
        wish: &Wish,
        lost: Option<Lost>,
    ) -> Result<Backlog, StoreError> {
        let after = if lost.is_none() { wish.after.clone() } else { None };
        let (last, streams) = store.snapshot(self.of(after.clone(), wish)).await?;
        self.hub.store_clock.seen(last.now_ms, clock::now());
        let mut found =
            Backlog { last, entries: vec![], streams, outcome: ResumeOutcome::Fresh, bytes: 0 };
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
        found.outcome = ResumeOutcome::Resumed(entries.len());
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

    /// Checks that the entries of the logs and the messages behind the fence have no gap between them. While the
    /// returned locks are held, no further message comes.
    fn join(&self, found: &Backlog, turns: &[u32]) -> Joined<'_> {
        let mut shards = self.hub.shards.lock_for(&self.topics);
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
        // Entries and waiting messages go into the client's outbox together and must fit. If they overflowed it,
        // the client would be closed as slow, resume, and be closed again.
        let fits = |held: &[Bytes]| {
            let bytes: usize = held.iter().map(|message| message.len() + FRAME_OVERHEAD).sum();
            found.bytes + bytes <= bytes_max
        };
        let heads: Vec<_> = found.last.logs.iter().map(Log::position).collect();
        match fence.release_or_restart(&heads, fits) {
            Released::Open(held) => {
                // Later messages of these topics cannot be among the entries, so they need no gate.
                for topic in passed {
                    self.ungate(topic, &mut shards);
                }
                Joined::Now(shards, fence, held)
            }
            Released::ReadAgain(None) => Joined::Not,
            Released::ReadAgain(Some(lost)) => Joined::Lost(lost),
        }
    }

    /// Replaces the gate at a topic, so that the client gets the topic's messages directly.
    fn ungate(&self, topic: &str, shards: &mut LockedShards<'_>) {
        let Some(topic) = shards.topic(topic) else { return };
        for sink in topic.subscribers.iter_mut() {
            if matches!(sink, Sink::Gated(other) if Arc::ptr_eq(other, &self.gate)) {
                *sink = self.gate.target.clone();
            }
        }
    }

    fn count(&self, outcome: ResumeOutcome) {
        let counters = &self.hub.counters;
        match outcome {
            ResumeOutcome::Fresh => {}
            ResumeOutcome::Resumed(count) => {
                counters.resumed.add(1);
                counters.replayed.add(count as u64);
            }
            ResumeOutcome::Lost(lost) => counters.history_lost[lost as usize].add(1),
        }
    }

    /// Interrupts all topics: their logs do not fit the messages that were delivered. The healer reads the logs
    /// again, for all clients.
    fn interrupt(&self) {
        let mut shards = self.hub.shards.lock_for(&self.topics);
        for topic in &self.topics {
            if let Some(track) = shards.track(topic) {
                track.interrupt();
            }
        }
        drop(shards);
        self.hub.open_hole(&self.histories);
    }

    /// Encodes entries for the client, before any lock is taken. Yields at intervals, so that long histories do
    /// not keep other tasks waiting.
    async fn encode(&self, entries: &[Entry]) -> Vec<Option<Bytes>> {
        let mut encoded = Vec::with_capacity(entries.len());
        for entries in entries.chunks(ENCODED_AT_ONCE) {
            let one =
                |entry| Fanout::new(Message::from(entry)).encode(&self.gate.target, &self.hub);
            encoded.extend(entries.iter().map(one));
            tokio::task::yield_now().await;
        }
        encoded
    }

    /// Sends the first message, the notices, the missed messages and the waiting ones, in this order.
    fn tell(
        &self,
        found: &Backlog,
        (encoded, held): (Vec<Option<Bytes>>, Vec<Bytes>),
        after: Option<&After>,
        hello: impl FnOnce(ResumeOutcome, Option<Position>) -> Option<String>,
        round: &mut DeliveryRound,
    ) {
        let seen = found.last.position();
        let mut told = Telling { replay: self, round };
        let outcome = found.outcome;
        match (outcome, after) {
            (ResumeOutcome::Resumed(count), Some(after)) => {
                let notices = [hello(outcome, None), Some(notice::resumed(count, after))];
                told.notices(notices, None);
            }
            (ResumeOutcome::Lost(lost), _) => {
                let notice = notice::history_lost(lost, seen);
                told.notices([hello(outcome, Some(seen)), Some(notice)], Some(seen));
            }
            _ => {
                let hello = hello(outcome, Some(seen));
                // Any notice would carry the position.
                if hello.is_none() && found.streams.is_empty() {
                    told.position(seen);
                }
                told.notices([hello], Some(seen));
            }
        }
        if !matches!(outcome, ResumeOutcome::Resumed(_)) {
            let streams = found.streams.iter().map(|stream| Some(notice::stream_snapshot(stream)));
            told.notices(streams, Some(seen));
        }
        let target = &self.gate.target;
        for (entry, bytes) in found.entries.iter().zip(encoded) {
            if let Some(bytes) = bytes {
                Fanout::new(Message::from(entry)).announce_to(target);
                told.round.send_missed(target, bytes);
            }
        }
        for bytes in held {
            told.round.send_missed(&self.gate.target, bytes);
        }
    }
}

/// Result of [`Replay::join`].
enum Joined<'a> {
    /// No gap. The locks are held, and the messages waited behind the fence.
    Now(LockedShards<'a>, MutexGuard<'a, Fence<Bytes>>, Vec<Bytes>),
    /// Messages are missing.
    Lost(Lost),
    /// A gap: the logs have to be read again.
    Not,
    /// A log ends before the position at which the instance began to read it.
    Early,
}

/// Writes to the client of a replay.
struct Telling<'a> {
    replay: &'a Replay,
    round: &'a mut DeliveryRound,
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
            // A notice carries its position, if it has one, in its own members.
            self.tell(Message { id, carries_id: true, ..Message::plain(notice.as_bytes()) });
        }
    }

    /// Tells an event stream its position before the first message, so that it can resume from there.
    fn position(&self, position: Position) {
        let target = &self.replay.gate.target;
        if let Sink::Client { client: Client::EventStream(outbox), .. } = target {
            outbox.set_position(position);
        }
    }
}

impl Backlog {
    fn lose(&mut self, lost: Lost) {
        self.outcome = ResumeOutcome::Lost(lost);
        (self.entries, self.bytes) = (Vec::new(), 0);
    }
}

/// Number of entries that are encoded before other tasks have their turn.
const ENCODED_AT_ONCE: usize = 32;

/// Pause before the logs are read again.
const AGAIN: Duration = Duration::from_millis(20);

/// Bytes of a missed message in the outbox in addition to its data: its entry, its frame's head and its id.
const MISSED_BYTES: usize = FRAME_OVERHEAD + 96;

/// Upper bound of the entries of a log in one read.
pub(super) const PAGE_ENTRIES: usize = 500;
