//! The members and the state of rooms in the store: Redis, or this process. Knows no connection.
//!
//! A join and a leave change the record of a member and publish the change in one step, so that every instance learns of
//! each once.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_proto::{
    names::{Id, Names},
    rooms::{
        mirror::Reading,
        wire::{self, Connection, Form, Record},
    },
};

use crate::{
    bus::{
        Bus,
        publish::{Keep, Publish},
    },
    core::Core,
    endpoint::rooms::table::Table,
    hub::Hub,
    redis::{
        reply::{odd_reply, text},
        resp::Reply,
        script,
        words::milliseconds,
    },
    registry::commands::Commands,
    store::command::StoreError,
    telemetry::time,
};

pub(super) mod lookup;

/// The store of rooms. Every call has the deadline `redis.response_timeout`.
pub(super) struct Keeper {
    names: Names,
    members_max: u32,
    empty_ttl: Duration,
    backend: KeeperBackend,
}

/// Storage of rooms.
enum KeeperBackend {
    /// This process. The lock covers a change and its publishing, so that both have one order. The mirror of a room is
    /// all of its further state.
    Embedded(Mutex<HashMap<Id, EmbeddedRoom>>, Arc<Hub>, Arc<Table>),
    /// Redis.
    Redis(Commands),
}

/// The members of a room in this process.
#[derive(Default)]
struct EmbeddedRoom {
    version: u64,
    members: HashMap<Id, EmbeddedMember>,
}

struct EmbeddedMember {
    connection: Connection,
    user: Id,
    json: String,
}

/// The entities that a member has which joins again, with their snapshots. Redis may have lost them too, and other
/// instances never have had them.
pub(super) type Entities<'a> = &'a [(Box<str>, Bytes)];

/// A wish to be a member.
#[derive(Debug, Clone, Copy)]
pub(super) struct Join<'a> {
    /// The room.
    pub(super) room: &'a Id,
    /// The member's name in the room.
    pub(super) client: &'a Id,
    /// The member's connection.
    pub(super) connection: Connection,
    /// The member's user.
    pub(super) user: &'a Id,
    /// Record of the member, as a JSON object.
    pub(super) json: &'a str,
    /// Set to join after Redis may have lost the member: another connection that has the name by now keeps it.
    pub(super) again: Option<Entities<'a>>,
}

/// Answer to a wish to be a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Joined {
    /// The connection is a member.
    Held {
        /// Version of the room's members.
        version: u64,
        /// Connection that had the name until now, which may be the same one.
        before: Option<Connection>,
    },
    /// Another user has the name.
    Taken,
    /// The room has as many members as it may.
    Full,
    /// Another connection of the user has the name by now.
    Replaced,
}

impl Keeper {
    /// Makes the store of an instance, whose rooms are in `table`.
    pub(super) fn new(core: &Core, table: &Arc<Table>) -> Self {
        let config = &core.config;
        let backend = match &core.bus {
            Bus::Embedded(_) => {
                let (hub, table) = (Arc::clone(&core.hub), Arc::clone(table));
                KeeperBackend::Embedded(Mutex::default(), hub, table)
            }
            Bus::Redis(bus) => KeeperBackend::Redis(Commands::new(
                bus.client().clone(),
                config.redis.response_timeout,
            )),
        };
        Self {
            names: core.names.clone(),
            members_max: config.rooms.members_max,
            empty_ttl: config.rooms.empty_ttl,
            backend,
        }
    }

    /// Enters a member, or replaces the record of one.
    ///
    /// # Errors
    /// The store did not answer. The join may take effect later: run [`Self::leave`].
    pub(super) async fn join(&self, join: Join<'_>) -> Result<Joined, StoreError> {
        match &self.backend {
            KeeperBackend::Embedded(rooms, hub, table) => {
                let mut rooms = rooms.lock();
                let room = rooms.entry_ref(join.room).or_default();
                let (joined, told) = room.join(join, self.members_max);
                if room.members.is_empty() {
                    rooms.remove(join.room);
                }
                if let Some(told) = told {
                    self.publish(hub, table, join.room, told);
                }
                Ok(joined)
            }
            KeeperBackend::Redis(commands) => self.join_in_redis(commands, join).await,
        }
    }

