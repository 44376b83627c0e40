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
        memory::{
            history::{Hasher, HistoryLog, Index},
            stream::TokenStream,
        },
    },
};

mod history;
mod stream;

/// Keys and logs of this process. Clones share one state.
///
/// Invariant: never holds more than [`StoreLimits::bytes`], estimated, and logs no more than their share; what does
/// not fit is refused, since to evict a client's token silently would be worse.
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
    /// Of these, what logs hold.
    log_bytes: usize,
    limits: StoreLimits,
    last_position: Position,
    /// How many tags were given.
    tags: u64,
    hasher: Hasher,
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
    Log(VecDeque<((u64, u64), Bytes)>),
    History(HistoryLog),
    /// Positions of the event ids of one or several logs.
    Ids(Box<Index>),
    Stream(TokenStream),
    /// Ids of a session's token streams, in the order in which they were opened.
    Index(Vec<Arc<str>>),
}

impl MemoryStore {
    /// An empty one beside the bus with this queue.
    pub(crate) fn new(names: Names, requests: Arc<Queue<Request>>, limits: StoreLimits) -> Self {
        let state = State {
            entries: HashMap::new(),
            by_expiry: BTreeSet::new(),
            bytes: 0,
            log_bytes: 0,
            limits,
            last_position: Position::START,
            tags: 0,
            hasher: Hasher::default(),
            leases: BTreeSet::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), names, requests }
    }

    /// Whether it takes no entry of a log any more, or nothing at all.
    pub(crate) fn is_full(&self) -> bool {
        let mut state = self.state.lock();
        state.purge();
        state.check_log_room(TOKEN_BYTES).is_err()
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
            "" => (0, 0),
            text => {
                id(text).ok_or_else(|| StoreError::Refused("not a position in a log".into()))?
            }
        };
        match self.state.lock().live(key) {
            None => Ok(Vec::new()),
            Some(Value::Log(log)) => {
                let from = log.partition_point(|(position, _)| *position <= after);
                let entry = |((milliseconds, sequence), data): &((u64, u64), Bytes)| LogEntry {
                    id: format!("{milliseconds}-{sequence}"),
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
            Some(Value::Log(log)) => {
                let id = |((milliseconds, sequence), _): &_| format!("{milliseconds}-{sequence}");
                Ok(log.back().map(id))
            }
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Appends to a log, of which at most `entries_max` and `bytes_max` bytes stay, and lets it live for `ttl` from
    /// now.
    pub(crate) fn append(
        &self,
        key: &str,
        data: Bytes,
        (entries_max, bytes_max): (u64, u64),
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        if !matches!(state.live(key), Some(Value::Log(_)) | None) {
            return Err(wrong_kind());
        }
        state.check_log_room(key.len() + data.len() + 2 * ENTRY_BYTES)?;
        let id = state.next_id();
        let (key, mut entry) = state.remove(key).unwrap_or_else(|| {
            let bytes = key.len() + ENTRY_BYTES;
            (key.into(), Held { value: Value::Log(VecDeque::new()), bytes, expires: now })
        });
        if let Value::Log(log) = &mut entry.value {
            entry.bytes += data.len() + ENTRY_BYTES;
            log.push_back((id, data));
            let mut bytes: u64 = log.iter().map(|(_, data)| data.len() as u64).sum();
            while log.len() > 1 && (log.len() as u64 > entries_max || bytes > bytes_max) {
                let trimmed = log.pop_front().map_or(0, |(_, data)| data.len());
                entry.bytes -= trimmed + ENTRY_BYTES;
                bytes -= trimmed as u64;
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
        if self.bytes - replaced + bytes > self.limits.bytes {
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
            let Some((_, key)) = self.by_expiry.pop_first() else { break };
            let Some(mut entry) = self.entries.remove(&key) else { continue };
            self.forget(&entry);
            // A log's head outlives its entries.
            if let Value::History(log) = &mut entry.value
                && let Some((bytes, expires)) = log.expire(now)
            {
                entry.bytes = key.len() + bytes;
                self.insert(key, Held { expires, ..entry });
            }
        }
        now
    }

    fn remove(&mut self, key: &str) -> Option<(Arc<str>, Held)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.by_expiry.remove(&(entry.expires, key.clone()));
        self.forget(&entry);
        Some((key, entry))
    }

    fn forget(&mut self, entry: &Held) {
        self.bytes -= entry.bytes;
        if entry.value.is_log() {
            self.log_bytes -= entry.bytes;
        }
    }

    /// Logs must not take the room of what is not theirs: tokens above all.
    fn check_log_room(&self, bytes: usize) -> Result<(), StoreError> {
        let has_room = self.bytes + bytes <= self.limits.bytes
            && self.log_bytes + bytes <= self.limits.log_bytes;
        if has_room { Ok(()) } else { Err(StoreError::Full) }
    }

    fn insert(&mut self, key: Arc<str>, entry: Held) {
        self.bytes += entry.bytes;
        if entry.value.is_log() {
            self.log_bytes += entry.bytes;
        }
        self.by_expiry.insert((entry.expires, key.clone()));
        self.entries.insert(key, entry);
    }

    /// The clock that positions have.
    fn now_ms(&self) -> u64 {
        wall_clock_ms().max(self.last_position.milliseconds)
    }

    /// Ids only grow, even where the wall clock steps back.
    fn next_id(&mut self) -> (u64, u64) {
        let milliseconds = wall_clock_ms();
        self.last_position = if milliseconds > self.last_position.milliseconds {
            Position { milliseconds, sequence: 0, tag: 0 }
        } else {
            Position { sequence: self.last_position.sequence + 1, ..self.last_position }
        };
        self.last_position.id()
    }
}

impl Value {
    const fn is_log(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// How much the embedded store may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoreLimits {
    /// In all, estimated.
    pub(crate) bytes: usize,
    /// Of these, by logs and token streams.
    pub(crate) log_bytes: usize,
}

/// As Redis reads one: the number may be missing.
fn id(text: &str) -> Option<(u64, u64)> {
    let (milliseconds, sequence) = text.split_once('-').unwrap_or((text, "0"));
    Some((milliseconds.parse().ok()?, sequence.parse().ok()?))
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

/// What a token or a small message takes, roughly.
const TOKEN_BYTES: usize = 1024;

/// What an entry costs beside its key and value, roughly.
const ENTRY_BYTES: usize = 128;

/// Longer is as good as for ever, and does not overflow the clock.
const TTL_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    impl Default for MemoryStore {
        fn default() -> Self {
            Self::new(Names::new(""), Arc::new(Queue::new(1024)), LIMITS)
        }
    }

    /// Room for 64 MiB, 60 of them for logs.
    pub(super) const LIMITS: StoreLimits =
        StoreLimits { bytes: 64 * 1024 * 1024, log_bytes: 60 * 1024 * 1024 };

    #[test]
    fn logs_leave_room_for_what_is_not_theirs() {
        let store = MemoryStore::default();
        let (megabyte, minute) = (vec![0; 1024 * 1024], Duration::from_secs(60));
        let append = |n: usize| {
            store.append(&format!("log-{n}"), megabyte.clone().into(), (9, u64::MAX), minute)
        };
        assert!(!store.is_full());
        assert_eq!((0..100).take_while(|n| append(*n).is_ok()).count(), 59);
        store.save("token", b"t", minute).unwrap();
        let rest = vec![0; 900 * 1024];
        store.append("rest", rest.into(), (9, u64::MAX), minute).unwrap();
        while store.append("rest", vec![0; 512].into(), (9000, u64::MAX), minute).is_ok() {}
        assert!(store.is_full());
    }

    #[test]
    fn a_log_is_bounded_in_bytes() {
        let store = MemoryStore::default();
        for _ in 0..100 {
            let minute = Duration::from_secs(60);
            store.append("log", vec![0; 1000].into(), (1000, 4500), minute).unwrap();
        }
        assert_eq!(store.read_log("log", "", 100).unwrap().len(), 4);
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
        assert_eq!(
            store.append("log", megabyte.clone().into(), (9, u64::MAX), minute),
            Err(StoreError::Full)
        );
        store.save("key-0", &megabyte, minute).unwrap();
        assert_eq!(store.remove("key-0"), Ok(true));
        store.save("another", &megabyte, Duration::from_secs(60)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_stays_of_what_has_expired() {
        let store = MemoryStore::default();
        store.save("key", b"value", Duration::from_secs(5)).unwrap();
        store.append("log", "entry".into(), (10, u64::MAX), Duration::from_secs(5)).unwrap();
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(store.load("key"), Ok(None));
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.by_expiry.len()), (0, 0, 0));
    }

    #[test]
    fn trimming_a_log_gives_its_bytes_back() {
        let store = MemoryStore::default();
        for n in 0..1000 {
            store
                .append("log", n.to_string().into(), (10, u64::MAX), Duration::from_secs(5))
                .unwrap();
        }
        assert_eq!(store.read_log("log", "", 100).unwrap().len(), 10);
        assert_eq!(store.remove("log"), Ok(true));
        assert_eq!(store.state.lock().bytes, 0);
    }
}
