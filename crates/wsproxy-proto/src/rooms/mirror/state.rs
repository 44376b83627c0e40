//! Members of a room with their entities and positions, and the bytes that these take. Knows neither versions nor
//! readings.

use std::{collections::HashMap, num::NonZeroU64};

use crate::rooms::{
    mirror::{Limits, Refused, shown::Shown},
    wire::{Connection, Record},
};

/// Members and entities of a room.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) members: HashMap<Box<str>, Member>,
    /// Number of members that have spawned an entity with this id.
    spawned: HashMap<Box<str>, u32>,
    /// Number of entities of all members, and of positions without an entity.
    entities: usize,
    /// Number of members whose connection is of this instance.
    here: usize,
    bytes: usize,
    /// The place of a member has passed to another connection elsewhere, so that positions of it may be such that no store
    /// has.
    pub(super) has_aged: bool,
    /// A leave of an earlier life has ended entities that a connection of this instance may have written in the later one.
    pub(super) has_ended: bool,
    /// Bytes for newcomers. Few rooms need them, so that those of members are not in the members.
    pub(super) shown: Shown,
}

/// Member of a room.
#[derive(Debug)]
pub struct Member {
    record: Box<str>,
    /// Sorted by id. Most members have one or none, for whom a vector would have room for four.
    pub(super) entities: Box<[Entity]>,
    is_here: bool,
    /// Presence version at which the member is known to have been there. An earlier leave is of an earlier life.
    pub(super) joined: u64,
    /// Presence version up to which clients were told of the member's leaves. A leave behind it ends the life that they
    /// know.
    pub(super) told: u64,
    /// Highest number of a connection of this instance that held the place.
    pub(super) own_seen: u64,
    /// Highest number of a connection of this instance of which the channel told that it takes the place.
    pub(super) own_heard: u64,
    /// Time of the first reading that lacked the member; 1: a time long ago.
    pub(super) missing_since: Option<NonZeroU64>,
    /// The channel told of the record's connection as a replacement, so a later join on it tells more.
    pub(super) is_replaced: bool,
    /// A connection here has lost the place since the latest reading began. That reading may lack what it changed
    /// before.
    pub(super) is_moved: bool,
    /// A leave was published that could not be counted.
    pub(super) is_leaving: bool,
    pub(super) arrival: Option<Box<Arrival>>,
}

/// State of a member that has joined here, while older news of it may still arrive.
#[derive(Debug, Default)]
pub(super) struct Arrival {
    /// The channel has not brought the join yet.
    pub(super) awaits_echo: bool,
    /// The client was no member before. What the channel brings before the echo is of an earlier life.
    pub(super) is_new: bool,
    /// Entities from before the join are not known yet: a reading brings them.
    pub(super) awaits_reading: bool,
    /// Entities that the connection here has changed. Older news of these are overtaken.
    pub(super) touched: Vec<Box<str>>,
    /// Entities whose last change was refused, because another connection holds the place, or that the leave of an earlier life
    /// has ended: a reading tells their state.
    pub(super) doubted: Vec<Box<str>>,
}

/// Entity of a member, or a position for which no entity was spawned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entity {
    id: Box<str>,
    snapshot: Option<Box<[u8]>>,
    /// Empty where there is none.
    position: Vec<u8>,
    /// The position came from its owner, so no reading is newer.
    pub(super) is_live: bool,
    /// Text that newcomers get, where it was made of the entity as it is.
    pub(super) shown: Option<Box<[u8]>>,
}

impl Member {
    fn new(record: &str) -> Self {
        Self {
            record: record.into(),
            entities: Box::default(),
            is_here: false,
            joined: 0,
            told: 0,
            own_seen: 0,
            own_heard: 0,
            missing_since: None,
            is_replaced: false,
            is_moved: false,
            is_leaving: false,
            arrival: None,
        }
    }

    /// Returns the record as it is stored.
    #[must_use]
    pub fn record_text(&self) -> &str {
        &self.record
    }

