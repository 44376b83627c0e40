//! The rooms of this instance, and the changes that the shared registry does not have yet; without IO.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use hashbrown::{HashMap, HashSet};
use tokio::sync::Notify;

use crate::registry::changes::Changes;

/// The state that the registry should have of this instance.
///
/// Invariant: `changes` names rooms with a connection here, and rooms without one that Redis may know of. Both are
/// bounded by the connections that an instance may hold; a room that was entered and left before it was written leaves
/// nothing.
pub(super) struct LocalRooms {
    rooms: BTreeMap<Arc<str>, LocalRoom>,
    pub(super) changes: Changes<Arc<str>>,
    /// Rooms in which Redis may have members of this instance without a connection here, and how many were abandoned.
    /// Each is among `rooms`.
    abandoned: HashMap<Arc<str>, u64>,
    /// Number of the connection to Redis over which all that is written was written.
    link: u64,
    /// Number of the connection to Redis over which members without a connection here were looked for.
    swept_link: u64,
}

#[derive(Default)]
struct LocalRoom {
    /// Numbers of the connections that are in the room, join it, or wait for their leave.
    connections: HashSet<u64>,
    /// Set once Redis may have an entry of the room.
    known: bool,
    /// Set while Redis certainly has an entry of the room.
    written: bool,
    /// Signal for those who wait until the room is written.
    signal: Option<Arc<Notify>>,
}

/// A change on its way to Redis.
pub(super) struct Write {
    pub(super) room: Arc<str>,
    /// The room has a connection here.
    pub(super) is_here: bool,
}

impl LocalRooms {
    pub(super) fn new(shared: bool, link: u64) -> Self {
        Self {
            rooms: BTreeMap::new(),
            changes: Changes::new(shared),
            abandoned: HashMap::new(),
            link,
            swept_link: NO_LINK,
        }
    }

    /// Adds a connection to a room. Returns the room's name, and whether there is something to write.
    pub(super) fn enter(&mut self, room: &str, connection: u64) -> (Arc<str>, bool) {
        let known = self.rooms.get_key_value(room).map(|(name, _)| Arc::clone(name));
        if let Some(name) = known {
            if let Some(room) = self.rooms.get_mut(room) {
                room.connections.insert(connection);
            }
            return (name, false);
        }
        let name: Arc<str> = room.into();
        // A removal that waits is of an entry that Redis has.
        let known = self.changes.contains(room);
        let entered = LocalRoom { known, connections: [connection].into(), ..Default::default() };
        self.rooms.insert(Arc::clone(&name), entered);
        let changed = self.changes.put(Arc::clone(&name), ());
        (name, changed)
    }

    /// Takes a connection out of a room, and returns whether there is something to write.
    pub(super) fn leave(&mut self, room: &Arc<str>, connection: u64) -> bool {
        let Some(left) = self.rooms.get_mut(room) else { return false };
        left.connections.remove(&connection);
        if !left.connections.is_empty() || self.abandoned.contains_key(room) {
            return false;
        }
        let known = left.known;
        self.rooms.remove(room);
        if known {
            return self.changes.put(Arc::clone(room), ());
        }
        self.changes.cancel(room);
        false
    }

    /// Takes a connection out of a room whose member may still be in Redis.
    pub(super) fn abandon(&mut self, room: &Arc<str>, connection: u64) {
        let Some(left) = self.rooms.get_mut(room).filter(|_| self.changes.is_shared()) else {
            return;
        };
        if left.connections.remove(&connection) {
            *self.abandoned.entry(Arc::clone(room)).or_default() += 1;
        }
    }

    /// Returns the rooms in which Redis may have members of this instance without a connection here, at most `count`.
    /// Each comes with the number to tell to [`Self::swept`].
    pub(super) fn abandoned(&self, count: usize) -> Vec<(Arc<str>, u64)> {
        self.abandoned
            .iter()
            .take(count)
            .map(|(room, number)| (Arc::clone(room), *number))
            .collect()
    }