    /// Removes members that these connections still are, with their `fields` of entities and positions. Returns the names
    /// of those that are gone.
    ///
    /// # Errors
    /// The store did not answer. The leave may take effect later.
    pub(super) async fn leave(
        &self,
        room: &Id,
        members: &[(Id, Connection)],
        fields: &[String],
    ) -> Result<Vec<Id>, StoreError> {
        match &self.backend {
            KeeperBackend::Embedded(rooms, hub, table) => {
                let mut rooms = rooms.lock();
                let Some(state) = rooms.get_mut(room) else { return Ok(Vec::new()) };
                let mut gone = Vec::new();
                for (client, connection) in members {
                    if state.leave(client, *connection) {
                        let left = wire::leave(*connection, state.version, client.as_str());
                        self.publish(hub, table, room, left);
                        gone.push(client.clone());
                    }
                }
                if state.members.is_empty() {
                    rooms.remove(room);
                }
                Ok(gone)
            }
            KeeperBackend::Redis(commands) => {
                self.leave_in_redis(commands, room, (members, fields)).await
            }
        }
    }

    /// Reads a room as the store has it.
    ///
    /// # Errors
    /// The store did not answer.
    pub(super) async fn read(&self, room: &Id) -> Result<Reading, StoreError> {
        match &self.backend {
            KeeperBackend::Embedded(rooms, ..) => {
                let rooms = rooms.lock();
                let mut reading = Reading { is_certain: true, ..Reading::default() };
                if let Some(state) = rooms.get(room) {
                    reading.version = state.version;
                    reading.members = state.members.iter().map(|(c, m)| m.field(c)).collect();
                }
                Ok(reading)
            }
            KeeperBackend::Redis(commands) => {
                let [members, meta, entities, positions] = self.keys(room);
                let version = ["HGET", &meta, "v"];
                // In this order on one connection: see `Reading`.
                let (entities, positions, version, members) = tokio::try_join!(
                    fields(commands, &entities),
                    fields(commands, &positions),
                    commands.call(&version),
                    fields(commands, &members),
                )?;
                let version = text(&version).and_then(|version| version.parse().ok());
                let version = version.unwrap_or_default();
                Ok(Reading { version, members, entities, positions, is_certain: false })
            }
        }
    }

