//! Positions of the members that one instance has in a room: the newest of each entity, and when it goes where. Knows
//! neither protobuf nor Redis: bytes and time are arguments.
//!
//! Positions are states, not events: of an entity only the newest counts.

use std::{collections::HashMap, sync::Arc};

/// Rules for the positions of a room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Shortest time between two batches, in microseconds; 0: each position leaves at once.
    pub tick: u64,
    /// Whether positions of a room that is alone are published only once per second. Off where replies do not tell
    /// all receivers.
    pub spares_local: bool,
    /// Whether other instances exist, to which positions are published and for which they are written.
    pub is_shared: bool,
}

/// Positions of the members here.
///
/// Invariant: holds one position for each entity of a member here, so it is bounded as the mirror is: the caller puts
/// those that [`crate::rooms::mirror::Mirror::position`] has taken.
#[derive(Debug)]
pub struct Positions {
    rules: Rules,
    /// Positions, and free places among them.
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    clients: HashMap<Arc<str>, Vec<u32>>,
    /// Positions that wait for the end of the tick.
    waiting: Vec<u32>,
    /// Positions that the other instances do not have.
    unpublished: Vec<u32>,
    /// Positions that Redis does not have.
    unwritten: Vec<u32>,
    taken_at: Option<u64>,
    published_at: Option<u64>,
    written_at: Option<u64>,
    /// All members of the room are here.
    is_local: bool,
    /// The last publish reached other instances or workers, or its receivers are unknown.
    is_heard: bool,
    /// All positions are to be published, since others have begun to listen.
    owes_all: bool,
}

#[derive(Debug)]
struct Entry {
    client: Arc<str>,
    connection: u64,
    entity: Box<str>,
    position: Vec<u8>,
    is_waiting: bool,
    is_unpublished: bool,
    is_unwritten: bool,
}

/// Position of an entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position<'a> {
    /// Client id of the owner.
    pub client: &'a str,
    /// Number of the connection here that told it.
    pub connection: u64,
    /// Entity id.
    pub entity: &'a str,
    /// Bytes, as they were put.
    pub position: &'a [u8],
}

/// Batch of one tick.
#[derive(Debug)]
pub struct Batch<'a> {
    positions: &'a Positions,
    local: Vec<u32>,
    published: Published,
}

#[derive(Debug)]
enum Published {
    Nothing,
    SameAsLocal,
    These(Vec<u32>),
}

