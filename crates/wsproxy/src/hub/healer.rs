//! The healer: fills the holes that losses of the bus leave in histories, once for all clients of a topic.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::{
    history::{After, Entry, Log, Lost, Pages, Position, pages::Since},
    names::Id,
};

use crate::{
    hub::{
        Hub,
        audience::{Audience, DeliveryRound},
        fanout::Fanout,
        gate::Gate,
        message::Message,
        replay::PAGE_ENTRIES,
        sink::{Sink, SinkId},
        topic::{LockedShards, Topic},
        track::Histories,
    },
    store::{
        Store,
        command::{SnapshotOf, StoreError},
        not_done::NotDone,
        token_streams::StreamState,
    },
    telemetry::throttle::Throttle,
};

/// A topic with messages possibly missing behind the reader's position.
pub(super) struct OpenHole {
    topic: Arc<str>,
    log: Arc<str>,
    histories: Arc<Histories>,
    from: Position,
}

/// A hole's log as it was read.
struct ReadLog {
    hole: OpenHole,
    log: Log,
    /// Moment up to which the log is complete, in the order that logs share.
    moment: (u64, u64),
    judged: Result<(), Lost>,
    /// Token streams that clients get if the log is lost.
    streams: Vec<StreamState>,
}

/// Logs whose holes are filled together.
struct Filling {
    logs: Vec<Part>,
    /// Entries still to be delivered, with the index of their log, in the order that the logs share.
    entries: VecDeque<(usize, Entry)>,
    /// All logs could be read.
    is_complete: bool,
}

/// A log of a [`Filling`].
struct Part {
    topic: Arc<str>,
    /// Position up to which the log is delivered.
    at: Position,
    /// End of the log when it was read.
    head: Option<Position>,
}

/// Fills holes as they appear, and renews the heads of logs at intervals, until `end`.
pub async fn run(hub: Arc<Hub>, store: Store, end: CancellationToken) {
    let mut keep = tokio::time::interval(KEEP_HEADS_EVERY);
    keep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = hub.holes.notified() => {}
            _ = keep.tick() => {
                tokio::select! {
                    () = hub.keep_heads(&store) => {}
                    () = end.cancelled() => return,
                }
            }
            () = hub.broken.due() => {
                hub.tell_broken();
                continue;
            }
            () = end.cancelled() => return,
        }
        let begun = clock::now();
        let mut healed = 0;
        for pass in 0.. {
            let outage = hub.outage();
            if outage % 2 == 1 {
                break; // told again when the bus is back
            }
            let holes = hub.holes();
            if holes.is_empty() {
                break;
            }
            let filled = tokio::select! {
                filled = hub.fill(&store, holes, outage, pass < PATIENT_PASSES) => filled,
                () = end.cancelled() => return,
            };
            healed += filled;
            hub.tell_broken();
            if filled == 0 {
                tokio::time::sleep(AGAIN).await;
            }
        }
        let milliseconds = clock::now().since(begun).0 / 1000;
        if healed > 0
            && let Some(left_out) = HEALINGS.pass()
        {
            info!(
                topics = healed,
                milliseconds, left_out, "Histories were read again and are whole."
            );
        }
    }
}

/// Lost histories that are not logged yet.
#[derive(Debug, Default)]
pub struct BrokenHistories {
    untold: Mutex<Untold>,
    lines: Throttle,
}

#[derive(Debug, Default)]
struct Untold {
    topics: usize,
    /// The latest of these topics.
    last: Option<(Arc<str>, Lost)>,
}

impl BrokenHistories {
    fn note(&self, topic: &Arc<str>, lost: Lost) {
        let mut untold = self.untold.lock();
        untold.topics += 1;
        untold.last = Some((Arc::clone(topic), lost));
    }

