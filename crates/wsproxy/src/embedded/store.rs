//! The embedded store: a map with expiry and a bound; knows no channels.

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
    embedded::{
        history::{Hasher, HistoryLog, Index},
        request::EmbeddedRequest,
        token_streams::TokenStream,
    },
    queue::Queue,
    store::{
        command::{LogEntry, StoreError},
        not_done::NotDone,
    },
};

/// Keys and logs of this process. Clones share one state.
///
/// Invariant: never holds more than [`StoreLimits::bytes`], estimated, and logs no more than their share. A value that
/// does not fit is refused, since silently evicting a client's token would be worse.
#[derive(Clone)]
pub struct EmbeddedStore {
    pub(super) state: Arc<Mutex<StoreState>>,
    pub(super) names: Names,
    /// The queue of the bus: commands that publish are done by the reader that delivers messages.
    pub(super) requests: Arc<Queue<EmbeddedRequest>>,
}

pub(super) struct StoreState {
    pub(super) entries: HashMap<Arc<str>, Held>,
    /// The keys by expiry, so that expired ones are found without a search.
    pub(super) by_expiry: BTreeSet<(Instant, Arc<str>)>,
    pub(super) bytes: usize,
    /// Of these, bytes of logs.
    pub(super) log_bytes: usize,
    pub(super) limits: StoreLimits,
    pub(super) last_position: Position,
    /// Number of tags so far.
    pub(super) tags: u64,
    pub(super) hasher: Hasher,
    /// Open token streams by the end of their lease, with session and id.
    pub(super) leases: BTreeSet<(Instant, Arc<str>, Arc<str>)>,
}

pub(super) struct Held {
    pub(super) value: StoredValue,
    pub(super) bytes: usize,
    pub(super) expires: Instant,
}

pub(super) enum StoredValue {
    Plain(Bytes),
    Log(VecDeque<((u64, u64), Bytes)>),
    History(HistoryLog),
    /// Positions of the event ids of one or several logs.
    Ids(Box<Index>),
    Stream(TokenStream),
    /// Ids of a session's token streams, in the order in which they were opened.
    Index(Vec<Arc<str>>),
}

