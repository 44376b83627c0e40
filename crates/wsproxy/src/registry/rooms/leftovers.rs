//! Takes members of a lost instance out of their rooms; done by another instance, or by a later run with the same name.

use std::borrow::Cow;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use serde::Deserialize;
use wsproxy_proto::{
    names::{Id, Names},
    rooms::wire::{self, Connection, Form, Record},
};

use crate::{
    redis::{reply::odd_reply, resp::Reply, script, words::milliseconds},
    registry::{
        commands::{Commands, SCAN_START},
        lease::{LeaseSettings, LeasedState, LostInstance},
        rooms::keys::Field,
    },
    store::command::StoreError,
};

/// Takes the members of an instance out of rooms.
pub(in crate::registry) struct RoomLeftovers {
    commands: Commands,
    names: Names,
    /// Milliseconds for which the keys of an empty room stay.
    empty_ms: String,
}

/// Members of one room that leave together.
pub(super) struct Leaving {
    room: Id,
    places: Vec<Place>,
}

/// A client of a room with the printed connection that holds its place.
#[derive(Clone)]
struct Place {
    client: String,
    connection: String,
}

impl RoomLeftovers {
    pub(in crate::registry) fn new(commands: Commands, settings: &LeaseSettings) -> Self {
        let empty_ms = milliseconds(settings.empty_room_ttl).to_string();
        Self { commands, names: settings.names.clone(), empty_ms }
    }

    /// Returns the members of rooms whose records name an instance, without those whose printed connection is in use.
    pub(super) async fn find(
        &self,
        server: &str,
        rooms: &[Bytes],
        is_in_use: impl Fn(&Id, &str) -> bool + Sync,
    ) -> Result<Vec<Leaving>, StoreError> {
        let is_in_use = &is_in_use;
        // No gateway wrote a field that is no id, so no member is there.
        let rooms = rooms.iter().filter_map(room_of).map(async |room| {
            let mut places = Vec::new();
            let (key, mut cursor) = (self.names.room_members(&room), SCAN_START);
            loop {
                let (next, members) = match self.commands.scan(&key, &cursor).await {
                    // A key of another type holds no member.
                    Err(error) if error.is_of_one_key() => break,
                    piece => piece?,
                };
                let found = members.iter().filter_map(|member| place_at(server, member));
                places.extend(found.filter(|place| !is_in_use(&room, &place.connection)));
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            Ok((room, places))
        });
        let rooms = try_join_all(rooms).await?;
        let pieces = rooms.iter().flat_map(|(room, places)| {
            let piece = |places: &[Place]| Leaving { room: room.clone(), places: places.to_vec() };
            places.chunks(MEMBERS_AT_A_TIME).map(piece)
        });
        Ok(pieces.collect())
    }

    /// Takes members out of their rooms. Returns the number of those who left.
    pub(super) async fn end(&self, leaving: &[Leaving]) -> Result<u64, StoreError> {
        let leaves = leaving.iter().map(async |leaving| match self.leave(leaving).await {
            // A key of another type holds no member.
            Err(error) if error.is_of_one_key() => Ok(0),
            left => left,
        });
        Ok(try_join_all(leaves).await?.into_iter().sum())
    }

    /// Takes members out of one room, with all that they have there. Returns the number of those who left: others came
    /// back with another connection.
    async fn leave(&self, Leaving { room, places }: &Leaving) -> Result<u64, StoreError> {
        let names = &self.names;
        let keys = [
            names.room_members(room),
            names.room_meta(room),
            names.room_entities(room),
            names.room_positions(room),
        ];
        let (channel, count) = (names.room(room), places.len().to_string());
        // No instance takes this for its own, so the one that runs it tells its clients too.
        let origin = wire::origin(Connection { server: 0, number: 0 }, Form::Envelope);
        let mut words: Vec<&[u8]> = vec![b"4"];
        words.extend(keys.iter().map(String::as_bytes));
        words.extend([channel.as_bytes(), &origin, self.empty_ms.as_bytes(), count.as_bytes()]);
        for Place { client, connection } in places {
            words.extend([client.as_bytes(), connection.as_bytes()]);
        }
        words.push(b"*");
        match self.commands.run_script(&script::ROOM_LEAVE, &words).await? {
            Reply::Array(left) => Ok(left.len() as u64),
            _ => Err(odd_reply()),
        }
    }

    async fn clean_up(&self, lost: &LostInstance<'_>) -> Result<bool, StoreError> {
        let key = self.names.server_rooms(lost.server);
        for _ in 0..WALKS_MAX {
            let mut cursor = SCAN_START;
            loop {
                let (next, fields) = self.commands.scan(&key, &cursor).await?;
                for fields in fields.chunks(ROOMS_AT_A_TIME) {
                    if !self.clean_rooms(lost, fields).await? {
                        return Ok(false);
                    }
                    self.commands.remove_equal(&key, fields.iter().cloned()).await?;
                }
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            if self.commands.hash_len(&key).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes the members of a lost instance out of some rooms; returns whether all could leave.
    async fn clean_rooms(
        &self,
        lost: &LostInstance<'_>,
        fields: &[Field],
    ) -> Result<bool, StoreError> {
        // Read before the instance is judged: a member of a later run joins only once that has the lease.
        let rooms: Vec<_> = fields.iter().map(|(room, _)| room.clone()).collect();
        let leaving = self.find(lost.server, &rooms, |_, _| false).await?;
        for some in leaving.chunks(LEAVES_AT_A_TIME) {
            if !lost.is_certain().await? {
                return Ok(false);
            }
            let left = self.end(some).await?;
            lost.counters.room_members_reaped.add(left);
        }
        lost.is_certain().await
    }
}

impl LeasedState for RoomLeftovers {
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.clean_up(lost).boxed()
    }

    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>> {
        let key = self.names.server_rooms(server);
        async move { Ok(self.commands.hash_len(&key).await? == 0) }.boxed()
    }
}

/// Returns the room that a field names.
fn room_of(field: &Bytes) -> Option<Id> {
    Id::parse(std::str::from_utf8(field).ok()?).ok()
}

/// Returns the place of a member whose record names an instance.
fn place_at(server: &str, (client, record): &(Bytes, Bytes)) -> Option<Place> {
    #[derive(Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        server: Cow<'a, str>,
    }
    let (client, record) = (std::str::from_utf8(client).ok()?, std::str::from_utf8(record).ok()?);
    let record = Record::parse(record)?;
    let named: Named<'_> = serde_json::from_str(record.json).ok()?;
    let connection = record.connection.into();
    (named.server == server).then(|| Place { client: client.into(), connection })
}

/// Rooms that are read at a time.
pub(super) const ROOMS_AT_A_TIME: usize = 32;

/// Leaves of rooms that run at a time, after one look at the lease of the lost instance.
pub(super) const LEAVES_AT_A_TIME: usize = 8;

/// Members that leave a room at a time: Redis does nothing else meanwhile.
const MEMBERS_AT_A_TIME: usize = 500;

/// Upper bound of walks over the rooms of one instance: a walk may miss rooms that move.
const WALKS_MAX: usize = 10;
