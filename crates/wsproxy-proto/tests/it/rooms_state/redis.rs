//! Model of the four scripts of rooms, of the hashes behind them and of the channel, with the truth about members.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use wsproxy_proto::rooms::{
    mirror::Reading,
    wire::{self, Connection, Form, Record},
};

/// Redis with one room.
#[derive(Debug, Default)]
pub(crate) struct Redis {
    /// Time in microseconds.
    pub(crate) now: u64,
    members_max: usize,
    /// Readings see version and members at one moment, so that a test knows which events follow.
    reads_at_once: bool,
    pub(crate) members: BTreeMap<String, String>,
    version: Option<u64>,
    pub(crate) entities: BTreeMap<String, Bytes>,
    pub(crate) positions: BTreeMap<String, Bytes>,
    /// Messages on their way to each subscriber; `None` where it is not subscribed.
    pub(crate) channels: Vec<Option<VecDeque<Bytes>>>,
    /// Joins (`true`) and leaves with their versions.
    pub(crate) truth: Vec<(u64, bool, String)>,
}

/// Answer of the script that joins.
#[derive(Debug, Clone)]
pub(crate) enum Joined {
    Member { version: u64, before: Option<String> },
    Taken,
    Replaced,
    Full,
}

/// Reading that is under way at the server, which reads one hash after the other.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    reading: Reading,
    commands: usize,
}

impl Redis {
    pub(crate) fn new(members_max: usize, subscribers: usize, reads_at_once: bool) -> Self {
        let channels = vec![None; subscribers];
        Self { now: 1_000_000_000, members_max, reads_at_once, channels, ..Self::default() }
    }

    /// Does what `room_join.lua` does.
    pub(crate) fn join(
        &mut self,
        client: &str,
        record: &Record<'_>,
        again: Option<&[(String, Bytes)]>,
    ) -> Joined {
        let held = self.members.get(client).cloned();
        let held = held.as_deref().and_then(Record::parse);
        let from = record.connection().unwrap();
        let before = match held {
            Some(held) if held.user != record.user => return Joined::Taken,
            Some(held) if again.is_some() && held.connection != record.connection => {
                return Joined::Replaced;
            }
            None if self.members.len() >= self.members_max => return Joined::Full,
            _ => held.map(|held| held.connection.to_owned()),
        };
        let text = record.to_string();
        self.members.insert(client.to_owned(), text.clone());
        let version = match &before {
            None => {
                let version = self.next_version();
                self.truth.push((version, true, client.to_owned()));
                self.publish(&wire::join(from, version, client, &text));
                version
            }
            Some(before) => {
                if before != record.connection {
                    self.publish(&wire::replaced(from, before, client, &text));
                }
                self.version.unwrap_or(0)
            }
        };
        for (entity, snapshot) in again.into_iter().flatten() {
            let field = wire::field(client, entity);
            if before.is_none() || !self.entities.contains_key(&field) {
                self.entities.insert(field, snapshot.clone());
                self.publish(&entity_message(from, client, entity, snapshot));
            }
        }
        Joined::Member { version, before }
    }

    /// Does what `room_leave.lua` does for one client.
    pub(crate) fn leave(&mut self, client: &str, connection: &str) {
        let held = self.members.get(client).map(|record| Record::parse(record).unwrap().connection);
        if held.is_some_and(|held| held != connection) {
            return;
        }
        if held.is_some() {
            self.members.remove(client);
            let version = self.next_version();
            self.truth.push((version, false, client.to_owned()));
            let nobody = Connection { server: 0, number: 0 };
            self.publish(&wire::leave(nobody, version, client));
        }
        let is_other = |field: &String| wire::parse_field(field.as_bytes()).unwrap().0 != client;
        self.entities.retain(|field, _| is_other(field));
        self.positions.retain(|field, _| is_other(field));
    }

    /// Does what `room_state.lua` does. Returns whether the connection still holds its place.
    pub(crate) fn state(
        &mut self,
        client: &str,
        connection: &str,
        entity: &str,
        snapshot: Option<Bytes>,
        message: &Bytes,
    ) -> bool {
        let held = self.members.get(client).map(|record| Record::parse(record).unwrap().connection);
        if held != Some(connection) {
            return false;
        }
        let field = wire::field(client, entity);
        match snapshot {
            Some(snapshot) => drop(self.entities.insert(field, snapshot)),
            None => {
                self.entities.remove(&field);
                self.positions.remove(&field);
            }
        }
        self.publish(message);
        true
    }

    /// Does what `room_positions.lua` does for one position: it is written where the connection still holds its place.
    pub(crate) fn position(&mut self, (client, entity): (&str, &str), from: &str, position: Bytes) {
        let held = self.members.get(client).map(|record| Record::parse(record).unwrap().connection);
        if held == Some(from) {
            self.positions.insert(wire::field(client, entity), position);
        }
    }

    pub(crate) fn publish(&mut self, message: &Bytes) {
        for channel in self.channels.iter_mut().flatten() {
            channel.push_back(message.clone());
        }
    }

    fn next_version(&mut self) -> u64 {
        let version = self.version.map_or(self.now, |version| version + 1);
        self.version = Some(version);
        version
    }

    pub(crate) fn empty(&mut self) {
        self.members.clear();
        self.entities.clear();
        self.positions.clear();
        self.version = None;
        self.now += 1_000;
    }

    /// Runs the next command of a reading. Returns whether it was the last.
    pub(crate) fn read(&self, reader: &mut Reader) -> bool {
        let pairs = |map: &BTreeMap<String, Bytes>| {
            map.iter().map(|(field, value)| (field.clone().into(), value.clone())).collect()
        };
        let reading = &mut reader.reading;
        match reader.commands {
            0 => reading.entities = pairs(&self.entities),
            1 => reading.positions = pairs(&self.positions),
            2 if !self.reads_at_once => reading.version = self.version.unwrap_or(0),
            2 => {}
            _ => {
                if self.reads_at_once {
                    reading.version = self.version.unwrap_or(0);
                }
                let members = self.members.iter();
                reading.members = members
                    .map(|(id, record)| (id.clone().into(), record.clone().into()))
                    .collect();
            }
        }
        reader.commands += 1;
        reader.is_done()
    }
}

impl Reader {
    pub(crate) const fn is_done(&self) -> bool {
        self.commands > 3
    }

    pub(crate) fn into_reading(self) -> Reading {
        self.reading
    }
}

/// Encodes all of an entity again.
pub(crate) fn entity_message(
    from: Connection,
    client: &str,
    entity: &str,
    snapshot: &[u8],
) -> Bytes {
    wire::entity(from, &[format!("E {client} {entity} ").as_bytes(), snapshot].concat())
}

/// Encodes a change of an entity as instances of this test do, with `op` and its bytes.
pub(crate) fn state_message(
    from: Connection,
    op: char,
    client: &str,
    entity: &str,
    data: &[u8],
) -> Bytes {
    let payload = [format!("{op} {client} {entity} ").as_bytes(), data].concat();
    wire::message(from, Form::Envelope, &payload)
}
