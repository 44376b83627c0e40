//! Mirror of one room on one instance: members, entities and newest positions, fed by the room's channel and by the
//! members here. Knows neither protobuf nor Redis: bytes and time are arguments.
//!
//! Events to clients are changes of the mirror's set of members. So a join of a known client and a leave of an unknown
//! one are no event.

mod news;
mod reading;
mod replica;
mod shown;
mod state;

pub use reading::{
    Due, LOG_BYTES_MAX, MISSING_MAX, Outcome, POSITIONS_AGAIN, Read, Reading, Ticket,
};
pub use shown::Encoding;
pub use state::{Entity, Member};

use std::mem::take;

use crate::rooms::{
    mirror::{
        news::Op,
        reading::Reader,
        replica::{Counted, Replica},
    },
    wire::{Connection, Kind},
};

/// Bounds of the state of one room.
///
/// Instances that fill a room at the same moment may exceed them together, so news of other instances may take twice
/// as much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Upper bound of the entities of one member. Positions without an entity count too.
    pub member_entities_max: usize,
    /// Upper bound of the entities of the room.
    pub entities_max: usize,
    /// Upper bound of a snapshot, of a position and of presence data, in bytes.
    pub entity_bytes_max: usize,
    /// Upper bound of the whole state, in bytes.
    pub bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            member_entities_max: 100,
            entities_max: 10_000,
            entity_bytes_max: 4 << 10,
            bytes_max: 4 << 20,
        }
    }
}

/// Functions that know the bytes which a mirror keeps.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// Merges an update into the snapshot of an entity; `None` where either is broken. Merging the same updates again,
    /// in the same order, must change nothing.
    pub entity: fn(snapshot: &[u8], update: &[u8]) -> Option<Vec<u8>>,
    /// Writes presence data into the JSON of a record; `None` where either is broken.
    pub presence: fn(json: &str, presence: &[u8]) -> Option<String>,
}

/// Source of a change of entities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The member's connection on this instance.
    Here,
    /// The room's channel.
    Channel,
}

/// Change of a room of which clients have to be told, or connections here be ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A client became a member.
    Joined {
        /// Client id.
        client: Box<str>,
        /// Record, as [`crate::rooms::wire::Record`] reads it.
        record: Box<str>,
    },
    /// A member left. Its entities are gone.
    Left {
        /// Client id.
        client: Box<str>,
        /// Entities that it had, and positions without an entity.
        entities: Vec<Entity>,
    },
    /// A member has another connection. No event for clients, but the holder of the old connection ends it.
    Replaced {
        /// Client id.
        client: Box<str>,
        /// Printed connection that held the place before.
        old_connection: Box<str>,
        /// New record.
        record: Box<str>,
    },
    /// A reading showed another record of a member: its presence has changed.
    Updated {
        /// Client id.
        client: Box<str>,
        /// New record.
        record: Box<str>,
    },
    /// A reading showed an entity that is new or has changed. Its snapshot is in the mirror.
    Spawned {
        /// Client id of the owner.
        client: Box<str>,
        /// Entity id.
        entity: Box<str>,
    },
    /// A reading lacked an entity, or it was of an earlier life of its owner.
    Despawned {
        /// Client id of the owner.
        client: Box<str>,
        /// Entity id.
        entity: Box<str>,
    },
    /// A reading showed another position. It is in the mirror.
    Moved {
        /// Client id of the owner.
        client: Box<str>,
        /// Entity id.
        entity: Box<str>,
    },
}

/// Reason why the mirror did not take a change of an entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The client is no member.
    #[error("the client is no member")]
    NotMember,
    /// The entity is of another member.
    #[error("the entity is of another member")]
    Foreign,
    /// The entity was not spawned, or the update cannot be merged.
    #[error("the entity is unknown")]
    Unknown,
    /// The snapshot, the position or the presence data have too many bytes.
    #[error("an entity and presence data have a limit of bytes")]
    TooLarge,
    /// The member has too many entities.
    #[error("the member has too many entities")]
    MemberFull,
    /// The room has too many entities, or too many bytes.
    #[error("the room has too much state")]
    StateFull,
    /// Newer state of the entity is known.
    #[error("newer state of the entity is known")]
    Overtaken,
}

/// Mirror of one room.
///
/// Invariant: holds at most twice [`Limits`] of entities and positions, and 4 MiB of news while a reading is under
/// way. The number of members is bounded by the script that joins them.
#[derive(Debug)]
pub struct Mirror {
    limits: Limits,
    merge: Merge,
    replica: Replica,
    /// Version of the latest join or leave on the channel; `None` since the link was lost.
    channel: Option<u64>,
    reader: Reader,
}

