//! Histories in the embedded store, with the semantics of the scripts that Redis runs.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use wsproxy_proto::history::{After, Entry as HistoryEntry, Envelope, Log, Position, Snapshot};

use crate::{
    bus::History,
    store::{
        SnapshotOf, StoreError, StreamState,
        memory::{
            BYTES_MAX, ENTRY_BYTES, Entry, MemoryStore, State, Value, expiry, now_ms, wrong_kind,
        },
    },
};

/// What became of a message that was to be appended.
pub(crate) enum Appended {
    /// It was appended before.
    Duplicate(Position),
    /// It is in the log.
    New {
        /// Its id.
        id: Position,
        /// As it goes over the channel.
        message: Vec<u8>,
    },
}

impl MemoryStore {
    /// Appends a message to a history, within its bounds.
    pub(crate) fn append_history(
        &self,
        history: &History,
        payload: &Bytes,
    ) -> Result<Appended, StoreError> {
        let mut state = self.state.lock();
        if let Some((key, _)) = &history.dedup
            && let Some(Value::Plain(first)) = state.live(key)
            && let Some(id) = Position::parse(first)
        {
            return Ok(Appended::Duplicate(id));
        }
        let appended = state.append_history(history, payload)?;
        if let (Some((key, ttl)), Appended::New { id, .. }) = (&history.dedup, &appended) {
            let now = state.purge();
            let value = Bytes::from(id.to_string());
            let bytes = key.len() + value.len() + ENTRY_BYTES;
            state.remove(key);
            let entry = Entry { value: Value::Plain(value), bytes, expires: expiry(now, *ttl) };
            state.insert(Arc::clone(key), entry);
        }
        Ok(appended)
    }

    pub(in crate::store) fn snapshot(
        &self,
        of: &SnapshotOf,
    ) -> Result<(Snapshot, Vec<StreamState>), StoreError> {
        let mut state = self.state.lock();
        let after = match &of.after {
            None => None,
            Some(After::Position(position)) => Some(*position),
            Some(After::Event(event_id)) => {
                let mut found = None;
                for key in &of.logs {
                    let log = state.history(key)?.into_iter().flatten().rev();
                    let is_it = |entry: &&HistoryEntry| entry.event_id.as_ref() == Some(event_id);
                    found = found.max(log.clone().find(is_it).map(|entry| entry.id));
                }
                found
            }
        };
        let logs = of.logs.iter().map(|key| {
            let history = state.history(key)?;
            Ok(history.map_or_else(
                || Log { complete: true, ..Log::default() },
                |entries| log(entries, after, of.entries_max),
            ))
        });
        let logs = logs.collect::<Result<_, StoreError>>()?;
        let streams = match &of.streams_of {
            Some(session) => state.streams(&self.names.session_streams(session))?,
            None => Vec::new(),
        };
        let snapshot = Snapshot { now_ms: now_ms(), epoch_ms: state.epoch_ms, after, logs };
        Ok((snapshot, streams))
    }
}

impl State {
    fn history(&mut self, key: &str) -> Result<Option<&VecDeque<HistoryEntry>>, StoreError> {
        match self.live(key) {
            None => Ok(None),
            Some(Value::History(entries)) => Ok(Some(entries)),
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Appends, makes room, and answers what goes over the channel.
    pub(super) fn append_history(
        &mut self,
        history: &History,
        payload: &Bytes,
    ) -> Result<Appended, StoreError> {
        let now = self.purge();
        self.history(&history.log)?;
        if self.bytes + history.log.len() + payload.len() + 2 * ENTRY_BYTES > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let id = self.next_position();
        let (key, mut entry) = self.remove(&history.log).unwrap_or_else(|| {
            let bytes = history.log.len() + ENTRY_BYTES;
            let value = Value::History(VecDeque::new());
            (Arc::clone(&history.log), Entry { value, bytes, expires: now })
        });
        let mut prev = Position::START;
        if let Value::History(entries) = &mut entry.value {
            prev = entries.back().map_or(prev, |last| last.id);
            let event_id = history.event_id.clone();
            entries.push_back(HistoryEntry { id, prev, event_id, data: payload.clone() });
            entry.bytes += payload.len() + ENTRY_BYTES;
            entry.bytes -= make_room(entries, history);
        }
        entry.expires = expiry(now, history.limits.ttl);
        self.insert(key, entry);
        let event_id = history.event_id.as_deref();
        let message = Envelope { id, prev, event_id, payload }.encode();
        Ok(Appended::New { id, message })
    }
}

/// Removes the oldest entries beyond the bounds, never the newest. Answers what they weighed.
fn make_room(entries: &mut VecDeque<HistoryEntry>, history: &History) -> usize {
    let limits = &history.limits;
    let ttl_ms = u64::try_from(limits.ttl.as_millis()).unwrap_or(u64::MAX);
    let oldest_ms = now_ms().saturating_sub(ttl_ms);
    let mut bytes: u64 = entries.iter().map(|entry| entry.data.len() as u64).sum();
    let mut freed = 0;
    while entries.len() > 1 {
        let too_many = entries.len() as u64 > limits.entries_max || bytes > limits.bytes_max;
        let too_old = entries.front().is_some_and(|entry| entry.id.milliseconds < oldest_ms);
        if !too_many && !too_old {
            break;
        }
        let removed = entries.pop_front().map_or(0, |entry| entry.data.len());
        bytes -= removed as u64;
        freed += removed + ENTRY_BYTES;
    }
    freed
}

fn log(entries: &VecDeque<HistoryEntry>, after: Option<Position>, entries_max: usize) -> Log {
    let mut log = Log {
        last: entries.back().map(|entry| entry.id),
        first: entries.front().map(|entry| (entry.id, entry.prev)),
        entries: Vec::new(),
        complete: true,
    };
    if let Some(after) = after {
        let from = entries.partition_point(|entry| entry.id <= after);
        log.entries = entries.range(from..).take(entries_max).cloned().collect();
        log.complete = from + log.entries.len() == entries.len();
    }
    log
}