impl Positions {
    /// Creates an empty set.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            entries: Vec::new(),
            free: Vec::new(),
            clients: HashMap::new(),
            waiting: Vec::new(),
            unpublished: Vec::new(),
            unwritten: Vec::new(),
            taken_at: None,
            published_at: None,
            written_at: None,
            is_local: false,
            is_heard: true,
            owes_all: false,
        }
    }

    /// Takes the newest position of an entity, as the connection with this number here tells it. Returns whether it
    /// replaces one that was still waiting. Afterwards [`Self::due`] may be earlier.
    pub fn put(&mut self, owner: (&str, u64), entity: &str, position: &[u8]) -> bool {
        let index = self.keep(owner, entity, position);
        let Some(entry) = &mut self.entries[index as usize] else { return false };
        let is_replaced = std::mem::replace(&mut entry.is_waiting, true);
        if !is_replaced {
            self.waiting.push(index);
        }
        is_replaced
    }

    /// Takes a position that the members here have, and other instances and Redis may lack.
    pub fn put_for_others(&mut self, owner: (&str, u64), entity: &str, position: &[u8]) {
        self.keep(owner, entity, position);
    }

    fn keep(&mut self, (client, connection): (&str, u64), entity: &str, position: &[u8]) -> u32 {
        let index = self.find(client, entity).unwrap_or_else(|| self.insert(client, entity));
        let Some(entry) = &mut self.entries[index as usize] else { return index };
        entry.connection = connection;
        entry.position.clear();
        entry.position.extend_from_slice(position);
        if self.rules.is_shared {
            if !std::mem::replace(&mut entry.is_unpublished, true) {
                self.unpublished.push(index);
            }
            if !std::mem::replace(&mut entry.is_unwritten, true) {
                self.unwritten.push(index);
            }
        }
        index
    }

    /// Forgets an entity that was despawned.
    pub fn forget_entity(&mut self, client: &str, entity: &str) {
        let Some(index) = self.find(client, entity) else { return };
        if let Some(indexes) = self.clients.get_mut(client) {
            indexes.retain(|own| *own != index);
            if indexes.is_empty() {
                self.clients.remove(client);
            }
        }
        self.remove(index);
    }

    /// Forgets a member that has left, or has a connection at another instance.
    pub fn forget_member(&mut self, client: &str) {
        let indexes = self.clients.remove(client).unwrap_or_default();
        indexes.into_iter().for_each(|index| self.remove(index));
    }

    /// Notes whether all members of the room are here.
    pub fn set_local(&mut self, is_local: bool) {
        let was_alone = self.is_alone();
        self.is_local = is_local;
        self.stop_being_alone(was_alone);
    }

    /// Notes how many received the last publish into the room, this instance among them; `None` where it is unknown.
    pub fn set_receivers(&mut self, receivers: Option<u64>) {
        let was_alone = self.is_alone();
        self.is_heard = receivers.is_none_or(|receivers| receivers > 1);
        self.stop_being_alone(was_alone);
    }

    /// Publishes all positions with the next batch, which is due at once: after a lost link, or when Redis is new.
    pub fn owe_all(&mut self) {
        self.owes_all = self.rules.is_shared && !self.clients.is_empty();
    }

    /// Marks all positions as not written, because Redis has lost them.
    pub fn rewrite_all(&mut self) {
        if !self.rules.is_shared {
            return;
        }
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if let Some(entry) = entry.as_mut().filter(|entry| !entry.is_unwritten) {
                entry.is_unwritten = true;
                self.unwritten.push(index as u32);
            }
        }
    }

    /// Returns whether no other instance and no worker listens to the room, as far as is known.
    #[must_use]
    pub const fn is_alone(&self) -> bool {
        self.rules.spares_local && self.is_local && !self.is_heard
    }

    /// Returns the time at which [`Self::take`] should be called, in microseconds; 0: at once.
    #[must_use]
    pub fn due(&self) -> Option<u64> {
        if self.owes_all {
            return Some(0);
        }
        let local = (!self.waiting.is_empty())
            .then(|| self.taken_at.map_or(0, |at| at.saturating_add(self.rules.tick)));
        let published = (!self.unpublished.is_empty()).then(|| self.publish_at());
        local.into_iter().chain(published).min()
    }

    /// Returns the time at which [`Self::take_writes`] should be called, in microseconds; 0: at once.
    #[must_use]
    pub fn writes_due(&self) -> Option<u64> {
        // A reader that makes the room more than local gets all positions published.
        let pause = if self.is_alone() { LOCAL_WRITES } else { SECOND };
        (!self.unwritten.is_empty())
            .then(|| self.written_at.map_or(0, |at| at.saturating_add(pause)))
    }

    /// Takes the batch that is due at `now`.
    pub fn take(&mut self, now: u64) -> Batch<'_> {
        let is_tick = self.taken_at.is_none_or(|at| now >= at.saturating_add(self.rules.tick));
        let mut local = Vec::new();
        if (is_tick || self.owes_all) && !self.waiting.is_empty() {
            local = std::mem::take(&mut self.waiting);
            self.taken_at = Some(now);
            for index in &local {
                if let Some(entry) = &mut self.entries[*index as usize] {
                    entry.is_waiting = false;
                }
            }
        }
        let published = self.take_published(&local, now);
        Batch { positions: self, local, published }
    }

    fn take_published(&mut self, local: &[u32], now: u64) -> Published {
        if !self.owes_all && (self.unpublished.is_empty() || now < self.publish_at()) {
            return Published::Nothing;
        }
        let mut indexes = std::mem::take(&mut self.unpublished);
        for index in &indexes {
            if let Some(entry) = &mut self.entries[*index as usize] {
                entry.is_unpublished = false;
            }
        }
        if std::mem::take(&mut self.owes_all) {
            let all = 0..self.entries.len() as u32;
            indexes = all.filter(|index| self.entries[*index as usize].is_some()).collect();
        }
        self.published_at = Some(now);
        // Most batches are the same for all, and are encoded once.
        if indexes == local { Published::SameAsLocal } else { Published::These(indexes) }
    }

    /// Returns the time of the next publish of what waits for one.
    fn publish_at(&self) -> u64 {
        let pause = if self.is_alone() { SECOND } else { self.rules.tick };
        self.published_at.map_or(0, |at| at.saturating_add(pause))
    }

    /// Takes the positions that are to be written to Redis at `now`: those that have changed since, once per second; of a
    /// room that is alone every two seconds.
    pub fn take_writes(&mut self, now: u64) -> impl ExactSizeIterator<Item = Position<'_>> {
        let is_due = self.writes_due().is_some_and(|at| now >= at);
        let indexes = if is_due { std::mem::take(&mut self.unwritten) } else { Vec::new() };
        if is_due {
            self.written_at = Some(now);
        }
        for index in &indexes {
            if let Some(entry) = &mut self.entries[*index as usize] {
                entry.is_unwritten = false;
            }
        }
        indexes.into_iter().map(|index| self.at(index))
    }

    /// Takes the positions of a member that are not written yet: its connection has ended, and it may come back at another
    /// instance.
    pub fn take_writes_of(&mut self, client: &str) -> impl ExactSizeIterator<Item = Position<'_>> {
        let mut taken = self.clients.get(client).cloned().unwrap_or_default();
        taken.retain(|index| {
            let entry = self.entries[*index as usize].as_mut();
            entry.is_some_and(|entry| std::mem::take(&mut entry.is_unwritten))
        });
        if !taken.is_empty() {
            self.unwritten.retain(|index| !taken.contains(index));
        }
        taken.into_iter().map(|index| self.at(index))
    }

    /// Returns the number of positions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Returns whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn stop_being_alone(&mut self, was_alone: bool) {
        if was_alone && !self.is_alone() {
            self.owe_all();
        }
    }

    fn at(&self, index: u32) -> Position<'_> {
        let none = Position { client: "", connection: 0, entity: "", position: &[] };
        self.entries[index as usize].as_ref().map_or(none, |entry| Position {
            client: &entry.client,
            connection: entry.connection,
            entity: &entry.entity,
            position: &entry.position,
        })
    }

    fn find(&self, client: &str, entity: &str) -> Option<u32> {
        let is_it = |index: &&u32| self.at(**index).entity == entity;
        self.clients.get(client)?.iter().find(is_it).copied()
    }

    fn insert(&mut self, client: &str, entity: &str) -> u32 {
        let client = match self.clients.get_key_value(client) {
            Some((client, _)) => Arc::clone(client),
            None => client.into(),
        };
        let entry = Some(Entry {
            client: Arc::clone(&client),
            connection: 0,
            entity: entity.into(),
            position: Vec::new(),
            is_waiting: false,
            is_unpublished: false,
            is_unwritten: false,
        });
        let index = match self.free.pop() {
            Some(index) => {
                self.entries[index as usize] = entry;
                index
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.clients.entry(client).or_default().push(index);
        index
    }

    fn remove(&mut self, index: u32) {
        let Some(entry) = self.entries[index as usize].take() else { return };
        self.free.push(index);
        let lists = [
            (entry.is_waiting, &mut self.waiting),
            (entry.is_unpublished, &mut self.unpublished),
            (entry.is_unwritten, &mut self.unwritten),
        ];
        for (_, list) in lists.into_iter().filter(|(is_listed, _)| *is_listed) {
            list.retain(|listed| *listed != index);
        }
    }
}

impl Batch<'_> {
    /// Returns the positions for the members here.
    pub fn local(&self) -> impl ExactSizeIterator<Item = Position<'_>> {
        self.local.iter().map(|index| self.positions.at(*index))
    }

    /// Returns the positions to publish for other instances.
    pub fn published(&self) -> impl ExactSizeIterator<Item = Position<'_>> {
        let indexes: &[u32] = match &self.published {
            Published::Nothing => &[],
            Published::SameAsLocal => &self.local,
            Published::These(indexes) => indexes,
        };
        indexes.iter().map(|index| self.positions.at(*index))
    }

    /// Returns whether the positions to publish are those for the members here.
    #[must_use]
    pub const fn is_same(&self) -> bool {
        matches!(self.published, Published::SameAsLocal)
    }
}