    /// Reads the newest positions of a room.
    ///
    /// # Errors
    /// The store did not answer.
    pub(super) async fn read_positions(
        &self,
        room: &Id,
    ) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        match &self.backend {
            KeeperBackend::Embedded(..) => Ok(Vec::new()),
            KeeperBackend::Redis(commands) => {
                fields(commands, &self.names.room_positions(room)).await
            }
        }
    }

    /// Returns whether the state of rooms is in Redis, beside their members.
    pub(super) const fn is_shared(&self) -> bool {
        matches!(self.backend, KeeperBackend::Redis(_))
    }

    /// Removes what clients that are no members have left behind.
    ///
    /// # Errors
    /// The store did not answer.
    pub(super) async fn sweep(&self, room: &Id, clients: &[Box<str>]) -> Result<(), StoreError> {
        let KeeperBackend::Redis(commands) = &self.backend else { return Ok(()) };
        let (keys, channel) = (self.keys(room), self.names.room(room));
        let ttl = milliseconds(self.empty_ttl).to_string();
        let head = wire::origin(Connection { server: 0, number: 0 }, Form::Envelope);
        let count = clients.len().to_string();
        let mut words: Vec<&[u8]> = vec![b"4"];
        words.extend(keys.iter().map(String::as_bytes));
        words.extend([channel.as_bytes(), &head, ttl.as_bytes(), count.as_bytes()]);
        words.extend(clients.iter().flat_map(|client| [client.as_bytes(), b""]));
        words.push(b"*");
        commands.run_script(&script::ROOM_LEAVE, &words).await.map(drop)
    }

    async fn join_in_redis(
        &self,
        commands: &Commands,
        join: Join<'_>,
    ) -> Result<Joined, StoreError> {
        let keys = self.keys(join.room);
        let (channel, connection) = (self.names.room(join.room), join.connection.to_string());
        let (most, ttl) = (self.members_max.to_string(), milliseconds(KEYS_TTL).to_string());
        let head = wire::origin(join.connection, Form::Envelope);
        let again = if join.again.is_some() { "again" } else { "" };
        let mut words: Vec<&[u8]> = vec![b"4"];
        words.extend(keys.iter().map(String::as_bytes));
        words.extend([
            join.client.as_str().as_bytes(),
            connection.as_bytes(),
            join.user.as_str().as_bytes(),
            join.json.as_bytes(),
            most.as_bytes(),
            channel.as_bytes(),
            &head,
            ttl.as_bytes(),
            again.as_bytes(),
        ]);
        for (entity, snapshot) in join.again.into_iter().flatten() {
            words.extend([entity.as_bytes(), snapshot]);
        }
        let Reply::Array(parts) = commands.run_script(&script::ROOM_JOIN, &words).await? else {
            return Err(odd_reply());
        };
        let [Reply::Integer(is_held), what, before] = &parts[..] else { return Err(odd_reply()) };
        match (is_held, text(what).unwrap_or_default()) {
            (1, version) => {
                let version = version.parse().map_err(|_| odd_reply())?;
                let before = text(before).and_then(Connection::parse);
                Ok(Joined::Held { version, before })
            }
            (_, "taken") => Ok(Joined::Taken),
            (_, "full") => Ok(Joined::Full),
            (_, "replaced") => Ok(Joined::Replaced),
            _ => Err(odd_reply()),
        }
    }

    async fn leave_in_redis(
        &self,
        commands: &Commands,
        room: &Id,
        (members, fields): (&[(Id, Connection)], &[String]),
    ) -> Result<Vec<Id>, StoreError> {
        let Some((_, first)) = members.first() else { return Ok(Vec::new()) };
        let (keys, channel) = (self.keys(room), self.names.room(room));
        let ttl = milliseconds(self.empty_ttl).to_string();
        let nobody = Connection { number: 0, ..*first };
        let head = wire::origin(nobody, Form::Envelope);
        let mut words: Vec<&[u8]> = vec![b"4"];
        words.extend(keys.iter().map(String::as_bytes));
        let count = members.len().to_string();
        words.extend([channel.as_bytes(), &head, ttl.as_bytes(), count.as_bytes()]);
        let connections: Vec<_> =
            members.iter().map(|(_, connection)| connection.to_string()).collect();
        for ((client, _), connection) in members.iter().zip(&connections) {
            words.extend([client.as_str().as_bytes(), connection.as_bytes()]);
        }
        words.extend(fields.iter().map(String::as_bytes));
        let Reply::Array(gone) = commands.run_script(&script::ROOM_LEAVE, &words).await? else {
            return Err(odd_reply());
        };
        Ok(gone.iter().filter_map(text).filter_map(|client| Id::parse(client).ok()).collect())
    }

    /// Returns the keys of a room: members, meta, entities, positions.
    pub(super) fn keys(&self, room: &Id) -> [String; 4] {
        let names = &self.names;
        [
            names.room_members(room),
            names.room_meta(room),
            names.room_entities(room),
            names.room_positions(room),
        ]
    }

    /// Publishes a change in this process. Where the queue of the bus is full the room is read instead.
    fn publish(&self, hub: &Hub, table: &Table, room: &Id, frame: Bytes) {
        let channel = self.names.room(room).into();
        let publish = Publish { channel, payload: frame, keep: Keep::Nothing, receipt: None };
        if hub.publish(publish).is_err()
            && let Some(room) = table.get(room)
        {
            room.read_behind();
        }
    }
}

impl EmbeddedRoom {
    /// Does what the script does. Also returns the frame that tells others of it.
    fn join(&mut self, join: Join<'_>, members_max: u32) -> (Joined, Option<Bytes>) {
        let held = self.members.get(join.client);
        let before = held.map(|held| held.connection);
        if held.is_some_and(|held| held.user != *join.user) {
            return (Joined::Taken, None);
        }
        if join.again.is_some() && before.is_some_and(|before| before != join.connection) {
            return (Joined::Replaced, None);
        }
        if held.is_none() && self.members.len() >= members_max as usize {
            return (Joined::Full, None);
        }
        if held.is_none() {
            self.advance();
        }
        let member = EmbeddedMember {
            connection: join.connection,
            user: join.user.clone(),
            json: join.json.to_owned(),
        };
        let record = member.record();
        self.members.insert(join.client.clone(), member);
        let (from, client) = (join.connection, join.client.as_str());
        let told = match before {
            None => Some(wire::join(from, self.version, client, &record)),
            Some(before) if before != from => {
                Some(wire::replaced(from, &before.to_string(), client, &record))
            }
            Some(_) => None,
        };
        (Joined::Held { version: self.version, before }, told)
    }

    fn leave(&mut self, client: &Id, connection: Connection) -> bool {
        let is_member = self.members.get(client).is_some_and(|held| held.connection == connection);
        if is_member {
            self.members.remove(client);
            self.advance();
        }
        is_member
    }

