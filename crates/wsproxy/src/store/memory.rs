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
use wsproxy_proto::{history::Position, names::Names};

use crate::{
    bus::{memory::Request, not_done::NotDone, queue::Queue},
    store::{
        LogEntry, StoreError,
        memory::{history::HistoryLog, stream::TokenStream},
    },
};

mod history;
mod stream;

/// Keys and logs of this process. Clones share one state.
///
/// Invariant: never holds more than `BYTES_MAX`, estimated; what does not fit is refused, since to evict
/// somebody's token silently would be worse.
#[derive(Clone)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    names: Names,
    /// The bus's queue: what publishes is done where messages are delivered.
    requests: Arc<Queue<Request>>,
}

struct State {
    entries: HashMap<Arc<str>, Held>,
    /// The same keys by their end, so that expired ones are found without a search.
    by_expiry: BTreeSet<(Instant, Arc<str>)>,
    bytes: usize,
    last_position: Position,
    /// When this process began, by the clock that positions have.
    epoch_ms: u64,
    /// Open token streams by the end of their lease, with session and id.
    leases: BTreeSet<(Instant, Arc<str>, Arc<str>)>,
}

struct Held {
    value: Value,
    bytes: usize,
    expires: Instant,
}

enum Value {
    Plain(Bytes),
    Log(VecDeque<(Position, Bytes)>),
    History(HistoryLog),
    Stream(TokenStream),
    /// Ids of a session's token streams, in the order in which they were opened.
    Index(Vec<Arc<str>>),
}

impl MemoryStore {
    /// An empty one beside the bus with this queue.
    pub(crate) fn new(names: Names, requests: Arc<Queue<Request>>) -> Self {
        let state = State {
            entries: HashMap::new(),
            by_expiry: BTreeSet::new(),
            bytes: 0,
            last_position: Position::START,
            epoch_ms: wall_clock_ms(),
            leases: BTreeSet::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), names, requests }
    }

    /// How keys and channels are spelled.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    pub(crate) fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.state.lock().live(key) {
            None => Ok(None),
            Some(Value::Plain(value)) => Ok(Some(value.clone())),
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(super) fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        self.state.lock().save(key, value, ttl)
    }

    /// Sets a key as [`Self::save`] does, but does not cut a longer life short that it had.
    pub(crate) fn save_for_longer(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        let left = state.entries.get(key).map_or(Duration::ZERO, |entry| entry.expires - now);
        state.save(key, value, ttl.max(left))
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
            "" => Position::START,
            text => position(text)
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

    pub(super) fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
        match self.state.lock().live(key) {
            None => Ok(None),
            Some(Value::Log(log)) => Ok(log.back().map(|(position, _)| position.to_string())),
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
        if !matches!(state.live(key), Some(Value::Log(_)) | None) {
            return Err(wrong_kind());
        }
        if state.bytes + key.len() + data.len() + 2 * ENTRY_BYTES > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let position = state.next_position();
        let (key, mut entry) = state.remove(key).unwrap_or_else(|| {
            let bytes = key.len() + ENTRY_BYTES;
            (key.into(), Held { value: Value::Log(VecDeque::new()), bytes, expires: now })
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
        self.held(key)
    }

    /// The same, after a purge.
    fn held(&self, key: &str) -> Option<&Value> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    fn save(&mut self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        let now = self.purge();
        let bytes = key.len() + value.len() + ENTRY_BYTES;
        let replaced = self.entries.get(key).map_or(0, |entry| entry.bytes);
        if self.bytes - replaced + bytes > BYTES_MAX {
            return Err(StoreError::Full);
        }
        let value = Value::Plain(Bytes::copy_from_slice(value));
        self.remove(key);
        self.insert(key.into(), Held { value, bytes, expires: expiry(now, ttl) });
        Ok(())
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

    fn remove(&mut self, key: &str) -> Option<(Arc<str>, Held)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.by_expiry.remove(&(entry.expires, key.clone()));
        self.bytes -= entry.bytes;
        Some((key, entry))
    }

    fn insert(&mut self, key: Arc<str>, entry: Held) {
        self.bytes += entry.bytes;
        self.by_expiry.insert((entry.expires, key.clone()));
        self.entries.insert(key, entry);
    }

    /// The clock that positions have.
    fn now_ms(&self) -> u64 {
        wall_clock_ms().max(self.last_position.milliseconds)
    }

    /// Positions only grow, even where the wall clock steps back.
    fn next_position(&mut self) -> Position {
        let milliseconds = wall_clock_ms();
        self.last_position = if milliseconds > self.last_position.milliseconds {
            Position { milliseconds, sequence: 0 }
        } else {
            Position { sequence: self.last_position.sequence + 1, ..self.last_position }
        };
        self.last_position
    }
}

/// As Redis reads one: the number may be missing.
fn position(text: &str) -> Option<Position> {
    let (milliseconds, sequence) = text.split_once('-').unwrap_or((text, "0"));
    Some(Position { milliseconds: milliseconds.parse().ok()?, sequence: sequence.parse().ok()? })
}

fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn expiry(now: Instant, ttl: Duration) -> Instant {
    now + ttl.clamp(Duration::from_millis(1), TTL_MAX)
}

fn wrong_kind() -> StoreError {
    let error = "the key holds another kind of value".into();
    StoreError::NotDone { refusal: NotDone::WrongType, error }
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

    impl Default for MemoryStore {
        fn default() -> Self {
            Self::new(Names::new(""), Arc::new(Queue::new(1024)))
        }
    }

    #[test]
    fn a_full_store_refuses_and_takes_again_after_expiry_or_removal() {
        let store = MemoryStore::default();
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
        let store = MemoryStore::default();
        store.save("key", b"value", Duration::from_secs(5)).unwrap();
        store.append("log", "entry".into(), 10, Duration::from_secs(5)).unwrap();
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(store.load("key"), Ok(None));
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.by_expiry.len()), (0, 0, 0));
    }

    #[test]
    fn trimming_a_log_gives_its_bytes_back() {
        let store = MemoryStore::default();
        for n in 0..1000 {
            store.append("log", n.to_string().into(), 10, Duration::from_secs(5)).unwrap();
        }
        assert_eq!(store.read_log("log", "", 100).unwrap().len(), 10);
        assert_eq!(store.remove("log"), Ok(true));
        assert_eq!(store.state.lock().bytes, 0);
    }
}
