//! The embedded store: a map with expiry and a bound; knows nothing of channels.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::Instant;

use wsproxy_proto::{
    history::{Entry as HistoryEntry, Position},
    names::Names,
};

use crate::{
    bus::memory::Work,
    bus::queue::Queue,
    store::{LogEntry, StoreError, memory::streams::Stream},
};

mod history;
mod streams;

pub(crate) use history::Appended;

/// Keys and logs of this process. Clones share one state.
///
/// Invariant: never holds more than `BYTES_MAX`, estimated; what does not fit is refused, since to evict
/// somebody's token silently would be worse.
#[derive(Clone)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    /// What publishes has to be done by the one who delivers, so that both have one order.
    work: Arc<Queue<Work>>,
    names: Names,
}

#[derive(Default)]
struct State {
    entries: HashMap<Arc<str>, Entry>,
    /// The same keys by their end, so that expired ones are found without a search.
    by_expiry: BTreeSet<(Instant, Arc<str>)>,
    bytes: usize,
    last_position: Position,
    /// When this store began.
    epoch_ms: u64,
}

struct Entry {
    value: Value,
    bytes: usize,
    expires: Instant,
}

enum Value {
    Plain(Bytes),
    Log(VecDeque<(Position, Bytes)>),
    History(VecDeque<HistoryEntry>),
    Streams(Vec<Stream>),
}

