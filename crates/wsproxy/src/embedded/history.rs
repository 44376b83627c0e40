//! Histories in the embedded store, with the bounds, positions and answers of the scripts on Redis.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use hashbrown::HashMap;
use tokio::time::Instant;
use wsproxy_proto::{
    history::{After, Entry, Log, Position, Resolved, Snapshot},
    names::Names,
};

use wsproxy_proto::history::HistoryLimits;

use crate::{
    bus::publish::History,
    embedded::store::{
        ENTRY_BYTES, EmbeddedStore, Held, StoreState, StoredValue, expiry, wrong_kind,
    },
    store::{
        command::{PAGE_BYTES_MAX, STREAMS_BYTES_MAX, SnapshotOf, StoreError},
        token_streams::StreamState,
    },
};

/// The log of a channel. It outlives its entries, as the head of a log on Redis does.
pub(super) struct HistoryLog {
    entries: VecDeque<Entry>,
    /// Position of the last entry of its life, even a removed one, or the position where its life began.
    head: Position,
    /// Set if no entry of its life was removed.
    is_from_start: bool,
    /// Expiry of the entries; that of the head is `head_until`.
    until: Instant,
    head_until: Instant,
    /// Bytes of data only.
    bytes: u64,
    /// Estimate of the memory of all entries.
    weight: usize,
}

/// Positions of the workers' event ids; `None` if several messages have the same one.
///
/// Ids are in two generations: when the new one is full, it replaces the old one.
#[derive(Default)]
pub(super) struct Index {
    new: HashMap<Box<str>, Option<Position>>,
    old: HashMap<Box<str>, Option<Position>>,
}

/// Result of appending a message.
pub(crate) struct Appended {
    /// Position of the message.
    pub(crate) id: Position,
    /// The position before; `None`: the message was there already, and was not appended.
    pub(crate) prev: Option<Position>,
}

impl EmbeddedStore {
    /// Appends a message to a history, unless it is there already.
    pub(crate) fn append_history(
        &self,
        history: &History,
        data: Bytes,
    ) -> Result<Appended, StoreError> {
        let mut state = self.state.lock();
        if let Some((key, _)) = &history.dedup {
            match state.live(key) {
                None => {}
                Some(StoredValue::Plain(id)) => {
                    let id = Position::parse(id).ok_or_else(wrong_kind)?;
                    return Ok(Appended { id, prev: None });
                }
                Some(_) => return Err(wrong_kind()),
            }
        }
        let event_id = history.event_id.as_deref();
        let ids = index_of(&history.log);
        if let (true, Some(event_id)) = (history.unique, event_id) {
            state.purge();
            if let Some(known) = state.find(&ids, event_id)? {
                return Ok(Appended { id: known.unwrap_or_default(), prev: None });
            }
        }
        let wants_ack = memchr::memmem::find(&data, br#""ack""#).is_some();
        let (id, prev) = state.append(&history.log, event_id, data, history.limits)?;
        if let Some((key, ttl)) = &history.dedup {
            state.save(key, id.to_string().as_bytes(), *ttl)?;
        }
        let is_private = is_private(&history.log);
        let ids_max = if is_private { PRIVATE_IDS_MAX } else { history.limits.entries_max };
        if let Some(event_id) = event_id {
            state.remember(&ids, event_id, id, ids_max, history.limits.ttl)?;
        } else if is_private && wants_ack {
            state.remember(&ids, &id.to_string(), id, ids_max, history.limits.ttl)?;
        }
        Ok(Appended { id, prev: Some(prev) })
    }

    pub(crate) fn snapshot(
        &self,
        of: &SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        let mut state = self.state.lock();
        state.purge();
        let (after, known) = state.resolve(of)?;
        let position = match after {
            Resolved::At(position) => Some(position),
            Resolved::Nothing | Resolved::Ambiguous => None,
        };
        let mut logs = Vec::with_capacity(of.logs.len());
        for key in &of.logs {
            let is_private = is_private(key);
            let head_ttl = of.head_ttl.filter(|_| !is_private);
            let is_new = match head_ttl {
                Some(ttl) => state.make_head(key, ttl)?,
                None => false,
            };
            let log = state.history(key)?;
            let read = log.map(|log| log.read(position, of.entries_max));
            let nothing = || Log { complete: true, is_from_start: true, ..Log::default() };
            logs.push(Log { is_new, is_private, ..read.unwrap_or_else(nothing) });
        }
        let streams = match &of.streams_of {
            None => Vec::new(),
            Some(session) => state.streams(&self.names, session, STREAMS_BYTES_MAX)?,
        };
        let moment = state.last_position.id();
        Ok((Snapshot { now_ms: state.now_ms(), moment, after, known, logs }, streams))
    }

    pub(crate) fn keep_heads(&self, logs: &[Arc<str>], ttl: Duration) -> Vec<bool> {
        let mut state = self.state.lock();
        let now = state.purge();
        let expires = expiry(now, ttl);
        let mut keep = |log: &Arc<str>| match state.remove(log) {
            Some((key, mut held)) => {
                held.prolong(expires);
                state.insert(key, held);
                true
            }
            None => false,
        };
        logs.iter().map(&mut keep).collect()
    }
}

impl StoreState {
    fn history(&self, key: &str) -> Result<Option<&HistoryLog>, StoreError> {
        match self.held(key) {
            None => Ok(None),
            Some(StoredValue::History(log)) => Ok(Some(log)),
            Some(_) => Err(wrong_kind()),
        }
    }

