//! Fills the holes that losses of the bus leave in histories, once for all clients of a topic.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use wsproxy_conn::clock;
use wsproxy_proto::history::{After, Log, Lost, Position, reader::Filled, rule};

use crate::{
    bus::not_done::NotDone,
    hub::{
        Histories, Hub, Name, State, Topics,
        audience::{Audience, Round},
        message::{Fanout, Message, Stored},
        replay::{PAGE_ENTRIES, merge},
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
    since: u64,
}

/// What is held of its log.
struct Found {
    hole: Hole,
    log: Log,
    /// The store's clock when the first and the last page were read.
    first_ms: u64,
    now_ms: u64,
    judged: Result<(), Lost>,
    /// What clients are shown where it is lost.
    streams: Vec<StreamState>,
}

/// What a topic's clients get, in the shared order.
enum Item {
    Lost(Lost, Position, Vec<StreamState>),
    Entry(wsproxy_proto::history::Entry),
    Held(Position, Stored, Audience),
}

/// Serves until `end`.
pub async fn run(hub: Arc<Hub>, store: Store, epoch: Arc<str>, end: CancellationToken) {
    loop {
        // At the start, and whenever the bus is back: an emptied store must be known as such.
        tokio::select! {
            () = mark_epoch(&store, &epoch) => {}
            () = end.cancelled() => return,
        }
        tokio::select! {
            () = hub.holes.notified() => {}
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
                let Some((from, since)) = track.reader.hole() else { continue };
                holes.push(Hole {
                    topic: Arc::clone(&topic.0),
                    log: Arc::clone(&track.log),
                    histories: Arc::clone(&track.histories),
                    from,
                    since,
                });
            }
        }
        holes
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
            for found in read_all(store, batch, usize::MAX).await {
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
        let mut found = read_all(store, holes, TOGETHER_BYTES_MAX).await;
        if self.links_lost() != links {
            return 0; // some were read from another store than others, perhaps
        }
        // They were not read at one moment: what is older than the first of these is complete in all.
        let first_ms = found.iter().map(|found| found.first_ms).min().unwrap_or_default();
        let limit = Position { milliseconds: first_ms, sequence: 0 };
        found.iter_mut().for_each(|found| found.log.cut(limit));
        let mut shards = self.lock_all();
        let mut joins = found.len() == wanted && self.outage() == outage;
        for Found { hole, log, now_ms, judged, .. } in &found {
            let shard = &shards[self.shard_number(hole.topic.as_bytes())];
            let track = shard.get(&Name(hole.topic.as_bytes())).and_then(|s| s.track.as_ref());
            joins &= track.is_none_or(|track| track.reader.joins(hole.from, *judged, log, *now_ms));
        }
        let mut items = Vec::new();
        let mut whole = 0;
        for found in found {
            let number = self.shard_number(found.hole.topic.as_bytes());
            let shard = &mut shards[number];
            whole += usize::from(self.fill_one(shard, found, joins, &mut items));
        }
        items.sort_by_key(|(id, ..)| *id);
        let mut round = Round::default();
        for (_, topic, item) in items {
            let number = self.shard_number(topic.as_bytes());
            self.deliver_item(&mut shards[number], &topic, &item, &mut round);
        }
        drop(shards);
        round.flush(clock::now());
        whole
    }

    /// Fills one hole; what is to be delivered goes to `items`.
    fn fill_one(
        &self,
        shard: &mut MutexGuard<'_, Topics>,
        found: Found,
        is_linked: bool,
        items: &mut Vec<(Position, Arc<str>, Item)>,
    ) -> bool {
        let Found { hole, log, now_ms, judged, streams, .. } = found;
        let track =
            shard.get_mut(&Name(hole.topic.as_bytes())).and_then(|state| state.track.as_mut());
        let Some(track) = track else { return false };
        let filled = track.reader.fill(hole.from, judged, &log, now_ms, is_linked);
        let Some(Filled { lost, entries, held, whole }) = filled else { return false };
        let topic = hole.topic;
        if let Some((lost, position)) = lost {
            self.broken.note(&topic, lost);
            // Before all entries: whoever got those only would go on behind what is missing.
            items.push((Position::START, Arc::clone(&topic), Item::Lost(lost, position, streams)));
        }
        if entries {
            self.counters.healed_messages.add(log.entries.len() as u64);
            let item = |entry: wsproxy_proto::history::Entry| {
                (entry.id, Arc::clone(&topic), Item::Entry(entry))
            };
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
                let told = round.lose(&state.subscribers, (*lost, *position), streams, self);
                self.counters.history_lost[*lost as usize].add(told);
            }
            Item::Entry(entry) => {
                let carries_id = entry.event_id.is_some();
                let is_private = state.track.as_ref().is_some_and(|track| track.is_private);
                let message =
                    Message { id: Some(entry.id), carries_id, is_private, payload: &entry.data };
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
        round.deliver(state, audience, &mut Fanout::new(message), self, clock::now());
    }
}

/// Makes the store remember since when it is known.
async fn mark_epoch(store: &Store, epoch: &Arc<str>) {
    while let Err(error) = store.snapshot(clock_of(epoch)).await {
        debug!(%error, "The store cannot be asked since when it is known.");
        tokio::time::sleep(AGAIN).await;
    }
}

/// Asks for nothing but the store's clock and epoch.
fn clock_of(epoch: &Arc<str>) -> SnapshotOf {
    SnapshotOf {
        logs: Vec::new(),
        epoch: Arc::clone(epoch),
        after: None,
        entries_max: 1,
        streams_of: None,
    }
}

/// Reads what the logs of holes hold; those that cannot be read are tried again later.
async fn read_all(store: &Store, holes: Vec<Hole>, bytes_max: usize) -> Vec<Found> {
    let reads = holes.into_iter().map(|hole| read_or_lose(store, hole));
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

/// A log that is lost begins where it ends now, with its session's token streams as they stand then.
async fn begin_anew(store: &Store, mut found: Found) -> Result<Found, StoreError> {
    let Hole { topic, log, histories, .. } = &found.hole;
    let of = SnapshotOf {
        logs: vec![Arc::clone(log)],
        epoch: Arc::clone(&histories.epoch),
        after: None,
        entries_max: 1,
        streams_of: histories.names.session_of_down(topic),
    };
    let (mut page, streams) = store.snapshot(of).await?;
    found.log = page.logs.pop().unwrap_or_default();
    (found.now_ms, found.streams) = (page.now_ms, streams);
    Ok(found)
}

/// A key that holds something else is no log: waiting for it would stall all logs that share its order.
async fn read_or_lose(store: &Store, hole: Hole) -> Result<Found, StoreError> {
    match read(store, &hole).await {
        Ok((log, first_ms, now_ms, judged)) => {
            let streams = Vec::new();
            let found = Found { hole, log, first_ms, now_ms, judged, streams };
            if judged.is_ok() { Ok(found) } else { begin_anew(store, found).await }
        }
        Err(StoreError::NotDone { refusal: NotDone::WrongType, error }) => {
            if let Some(left_out) = ODD_KEYS.pass() {
                let log = &*hole.log;
                warn!(log, %error, left_out, "The key of a history holds something else.");
            }
            let (clock, _) = store.snapshot(clock_of(&hole.histories.epoch)).await?;
            let (log, now_ms) = (Log::default(), clock.now_ms);
            let (judged, streams) = (Err(Lost::Unknown), Vec::new());
            Ok(Found { hole, log, first_ms: now_ms, now_ms, judged, streams })
        }
        Err(error) => Err(error),
    }
}

/// A log, the store's clock when its first and its last page were read, and how it is judged.
type Pages = (Log, u64, u64, Result<(), Lost>);

async fn read(store: &Store, hole: &Hole) -> Result<Pages, StoreError> {
    let mut chain = [Log::default()];
    let mut first_ms = None;
    loop {
        let behind = chain[0].entries.last().map_or(hole.from, |entry| entry.id);
        let of = SnapshotOf {
            logs: vec![Arc::clone(&hole.log)],
            epoch: Arc::clone(&hole.histories.epoch),
            after: Some(After::Position(behind)),
            entries_max: PAGE_ENTRIES,
            streams_of: None,
        };
        let (mut page, _) = store.snapshot(of).await?;
        let now_ms = page.now_ms;
        let first_ms = *first_ms.get_or_insert(now_ms);
        // Every page is a healing of its own: time passes between them.
        let gap_ms = clock::now().since(clock::Micros(hole.since)).0.div_ceil(1000);
        let (retention, clocks) = (hole.histories.limits.retention_ms(), (now_ms, page.epoch_ms));
        let log = page.logs.first().ok_or(Lost::Unknown);
        let mut judged = log.and_then(|log| rule::heal(behind, gap_ms, retention, clocks, log));
        let further = merge(&mut page.logs, &mut chain);
        if !chain[0].is_chain() {
            judged = judged.and(Err(Lost::Trimmed));
        }
        if further.is_none() || judged.is_err() {
            let [log] = chain;
            return Ok((log, first_ms, now_ms, judged));
        }
    }
}
