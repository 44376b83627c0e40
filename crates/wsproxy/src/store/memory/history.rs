//! Histories in the embedded store: the same bounds, links and answers as the scripts on Redis give.

use std::collections::VecDeque;

use bytes::Bytes;
use wsproxy_proto::history::{After, Entry, Log, Position, Snapshot};

use crate::{
    bus::{History, HistoryLimits},
    store::{
        PAGE_BYTES_MAX, SCAN_MAX, STREAMS_BYTES_MAX, SnapshotOf, StoreError, StreamState,
        memory::{BYTES_MAX, ENTRY_BYTES, Held, MemoryStore, State, Value, expiry, wrong_kind},
    },
};

/// The log of a channel.
#[derive(Default)]
pub(super) struct HistoryLog {
    entries: VecDeque<Entry>,
    /// Of data alone.
    bytes: u64,
    /// What all entries take up, roughly.
    weight: usize,
}

/// What became of a message that was appended.
pub(crate) struct Appended {
    /// Its id.
    pub(crate) id: Position,
    /// The id before it; `None`: it was there already, and nothing has happened.
    pub(crate) prev: Option<Position>,
}

impl MemoryStore {
    /// Appends a message to a history, unless that was done before.
    pub(crate) fn append_history(
        &self,
        history: &History,
        data: Bytes,
    ) -> Result<Appended, StoreError> {
        let mut state = self.state.lock();
        if let Some((key, _)) = &history.dedup {
            match state.live(key) {
                None => {}
                Some(Value::Plain(id)) => {
                    let id = Position::parse(id).ok_or_else(wrong_kind)?;
                    return Ok(Appended { id, prev: None });
                }
                Some(_) => return Err(wrong_kind()),
            }
        }
        let event_id = history.event_id.as_deref();
        let (id, prev) = state.append(&history.log, event_id, data, history.limits)?;
        if let Some((key, ttl)) = &history.dedup {
            state.save(key, id.to_string().as_bytes(), *ttl)?;
        }
        Ok(Appended { id, prev: Some(prev) })
    }

    pub(in crate::store) fn snapshot(
        &self,
        of: &SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        let mut state = self.state.lock();
        state.purge();
        let held = of.logs.iter().map(|key| state.history(key)).collect::<Result<Vec<_>, _>>()?;
        let after = match &of.after {
            None => None,
            Some(After::Position(after)) => Some(*after),
            Some(After::Event(id)) => held.iter().flatten().filter_map(|log| log.find(id)).max(),
        };
        let nothing = || Log { complete: true, ..Log::default() };
        let read = |log: &HistoryLog| log.read(after, of.entries_max);
        let logs = held.into_iter().map(|log| log.map_or_else(nothing, read)).collect();
        let now_ms = state.now_ms();
        let streams = match &of.streams_of {
            None => Vec::new(),
            Some(session) => state.streams(&self.names, session, STREAMS_BYTES_MAX)?,
        };
        Ok((Snapshot { now_ms, epoch_ms: state.epoch_ms, after, logs }, streams))
    }
}

impl State {
    fn history(&self, key: &str) -> Result<Option<&HistoryLog>, StoreError> {
        match self.held(key) {
            None => Ok(None),
            Some(Value::History(log)) => Ok(Some(log)),
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Appends to a log; answers the id and the one before it.
    pub(super) fn append(
        &mut self,
        key: &str,
        event_id: Option<&str>,
        data: Bytes,
        limits: HistoryLimits,
    ) -> Result<(Position, Position), StoreError> {
        let now = self.purge();
        self.history(key)?;
        if self.bytes + key.len() + data.len() + 2 * ENTRY_BYTES > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let id = self.next_position();
        let (key, mut held) = self.remove(key).unwrap_or_else(|| {
            let value = Value::History(HistoryLog::default());
            (key.into(), Held { value, bytes: 0, expires: now })
        });
        let mut prev = Position::START;
        if let Value::History(log) = &mut held.value {
            prev = log.entries.back().map_or(Position::START, |entry| entry.id);
            log.push(Entry { id, prev, event_id: event_id.map(Into::into), data }, limits);
            held.bytes = key.len() + ENTRY_BYTES + log.weight;
        }
        held.expires = expiry(now, limits.ttl);
        self.insert(key, held);
        Ok((id, prev))
    }
}

impl HistoryLog {
    fn push(&mut self, entry: Entry, limits: HistoryLimits) {
        let bytes = entry.data.len() as u64;
        let ttl_ms = u64::try_from(limits.ttl.as_millis()).unwrap_or(u64::MAX);
        let oldest_ms = entry.id.milliseconds.saturating_sub(ttl_ms);
        while let Some(first) = self.entries.front()
            && (self.entries.len() as u64 >= limits.entries_max
                || self.bytes + bytes > limits.bytes_max
                || first.id.milliseconds < oldest_ms)
        {
            self.bytes -= first.data.len() as u64;
            self.weight -= weight(first);
            self.entries.pop_front();
        }
        self.bytes += bytes;
        self.weight += weight(&entry);
        self.entries.push_back(entry);
    }

    fn find(&self, event_id: &str) -> Option<Position> {
        let entries = self.entries.iter().rev().take(SCAN_MAX);
        let mut found = entries.filter(|entry| entry.event_id.as_deref() == Some(event_id));
        Some(found.next()?.id)
    }

    fn read(&self, after: Option<Position>, entries_max: usize) -> Log {
        let mut log = Log {
            last: self.entries.back().map(|entry| entry.id),
            first: self.entries.front().map(|entry| (entry.id, entry.prev)),
            entries: Vec::new(),
            complete: true,
        };
        let Some(after) = after else { return log };
        let mut bytes = 0;
        for entry in self.entries.range(self.entries.partition_point(|entry| entry.id <= after)..) {
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

fn weight(entry: &Entry) -> usize {
    entry.data.len() + entry.event_id.as_ref().map_or(0, |id| id.len()) + ENTRY_BYTES
}