    fn find(&self, ids: &str, event_id: &str) -> Result<Option<Option<Position>>, StoreError> {
        match self.held(ids) {
            None => Ok(None),
            Some(StoredValue::Ids(index)) => Ok(index.find(event_id)),
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Returns the position after which a client continues, and whether it is one of a message to a single connection.
    fn resolve(&self, of: &SnapshotOf) -> Result<(Resolved, bool), StoreError> {
        let private = of
            .clock
            .as_ref()
            .map(|clock| format!("{}connection:ids", clock.strip_suffix("clock").unwrap_or(clock)));
        let find_private = |text: &str| match &private {
            Some(ids) => self.find(ids, text),
            None => Ok(None),
        };
        match &of.after {
            None => Ok((Resolved::Nothing, false)),
            Some(After::Position(after)) => {
                let known = find_private(&after.to_string())?.is_some();
                Ok((Resolved::At(*after), known))
            }
            Some(After::Event(event_id)) => {
                let mut found = Vec::new();
                for log in &of.logs {
                    found.extend(self.find(&Names::event_ids(log), event_id)?);
                }
                let private = find_private(event_id)?;
                found.extend(private);
                let resolved = match found[..] {
                    [] => Resolved::Nothing,
                    [Some(position)] => Resolved::At(position),
                    _ => Resolved::Ambiguous,
                };
                Ok((resolved, private.is_some()))
            }
        }
    }

    fn remember(
        &mut self,
        ids: &str,
        event_id: &str,
        position: Position,
        ids_max: u64,
        ttl: Duration,
    ) -> Result<(), StoreError> {
        if !matches!(self.held(ids), None | Some(StoredValue::Ids(_))) {
            return Err(wrong_kind());
        }
        let now = Instant::now();
        let (key, mut held) = self.remove(ids).unwrap_or_else(|| {
            let value = StoredValue::Ids(Box::default());
            (ids.into(), Held { value, bytes: 0, expires: now })
        });
        if let StoredValue::Ids(index) = &mut held.value {
            index.remember(event_id, position, ids_max);
            held.bytes = key.len() + ENTRY_BYTES * (1 + index.new.len() + index.old.len());
        }
        held.expires = expiry(now, ttl);
        self.insert(key, held);
        Ok(())
    }

    /// Gives a log a head, or renews its time to live; returns whether there was none.
    fn make_head(&mut self, key: &str, ttl: Duration) -> Result<bool, StoreError> {
        let now = Instant::now();
        if self.history(key)?.is_some() {
            if let Some((key, mut held)) = self.remove(key) {
                held.prolong(expiry(now, ttl));
                self.insert(key, held);
            }
            return Ok(false);
        }
        let head = Position { milliseconds: 1, sequence: 0, tag: self.next_tag() };
        let bytes = key.len() + ENTRY_BYTES;
        self.check_log_room(bytes)?;
        let value = StoredValue::History(HistoryLog::new(head, now));
        let mut held = Held { value, bytes, expires: now };
        held.prolong(expiry(now, ttl));
        self.insert(key.into(), held);
        Ok(true)
    }

    /// Appends to a log; returns the position and the one before it.
    pub(super) fn append(
        &mut self,
        key: &str,
        event_id: Option<&str>,
        data: Bytes,
        limits: HistoryLimits,
    ) -> Result<(Position, Position), StoreError> {
        let now = self.purge();
        self.history(key)?;
        self.check_log_room(key.len() + data.len() + 2 * ENTRY_BYTES)?;
        let (milliseconds, sequence) = self.next_id();
        let id = Position { milliseconds, sequence, tag: self.next_tag() };
        let (key, mut held) = self.remove(key).unwrap_or_else(|| {
            let value = StoredValue::History(HistoryLog::new(Position::START, now));
            (key.into(), Held { value, bytes: 0, expires: now })
        });
        let mut prev = Position::START;
        if let StoredValue::History(log) = &mut held.value {
            prev = log.head;
            log.push(Entry { id, prev, event_id: event_id.map(Into::into), data }, limits);
            log.until = expiry(now, limits.ttl);
            held.bytes = key.len() + ENTRY_BYTES + log.weight;
        }
        held.prolong(expiry(now, limits.head_ttl()));
        self.insert(key, held);
        Ok((id, prev))
    }

    fn next_tag(&mut self) -> u32 {
        self.tags += 1;
        // The upper half of a keyed hash, so that another run of this process has other tags.
        (self.hasher.hash_one(self.tags) >> 32) as u32
    }
}

impl Held {
    /// Extends the life of the head. A log with entries expires with these first, a log without entries with its head.
    fn prolong(&mut self, head_until: Instant) {
        if let StoredValue::History(log) = &mut self.value {
            log.head_until = log.head_until.max(head_until);
            self.expires = if log.entries.is_empty() { log.head_until } else { log.until };
        }
    }
}

impl Index {
    fn find(&self, event_id: &str) -> Option<Option<Position>> {
        self.new.get(event_id).or_else(|| self.old.get(event_id)).copied()
    }

    fn remember(&mut self, event_id: &str, position: Position, ids_max: u64) {
        let is_used = self.find(event_id).is_some();
        self.new.insert(event_id.into(), (!is_used).then_some(position));
        if self.new.len() as u64 >= ids_max {
            self.old = std::mem::take(&mut self.new);
        }
    }
}

impl HistoryLog {
    fn new(head: Position, now: Instant) -> Self {
        let (entries, until, head_until) = (VecDeque::new(), now, now);
        Self { entries, head, is_from_start: true, until, head_until, bytes: 0, weight: 0 }
    }

    /// Removes the entries. Returns the weight of the head and its expiry; `None` if the head has expired too.
    pub(super) fn expire(&mut self, now: Instant) -> Option<(usize, Instant)> {
        self.is_from_start &= self.entries.is_empty();
        self.entries = VecDeque::new();
        (self.bytes, self.weight) = (0, 0);
        (now < self.head_until).then_some((ENTRY_BYTES, self.head_until))
    }

    fn push(&mut self, entry: Entry, limits: HistoryLimits) {
        let bytes = entry.data.len() as u64 + 1;
        let ttl_ms = u64::try_from(limits.ttl.as_millis()).unwrap_or(u64::MAX);
        let oldest_ms = entry.id.milliseconds.saturating_sub(ttl_ms);
        while let Some(first) = self.entries.front()
            && (self.entries.len() as u64 >= limits.entries_max
                || self.bytes + bytes > limits.bytes_max
                || first.id.milliseconds < oldest_ms)
        {
            self.bytes -= first.data.len() as u64 + 1;
            self.weight -= weight(first);
            self.entries.pop_front();
            self.is_from_start = false;
        }
        self.bytes += bytes;
        self.weight += weight(&entry);
        self.head = entry.id;
        self.entries.push_back(entry);
    }

    fn read(&self, after: Option<Position>, entries_max: usize) -> Log {
        let mut log = Log {
            head: Some(self.head),
            is_from_start: self.is_from_start,
            complete: true,
            ..Log::default()
        };
        let Some(after) = after else { return log };
        let mut bytes = 0;
        let from = self.entries.partition_point(|entry| !after.is_before(entry.id));
        for entry in self.entries.range(from..) {
            bytes += entry.data.len();
            let is_over = log.entries.len() >= entries_max || bytes > PAGE_BYTES_MAX;
            if is_over && !log.entries.is_empty() {
                log.complete = false;
                break;
            }
            log.entries.push(entry.clone());
        }
        log
    }
}

/// Returns the key of a log's index of event ids. Logs of single connections share one, since a reconnecting client has
/// another connection.
fn index_of(log: &str) -> String {
    match log.split_once("}:connection:") {
        Some((begin, _)) => format!("{begin}}}:connection:ids"),
        None => Names::event_ids(log),
    }
}

/// Returns whether a log is one of a single connection. A reconnecting client has another connection, hence another
/// log.
fn is_private(log: &str) -> bool {
    log.contains("}:connection:")
}

fn weight(entry: &Entry) -> usize {
    entry.data.len() + entry.event_id.as_ref().map_or(0, |id| id.len()) + ENTRY_BYTES
}

/// The hasher that gives tags.
pub(super) type Hasher = RandomState;

/// Upper bound of one generation of event ids of messages to single connections.
const PRIVATE_IDS_MAX: u64 = 50_000;
