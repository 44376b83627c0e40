//! Fills the holes that losses of the bus leave in histories, once for all clients of a topic.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use hashbrown::HashMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::{
    history::{After, Entry, Log, Lost, Pages, Position, pages::Since, reader::Filled},
    names::Id,
};

use crate::{
    bus::not_done::NotDone,
    hub::{
        Histories, Hub, Name, Place, Sink, State, Topics,
        audience::{Audience, Round},
        message::{Fanout, Message, Stored},
        replay::{Gate, PAGE_ENTRIES},
    },
    store::{SnapshotOf, Store, StoreError, StreamState},
    telemetry::throttle::Throttle,
};

/// So many logs are read at the same time.
const READS: usize = 64;

/// So many topics are read before their clients are served.
const BATCH: usize = 64;

/// Of log lines about keys that are no histories.
static ODD_KEYS: Throttle = Throttle::new();

/// The same about histories that are whole again.
static HEALINGS: Throttle = Throttle::new();

/// Most bytes that are held for logs which must be delivered together; further ones count as lost.
const TOGETHER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// When to look again at a log that could not be read.
const AGAIN: Duration = Duration::from_millis(50);

/// A topic behind whose position something may be missing.
struct Hole {
    topic: Arc<str>,
    log: Arc<str>,
    histories: Arc<Histories>,
    from: Position,
}

/// What is held of its log.
struct Found {
    hole: Hole,
    log: Log,
    /// Up to where it is complete, of logs with one order.
    moment: (u64, u64),
    judged: Result<(), Lost>,
    /// What clients are shown where it is lost.
    streams: Vec<StreamState>,
}

/// What a topic's clients get, in the shared order.
enum Item {
    Lost(Lost, Position, Vec<StreamState>),
    Entry(Entry),
    Held(Position, Stored, Audience),
}