/// Time between two publishes of a room that is alone, and between two writes, in microseconds.
pub const SECOND: u64 = 1_000_000;

/// Time between two writes of a room that is alone, in microseconds.
pub const LOCAL_WRITES: u64 = 2 * SECOND;

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 50_000;
    const START: u64 = 1_000_000_000;

    fn positions(tick: u64) -> Positions {
        Positions::new(Rules { tick, spares_local: true, is_shared: true })
    }

    /// Positions of a room whose members are all here, and to which no worker listens.
    fn alone() -> Positions {
        let mut positions = positions(TICK);
        positions.set_local(true);
        positions.set_receivers(Some(1));
        positions
    }

    fn tell<'a>(positions: impl Iterator<Item = Position<'a>>) -> Vec<String> {
        let text = |position: &[u8]| String::from_utf8_lossy(position).into_owned();
        positions
            .map(|one| format!("{} {} {}", one.client, one.entity, text(one.position)))
            .collect()
    }

    /// Returns what goes to the members here, and what is published.
    fn take(positions: &mut Positions, now: u64) -> (Vec<String>, Vec<String>) {
        let batch = positions.take(now);
        (tell(batch.local()), tell(batch.published()))
    }

    #[test]
    fn first_position_after_a_quiet_tick_leaves_at_once() {
        let mut positions = positions(TICK);
        assert!(!positions.put(("a", 1), "e", b"1"));
        assert_eq!(positions.due(), Some(0));
        assert!(positions.take(START).is_same());
        assert_eq!(positions.due(), None);
        assert!(!positions.put(("a", 1), "e", b"2"));
        assert!(positions.put(("a", 1), "e", b"3"), "a position is coalesced");
        assert!(!positions.put(("b", 1), "e", b"4"));
        assert_eq!(positions.due(), Some(START + TICK));
        assert_eq!(take(&mut positions, START + TICK - 1), (vec![], vec![]));
        let both = vec!["a e 3".to_owned(), "b e 4".to_owned()];
        assert_eq!(take(&mut positions, START + TICK), (both.clone(), both));
        assert_eq!(take(&mut positions, START + 2 * TICK), (vec![], vec![]));
    }

    #[test]
    fn without_a_tick_each_position_leaves_at_once() {
        let mut positions = positions(0);
        for now in [START, START] {
            positions.put(("a", 1), "e", b"1");
            assert!(positions.due().unwrap() <= now);
            assert_eq!(take(&mut positions, now).0, ["a e 1"]);
        }
    }

    #[test]
    fn room_that_is_alone_publishes_once_per_second() {
        let mut positions = alone();
        let mut published = Vec::new();
        for tick in 0..40 {
            let now = START + tick * TICK;
            positions.put(("a", 1), "e", tick.to_string().as_bytes());
            let (local, shared) = take(&mut positions, now);
            assert_eq!(local, [format!("a e {tick}")]);
            published.extend(shared);
        }
        assert_eq!(published, ["a e 0", "a e 20"]);
        // The last position is published too, although nothing moves any more.
        assert_eq!(positions.due(), Some(START + 2 * SECOND));
        assert_eq!(take(&mut positions, START + 2 * SECOND), (vec![], vec!["a e 39".into()]));
        assert_eq!(positions.due(), None);
    }

    #[test]
    fn all_positions_are_published_when_others_listen() {
        let begins: [fn(&mut Positions); 3] = [
            |positions| positions.set_local(false),
            |positions| positions.set_receivers(Some(2)),
            |positions| positions.set_receivers(None),
        ];
        for begin in begins {
            let mut positions = alone();
            positions.put(("a", 1), "e", b"1");
            positions.put(("b", 1), "e", b"2");
            take(&mut positions, START);
            positions.put(("b", 1), "e", b"3");
            begin(&mut positions);
            assert_eq!(positions.due(), Some(0));
            let all = vec!["a e 1".to_owned(), "b e 3".to_owned()];
            assert_eq!(take(&mut positions, START + 1), (vec!["b e 3".into()], all));
            positions.put(("a", 1), "e", b"4");
            assert!(positions.take(START + 1 + TICK).is_same());
        }
    }

    #[test]
    fn positions_are_written_once_per_second() {
        let mut positions = positions(TICK);
        positions.put(("a", 1), "e", b"1");
        positions.put(("b", 1), "e", b"1");
        assert_eq!(tell(positions.take_writes(START)), ["a e 1", "b e 1"]);
        positions.put(("b", 1), "e", b"2");
        assert_eq!(positions.writes_due(), Some(START + SECOND));
        assert_eq!(tell(positions.take_writes(START + SECOND - 1)).len(), 0);
        assert_eq!(tell(positions.take_writes(START + SECOND)), ["b e 2"]);
        assert_eq!(positions.writes_due(), None);
        positions.rewrite_all();
        assert_eq!(tell(positions.take_writes(START + 2 * SECOND)).len(), 2);
    }

    #[test]
    fn positions_for_others_are_no_news_here() {
        let mut positions = positions(TICK);
        positions.put_for_others(("a", 1), "e", b"1");
        assert_eq!(take(&mut positions, START), (vec![], vec!["a e 1".into()]));
        assert_eq!(tell(positions.take_writes(START)), ["a e 1"]);
        positions.put(("a", 1), "e", b"2");
        positions.put_for_others(("a", 1), "e", b"2");
        let both = vec!["a e 2".to_owned()];
        assert_eq!(take(&mut positions, START + TICK), (both.clone(), both));
    }

    #[test]
    fn positions_of_a_local_room_are_written_less_often() {
        let mut positions = alone();
        positions.put(("a", 1), "e", b"1");
        assert_eq!(tell(positions.take_writes(START)).len(), 1);
        positions.put(("a", 1), "e", b"2");
        assert_eq!(positions.writes_due(), Some(START + LOCAL_WRITES));
        positions.set_local(false);
        assert_eq!(positions.writes_due(), Some(START + SECOND));
    }

    #[test]
    fn positions_of_a_member_that_goes_are_written_at_once() {
        let mut positions = alone();
        for (client, entity) in [("a", "e"), ("a", "f"), ("b", "e")] {
            positions.put((client, 1), entity, b"1");
        }
        assert_eq!(tell(positions.take_writes_of("a")), ["a e 1", "a f 1"]);
        for client in ["a", "c"] {
            assert_eq!(positions.take_writes_of(client).len(), 0);
        }
        assert_eq!(tell(positions.take_writes(START)), ["b e 1"]);
        positions.put(("a", 1), "f", b"2");
        assert_eq!(tell(positions.take_writes_of("a")), ["a f 2"]);
        assert_eq!(positions.writes_due(), None);
    }

    #[test]
    fn forgotten_entity_goes_nowhere() {
        let mut positions = positions(TICK);
        for entity in ["e", "f"] {
            positions.put(("a", 1), entity, b"1");
            positions.put(("b", 1), entity, b"1");
        }
        positions.forget_entity("b", "e");
        positions.forget_member("a");
        assert_eq!(positions.len(), 1);
        assert_eq!(take(&mut positions, START), (vec!["b f 1".into()], vec!["b f 1".into()]));
        assert_eq!(tell(positions.take_writes(START)), ["b f 1"]);
        positions.put(("c", 1), "e", b"2");
        positions.forget_member("b");
        assert_eq!(
            (take(&mut positions, START + TICK).0, positions.len()),
            (vec!["c e 2".into()], 1)
        );
        positions.forget_member("c");
        assert!(positions.is_empty());
        positions.owe_all();
        assert_eq!(positions.due(), None);
    }

    #[test]
    fn embedded_room_publishes_and_writes_nothing() {
        let mut positions =
            Positions::new(Rules { tick: TICK, spares_local: false, is_shared: false });
        positions.put(("a", 1), "e", b"1");
        assert_eq!(take(&mut positions, START), (vec!["a e 1".into()], vec![]));
        assert_eq!((positions.due(), positions.writes_due()), (None, None));
    }
}