    /// Notes that a room had no such members any more when so many were abandoned there.
    pub(super) fn swept(&mut self, room: &Arc<str>, abandoned: u64) {
        if self.abandoned.get(room) != Some(&abandoned) {
            return;
        }
        self.abandoned.remove(room);
        if self.rooms.get(room).is_some_and(|room| room.connections.is_empty()) {
            self.rooms.remove(room);
            self.changes.put(Arc::clone(room), ());
        }
    }

    /// Returns the connection to Redis, if members without a connection here were not looked for since it is used.
    pub(super) fn unswept_link(&self) -> Option<u64> {
        (self.link != self.swept_link).then_some(self.link)
    }

    /// Notes that members without a connection here were looked for over this connection to Redis.
    pub(super) fn swept_link(&mut self, link: u64) {
        self.swept_link = link;
    }

    /// Returns whether a connection is in a room, joins it, or waits for its leave.
    pub(super) fn has(&self, room: &str, connection: u64) -> bool {
        self.rooms.get(room).is_some_and(|room| room.connections.contains(&connection))
    }

    pub(super) fn has_room(&self, room: &str) -> bool {
        self.rooms.contains_key(room)
    }

    pub(super) fn len(&self) -> usize {
        self.rooms.len()
    }

    /// Returns the signal of a room that Redis does not certainly have.
    pub(super) fn unwritten(&mut self, room: &str) -> Option<Arc<Notify>> {
        let room = self.rooms.get_mut(room).filter(|room| !room.written)?;
        Some(Arc::clone(room.signal.get_or_insert_default()))
    }

    /// Takes at most `count` changes, which Redis may have from now on.
    pub(super) fn take(&mut self, count: usize) -> Vec<Write> {
        let write = |(room, ()): (Arc<str>, ())| {
            let here = self.rooms.get_mut(&room);
            let is_here = here.map(|room| room.known = true).is_some();
            Write { room, is_here }
        };
        self.changes.take(count).into_iter().map(write).collect()
    }

    /// Notes that Redis has answered to the changes that were taken.
    pub(super) fn written(&mut self, writes: Vec<Write>) {
        self.changes.answered();
        for Write { room, is_here } in writes {
            // A room that was left and entered again since is written once more.
            if !is_here || self.changes.contains(&room) {
                continue;
            }
            if let Some(room) = self.rooms.get_mut(&room) {
                room.written = true;
                if let Some(signal) = room.signal.take() {
                    signal.notify_waiters();
                }
            }
        }
    }

    /// Puts back changes that may or may not have been written.
    pub(super) fn give_back(&mut self, writes: Vec<Write>) {
        self.changes.give_back(writes.into_iter().map(|write| (write.room, ())));
    }

    /// Marks every room to be written again, since Redis has lost its data.
    pub(super) fn rewrite_all(&mut self) {
        for (name, room) in &mut self.rooms {
            room.written = false;
            self.changes.put(Arc::clone(name), ());
        }
    }

    /// Notes the connection that leads to Redis. Where it is a new one, marks every room to be written again. Returns
    /// whether there was another before.
    pub(super) fn relink(&mut self, link: u64) -> bool {
        let before = std::mem::replace(&mut self.link, link);
        if before == link {
            return false;
        }
        self.rewrite_all();
        before != NO_LINK
    }

    /// Marks entries for removal that Redis has under this instance's name without a connection here.
    pub(super) fn remove_strays(&mut self, rooms: impl Iterator<Item = Arc<str>>) {
        for room in rooms {
            self.changes.put(room, ());
        }
    }

    /// Returns at most `count` rooms.
    pub(super) fn first(&self, count: usize) -> BTreeSet<Box<str>> {
        self.rooms.keys().take(count).map(|room| (**room).into()).collect()
    }
}