impl EmbeddedStore {
    /// Creates an empty store beside the bus with this queue.
    pub(super) fn new(
        names: Names,
        requests: Arc<Queue<EmbeddedRequest>>,
        limits: StoreLimits,
    ) -> Self {
        let state = StoreState {
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

    /// Returns whether there is no room for another entry of a log.
    pub(crate) fn is_full(&self) -> bool {
        let mut state = self.state.lock();
        state.purge();
        state.check_log_room(TOKEN_BYTES).is_err()
    }

    /// Returns the names of keys and channels.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    pub(crate) fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match self.state.lock().live(key) {
            None => Ok(None),
            Some(StoredValue::Plain(value)) => Ok(Some(value.clone())),
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(crate) fn load_expiring(&self, key: &str) -> Result<Option<(Bytes, Duration)>, StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        match state.entries.get(key) {
            None => Ok(None),
            Some(Held { value: StoredValue::Plain(value), expires, .. }) => {
                Ok(Some((value.clone(), *expires - now)))
            }
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(crate) fn add(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        let mut state = self.state.lock();
        match state.live(key) {
            None => {}
            Some(StoredValue::Plain(held)) => return Ok(Some(held.clone())),
            Some(_) => return Err(wrong_kind()),
        }
        state.save(key, value, ttl)?;
        Ok(None)
    }

    pub(crate) fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        self.state.lock().save(key, value, ttl)
    }

    /// Sets a key as [`Self::save`] does, but keeps a longer time to live that the key has.
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

    pub(crate) fn remove(&self, key: &str) -> Result<bool, StoreError> {
        let mut state = self.state.lock();
        state.purge();
        Ok(state.remove(key).is_some())
    }

    pub(crate) fn take_if_equal(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        let mut state = self.state.lock();
        match state.live(key) {
            Some(StoredValue::Plain(value)) if value == expected => Ok(state.remove(key).is_some()),
            Some(StoredValue::Plain(_)) | None => Ok(false),
            Some(_) => Err(wrong_kind()),
        }
    }

    pub(crate) fn replace(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Bytes>, StoreError> {
        let mut state = self.state.lock();
        let replaced = match state.live(key) {
            None => None,
            Some(StoredValue::Plain(held)) => Some(held.clone()),
            Some(_) => return Err(wrong_kind()),
        };
        state.save(key, value, ttl)?;
        Ok(replaced)
    }

    pub(crate) fn save_if_equal(
        &self,
        key: &str,
        expected: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<bool, StoreError> {
        let mut state = self.state.lock();
        match state.live(key) {
            Some(StoredValue::Plain(held)) if held == expected => {}
            Some(StoredValue::Plain(_)) | None => return Ok(false),
            Some(_) => return Err(wrong_kind()),
        }
        state.save(key, value, ttl)?;
        Ok(true)
    }

    pub(crate) fn read_log(
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
            Some(StoredValue::Log(log)) => {
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

    pub(crate) fn log_end(&self, key: &str) -> Result<Option<String>, StoreError> {
        match self.state.lock().live(key) {
            None => Ok(None),
            Some(StoredValue::Log(log)) => {
                let id = |((milliseconds, sequence), _): &_| format!("{milliseconds}-{sequence}");
                Ok(log.back().map(id))
            }
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Appends to a log, keeps at most `entries_max` entries and `bytes_max` bytes of it, and sets its time to live to
    /// `ttl`.
    pub(crate) fn append(
        &self,
        key: &str,
        data: Bytes,
        (entries_max, bytes_max): (u64, u64),
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        if !matches!(state.live(key), Some(StoredValue::Log(_)) | None) {
            return Err(wrong_kind());
        }
        state.check_log_room(key.len() + data.len() + 2 * ENTRY_BYTES)?;
        let id = state.next_id();
        let (key, mut entry) = state.remove(key).unwrap_or_else(|| {
            let bytes = key.len() + ENTRY_BYTES;
            (key.into(), Held { value: StoredValue::Log(VecDeque::new()), bytes, expires: now })
        });
        if let StoredValue::Log(log) = &mut entry.value {
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

impl StoreState {
    pub(super) fn live(&mut self, key: &str) -> Option<&StoredValue> {
        self.purge();
        self.held(key)
    }

    /// Returns a value; call it after a purge only.
    pub(super) fn held(&self, key: &str) -> Option<&StoredValue> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    pub(super) fn save(
        &mut self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<(), StoreError> {
        let now = self.purge();
        let bytes = key.len() + value.len() + ENTRY_BYTES;
        let replaced = self.entries.get(key).map_or(0, |entry| entry.bytes);
        if self.bytes - replaced + bytes > self.limits.bytes {
            return Err(StoreError::Full);
        }
        let value = StoredValue::Plain(Bytes::copy_from_slice(value));
        self.remove(key);
        self.insert(key.into(), Held { value, bytes, expires: expiry(now, ttl) });
        Ok(())
    }

    /// Removes expired keys; every operation begins with this.
    pub(super) fn purge(&mut self) -> Instant {
        let now = Instant::now();
        while self.by_expiry.first().is_some_and(|(expires, _)| *expires <= now) {
            let Some((_, key)) = self.by_expiry.pop_first() else { break };
            let Some(mut entry) = self.entries.remove(&key) else { continue };
            self.forget(&entry);
            // A log's head outlives its entries.
            if let StoredValue::History(log) = &mut entry.value
                && let Some((bytes, expires)) = log.expire(now)
            {
                entry.bytes = key.len() + bytes;
                self.insert(key, Held { expires, ..entry });
            }
        }
        now
    }

    pub(super) fn remove(&mut self, key: &str) -> Option<(Arc<str>, Held)> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.by_expiry.remove(&(entry.expires, key.clone()));
        self.forget(&entry);
        Some((key, entry))
    }

    pub(super) fn forget(&mut self, entry: &Held) {
        self.bytes -= entry.bytes;
        if entry.value.is_log() {
            self.log_bytes -= entry.bytes;
        }
    }

    /// Checks that there is room for `bytes` of a log. Logs must not take the room of tokens.
    pub(super) fn check_log_room(&self, bytes: usize) -> Result<(), StoreError> {
        let has_room = self.bytes + bytes <= self.limits.bytes
            && self.log_bytes + bytes <= self.limits.log_bytes;
        if has_room { Ok(()) } else { Err(StoreError::Full) }
    }

    pub(super) fn insert(&mut self, key: Arc<str>, entry: Held) {
        self.bytes += entry.bytes;
        if entry.value.is_log() {
            self.log_bytes += entry.bytes;
        }
        self.by_expiry.insert((entry.expires, key.clone()));
        self.entries.insert(key, entry);
    }

    /// Returns the time by the clock of positions.
    pub(super) fn now_ms(&self) -> u64 {
        wall_clock_ms().max(self.last_position.milliseconds)
    }

    /// Returns the next id. Ids only grow, even if the wall clock steps back.
    pub(super) fn next_id(&mut self) -> (u64, u64) {
        let milliseconds = wall_clock_ms();
        self.last_position = if milliseconds > self.last_position.milliseconds {
            Position { milliseconds, sequence: 0, tag: 0 }
        } else {
            Position { sequence: self.last_position.sequence + 1, ..self.last_position }
        };
        self.last_position.id()
    }
}

impl StoredValue {
    pub(super) const fn is_log(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

/// Bounds of the embedded store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoreLimits {
    /// Upper bound of all bytes, estimated.
    pub(crate) bytes: usize,
    /// Upper bound of the bytes of logs and token streams.
    pub(crate) log_bytes: usize,
}

/// Reads an id as Redis does: the sequence number may be missing.
fn id(text: &str) -> Option<(u64, u64)> {
    let (milliseconds, sequence) = text.split_once('-').unwrap_or((text, "0"));
    Some((milliseconds.parse().ok()?, sequence.parse().ok()?))
}

fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn expiry(now: Instant, ttl: Duration) -> Instant {
    now + ttl.clamp(Duration::from_millis(1), TTL_MAX)
}

pub(super) fn wrong_kind() -> StoreError {
    let error = "the key holds another kind of value".into();
    StoreError::NotDone { refusal: NotDone::WrongType, error }
}

/// Estimate of the memory of a token or a small message.
const TOKEN_BYTES: usize = 1024;

/// Estimate of an entry's cost beside its key and value.
pub(super) const ENTRY_BYTES: usize = 128;

/// Longest time to live, so that the clock does not overflow.
const TTL_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    impl Default for EmbeddedStore {
        fn default() -> Self {
            Self::new(Names::new(""), Arc::new(Queue::new(1024)), LIMITS)
        }
    }

    /// Limits of 64 MiB, 60 of them for logs.
    pub(super) const LIMITS: StoreLimits =
        StoreLimits { bytes: 64 * 1024 * 1024, log_bytes: 60 * 1024 * 1024 };

    #[test]
    fn logs_leave_room_for_what_is_not_theirs() {
        let store = EmbeddedStore::default();
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
        let store = EmbeddedStore::default();
        for _ in 0..100 {
            let minute = Duration::from_secs(60);
            store.append("log", vec![0; 1000].into(), (1000, 4500), minute).unwrap();
        }
        assert_eq!(store.read_log("log", "", 100).unwrap().len(), 4);
    }

    #[test]
    fn a_full_store_refuses_until_keys_expire_or_go() {
        let store = EmbeddedStore::default();
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
        let store = EmbeddedStore::default();
        store.save("key", b"value", Duration::from_secs(5)).unwrap();
        store.append("log", "entry".into(), (10, u64::MAX), Duration::from_secs(5)).unwrap();
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(store.load("key"), Ok(None));
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.by_expiry.len()), (0, 0, 0));
    }

    #[test]
    fn trimming_a_log_gives_its_bytes_back() {
        let store = EmbeddedStore::default();
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
