//! Channels and keys of rooms.

use crate::names::{Id, Names};

impl Names {
    /// Channel of a room.
    #[must_use]
    pub fn room(&self, room: &Id) -> String {
        format!("{}room:{room}", self.prefix)
    }

    /// Hash of a room's members, by client id.
    #[must_use]
    pub fn room_members(&self, room: &Id) -> String {
        self.kept(&self.room(room), "members")
    }

    /// Hash with the version of a room's members.
    #[must_use]
    pub fn room_meta(&self, room: &Id) -> String {
        self.kept(&self.room(room), "meta")
    }

    /// Hash of a room's entities, by client id and entity id.
    #[must_use]
    pub fn room_entities(&self, room: &Id) -> String {
        self.kept(&self.room(room), "entities")
    }

    /// Hash of the last positions in a room, by client id and entity id.
    #[must_use]
    pub fn room_positions(&self, room: &Id) -> String {
        self.kept(&self.room(room), "positions")
    }

    /// Hash of the rooms in which an instance has members.
    #[must_use]
    pub fn server_rooms(&self, server: &str) -> String {
        format!("{}ws:server:{server}:rooms", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::slot;

    #[test]
    fn names_are_those_of_the_contract() {
        let (names, room) = (Names::new("graphwiz"), Id::parse("lobby").unwrap());
        assert_eq!(names.room(&room), "graphwiz:room:lobby");
        let keys = [
            names.room_members(&room),
            names.room_meta(&room),
            names.room_entities(&room),
            names.room_positions(&room),
        ];
        assert_eq!(keys[0], "{graphwiz:room:lobby}:members");
        assert_eq!(Names::new("").room_members(&room), "{room:lobby}:members");
        for key in &keys {
            assert_eq!(slot(key.as_bytes()), slot(names.room(&room).as_bytes()));
        }
        assert_eq!(names.server_rooms("a"), "graphwiz:ws:server:a:rooms");
    }
}