    /// Counts a change. Versions of a new room begin at the time, so that none repeats.
    fn advance(&mut self) {
        self.version = match self.version {
            0 => time::since_epoch().as_micros() as u64,
            version => version + 1,
        };
    }
}

impl EmbeddedMember {
    fn record(&self) -> String {
        let connection = self.connection.to_string();
        Record { connection: &connection, user: self.user.as_str(), json: &self.json }.to_string()
    }

    fn field(&self, client: &Id) -> (Bytes, Bytes) {
        (client.as_str().to_owned().into(), self.record().into())
    }
}

/// Reads a hash.
async fn fields(commands: &Commands, key: &str) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
    let Reply::Array(parts) = commands.call(&["HGETALL", key]).await? else {
        return Err(odd_reply());
    };
    let field = |field: &[Reply]| match field {
        [Reply::Text(name), Reply::Text(value)] => Some((name.clone(), value.clone())),
        _ => None,
    };
    Ok(parts.chunks_exact(2).filter_map(field).collect())
}

/// Time to live of a room's keys, which each join renews.
pub(super) const KEYS_TTL: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use futures_util::FutureExt;
    use wsproxy_conn::clock;

    use super::*;
    use crate::{
        config::{Config, rooms::Development},
        endpoint::rooms::{Rooms, room::Room, table::RoomHold},
        server::Instance,
    };

    /// An instance on the embedded bus, with a room that is open and has no members.
    async fn open() -> (Instance, Arc<Rooms>, RoomHold) {
        let mut config = Config::default();
        (config.server.bind, config.server.port) = (IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        config.endpoints.rooms = true;
        config.rooms.development = Development::Loopback;
        config.redis.publish_queue_bytes = 64 << 10;
        let instance = Instance::start(config, |_, _| axum::Router::new()).await.unwrap();
        let rooms = Arc::clone(&instance.families().rooms);
        let id = Id::parse("lobby").unwrap();
        let make = |bytes| Room::new(&rooms, &id, bytes, clock::now());
        let hold = rooms.table.hold(&id, make).unwrap();
        hold.room().open(&rooms).await.unwrap();
        (instance, rooms, hold)
    }

    /// Fills the queue of the bus: nothing is delivered before the test waits.
    fn fill(rooms: &Rooms) {
        let empty = || Publish {
            channel: "x".into(),
            payload: Bytes::new(),
            keep: Keep::Nothing,
            receipt: None,
        };
        while rooms.hub.publish(empty()).is_ok() {}
    }

    fn join(rooms: &Rooms, client: &str, number: u64) {
        let connection = Connection { server: rooms.server, number };
        let (room, client) = (Id::parse("lobby").unwrap(), Id::parse(client).unwrap());
        let (user, json) = (&client, "{}");
        let join = Join { room: &room, client: &client, connection, user, json, again: None };
        let joined = rooms.keeper.join(join).now_or_never().unwrap().unwrap();
        assert!(matches!(joined, Joined::Held { .. }));
    }

    fn leave(rooms: &Rooms, client: &str, number: u64) {
        let connection = Connection { server: rooms.server, number };
        let (room, client) = (Id::parse("lobby").unwrap(), Id::parse(client).unwrap());
        let members = [(client, connection)];
        let left = rooms.keeper.leave(&room, &members, &[]);
        assert_eq!(left.now_or_never().unwrap().unwrap().len(), 1);
    }

    async fn has_members(room: &Room, wanted: &[&str]) {
        for _ in 0..500 {
            let mut found: Vec<_> = room.records().into_iter().map(|(client, _)| client).collect();
            found.sort_unstable();
            if found == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?} instead of {wanted:?}", room.records());
    }

    #[tokio::test]
    async fn a_join_that_finds_the_queue_full_is_read() {
        let (instance, rooms, hold) = open().await;
        fill(&rooms);
        join(&rooms, "ann", 1);
        has_members(hold.room(), &["ann"]).await;
        drop(hold);
        instance.drain(()).await;
    }

    #[tokio::test]
    async fn a_leave_that_finds_the_queue_full_is_read() {
        let (instance, rooms, hold) = open().await;
        join(&rooms, "ann", 1);
        has_members(hold.room(), &["ann"]).await;
        // The news of one join are still on their way.
        join(&rooms, "bob", 2);
        fill(&rooms);
        leave(&rooms, "ann", 1);
        leave(&rooms, "bob", 2);
        join(&rooms, "cat", 3);
        has_members(hold.room(), &["cat"]).await;
        drop(hold);
        instance.drain(()).await;
    }
}