    /// Returns the record.
    #[must_use]
    pub fn record(&self) -> Record<'_> {
        Record::parse(&self.record).unwrap_or(Record { connection: "", user: "", json: "" })
    }

    /// Returns the presence version at which the member is known to have been there.
    #[must_use]
    pub const fn joined(&self) -> u64 {
        self.joined
    }

    /// Returns whether a connection of this instance holds the place.
    #[must_use]
    pub const fn is_here(&self) -> bool {
        self.is_here
    }

    /// Returns the entities, and the positions without an entity, and forgets the rest.
    pub(super) fn into_entities(self) -> Vec<Entity> {
        self.entities.into_vec()
    }

    /// Returns the entities, and the positions without an entity, by id.
    pub fn entities(&self) -> impl ExactSizeIterator<Item = &Entity> {
        self.entities.iter()
    }

    /// Returns an entity, or a position without one.
    #[must_use]
    pub fn entity(&self, id: &str) -> Option<&Entity> {
        self.place(id).ok().map(|at| &self.entities[at])
    }

    fn place(&self, id: &str) -> Result<usize, usize> {
        self.entities.binary_search_by(|entity| (*entity.id).cmp(id))
    }

    fn insert(&mut self, index: usize, entity: Entity) {
        let mut entities = std::mem::take(&mut self.entities).into_vec();
        entities.reserve_exact(1);
        entities.insert(index, entity);
        self.entities = entities.into();
    }

    fn take(&mut self, id: &str) -> Option<Entity> {
        let index = self.place(id).ok()?;
        let mut entities = std::mem::take(&mut self.entities).into_vec();
        let taken = entities.remove(index);
        self.entities = entities.into();
        Some(taken)
    }

    /// Notes that the connection here has changed an entity, so that older news of it are overtaken.
    pub(super) fn touch(&mut self, id: &str) {
        let Some(arrival) = &mut self.arrival else { return };
        arrival.doubted.retain(|doubted| **doubted != *id);
        let is_open = arrival.awaits_echo || arrival.awaits_reading;
        if is_open && arrival.touched.len() < TOUCHED_MAX && !arrival.has_touched(id) {
            arrival.touched.push(id.into());
        }
        self.settle();
    }

    /// Returns the entities whose state another reading tells.
    pub(super) fn doubted(&self) -> impl Iterator<Item = &str> {
        self.arrival.iter().flat_map(|arrival| arrival.doubted.iter().map(|id| &**id))
    }

    pub(super) fn doubt(&mut self, id: &str) {
        let arrival = self.arrival.get_or_insert_default();
        arrival.touched.retain(|touched| **touched != *id);
        if arrival.doubted.len() < TOUCHED_MAX && !arrival.has_doubted(id) {
            arrival.doubted.push(id.into());
        }
    }

    /// Returns whether news of the channel are of an earlier life.
    pub(super) fn is_reborn(&self) -> bool {
        self.arrival.as_ref().is_some_and(|arrival| arrival.is_new && arrival.awaits_echo)
    }

    /// Returns whether a reading knows more of an entity than the connection here.
    pub(super) fn yields(&self, id: &str) -> bool {
        self.arrival.as_ref().is_some_and(|arrival| {
            arrival.has_doubted(id) || (arrival.awaits_reading && !arrival.has_touched(id))
        })
    }

    /// Returns whether the connection here has changed an entity while older news of it may arrive.
    pub(super) fn has_touched(&self, id: &str) -> bool {
        self.arrival.as_ref().is_some_and(|arrival| arrival.has_touched(id))
    }

    /// Notes that the channel has brought a join or, not `is_new`, a replacement that has the record's connection. The one is
    /// not the echo of the other: a connection may come from elsewhere, be taken for dead, and join again.
    pub(super) fn hear_echo(&mut self, is_new: bool) {
        if self.arrival.as_ref().is_some_and(|arrival| arrival.is_new == is_new) {
            self.end_echo();
        }
    }

    /// Ends the wait for the echo of the join.
    pub(super) fn end_echo(&mut self) {
        if let Some(arrival) = &mut self.arrival {
            arrival.awaits_echo = false;
            self.settle();
        }
    }

    /// Ends the wait for a reading.
    pub(super) fn end_reading(&mut self) {
        if let Some(arrival) = &mut self.arrival {
            arrival.awaits_reading = false;
            arrival.doubted.clear();
            self.settle();
        }
    }

    pub(super) fn settle(&mut self) {
        self.arrival.take_if(|arrival| {
            !arrival.awaits_echo && !arrival.awaits_reading && arrival.doubted.is_empty()
        });
    }

    /// Makes all positions such that a reading may be newer.
    pub(super) fn age_positions(&mut self) {
        self.entities.iter_mut().for_each(|entity| entity.is_live = false);
    }

    fn bytes(&self, client: &str) -> usize {
        MEMBER_BYTES + client.len() + self.record.len()
    }
}

impl Arrival {
    fn has_touched(&self, id: &str) -> bool {
        self.touched.iter().any(|touched| **touched == *id)
    }

    fn has_doubted(&self, id: &str) -> bool {
        self.doubted.iter().any(|doubted| **doubted == *id)
    }
}