/// Number of the connection before the first.
const NO_LINK: u64 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all changes, as Redis gets them: rooms, in order, and whether they are here.
    fn taken(rooms: &mut LocalRooms) -> (Vec<Write>, Vec<(String, bool)>) {
        let writes = rooms.take(100);
        let mut seen: Vec<_> =
            writes.iter().map(|write| (write.room.to_string(), write.is_here)).collect();
        seen.sort();
        (writes, seen)
    }

    fn write(rooms: &mut LocalRooms) -> Vec<(String, bool)> {
        let (writes, seen) = taken(rooms);
        rooms.written(writes);
        seen
    }

    #[test]
    fn a_room_is_written_with_its_first_connection_and_removed_with_its_last() {
        let mut rooms = LocalRooms::new(true, 1);
        let (name, changed) = rooms.enter("r", 1);
        assert!(changed && rooms.unwritten("r").is_some());
        assert!(!rooms.enter("r", 2).1, "the entry is on its way");
        assert_eq!(write(&mut rooms), [("r".into(), true)]);
        assert!(rooms.unwritten("r").is_none() && rooms.changes.is_written());
        assert!(rooms.has("r", 2) && !rooms.has("r", 3) && !rooms.has("s", 1));
        assert!(!rooms.leave(&name, 1));
        assert!(rooms.leave(&name, 2));
        assert_eq!(write(&mut rooms), [("r".into(), false)]);
        assert!(!rooms.leave(&name, 2));
        assert!(rooms.changes.is_written() && rooms.len() == 0);
    }

    #[test]
    fn a_short_lived_room_is_never_written() {
        let mut rooms = LocalRooms::new(true, 1);
        let (name, _) = rooms.enter("r", 1);
        assert!(!rooms.leave(&name, 1));
        assert!(rooms.changes.is_written() && write(&mut rooms).is_empty());
    }

    #[test]
    fn a_room_that_is_entered_during_its_removal_is_written_again() {
        let mut rooms = LocalRooms::new(true, 1);
        let (name, _) = rooms.enter("r", 1);
        let (entering, _) = taken(&mut rooms);
        rooms.leave(&name, 1);
        rooms.enter("r", 2);
        rooms.written(entering);
        assert!(rooms.unwritten("r").is_some(), "a removal may be on its way");
        assert_eq!(write(&mut rooms), [("r".into(), true)]);
        assert!(rooms.unwritten("r").is_none());
    }

    #[test]
    fn writes_in_doubt_are_repeated_with_present_state() {
        let mut rooms = LocalRooms::new(true, 1);
        let (name, _) = rooms.enter("a", 1);
        rooms.enter("b", 2);
        let (writes, _) = taken(&mut rooms);
        rooms.leave(&name, 1);
        rooms.give_back(writes);
        assert_eq!(write(&mut rooms), [("a".into(), false), ("b".into(), true)]);
        rooms.remove_strays(["c".into()].into_iter());
        assert!(!rooms.relink(1));
        assert!(rooms.unwritten("b").is_none());
        assert!(rooms.relink(2), "another Redis may answer");
        assert!(rooms.unwritten("b").is_some());
        assert_eq!(write(&mut rooms), [("b".into(), true), ("c".into(), false)]);
    }

    #[test]
    fn an_abandoned_room_stays_until_it_is_swept() {
        let mut rooms = LocalRooms::new(true, 1);
        let (name, _) = rooms.enter("r", 1);
        write(&mut rooms);
        rooms.abandon(&name, 1);
        assert!(!rooms.leave(&name, 1));
        assert!(!rooms.has("r", 1) && rooms.has_room("r") && rooms.changes.is_written());
        let abandoned = rooms.abandoned(10);
        assert_eq!(abandoned, [(Arc::clone(&name), 1)]);
        rooms.enter("r", 2);
        rooms.abandon(&name, 2);
        rooms.swept(&name, 1);
        assert!(rooms.has_room("r"), "another was abandoned meanwhile");
        rooms.enter("r", 3);
        rooms.swept(&name, 2);
        assert!(rooms.abandoned(10).is_empty() && rooms.has("r", 3) && rooms.changes.is_written());
        assert!(rooms.leave(&name, 3));
        assert_eq!(write(&mut rooms), [("r".into(), false)]);
    }

    #[test]
    fn without_a_shared_registry_nothing_waits() {
        let mut rooms = LocalRooms::new(false, 0);
        for (connection, room) in ["c", "a", "b"].into_iter().enumerate() {
            assert!(!rooms.enter(room, connection as u64).1);
        }
        assert!(rooms.changes.is_written());
        assert_eq!(rooms.first(2), ["a".into(), "b".into()].into());
    }
}