impl Mirror {
    /// Creates the mirror of a room without news. Its first reading is due at once.
    ///
    /// `server` is the number of this instance's incarnation, as in [`crate::rooms::wire::Connection`]. `now` is in
    /// microseconds, as everywhere in this module.
    #[must_use]
    pub fn new(server: u64, limits: Limits, merge: Merge, now: u64) -> Self {
        let replica = Replica::new(server);
        Self { limits, merge, replica, channel: None, reader: Reader::new(now) }
    }

    /// Returns whether a reading was applied, so that clients may be told of the state. No change is reported before,
    /// but [`Change::Replaced`].
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.reader.is_complete()
    }

    /// Returns the number of members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.replica.state.members().len()
    }

    /// Returns whether there are no members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether connections of this instance hold the places of all members.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.replica.state.here() == self.len()
    }

    /// Returns the number of entities, with the positions that have none.
    #[must_use]
    pub const fn entities(&self) -> usize {
        self.replica.state.entities()
    }

    /// Returns the bytes that the state takes, with what is kept for newcomers and the news that wait for a reading.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let state = &self.replica.state;
        state.bytes() + state.shown.bytes() + self.reader.bytes()
    }

    /// Returns the presence version up to which the set of members is complete.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.replica.known
    }

    /// Returns the members with their client ids, in no order.
    pub fn members(&self) -> impl ExactSizeIterator<Item = (&str, &Member)> {
        self.replica.state.members()
    }

    /// Returns a member.
    #[must_use]
    pub fn member(&self, client: &str) -> Option<&Member> {
        self.replica.state.member(client)
    }

    /// Returns whether an entity is known as that of another member, so that `client` may not change it.
    #[must_use]
    pub fn is_foreign(&self, client: &str, entity: &str) -> bool {
        self.replica.state.is_foreign(client, entity)
    }

    /// Applies a join, leave or replacement that came over the channel. Other kinds change nothing here.
    pub fn apply(&mut self, kind: &Kind<'_>, now: u64, changes: &mut Vec<Change>) {
        self.replica.is_current = self.reader.is_current();
        match *kind {
            Kind::Join { version, client, record } => {
                self.reader.log(|| Op::Join {
                    version,
                    client: client.into(),
                    record: record.into(),
                });
                if let Some(member) = self.replica.state.member_mut(client) {
                    member.is_leaving = false;
                }
                if !self.follows(version)
                    || self.replica.join(version, client, record, changes) == Counted::Gap
                {
                    self.miss(now);
                }
            }
            Kind::Leave { version, client } => {
                self.reader.log(|| Op::Leave { version, client: client.into() });
                self.reader.overtake_positions();
                if !self.follows(version)
                    || self.replica.leave(version, client, changes) == Counted::Gap
                {
                    if let Some(member) = self.replica.state.member_mut(client) {
                        member.is_leaving = true;
                    }
                    self.miss(now);
                }
            }
            Kind::Replaced { old_connection, client, record } => {
                self.replaced(old_connection, client, record, now, changes);
            }
            _ => {}
        }
        let state = &mut self.replica.state;
        let (has_aged, has_ended) = (take(&mut state.has_aged), take(&mut state.has_ended));
        if has_aged {
            self.reader.want_positions(now);
        }
        if has_ended && self.is_complete() {
            // A reading that is under way applies that leave again.
            self.reader.give_up();
            self.reader.want_anew(now);
        }
    }

    fn replaced(
        &mut self,
        old_connection: &str,
        client: &str,
        record: &str,
        now: u64,
        changes: &mut Vec<Change>,
    ) {
        self.reader.log(|| Op::Replaced {
            old_connection: old_connection.into(),
            client: client.into(),
            record: record.into(),
        });
        // The connection that held the place may have ended entities.
        self.reader.overtake_positions();
        let is_known = self.replica.replace(old_connection, client, record);
        // Where the channel is behind what was read the member may have left since.
        let is_behind = self.channel.is_some_and(|channel| channel < self.replica.known);
        if !is_known && !is_behind {
            self.miss(now);
        }
        changes.push(Change::Replaced {
            client: client.into(),
            old_connection: old_connection.into(),
            record: record.into(),
        });
    }

    /// Returns whether a version is the next on the channel of a room that was read, and remembers it.
    fn follows(&mut self, version: u64) -> bool {
        let is_next = match self.channel {
            Some(channel) => version == channel.saturating_add(1),
            // A new room has no version; its first one is Redis' time.
            None => self.replica.known == 0 || version <= self.replica.known.saturating_add(1),
        };
        self.channel = Some(version);
        is_next && self.is_complete()
    }

    /// Has the members read again. While a reading is under way, its end shows whether a further one is needed.
    fn miss(&mut self, now: u64) {
        if self.is_complete() {
            self.reader.want(now);
        }
    }

    /// Applies the join, or join again, of a connection here, as the script has answered it: `before` is the
    /// connection that held the place, `None` where the client became a member. The channel brings the same news
    /// later, and then they are known.
    ///
    /// Returns `false` where newer news are known: the member has left since, or has yet another connection. Before
    /// [`Self::is_complete`] these are not known: then the first reading decides whether [`Self::member`] still has this
    /// connection.
    #[must_use]
    pub fn join_here(
        &mut self,
        client: &str,
        record: &str,
        version: u64,
        before: Option<&str>,
        changes: &mut Vec<Change>,
    ) -> bool {
        self.reader.log(|| Op::Here {
            client: client.into(),
            record: record.into(),
            version,
            before: before.map(Box::from),
        });
        // An earlier life of the client may have ended.
        self.reader.overtake_positions();
        let from = changes.len();
        self.replica.is_current = self.reader.is_current();
        let is_doubtful = self.replica.is_doubtful(client, record, version, before);
        let is_joined = self.replica.join_here(client, record, version, before, changes);
        if !self.is_complete() {
            changes.truncate(from);
        }
        if is_joined && is_doubtful {
            self.miss(0);
        }
        is_joined
    }

    /// Writes presence data of a member into its record. Clients that join later are told of it, so it is bounded as
    /// an entity is.
    ///
    /// # Errors
    /// [`Refused::NotMember`]; [`Refused::TooLarge`]; [`Refused::StateFull`]; [`Refused::Unknown`] where the data cannot
    /// be merged.
    pub fn presence(
        &mut self,
        origin: Origin,
        client: &str,
        presence: &[u8],
    ) -> Result<&Member, Refused> {
        if origin == Origin::Channel {
            self.reader.log(|| Op::Presence { client: client.into(), presence: presence.into() });
        }
        let limits = self.limits_of(origin);
        self.replica.presence(client, presence, self.merge, &limits)
    }

    /// Writes the snapshot of an entity that a member spawns.
    ///
    /// # Errors
    /// All of [`Refused`] but [`Refused::Unknown`].
    pub fn spawn(
        &mut self,
        origin: Origin,
        client: &str,
        entity: &str,
        snapshot: &[u8],
    ) -> Result<(), Refused> {
        let op = || Op::Spawn {
            client: client.into(),
            entity: entity.into(),
            snapshot: snapshot.into(),
        };
        if origin == Origin::Channel {
            self.reader.log(op);
        }
        self.admit(origin, client, entity)?;
        let limits = self.limits_of(origin);
        self.replica.state.spawn(client, entity, snapshot, &limits)?;
        if origin == Origin::Here {
            // A reading that is under way may be older than a change here, too.
            self.reader.log(op);
        }
        self.touch(origin, client, entity);
        Ok(())
    }

    /// Merges an update into the snapshot of an entity. Returns the snapshot.
    ///
    /// # Errors
    /// All of [`Refused`].
    pub fn update(
        &mut self,
        origin: Origin,
        client: &str,
        entity: &str,
        update: &[u8],
    ) -> Result<&[u8], Refused> {
        let op =
            || Op::Update { client: client.into(), entity: entity.into(), update: update.into() };
        if origin == Origin::Channel {
            self.reader.log(op);
        }
        self.admit(origin, client, entity)?;
        let held = self.member(client).and_then(|member| member.entity(entity));
        if origin == Origin::Channel && held.is_none_or(|held| held.snapshot().is_none()) {
            // The spawn was refused, and the update was not: Redis has what no news have told.
            self.reader.want_anew(0);
            self.replica.state.doubt_here(client, entity);
            return Err(Refused::Unknown);
        }
        let limits = self.limits_of(origin);
        self.replica.update(client, entity, update, self.merge, &limits)?;
        if origin == Origin::Here {
            self.reader.log(op);
        }
        self.touch(origin, client, entity);
        let member = self.replica.state.member(client).ok_or(Refused::NotMember)?;
        member.entity(entity).and_then(Entity::snapshot).ok_or(Refused::Unknown)
    }

    /// Removes an entity and its position.
    ///
    /// # Errors
    /// [`Refused::NotMember`], [`Refused::Foreign`], [`Refused::Unknown`], [`Refused::Overtaken`].
    pub fn despawn(&mut self, origin: Origin, client: &str, entity: &str) -> Result<(), Refused> {
        let op = || Op::Despawn { client: client.into(), entity: entity.into() };
        self.reader.overtake_positions();
        if origin == Origin::Channel {
            self.reader.log(op);
        }
        self.admit(origin, client, entity)?;
        self.replica.state.despawn(client, entity).ok_or(Refused::Unknown)?;
        if origin == Origin::Here {
            self.reader.log(op);
        }
        self.touch(origin, client, entity);
        Ok(())
    }

    /// Writes the newest position of an entity of a member here, spawned or not.
    ///
    /// # Errors
    /// All of [`Refused`] but [`Refused::Unknown`] and [`Refused::Overtaken`]. A position that is not kept may still be
    /// sent to the others.
    pub fn position(&mut self, client: &str, entity: &str, position: &[u8]) -> Result<(), Refused> {
        self.admit(Origin::Here, client, entity)?;
        self.replica.state.place(client, entity, position, &self.limits)?.is_live = true;
        Ok(())
    }

    /// Takes the position of an entity that the connection `from` at another instance has published. Returns whether
    /// clients may be told of it: not where another connection has the member's place. A position has no part in the
    /// order of the changes that the store makes, so that its membership may have ended before it was published.
    #[must_use]
    pub fn hear_position(
        &mut self,
        from: Connection,
        client: &str,
        entity: &str,
        position: &[u8],
    ) -> bool {
        let Some(member) = self.replica.state.member(client) else {
            // A reading that is under way may know the member.
            self.reader.log(|| Op::Position {
                from,
                client: client.into(),
                entity: entity.into(),
                position: position.into(),
            });
            return true;
        };
        if member.record().connection() != Some(from) {
            return false;
        }
        // Positions that the mirror does not take are still for clients.
        if self.admit(Origin::Channel, client, entity).is_ok()
            && let Ok(placed) =
                self.replica.state.place(client, entity, position, &self.limits.doubled())
        {
            placed.is_live = true;
        }
        true
    }

    /// Returns whether other instances may lack an entity of a member here, since a change of it was refused, or no
    /// reading has come since the member moved here. A caller that changes it publishes all of it.
    #[must_use]
    pub fn is_doubted(&self, client: &str, entity: &str) -> bool {
        self.member(client).is_some_and(|member| member.yields(entity))
    }

    /// Notes that a change of an entity by a connection of this instance was refused, because the connection did not hold
    /// the member's place: the mirror has told of a change that no other instance has seen. `refused` is the printed
    /// connection and [`Member::joined`] at the time of the change.
    ///
    /// Returns `true` where a connection here has taken the place since. Then the mirror has what its client said, and
    /// the caller publishes the entity again for that connection, as the mirror has it. Otherwise a reading is due at once.
    #[must_use]
    pub fn doubt(&mut self, client: &str, entity: &str, refused: (&str, u64), now: u64) -> bool {
        let member = self.replica.state.member_mut(client).filter(|member| member.is_here());
        if let Some(member) = member {
            if (member.record().connection, member.joined) != refused {
                // A reading that is under way does not have what is published now.
                member.touch(entity);
                return true;
            }
            member.doubt(entity);
        }
        // A reading that is under way may have begun before the other connection spoke.
        self.reader.give_up();
        self.reader.want_anew(now);
        false
    }

    /// Notes that all of an entity is published, or its end, as the mirror has it. No reading that is under way, and no
    /// older news, know more.
    pub fn confirm(&mut self, client: &str, entity: &str) {
        self.touch(Origin::Here, client, entity);
    }

    fn admit(&self, origin: Origin, client: &str, entity: &str) -> Result<(), Refused> {
        let member = self.member(client).ok_or(Refused::NotMember)?;
        match origin {
            Origin::Here if self.is_foreign(client, entity) => Err(Refused::Foreign),
            Origin::Channel if member.is_reborn() || member.has_touched(entity) => {
                Err(Refused::Overtaken)
            }
            _ => Ok(()),
        }
    }

    fn touch(&mut self, origin: Origin, client: &str, entity: &str) {
        if origin == Origin::Here
            && let Some(member) = self.replica.state.member_mut(client)
        {
            member.touch(entity);
        }
    }

    const fn limits_of(&self, origin: Origin) -> Limits {
        match origin {
            Origin::Here => self.limits,
            Origin::Channel => self.limits.doubled(),
        }
    }
}

impl Limits {
    const fn doubled(self) -> Self {
        Self {
            member_entities_max: self.member_entities_max * 2,
            entities_max: self.entities_max * 2,
            entity_bytes_max: self.entity_bytes_max * 2,
            bytes_max: self.bytes_max * 2,
        }
    }
}

#[cfg(test)]
mod tests;