impl Entity {
    fn new(id: &str) -> Self {
        Self { id: id.into(), snapshot: None, position: Vec::new(), is_live: false, shown: None }
    }

    /// Returns the id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the snapshot; `None` where only a position came.
    #[must_use]
    pub fn snapshot(&self) -> Option<&[u8]> {
        self.snapshot.as_deref()
    }

    /// Returns the newest position; `None` where none came.
    #[must_use]
    pub fn position(&self) -> Option<&[u8]> {
        (!self.position.is_empty()).then_some(&self.position)
    }

    fn bytes(&self) -> usize {
        ENTITY_BYTES + self.id.len() + self.snapshot_bytes() + self.position.len()
    }

    fn snapshot_bytes(&self) -> usize {
        self.snapshot.as_ref().map_or(0, |snapshot| snapshot.len())
    }
}

impl State {
    pub(super) fn members(&self) -> impl ExactSizeIterator<Item = (&str, &Member)> {
        self.members.iter().map(|(client, member)| (&**client, member))
    }

    pub(super) fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.members.values_mut()
    }

    pub(super) fn member(&self, client: &str) -> Option<&Member> {
        self.members.get(client)
    }

    pub(super) fn member_mut(&mut self, client: &str) -> Option<&mut Member> {
        self.members.get_mut(client)
    }

    pub(super) const fn entities(&self) -> usize {
        self.entities
    }

    pub(super) const fn here(&self) -> usize {
        self.here
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes the record of a member, present or not. Returns the member.
    pub(super) fn put(&mut self, client: &str, record: &str, server: u64) -> &mut Member {
        let own = Record::parse(record).and_then(|record| record.connection());
        let own = own.filter(|connection| connection.server == server);
        if !self.members.contains_key(client) {
            let member = Member::new(record);
            self.bytes += member.bytes(client);
            self.members.insert(client.into(), member);
        }
        if self.members.get(client).is_some_and(|member| *member.record != *record) {
            self.shown.hide(client);
        }
        let (bytes, here) = (&mut self.bytes, &mut self.here);
        let member = self.members.get_mut(client).expect("it was inserted");
        if *member.record != *record {
            if own.is_none() && member.record().connection() != connection_of(record) {
                // The connection that had the place may have told of positions that were not written any more.
                member.age_positions();
                self.has_aged = true;
            }
            *bytes = *bytes + record.len() - member.record.len();
            member.record = record.into();
        }
        member.is_replaced = false;
        member.is_moved |= member.is_here && own.is_none();
        *here = *here + usize::from(own.is_some()) - usize::from(member.is_here);
        member.is_here = own.is_some();
        member.own_seen = member.own_seen.max(own.map_or(0, |connection| connection.number));
        if let Some(arrival) = member.arrival.as_mut().filter(|_| !member.is_here) {
            // News of the connection that was here. What it was refused is to be read all the same.
            (arrival.awaits_echo, arrival.awaits_reading, arrival.touched) =
                (false, false, Vec::new());
            member.settle();
        }
        member
    }

    /// Removes a member with its entities. Returns the member.
    pub(super) fn remove(&mut self, client: &str) -> Option<Member> {
        let (client, mut member) = self.members.remove_entry(client)?;
        self.bytes -= member.bytes(&client);
        self.shown.hide(&client);
        self.here -= usize::from(member.is_here);
        for entity in &mut member.entities {
            self.shown.hide_entity(entity);
            self.bytes -= entity.bytes();
            self.entities -= 1;
            if entity.snapshot.is_some() {
                forget(&mut self.spawned, &entity.id);
            }
        }
        Some(member)
    }

    /// Returns whether an entity is known as that of other members only.
    pub(super) fn is_foreign(&self, client: &str, id: &str) -> bool {
        let own = || self.members.get(client).and_then(|member| member.entity(id));
        self.spawned.contains_key(id) && own().is_none_or(|entity| entity.snapshot.is_none())
    }

    /// Writes the snapshot of an entity.
    ///
    /// # Errors
    /// A limit, or the client is no member.
    pub(super) fn spawn(
        &mut self,
        client: &str,
        id: &str,
        snapshot: &[u8],
        limits: &Limits,
    ) -> Result<(), Refused> {
        let index = self.reserve(client, id, snapshot.len(), limits, Entity::snapshot_bytes)?;
        let member = self.members.get_mut(client).ok_or(Refused::NotMember)?;
        let entity = &mut member.entities[index];
        self.shown.hide_entity(entity);
        self.bytes -= entity.bytes();
        if entity.snapshot.is_none() {
            *self.spawned.entry(id.into()).or_default() += 1;
        }
        entity.snapshot = Some(snapshot.into());
        self.bytes += entity.bytes();
        Ok(())
    }

    /// Writes the position of an entity, spawned or not.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub(super) fn place(
        &mut self,
        client: &str,
        id: &str,
        position: &[u8],
        limits: &Limits,
    ) -> Result<&mut Entity, Refused> {
        let index =
            self.reserve(client, id, position.len(), limits, |entity| entity.position.len())?;
        let member = self.members.get_mut(client).ok_or(Refused::NotMember)?;
        let entity = &mut member.entities[index];
        self.shown.hide_entity(entity);
        self.bytes = self.bytes + position.len() - entity.position.len();
        // In place: a position comes twenty times in a second.
        entity.position.clear();
        entity.position.extend_from_slice(position);
        Ok(entity)
    }

    /// Removes an entity with its position. Returns the entity.
    pub(super) fn despawn(&mut self, client: &str, id: &str) -> Option<Entity> {
        let mut entity = self.members.get_mut(client)?.take(id)?;
        self.shown.hide_entity(&mut entity);
        self.bytes -= entity.bytes();
        self.entities -= 1;
        if entity.snapshot.is_some() {
            forget(&mut self.spawned, id);
        }
        Some(entity)
    }

    /// Notes that a reading knows more of an entity than a member here.
    pub(super) fn doubt_here(&mut self, client: &str, id: &str) {
        if let Some(member) = self.members.get_mut(client).filter(|member| member.is_here) {
            member.doubt(id);
        }
    }

    /// Removes the entities of an earlier life of a member: all but those that a connection here has changed since, and the
    /// positions without an entity that it has told. Returns them.
    ///
    /// Some of them may be of the later life. Others bring them again on the channel, but connections here do not: a reading
    /// tells.
    pub(super) fn end_earlier_life(&mut self, client: &str) -> Vec<Entity> {
        let Some(member) = self.members.get_mut(client) else { return Vec::new() };
        let is_kept = |entity: &&Entity| {
            let is_own = member.is_here && entity.is_live && entity.snapshot.is_none();
            is_own || member.has_touched(&entity.id)
        };
        let ended = member.entities.iter().filter(|entity| !is_kept(entity));
        let ended: Vec<Box<str>> = ended.map(|entity| entity.id.clone()).collect();
        self.has_ended |= member.own_seen > 0 && !ended.is_empty();
        if member.is_here {
            ended.iter().for_each(|id| member.doubt(id));
        }
        ended.iter().filter_map(|id| self.despawn(client, id)).collect()
    }

    /// Returns the index of an entity of which a part may grow from what `held` tells to `bytes`.
    fn reserve(
        &mut self,
        client: &str,
        id: &str,
        bytes: usize,
        limits: &Limits,
        held: fn(&Entity) -> usize,
    ) -> Result<usize, Refused> {
        let member = self.members.get_mut(client).ok_or(Refused::NotMember)?;
        if bytes > limits.entity_bytes_max {
            return Err(Refused::TooLarge);
        }
        let index = match member.place(id) {
            Ok(index) => {
                let growth = bytes.saturating_sub(held(&member.entities[index]));
                // A full room still takes a change that does not make it larger.
                let is_full = growth > 0 && self.bytes + growth > limits.bytes_max;
                return if is_full { Err(Refused::StateFull) } else { Ok(index) };
            }
            Err(index) => index,
        };
        if member.entities.len() >= limits.member_entities_max {
            return Err(Refused::MemberFull);
        }
        let entity = Entity::new(id);
        let is_full = self.bytes + entity.bytes() + bytes > limits.bytes_max;
        if is_full || self.entities >= limits.entities_max {
            return Err(Refused::StateFull);
        }
        self.bytes += entity.bytes();
        self.entities += 1;
        member.insert(index, entity);
        Ok(index)
    }
}

fn connection_of(record: &str) -> Option<Connection> {
    Record::parse(record)?.connection()
}

fn forget(spawned: &mut HashMap<Box<str>, u32>, id: &str) {
    if let Some(count) = spawned.get_mut(id) {
        *count -= 1;
        if *count == 0 {
            spawned.remove(id);
        }
    }
}

// Every connection of a room has one.
const _: () = assert!(size_of::<Member>() <= 88);

/// Room that a member takes besides its client id and its record, in bytes.
const MEMBER_BYTES: usize = 128;

/// Room that an entity takes besides its id, its snapshot and its position, in bytes. Its id is held twice.
const ENTITY_BYTES: usize = 160;

/// Upper bound of the entities that are remembered as changed while older news may arrive.
const TOUCHED_MAX: usize = 1000;
