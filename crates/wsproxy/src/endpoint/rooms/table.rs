//! The rooms with members at this instance. Knows no message.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_proto::names::Id;

use crate::endpoint::rooms::room::Room;

/// The rooms of this instance, at most `rooms.rooms_max`.
pub(super) struct Table {
    rooms: Mutex<HashMap<Id, Held>>,
    rooms_max: usize,
    /// Bytes of the state of all rooms.
    state_bytes: Arc<AtomicUsize>,
    state_bytes_max: usize,
}

/// A room and the number of its holders.
struct Held {
    room: Arc<Room>,
    holders: usize,
}

/// Hold on a room. The room and its subscription go with the last hold.
pub(super) struct RoomHold {
    room: Arc<Room>,
    table: Arc<Table>,
}

impl Table {
    pub(super) fn new(rooms_max: usize, state_bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            rooms: Mutex::default(),
            rooms_max,
            state_bytes: Arc::default(),
            state_bytes_max,
        })
    }

    /// Returns the room, which `make` makes where it is not here; `None` if no further room has a place.
    pub(super) fn hold(
        self: &Arc<Self>,
        id: &Id,
        make: impl FnOnce(Arc<AtomicUsize>) -> Arc<Room>,
    ) -> Option<RoomHold> {
        let mut rooms = self.rooms.lock();
        if let Some(held) = rooms.get_mut(id) {
            held.holders += 1;
            return Some(RoomHold { room: Arc::clone(&held.room), table: Arc::clone(self) });
        }
        if rooms.len() >= self.rooms_max || self.state_bytes() >= self.state_bytes_max {
            return None;
        }
        let room = make(Arc::clone(&self.state_bytes));
        rooms.insert(id.clone(), Held { room: Arc::clone(&room), holders: 1 });
        Some(RoomHold { room, table: Arc::clone(self) })
    }

    /// Returns a room that is here.
    pub(super) fn get(&self, id: &Id) -> Option<Arc<Room>> {
        self.rooms.lock().get(id).map(|held| Arc::clone(&held.room))
    }

    /// Returns all rooms that are here.
    pub(super) fn all(&self) -> Vec<Arc<Room>> {
        self.rooms.lock().values().map(|held| Arc::clone(&held.room)).collect()
    }

    /// Returns the number of rooms.
    pub(super) fn len(&self) -> usize {
        self.rooms.lock().len()
    }

    /// Returns the bytes of the state of all rooms.
    pub(super) fn state_bytes(&self) -> usize {
        self.state_bytes.load(Relaxed)
    }
}

impl RoomHold {
    /// Returns the room.
    pub(super) const fn room(&self) -> &Arc<Room> {
        &self.room
    }
}

impl Clone for RoomHold {
    fn clone(&self) -> Self {
        if let Some(held) = self.table.rooms.lock().get_mut(&self.room.id) {
            held.holders += 1;
        }
        Self { room: Arc::clone(&self.room), table: Arc::clone(&self.table) }
    }
}

impl Deref for RoomHold {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.room
    }
}

impl Drop for RoomHold {
    fn drop(&mut self) {
        let mut rooms = self.table.rooms.lock();
        let Some(held) = rooms.get_mut(&self.room.id) else { return };
        held.holders -= 1;
        if held.holders == 0 {
            rooms.remove(&self.room.id);
            drop(rooms);
            // Outside the lock: it ends the subscription.
            self.room.close();
        }
    }
}