/// Serves until `end`.
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
        loop {
            let outage = hub.outage();
            if outage % 2 == 1 {
                break; // told again when the bus is back
            }
            let holes = hub.holes();
            if holes.is_empty() {
                break;
            }
            let filled = tokio::select! {
                filled = hub.fill(&store, holes, outage) => filled,
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

/// Histories that could not be continued and of which no line in the log tells yet.
#[derive(Debug, Default)]
pub struct Broken {
    untold: Mutex<Untold>,
    lines: Throttle,
}

#[derive(Debug, Default)]
struct Untold {
    topics: usize,
    /// One of them.
    last: Option<(Arc<str>, Lost)>,
}

impl Broken {
    fn note(&self, topic: &Arc<str>, lost: Lost) {
        let mut untold = self.untold.lock();
        untold.topics += 1;
        untold.last = Some((Arc::clone(topic), lost));
    }

    /// Resolves when a line may be written about those that are left; never where none is.
    async fn due(&self) {
        if self.untold.lock().topics == 0 {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl Hub {
    /// One line for all histories that could not be continued; the rest with the next one.
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

    fn holes(&self) -> Vec<Hole> {
        let mut holes = Vec::new();
        for shard in &self.shards {
            for (topic, state) in shard.lock().iter() {
                let Some(track) = &state.track else { continue };
                let Some(from) = track.reader.hole() else { continue };
                holes.push(Hole {
                    topic: Arc::clone(&topic.0),
                    log: Arc::clone(&track.log),
                    histories: Arc::clone(&track.histories),
                    from,
                });
            }
        }
        holes
    }

    /// Lets the heads of all logs that are read here live on: as long as there is one, it is known what came last.
    /// A log whose head is gone was removed.
    async fn keep_heads(&self, store: &Store) {
        let mut kept: Vec<(Arc<str>, Arc<str>, Arc<Histories>)> = Vec::new();
        for shard in &self.shards {
            for (topic, state) in shard.lock().iter() {
                let Some(track) = &state.track else { continue };
                let is_read = track.reader.position().is_some() && !track.reader.has_hole();
                if is_read && !track.is_private {
                    let histories = Arc::clone(&track.histories);
                    kept.push((Arc::clone(&topic.0), Arc::clone(&track.log), histories));
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
                let mut shard = self.shard(topic.as_bytes()).lock();
                let state = shard.get_mut(&Name(topic.as_bytes()));
                if let Some(track) = state.and_then(|state| state.track.as_mut()) {
                    track.interrupt();
                }
            }
        }
        self.holes.notify_one();
    }

    /// Reads the logs and serves their clients. Answers how many are whole.
    async fn fill(self: &Arc<Self>, store: &Store, holes: Vec<Hole>, outage: u64) -> usize {
        let (together, alone): (Vec<_>, Vec<_>) =
            holes.into_iter().partition(|hole| hole.histories.clock.is_some());
        let mut whole = self.fill_together(store, together, outage).await;
        let mut alone = alone.into_iter();
        loop {
            let batch: Vec<_> = alone.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return whole;
            }
            for found in read_all(self, store, batch, usize::MAX).await {
                let number = self.shard_number(found.hole.topic.as_bytes());
                let mut shard = self.shards[number].lock();
                let mut round = Round::default();
                let mut items = Vec::new();
                let is_linked = self.outage() == outage;
                whole += usize::from(self.fill_one(&mut shard, found, is_linked, &mut items));
                for (_, topic, item) in items {
                    self.deliver_item(&mut shard, &topic, &item, &mut round);
                }
                drop(shard);
                round.flush(clock::now());
            }
        }
    }

    /// Logs with one order are delivered as one: a client's last event id must stand for all of them.
    async fn fill_together(&self, store: &Store, holes: Vec<Hole>, outage: u64) -> usize {
        if holes.is_empty() {
            return 0;
        }
        let wanted = holes.len();
        let links = self.links_lost();
        let mut found = read_all(self, store, holes, TOGETHER_BYTES_MAX).await;
        if self.links_lost() != links {
            return 0; // some were read from another store than others, perhaps
        }
        // They were not read at one moment: what is not above the first of these is complete in all.
        let limit = found.iter().map(|found| found.moment).min().unwrap_or_default();
        found.iter_mut().for_each(|found| found.log.cut(limit));
        let mut shards = self.lock_all();
        let mut joins = found.len() == wanted && self.outage() == outage;
        for Found { hole, log, judged, .. } in &found {
            let shard = &shards[self.shard_number(hole.topic.as_bytes())];
            let track = shard.get(&Name(hole.topic.as_bytes())).and_then(|s| s.track.as_ref());
            joins &= track.is_none_or(|track| track.reader.joins(hole.from, *judged, log));
        }
        let mut items = Vec::new();
        let mut whole = 0;
        for found in found {
            let number = self.shard_number(found.hole.topic.as_bytes());
            let shard = &mut shards[number];
            whole += usize::from(self.fill_one(shard, found, joins, &mut items));
        }
        let mut round = Round::default();
        let (lost, mut items): (Vec<_>, Vec<_>) =
            items.into_iter().partition(|(.., item)| matches!(item, Item::Lost(..)));
        self.lose_together(&mut shards, &lost, &mut round);
        items.sort_by_key(|(id, ..)| id.id());
        for (_, topic, item) in items {
            let number = self.shard_number(topic.as_bytes());
            self.deliver_item(&mut shards[number], &topic, &item, &mut round);
        }
        drop(shards);
        round.flush(clock::now());
        whole
    }

    /// Tells every client of a lost log once, before all that follows, and lets it begin behind everything that
    /// its other logs hold: one position stands for all of them.
    fn lose_together(
        &self,
        shards: &mut [MutexGuard<'_, Topics>],
        lost: &[(Position, Arc<str>, Item)],
        round: &mut Round,
    ) {
        let mut clients: HashMap<Place, (Lost, Position, Sink)> = HashMap::new();
        for (_, topic, item) in lost {
            let Item::Lost(lost, ..) = item else { continue };
            let shard = &shards[self.shard_number(topic.as_bytes())];
            let Some(state) = shard.get(&Name(topic.as_bytes())) else { continue };
            for sink in state.subscribers.iter() {
                clients.entry(sink.place()).or_insert((*lost, Position::START, sink.clone()));
            }
        }
        if clients.is_empty() {
            return;
        }
        let clocked = |state: &&mut State| {
            state.track.as_ref().is_some_and(|track| track.histories.clock.is_some())
        };
        for state in shards.iter_mut().flat_map(|shard| shard.values_mut()).filter(clocked) {
            let position = state.track.as_ref().and_then(|track| track.reader.position());
            for sink in state.subscribers.iter() {
                if let Some((_, at, _)) = clients.get_mut(&sink.place()) {
                    *at = at.later(position.unwrap_or(Position::START));
                }
            }
        }
        for (lost, at, sink) in clients.values_mut() {
            let is_told = round.lose(std::iter::once(&*sink), (*lost, *at), &[], self);
            self.counters.history_lost[*lost as usize].add(is_told);
            if !matches!(sink, Sink::Gated(_)) {
                *sink = Sink::Gated(Gate::open(sink.clone(), *at));
            }
        }
        for state in shards.iter_mut().flat_map(|shard| shard.values_mut()).filter(clocked) {
            for sink in state.subscribers.iter_mut() {
                if let Some((.., gated)) = clients.get(&sink.place())
                    && !matches!(sink, Sink::Gated(_))
                {
                    *sink = gated.clone();
                }
            }
        }
    }

    /// Fills one hole; what is to be delivered goes to `items`.
    fn fill_one(
        &self,
        shard: &mut MutexGuard<'_, Topics>,
        found: Found,
        is_linked: bool,
        items: &mut Vec<(Position, Arc<str>, Item)>,
    ) -> bool {
        let Found { hole, log, judged, streams, .. } = found;
        let track =
            shard.get_mut(&Name(hole.topic.as_bytes())).and_then(|state| state.track.as_mut());
        let Some(track) = track else { return false };
        let filled = track.reader.fill(hole.from, judged, &log, is_linked);
        let Some(Filled { lost, entries, held, whole }) = filled else { return false };
        let topic = hole.topic;
        if let Some((lost, position)) = lost {
            self.broken.note(&topic, lost);
            // Before all entries: whoever got those only would go on behind what is missing.
            items.push((Position::START, Arc::clone(&topic), Item::Lost(lost, position, streams)));
        }
        if entries {
            self.counters.healed_messages.add(log.entries.len() as u64);
            let item = |entry: Entry| (entry.id, Arc::clone(&topic), Item::Entry(entry));
            items.extend(log.entries.into_iter().map(item));
        }
        for (id, stored, is_new) in held {
            let audience = if is_new { Audience::All } else { Audience::Gated };
            items.push((id, Arc::clone(&topic), Item::Held(id, stored, audience)));
        }
        self.counters.healed.add(u64::from(whole));
        whole
    }

    fn deliver_item(
        &self,
        shard: &mut MutexGuard<'_, Topics>,
        topic: &str,
        item: &Item,
        round: &mut Round,
    ) {
        let Some(state) = shard.get_mut(&Name(topic.as_bytes())) else { return };
        match item {
            Item::Lost(lost, position, streams) => {
                let told = round.lose(state.subscribers.iter(), (*lost, *position), streams, self);
                self.counters.history_lost[*lost as usize].add(told);
            }
            Item::Entry(entry) => {
                let carries_id = entry.event_id.is_some();
                let is_private = state.track.as_ref().is_some_and(|track| track.is_private);
                let Entry { id, prev, ref data, .. } = *entry;
                let message = Message { id: Some(id), prev, carries_id, is_private, payload: data };
                self.deliver_one(state, Audience::All, message, round);
            }
            Item::Held(id, stored, audience) => {
                self.deliver_one(state, *audience, stored.message(*id), round);
            }
        }
    }

    fn deliver_one(
        &self,
        state: &mut State,
        audience: Audience,
        message: Message<'_>,
        round: &mut Round,
    ) {
        // Where the message was meanwhile is not known.
        round.deliver(state, audience, &mut Fanout::new(message), self, Micros::UNTIMED);
    }
}

/// Reads what the logs of holes hold; those that cannot be read are tried again later.
async fn read_all(hub: &Hub, store: &Store, holes: Vec<Hole>, bytes_max: usize) -> Vec<Found> {
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

impl Hole {
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

/// A log that is lost begins where it ends now, with its session's token streams as they stand then.
async fn begin_anew(store: &Store, hole: Hole, lost: Lost) -> Result<Found, StoreError> {
    let session = hole.histories.names.session_of_down(&hole.topic);
    let (mut page, streams) = store.snapshot(hole.snapshot_of(None, session)).await?;
    let log = page.logs.pop().unwrap_or_default();
    Ok(Found { hole, log, moment: page.moment, judged: Err(lost), streams })
}

/// A key that holds something else is no log: waiting for it would stall all logs that share its order.
async fn read_or_lose(hub: &Hub, store: &Store, hole: Hole) -> Result<Found, StoreError> {
    match read(hub, store, &hole).await {
        Ok((Ok(log), moment)) => {
            Ok(Found { hole, log, moment, judged: Ok(()), streams: Vec::new() })
        }
        Ok((Err(lost), _)) => begin_anew(store, hole, lost).await,
        Err(StoreError::NotDone { refusal: NotDone::WrongType, error }) => {
            if let Some(left_out) = ODD_KEYS.pass() {
                let log = &*hole.log;
                warn!(log, %error, left_out, "The key of a history holds something else.");
            }
            let (log, moment) = (Log::default(), (u64::MAX, u64::MAX));
            Ok(Found { hole, log, moment, judged: Err(Lost::Unknown), streams: Vec::new() })
        }
        Err(error) => Err(error),
    }
}

/// A log and the moment up to which it is complete.
type Whole = (Result<Log, Lost>, (u64, u64));

async fn read(hub: &Hub, store: &Store, hole: &Hole) -> Result<Whole, StoreError> {
    let ttl_ms = u64::try_from(hole.histories.limits.ttl.as_millis()).unwrap_or(u64::MAX);
    let (mut pages, mut behind, mut moment) = (Pages::default(), hole.from, None);
    loop {
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

/// How often the heads of logs that are read here are renewed; they live for an hour at least.
const KEEP_HEADS_EVERY: Duration = Duration::from_secs(900);

/// So many heads are renewed at a time.
const KEPT_AT_ONCE: usize = 1024;
