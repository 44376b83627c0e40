//! The topics of this instance, in shards with a lock each. Knows neither the bus nor messages.

use std::{
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
};

use hashbrown::{Equivalent, HashMap};
use parking_lot::{Mutex, MutexGuard};

use crate::hub::{subscribers::Subscribers, track::Track};

/// A topic that has sinks here.
#[derive(Default)]
pub(super) struct Topic {
    pub(super) subscribers: Subscribers,
    /// History of the topic, if it has one.
    pub(super) track: Option<Box<Track>>,
}

/// The topics of one shard, by name.
#[derive(Default)]
pub(super) struct Topics(HashMap<TopicKey, Topic, foldhash::fast::RandomState>);

impl Topics {
    pub(super) fn get(&self, name: &[u8]) -> Option<&Topic> {
        self.0.get(&Name(name))
    }

    pub(super) fn get_mut(&mut self, name: &[u8]) -> Option<&mut Topic> {
        self.0.get_mut(&Name(name))
    }

    pub(super) fn get_or_insert(&mut self, name: Arc<str>) -> &mut Topic {
        self.0.entry(TopicKey(name)).or_default()
    }

    pub(super) fn remove(&mut self, name: &[u8]) {
        self.0.remove(&Name(name));
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Topic> {
        self.0.values()
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Topic> {
        self.0.values_mut()
    }

    pub(super) fn tracks(&self) -> impl Iterator<Item = (&Arc<str>, &Track)> {
        self.0.iter().filter_map(|(key, topic)| Some((&key.0, topic.track.as_deref()?)))
    }

    pub(super) fn tracks_mut(&mut self) -> impl Iterator<Item = (&Arc<str>, &mut Track)> {
        self.0.iter_mut().filter_map(|(key, topic)| Some((&key.0, topic.track.as_deref_mut()?)))
    }
}

/// All topics.
pub(super) struct Shards {
    shards: [Mutex<Topics>; SHARDS],
    hasher: foldhash::fast::RandomState,
}

impl Default for Shards {
    fn default() -> Self {
        let hasher = foldhash::fast::RandomState::default();
        Self { shards: std::array::from_fn(|_| Mutex::default()), hasher }
    }
}

impl Shards {
    /// Locks the shard of a topic.
    pub(super) fn lock(&self, topic: &[u8]) -> MutexGuard<'_, Topics> {
        self.shards[self.number(topic)].lock()
    }

    /// Returns the shards. A caller releases each one before it locks the next.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Mutex<Topics>> {
        self.shards.iter()
    }

    /// Locks the shards of some topics.
    pub(super) fn lock_for(&self, topics: &[Arc<str>]) -> LockedShards<'_> {
        let mut numbers: Vec<_> =
            topics.iter().map(|topic| self.number(topic.as_bytes())).collect();
        numbers.sort_unstable();
        numbers.dedup();
        self.lock_ascending(numbers.into_iter())
    }

    /// Locks all shards.
    pub(super) fn lock_all(&self) -> LockedShards<'_> {
        self.lock_ascending(0..SHARDS)
    }

    /// Locks shards in ascending order, as every task does, so that tasks cannot deadlock.
    fn lock_ascending(&self, numbers: impl Iterator<Item = usize>) -> LockedShards<'_> {
        let locked = numbers.map(|number| (number, self.shards[number].lock())).collect();
        LockedShards { shards: self, locked }
    }

    fn number(&self, topic: &[u8]) -> usize {
        let hash = self.hasher.hash_one(Name(topic));
        // The map uses the top and the bottom bits of its own hash, so take others here.
        (hash >> 20) as usize % SHARDS
    }
}

/// Locked shards, in ascending order.
pub(super) struct LockedShards<'a> {
    shards: &'a Shards,
    locked: Vec<(usize, MutexGuard<'a, Topics>)>,
}

impl LockedShards<'_> {
    /// Returns a topic of these shards.
    pub(super) fn topic(&mut self, name: &str) -> Option<&mut Topic> {
        let number = self.shards.number(name.as_bytes());
        let place = self.locked.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        self.locked[place].1.get_mut(name.as_bytes())
    }

    /// Returns the history of a topic of these shards.
    pub(super) fn track(&mut self, name: &str) -> Option<&mut Track> {
        self.topic(name)?.track.as_deref_mut()
    }

    /// Returns the history of a topic; `None` unless messages behind its position may be missing.
    pub(super) fn track_with_hole(&mut self, name: &str) -> Option<&mut Track> {
        self.track(name).filter(|track| track.reader.has_hole())
    }

    /// Returns all topics of these shards.
    pub(super) fn topics_mut(&mut self) -> impl Iterator<Item = &mut Topic> {
        self.locked.iter_mut().flat_map(|(_, topics)| topics.values_mut())
    }
}

/// The name of a topic as a key of the map.
#[derive(PartialEq, Eq)]
struct TopicKey(Arc<str>);

/// The name of a topic as the bus passes it.
struct Name<'a>(&'a [u8]);

impl Hash for TopicKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0.as_bytes());
    }
}

impl Hash for Name<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0);
    }
}

impl Equivalent<TopicKey> for Name<'_> {
    fn equivalent(&self, key: &TopicKey) -> bool {
        key.0.as_bytes() == self.0
    }
}

/// Number of shards. With more shards, fewer handshakes wait while a round is delivered.
const SHARDS: usize = 64;