    /// Waits until the next line may be logged; for ever if no history is left.
    async fn due(&self) {
        if self.untold.lock().topics == 0 {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl Hub {
    /// Logs one line for all lost histories since the last line.
    fn tell_broken(&self) {
        let mut untold = self.broken.untold.lock();
        if untold.topics == 0 || self.broken.lines.pass().is_none() {
            return;
        }
        if let Untold { topics, last: Some((topic, lost)) } = std::mem::take(&mut *untold) {
            let (topic, reason) = (&*topic, lost.label());
            warn!(topics, topic, reason, "Histories cannot be continued.");
        }
    }

    /// Begins a reading of every log behind whose position something may be missing.
    pub(super) fn holes(&self) -> Vec<OpenHole> {
        let mut holes = Vec::new();
        for shard in self.shards.iter() {
            for (topic, track) in shard.lock().tracks_mut() {
                let Some(from) = track.reader.begin_reading() else { continue };
                holes.push(OpenHole {
                    topic: Arc::clone(topic),
                    log: track.log(topic),
                    histories: Arc::clone(&track.histories),
                    from,
                });
            }
        }
        holes
    }

    /// Renews the heads of all logs that this instance reads: a head tells the last position of a log whose entries
    /// have expired. A log whose head is gone was removed.
    async fn keep_heads(&self, store: &Store) {
        let mut kept: Vec<(Arc<str>, Arc<str>, Arc<Histories>)> = Vec::new();
        for shard in self.shards.iter() {
            for (topic, track) in shard.lock().tracks() {
                let is_read = track.reader.position().is_some() && !track.reader.has_hole();
                if is_read && !track.is_unresumable {
                    let histories = Arc::clone(&track.histories);
                    kept.push((Arc::clone(topic), track.log(topic), histories));
                }
            }
        }
        for topics in kept.chunks(KEPT_AT_ONCE) {
            let logs: Vec<_> = topics.iter().map(|(_, log, _)| Arc::clone(log)).collect();
            let ttl = topics.iter().map(|(.., histories)| histories.limits.head_ttl()).max();
            let held = match store.keep_heads(&logs, ttl.unwrap_or_default()).await {
                Ok(held) => held,
                Err(error) => return debug!(%error, "The heads of logs cannot be kept now."),
            };
            for ((topic, ..), _) in topics.iter().zip(held).filter(|(_, held)| !held) {
                let mut shard = self.shards.lock(topic.as_bytes());
                let state = shard.get_mut(topic.as_bytes());
                if let Some(track) = state.and_then(|state| state.track.as_mut()) {
                    track.interrupt();
                }
            }
        }
        self.holes.notify_one();
    }

    /// Reads the logs of holes and serves their clients. Returns the number of logs that are whole.
    pub(super) async fn fill(
        self: &Arc<Self>,
        store: &Store,
        holes: Vec<OpenHole>,
        outage: u64,
        is_patient: bool,
    ) -> usize {
        let (together, alone): (Vec<_>, Vec<_>) =
            holes.into_iter().partition(|hole| hole.histories.clock.is_some());
        let mut whole = self.fill_together(store, together, outage, is_patient).await;
        let mut alone = alone.into_iter();
        loop {
            let batch: Vec<_> = alone.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return whole;
            }
            for found in read_all(self, store, batch, usize::MAX).await {
                let mut filling = self.begin(vec![found]);
                whole += self.deliver_and_close(&mut filling, outage, is_patient).await;
            }
        }
    }

    /// Fills the holes of logs that share one order, in this order: a client's last event id stands for all these logs.
    async fn fill_together(
        &self,
        store: &Store,
        holes: Vec<OpenHole>,
        outage: u64,
        is_patient: bool,
    ) -> usize {
        if holes.is_empty() {
            return 0;
        }
        let wanted = holes.len();
        let links = self.links_lost();
        let mut found = read_all(self, store, holes, TOGETHER_BYTES_MAX).await;
        if self.links_lost() != links {
            return 0; // the logs may have been read from two different stores
        }
        // The logs were read at different moments. Up to the earliest one all of them are complete.
        let limit = found.iter().map(|found| found.moment).min().unwrap_or_default();
        found.iter_mut().for_each(|found| found.log.cut(limit));
        let is_complete = found.len() == wanted;
        let mut filling = self.begin(found);
        filling.is_complete &= is_complete;
        self.deliver_and_close(&mut filling, outage, is_patient).await
    }

    /// Begins to fill holes: tells the clients of lost histories first, and collects the entries of all others.
    fn begin(&self, found: Vec<ReadLog>) -> Filling {
        let mut filling = Filling { logs: Vec::new(), entries: VecDeque::new(), is_complete: true };
        let mut round = DeliveryRound::default();
        let topics: Vec<_> = found.iter().map(|found| Arc::clone(&found.hole.topic)).collect();
        let is_together = found.iter().any(|found| found.hole.histories.clock.is_some());
        let mut shards =
            if is_together { self.shards.lock_all() } else { self.shards.lock_for(&topics) };
        let mut lost_logs = Vec::new();
        for ReadLog { hole, log, judged, streams, .. } in found {
            let Some(track) = shards.track(&hole.topic) else { continue };
            let Some(judged) = track.reader.begin_fill(hole.from, judged, &log) else {
                // A topic that was left and wanted anew meanwhile misses nothing, unless it has another hole.
                filling.is_complete &= !track.reader.has_hole();
                continue;
            };
            let (mut at, mut entries) = (hole.from, log.entries);
            if let Err((lost, position)) = judged {
                self.broken.note(&hole.topic, lost);
                lost_logs.push((Arc::clone(&hole.topic), lost, position, streams));
                (at, entries) = (position, Vec::new());
            }
            let number = filling.logs.len();
            filling.entries.extend(entries.into_iter().map(|entry| (number, entry)));
            filling.logs.push(Part { topic: hole.topic, at, head: log.head });
        }
        if is_together {
            self.lose_together(&mut shards, &lost_logs, &filling, &mut round);
        } else {
            for (topic, lost, position, streams) in &lost_logs {
                let Some(topic) = shards.topic(topic) else { continue };
                let sinks = topic.subscribers.iter();
                let told = round.lose(sinks, (*lost, *position), streams, self);
                self.counters.history_lost[*lost as usize].add(told);
            }
        }
        drop(shards);
        round.flush(clock::now());
        filling.entries.make_contiguous().sort_by_key(|(_, entry)| entry.id.id());
        filling
    }

    /// Delivers the entries in bounded turns, and closes the holes behind them. Live messages wait in the readers
    /// meanwhile, so no client gets a later message before an earlier one. A client that leaves between two turns has
    /// everything up to its last id, of all its logs: the turns follow the order that the logs share.
    async fn deliver_and_close(
        &self,
        filling: &mut Filling,
        outage: u64,
        is_patient: bool,
    ) -> usize {
        while !filling.entries.is_empty() {
            if self.outage() != outage {
                return 0; // the logs are read again behind what was delivered
            }
            self.deliver_turn(filling);
            tokio::task::yield_now().await;
        }
        self.close(filling, outage, is_patient)
    }

    /// Delivers the entries of one turn, which is so short that tasks waiting for a shard or this thread hardly notice.
    fn deliver_turn(&self, filling: &mut Filling) {
        let Filling { logs, entries, .. } = filling;
        let (mut round, mut cost) = (DeliveryRound::default(), 0);
        while cost < TURN_COST
            && let Some((log, entry)) = entries.pop_front()
        {
            let part = &mut logs[log];
            let mut shard = self.shards.lock(part.topic.as_bytes());
            let Some(topic) = shard.get_mut(part.topic.as_bytes()) else { continue };
            let Some(track) = &mut topic.track else { continue };
            // All clients may have left the topic, and new ones may have joined it meanwhile.
            if !track.reader.advance(part.at, entry.id) {
                continue;
            }
            part.at = entry.id;
            let is_unresumable = track.is_unresumable;
            let message = Message { is_unresumable, ..Message::from(&entry) };
            cost += entry.data.len() + topic.subscribers.len() * SINK_COST;
            self.counters.healed_messages.add(1);
            self.deliver_one(topic, Audience::All, message, &mut round);
        }
        round.flush(clock::now());
    }

    /// Closes the holes if nothing is missing in any log; otherwise all logs are read again. Returns how many logs
    /// are whole.
    fn close(&self, filling: &Filling, outage: u64, is_patient: bool) -> usize {
        let topics: Vec<_> = filling.logs.iter().map(|part| Arc::clone(&part.topic)).collect();
        let mut shards = self.shards.lock_for(&topics);
        let (mut joins, mut held) = (filling.is_complete && self.outage() == outage, 0);
        for part in &filling.logs {
            if let Some(track) = shards.track_with_hole(&part.topic) {
                joins &= track.reader.joins(part.at, part.head);
                held += track.reader.held().0;
            }
        }
        // Many live messages wait: read them from the logs instead, so that they are delivered in turns too.
        let is_late = is_patient && held > HELD_AT_ONCE;
        let (mut whole, mut items) = (0, Vec::new());
        for (number, part) in filling.logs.iter().enumerate() {
            let Some(track) = shards.track_with_hole(&part.topic) else { continue };
            if !joins || is_late {
                track.reader.read_again();
                continue;
            }
            whole += 1;
            let held = track.reader.close().into_iter();
            items.extend(held.map(|(id, stored, is_new)| (id, number, stored, is_new)));
        }
        items.sort_by_key(|(id, ..)| id.id());
        let mut round = DeliveryRound::default();
        for (id, number, stored, is_new) in items {
            let Some(topic) = shards.topic(&filling.logs[number].topic) else { continue };
            let audience = if is_new { Audience::All } else { Audience::Gated };
            self.deliver_one(topic, audience, stored.message(id), &mut round);
        }
        drop(shards);
        round.flush(clock::now());
        self.counters.healed.add(whole as u64);
        whole
    }

    /// Tells every client of a lost log once, before all further messages. The client goes on behind the last entry of
    /// all its logs that share the order, since one position stands for all of them.
    fn lose_together(
        &self,
        shards: &mut LockedShards<'_>,
        lost_logs: &[(Arc<str>, Lost, Position, Vec<StreamState>)],
        filling: &Filling,
        round: &mut DeliveryRound,
    ) {
        let mut clients: HashMap<SinkId, (Lost, Position, Sink)> = HashMap::new();
        for (topic, lost, ..) in lost_logs {
            let Some(topic) = shards.topic(topic) else { continue };
            for sink in topic.subscribers.iter().filter(|sink| sink.has_history()) {
                clients.entry(sink.id()).or_insert((*lost, Position::START, sink.clone()));
            }
        }
        if clients.is_empty() {
            return;
        }
        let later = |clients: &mut HashMap<SinkId, (Lost, Position, Sink)>, topic: &Topic, end| {
            for sink in topic.subscribers.iter() {
                if let Some((_, at, _)) = clients.get_mut(&sink.id()) {
                    *at = at.later(end);
                }
            }
        };
        let clocked = |topic: &&mut Topic| {
            topic.track.as_ref().is_some_and(|track| track.histories.clock.is_some())
        };
        for topic in shards.topics_mut().filter(clocked) {
            let position = topic.track.as_ref().and_then(|track| track.reader.position());
            later(&mut clients, topic, position.unwrap_or(Position::START));
        }
        // Entries that this filling delivers count as delivered.
        let mut ends: HashMap<usize, Position> = HashMap::new();
        for (log, entry) in &filling.entries {
            let end = ends.entry(*log).or_insert(entry.id);
            *end = end.later(entry.id);
        }
        for (log, end) in ends {
            if let Some(topic) = shards.topic(&filling.logs[log].topic) {
                later(&mut clients, topic, end);
            }
        }
        for (lost, at, sink) in clients.values_mut() {
            let is_told = round.lose(std::iter::once(&*sink), (*lost, *at), &[], self);
            self.counters.history_lost[*lost as usize].add(is_told);
            if !matches!(sink, Sink::Gated(_)) {
                *sink = Sink::Gated(Gate::open(sink.clone(), *at));
            }
        }
        for topic in shards.topics_mut().filter(clocked) {
            for sink in topic.subscribers.iter_mut() {
                if let Some((.., gated)) = clients.get(&sink.id())
                    && !matches!(sink, Sink::Gated(_))
                {
                    *sink = gated.clone();
                }
            }
        }
    }

    fn deliver_one(
        &self,
        state: &mut Topic,
        audience: Audience,
        message: Message<'_>,
        round: &mut DeliveryRound,
    ) {
        // The latency is unknown: the message was not read from the bus.
        round.deliver(state, audience, &mut Fanout::new(message), self, Micros::UNTIMED);
    }
}

/// Reads the logs of holes. Logs that cannot be read are left out and tried again later.
async fn read_all(
    hub: &Hub,
    store: &Store,
    holes: Vec<OpenHole>,
    bytes_max: usize,
) -> Vec<ReadLog> {
    let reads = holes.into_iter().map(|hole| read_or_lose(hub, store, hole));
    let mut reads = stream::iter(reads).buffer_unordered(READS);
    let (mut found, mut bytes) = (Vec::new(), 0_usize);
    while let Some(result) = reads.next().await {
        match result {
            Ok(mut one) => {
                bytes += one.log.entries.iter().map(|entry| entry.data.len()).sum::<usize>();
                if bytes > bytes_max {
                    one.judged = Err(Lost::Overflow);
                    one.log.entries = Vec::new();
                }
                found.push(one);
            }
            Err(error) => debug!(%error, "A log cannot be read now."),
        }
    }
    found
}

impl OpenHole {
    fn snapshot_of(&self, after: Option<After>, streams_of: Option<Id>) -> SnapshotOf {
        SnapshotOf {
            logs: vec![Arc::clone(&self.log)],
            clock: self.histories.clock.clone(),
            head_ttl: Some(self.histories.limits.head_ttl()),
            after,
            entries_max: PAGE_ENTRIES,
            streams_of,
        }
    }
}

/// Begins a lost log anew at its present end, with the present state of its session's token streams.
async fn begin_anew(store: &Store, hole: OpenHole, lost: Lost) -> Result<ReadLog, StoreError> {
    let session = hole.histories.names.session_of_down(&hole.topic);
    let (mut page, streams) = store.snapshot(hole.snapshot_of(None, session)).await?;
    let log = page.logs.pop().unwrap_or_default();
    Ok(ReadLog { hole, log, moment: page.moment, judged: Err(lost), streams })
}

/// Reads the log of a hole. A key of another type counts as a lost log: waiting for it would stall all logs that share
/// its order.
///
/// # Errors
/// The store did not answer.
async fn read_or_lose(hub: &Hub, store: &Store, hole: OpenHole) -> Result<ReadLog, StoreError> {
    match read(hub, store, &hole).await {
        Ok((Ok(log), moment)) => {
            Ok(ReadLog { hole, log, moment, judged: Ok(()), streams: Vec::new() })
        }
        Ok((Err(lost), _)) => begin_anew(store, hole, lost).await,
        Err(StoreError::NotDone { refusal: NotDone::WrongType, error }) => {
            if let Some(left_out) = ODD_KEYS.pass() {
                let log = &*hole.log;
                warn!(log, %error, left_out, "The key of a history holds something else.");
            }
            let (log, moment) = (Log::default(), (u64::MAX, u64::MAX));
            Ok(ReadLog { hole, log, moment, judged: Err(Lost::Unknown), streams: Vec::new() })
        }
        Err(error) => Err(error),
    }
}

/// A log and the moment up to which it is complete.
type Whole = (Result<Log, Lost>, (u64, u64));

async fn read(hub: &Hub, store: &Store, hole: &OpenHole) -> Result<Whole, StoreError> {
    let ttl_ms = u64::try_from(hole.histories.limits.ttl.as_millis()).unwrap_or(u64::MAX);
    let (mut pages, mut behind, mut moment) = (Pages::default(), hole.from, None);
    loop {
        if hole.histories.clock.is_none() {
            hub.heal_pace.turn().await;
        }
        let of = hole.snapshot_of(Some(After::Position(behind)), None);
        let (mut page, _) = store.snapshot(of).await?;
        hub.store_clock.seen(page.now_ms, clock::now());
        let first = *moment.get_or_insert(page.moment);
        match pages.push(Since::Reader(hole.from), ttl_ms, &mut page) {
            Ok(Some(further)) => behind = further,
            Ok(None) => {
                let log = pages.into_logs().pop().ok_or(Lost::Unknown);
                return Ok((log, first));
            }
            Err(lost) => return Ok((Err(lost), first)),
        }
    }
}

/// Upper bound of the reads of sessions' logs per second: after a failover all instances read theirs. Logs with one order
/// are read all before a message is delivered, so that a pace would hold up all clients. Resumes read for themselves.
pub(super) const READS_PER_SECOND: u32 = 2000;

/// Upper bound of the logs that are read at the same time.
const READS: usize = 64;

/// Upper bound of the topics that are read before their clients are served.
const BATCH: usize = 64;

/// Throttle of log lines about keys that are not histories.
static ODD_KEYS: Throttle = Throttle::new();

/// Throttle of log lines about histories that are whole again.
static HEALINGS: Throttle = Throttle::new();

/// Upper bound of the bytes held for logs that must be delivered together. Logs beyond it count as lost.
const TOGETHER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Pause before a log that could not be read is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// Upper bound of the cost of a turn, in bytes: a megabyte takes some milliseconds.
const TURN_COST: usize = 1024 * 1024;

/// Cost of a delivery to one sink, not counting the message's encoding, in bytes.
const SINK_COST: usize = 256;

/// Upper bound of the waiting live messages that are delivered at once when holes are closed. If more wait, the logs
/// are read again.
const HELD_AT_ONCE: usize = 2000;

/// Upper bound of these repeated reads. Then the holes are closed with all waiting messages.
const PATIENT_PASSES: u32 = 3;

/// Interval at which the heads of logs are renewed. Heads live for an hour at least.
const KEEP_HEADS_EVERY: Duration = Duration::from_secs(900);

/// Number of heads that one request renews.
const KEPT_AT_ONCE: usize = 1024;