impl MemoryStore {
    /// An empty one. What publishes is put into `work`.
    pub(crate) fn new(work: Arc<Queue<Work>>, names: Names) -> Self {
        let state = State { epoch_ms: now_ms(), ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), work, names }
    }

    pub(super) fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.state.lock().live(key) {
            None => Ok(None),
            Some(Value::Plain(value)) => Ok(Some(value.clone())),
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(super) fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        let bytes = key.len() + value.len() + ENTRY_BYTES;
        let replaced = state.entries.get(key).map_or(0, |entry| entry.bytes);
        if state.bytes - replaced + bytes > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let value = Value::Plain(Bytes::copy_from_slice(value));
        state.remove(key);
        state.insert(key.into(), Entry { value, bytes, expires: expiry(now, ttl) });
        Ok(())
    }

    pub(super) fn remove(&self, key: &str) -> Result<bool, StoreError> {
        let mut state = self.state.lock();
        state.purge();
        Ok(state.remove(key).is_some())
    }

    pub(super) fn take_if_equal(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        let mut state = self.state.lock();
        match state.live(key) {
            Some(Value::Plain(value)) if value == expected => Ok(state.remove(key).is_some()),
            Some(Value::Plain(_)) | None => Ok(false),
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(super) fn read_log(
        &self,
        key: &str,
        after: &str,
        count: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let after = match after {
            "" => Position::default(),
            text => Position::parse(text.as_bytes())
                .ok_or_else(|| StoreError::Refused("not a position in a log".into()))?,
        };
        match self.state.lock().live(key) {
            None => Ok(Vec::new()),
            Some(Value::Log(log)) => {
                let from = log.partition_point(|(position, _)| *position <= after);
                let entry = |(position, data): &(Position, Bytes)| LogEntry {
                    id: position.to_string(),
                    data: data.clone(),
                };
                Ok(log.range(from..).take(count).map(entry).collect())
            }
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Appends to a log, of which at most `entries_max` stay, and lets it live for `ttl` from now.
    pub(crate) fn append(
        &self,
        key: &str,
        data: Bytes,
        entries_max: u64,
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        if !matches!(state.live(key), None | Some(Value::Log(_))) {
            return Err(wrong_kind());
        }
        if state.bytes + key.len() + data.len() + 2 * ENTRY_BYTES > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let position = state.next_position();
        let (key, mut entry) = state.remove(key).unwrap_or_else(|| {
            let bytes = key.len() + ENTRY_BYTES;
            (key.into(), Entry { value: Value::Log(VecDeque::new()), bytes, expires: now })
        });
        if let Value::Log(log) = &mut entry.value {
            entry.bytes += data.len() + ENTRY_BYTES;
            log.push_back((position, data));
            while log.len() as u64 > entries_max.max(1) {
                let trimmed = log.pop_front().map_or(0, |(_, data)| data.len());
                entry.bytes -= trimmed + ENTRY_BYTES;
            }
        }
        entry.expires = expiry(now, ttl);
        state.insert(key, entry);
        Ok(())
    }
}

impl State {
    fn live(&mut self, key: &str) -> Option<&Value> {
        self.purge();
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// Removes what has expired; every operation begins with it.
    fn purge(&mut self) -> Instant {
        let now = Instant::now();
        while self.by_expiry.first().is_some_and(|(expires, _)| *expires <= now) {
            if let Some((_, key)) = self.by_expiry.pop_first()
                && let Some(entry) = self.entries.remove(&key)
            {
                self.bytes -= entry.bytes;
            }
        }
        now
    }

    fn remove(&mut self, key: &str) -> Option<(Arc<str>, Entry)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.by_expiry.remove(&(entry.expires, key.clone()));
        self.bytes -= entry.bytes;
        Some((key, entry))
    }

    fn insert(&mut self, key: Arc<str>, entry: Entry) {
        self.bytes += entry.bytes;
        self.by_expiry.insert((entry.expires, key.clone()));
        self.entries.insert(key, entry);
    }

    /// Positions only grow, even where the wall clock steps back.
    fn next_position(&mut self) -> Position {
        let milliseconds = now_ms();
        self.last_position = if milliseconds > self.last_position.milliseconds {
            Position { milliseconds, sequence: 0 }
        } else {
            Position { sequence: self.last_position.sequence + 1, ..self.last_position }
        };
        self.last_position
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn expiry(now: Instant, ttl: Duration) -> Instant {
    now + ttl.clamp(Duration::from_millis(1), TTL_MAX)
}

fn wrong_kind() -> StoreError {
    StoreError::Refused("the key holds another kind of value".into())
}

/// Most bytes that all entries may hold.
const BYTES_MAX: usize = 64 * 1024 * 1024;

/// What an entry costs beside its key and value, roughly.
const ENTRY_BYTES: usize = 128;

/// Longer is as good as for ever, and does not overflow the clock.
const TTL_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> MemoryStore {
        MemoryStore::new(Arc::new(Queue::new(1 << 20)), Names::default())
    }

    #[test]
    fn a_full_store_refuses_and_takes_again_after_expiry_or_removal() {
        let store = store();
        let megabyte = vec![0; 1024 * 1024];
        let minute = Duration::from_secs(60);
        let taken = (0..100)
            .take_while(|n| store.save(&format!("key-{n}"), &megabyte, minute).is_ok())
            .count();
        assert_eq!(taken, 63);
        assert_eq!(store.save("another", &megabyte, minute), Err(StoreError::Full));
        assert_eq!(store.append("log", megabyte.clone().into(), 9, minute), Err(StoreError::Full));
        store.save("key-0", &megabyte, minute).unwrap();
        assert_eq!(store.remove("key-0"), Ok(true));
        store.save("another", &megabyte, Duration::from_secs(60)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_stays_of_what_has_expired() {
        let store = store();
        store.save("key", b"value", Duration::from_secs(5)).unwrap();
        store.append("log", "entry".into(), 10, Duration::from_secs(5)).unwrap();
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(store.load("key"), Ok(None));
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.by_expiry.len()), (0, 0, 0));
    }

    #[test]
    fn trimming_a_log_gives_its_bytes_back() {
        let store = store();
        for n in 0..1000 {
            store.append("log", n.to_string().into(), 10, Duration::from_secs(5)).unwrap();
        }
        assert_eq!(store.read_log("log", "", 100).unwrap().len(), 10);
        assert_eq!(store.remove("log"), Ok(true));
        assert_eq!(store.state.lock().bytes, 0);
    }
}
