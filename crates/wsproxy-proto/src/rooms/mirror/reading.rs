//! Readings of a room: when one is due, the news that come meanwhile, and the differences that it shows.

use std::{collections::HashSet, num::NonZeroU64};

use bytes::Bytes;

use crate::rooms::{
    mirror::{
        Change, Mirror,
        news::Op,
        replica::{Replica, joined, replaced},
        state::{Entity, Member},
    },
    wire,
};

/// Kind of a reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Everything: [`Mirror::begin_reading`].
    Room,
    /// Positions: [`Mirror::begin_positions`].
    Positions,
}

/// Reading that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Time from which on it should begin.
    pub at: u64,
    /// Kind.
    pub read: Read,
}

/// Number of a reading that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// State of a room as Redis has it.
///
/// To be read in this order by one connection: entities, positions, version, members. So no entity is without its
/// member, and no member without its join.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// Presence version; 0 where there is none.
    pub version: u64,
    /// Client ids and records.
    pub members: Vec<(Bytes, Bytes)>,
    /// Fields, as [`wire::field`] writes them, and snapshots.
    pub entities: Vec<(Bytes, Bytes)>,
    /// Fields, as [`wire::field`] writes them, and positions.
    pub positions: Vec<(Bytes, Bytes)>,
    /// The store cannot have lost a member: one that is missing has left.
    pub is_certain: bool,
}

/// Outcome of a reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The reading was applied.
    Applied {
        /// Clients that are no members and have left fields behind, at most 500. The leave script removes these fields.
        orphans: Vec<Box<str>>,
    },
    /// The link was lost since the reading began, or another reading is under way.
    Stale,
    /// More news came meanwhile than may wait. Another reading is due.
    Overflowed,
}

/// Times of readings, and the news that come during one.
#[derive(Debug)]
pub(super) struct Reader {
    is_complete: bool,
    /// Source of tickets.
    last: u64,
    under_way: Option<Box<UnderWay>>,
    /// Time at which a reading is wanted.
    wanted: Option<u64>,
    /// The wanted reading is for news that were missed, not to look for members again.
    is_missing_news: bool,
    /// Time before which no reading begins, since one has failed.
    earliest: u64,
    /// Time at which members that a reading lacked are looked for again.
    look_again: Option<u64>,
    positions_at: Option<u64>,
    /// An entity may have ended since the latest reading of positions began, which may be older.
    is_positions_overtaken: bool,
}

#[derive(Debug)]
struct UnderWay {
    ticket: Ticket,
    began: u64,
    log: Vec<Op>,
    bytes: usize,
    is_overflowed: bool,
}

impl Reader {
    pub(super) const fn new(now: u64) -> Self {
        Self {
            is_complete: false,
            last: 0,
            under_way: None,
            wanted: Some(now),
            is_missing_news: true,
            earliest: 0,
            look_again: None,
            positions_at: None,
            is_positions_overtaken: false,
        }
    }

    pub(super) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Returns whether no news are missing.
    pub(super) const fn is_current(&self) -> bool {
        self.is_complete && self.under_way.is_none() && !self.is_missing_news
    }

    /// Wants a reading, unless one is under way.
    pub(super) fn want(&mut self, at: u64) {
        if self.under_way.is_none() {
            self.want_anew(at);
        }
    }

    /// Wants a reading that begins after this moment.
    pub(super) fn want_anew(&mut self, at: u64) {
        self.is_missing_news = true;
        self.wanted = Some(self.wanted.map_or(at, |wanted| wanted.min(at)));
    }

    /// Wants a reading of positions, unless one is wanted or the first reading of all is to come.
    pub(super) fn want_positions(&mut self, now: u64) {
        if self.is_complete {
            self.positions_at.get_or_insert(now + POSITIONS_AGAIN);
        }
    }

    /// Makes a reading that is under way void.
    pub(super) fn give_up(&mut self) {
        self.under_way = None;
    }

    /// Notes that entities may have ended, so that a reading of positions that is under way may be older.
    pub(super) fn overtake_positions(&mut self) {
        self.is_positions_overtaken = true;
    }

    pub(super) fn bytes(&self) -> usize {
        self.under_way.as_ref().map_or(0, |reading| reading.bytes)
    }

    /// Keeps news while a reading is under way.
    pub(super) fn log(&mut self, op: impl FnOnce() -> Op) {
        let Some(reading) = &mut self.under_way else { return };
        if reading.is_overflowed {
            return;
        }
        let op = op();
        reading.bytes += op.bytes();
        reading.log.push(op);
        if reading.bytes > LOG_BYTES_MAX {
            (reading.log, reading.bytes, reading.is_overflowed) = (Vec::new(), 0, true);
        }
    }
}

impl Mirror {
    /// Returns the reading that should begin next; `None` where one is under way, or none is wanted.
    #[must_use]
    pub fn due(&self) -> Option<Due> {
        let reader = &self.reader;
        if reader.under_way.is_some() {
            return None;
        }
        let looks = [reader.wanted, reader.look_again].into_iter().flatten().min();
        let room = looks.map(|at| Due { at: at.max(reader.earliest), read: Read::Room });
        let positions = reader.positions_at.map(|at| Due { at, read: Read::Positions });
        room.into_iter().chain(positions).min_by_key(|due| due.at)
    }

    /// Wants a reading at a time, because news may have been missed.
    pub fn want_reading(&mut self, at: u64) {
        self.reader.want(at);
    }

    /// As [`Self::want_reading`], also where a reading is under way, which may be too old.
    pub fn want_later_reading(&mut self, at: u64) {
        self.reader.want_anew(at);
    }

    /// Notes that the link of subscriptions was lost: news may be missed from now on. A reading that is under way is
    /// void. Once the subscription is confirmed again, [`Self::want_reading`] is to be called.
    pub fn lose_link(&mut self) {
        self.replica.told = self.told();
        self.channel = None;
        self.reader.under_way = None;
        self.reader.is_missing_news = true;
        self.reader.positions_at = None;
        self.reader.overtake_positions();
        self.replica.state.members_mut().for_each(Member::end_echo);
        self.age_positions_elsewhere();
    }

    fn age_positions_elsewhere(&mut self) {
        let elsewhere = self.replica.state.members_mut().filter(|member| !member.is_here());
        elsewhere.for_each(Member::age_positions);
    }

    /// Returns the version up to which news were told. Readings may be ahead of the channel.
    fn told(&self) -> u64 {
        let heard = self.channel.map_or(0, |channel| channel.min(self.replica.known));
        self.replica.told.max(heard)
    }

    /// Begins a reading of the room. The subscription must have been confirmed before.
    pub fn begin_reading(&mut self, now: u64) -> Ticket {
        let reader = &mut self.reader;
        reader.last += 1;
        let ticket = Ticket(reader.last);
        (reader.wanted, reader.look_again, reader.positions_at) = (None, None, None);
        self.replica.state.members_mut().for_each(|member| member.is_moved = false);
        reader.under_way = Some(Box::new(UnderWay {
            ticket,
            began: now,
            log: Vec::new(),
            bytes: 0,
            is_overflowed: false,
        }));
        ticket
    }

    /// Gives up a reading that has failed. Another one is due at `retry_at`, and none before.
    pub fn abandon_reading(&mut self, ticket: Ticket, retry_at: u64) {
        if self.reader.under_way.take_if(|reading| reading.ticket == ticket).is_some() {
            self.reader.earliest = retry_at;
            self.reader.want(retry_at);
        }
    }

    /// Applies a reading of the room, and behind it the news that came meanwhile.
    pub fn apply_reading(
        &mut self,
        ticket: Ticket,
        reading: &Reading,
        now: u64,
        changes: &mut Vec<Change>,
    ) -> Outcome {
        let Some(under_way) = self.reader.under_way.take_if(|reading| reading.ticket == ticket)
        else {
            return Outcome::Stale;
        };
        if under_way.is_overflowed {
            self.reader.want(now);
            return Outcome::Overflowed;
        }
        self.reader.overtake_positions();
        let (mut draft, orphans) = self.draft(reading);
        let is_whole = draft.replay(under_way.log, self.merge, &self.limits.doubled());
        let from = changes.len();
        // A first reading is told as it is.
        let told = if self.is_complete() { self.told() } else { draft.known };
        (self.replica.known, self.replica.told) = (draft.known, told);
        self.reader.is_missing_news = self.reader.wanted.is_some();
        self.replica.is_current = true;
        let began = (!reading.is_certain).then_some(under_way.began);
        self.adopt(&draft, began, changes);
        // News were missed, so ends of what was heard may be among them: Redis refuses one while it lacks the member.
        // Redis has all positions that were heard until now once these are read again.
        self.age_positions_elsewhere();
        if !self.is_complete() {
            changes.truncate(from);
            let known = self.replica.known;
            self.replica.state.members_mut().for_each(|member| member.told = known);
        }
        let is_moved =
            self.is_complete() && self.replica.state.members().any(|(_, member)| member.is_moved);
        self.reader.is_complete = true;
        self.reader.positions_at = Some(now + POSITIONS_AGAIN);
        if !is_whole || draft.state.has_ended || is_moved {
            self.reader.want(now);
        }
        Outcome::Applied { orphans }
    }

    /// Begins a reading of positions.
    pub fn begin_positions(&mut self) {
        self.reader.positions_at = None;
        self.reader.is_positions_overtaken = false;
    }

    /// Applies a reading of positions: those that their owners have not overtaken. Positions without an entity that the
    /// reading lacks go: their end was missed.
    pub fn apply_positions(
        &mut self,
        positions: &[(Bytes, Bytes)],
        now: u64,
        changes: &mut Vec<Change>,
    ) {
        let limits = self.limits.doubled();
        let mut is_passed_over = false;
        for (field, position) in positions {
            let Some((client, id)) = wire::parse_field(field) else { continue };
            let Some(member) = self.replica.state.member(client) else { continue };
            let held = member.entity(id);
            if held.is_some_and(|held| held.is_live || held.position() == Some(position))
                || member.has_touched(id)
            {
                continue;
            }
            if held.and_then(Entity::position).is_none() {
                // Redis may still have an entity that a connection here has ended.
                if held.is_none() && member.is_here() && !member.yields(id) {
                    continue;
                }
                // The position may be of an entity that has ended since, and nothing would end that again.
                if self.reader.is_positions_overtaken {
                    is_passed_over = true;
                    continue;
                }
            }
            if self.replica.state.place(client, id, position, &limits).is_ok() {
                changes.push(Change::Moved { client: client.into(), entity: id.into() });
            }
        }
        if is_passed_over && self.is_complete() {
            self.reader.positions_at = Some(now + POSITIONS_AGAIN);
        }
        self.end_positions(positions, changes);
    }

    /// Removes positions without an entity of members elsewhere that a reading of positions lacks. One that was heard since
    /// the link was lost may not be in Redis yet.
    fn end_positions(&mut self, positions: &[(Bytes, Bytes)], changes: &mut Vec<Change>) {
        let fields: HashSet<&[u8]> = positions.iter().map(|(field, _)| &field[..]).collect();
        let mut ended: Vec<(Box<str>, Box<str>)> = Vec::new();
        for (client, member) in self.replica.state.members().filter(|(_, of)| !of.is_here()) {
            let old = member.entities().filter(|held| held.snapshot().is_none() && !held.is_live);
            let old =
                old.filter(|held| !fields.contains(wire::field(client, held.id()).as_bytes()));
            ended.extend(old.map(|held| (client.into(), held.id().into())));
        }
        for (client, entity) in ended {
            self.replica.state.despawn(&client, &entity);
            changes.push(Change::Despawned { client, entity });
        }
    }

    /// Returns what was read as a replica, and the clients without a record that have left fields behind.
    fn draft(&self, reading: &Reading) -> (Replica, Vec<Box<str>>) {
        let (mut draft, limits) = (self.replica.draft(reading.version), self.limits.doubled());
        for (client, record) in &reading.members {
            let (client, record) = (str::from_utf8(client), str::from_utf8(record));
            if let (Ok(client), Ok(record)) = (client, record)
                && wire::Record::parse(record).is_some()
            {
                draft.put(client, record).told = reading.version;
            }
        }
        let mut orphans: Vec<Box<str>> = Vec::new();
        let mut orphan = |client: &str| {
            // A member that Redis has lost may come back, with its entities.
            let is_orphan = self.member(client).is_none();
            if is_orphan && orphans.len() < ORPHANS_MAX && !orphans.iter().any(|o| **o == *client) {
                orphans.push(client.into());
            }
        };
        for (field, snapshot) in &reading.entities {
            let Some((client, id)) = wire::parse_field(field) else { continue };
            match draft.state.member(client) {
                Some(_) => _ = draft.state.spawn(client, id, snapshot, &limits),
                None => orphan(client),
            }
        }
        for (field, position) in &reading.positions {
            let Some((client, id)) = wire::parse_field(field) else { continue };
            match draft.state.member(client) {
                Some(_) => _ = draft.state.place(client, id, position, &limits),
                None => orphan(client),
            }
        }
        (draft, orphans)
    }

    /// Changes the members, entities and positions to those of `draft`, whose reading `began` then; `None`: the reading is
    /// certain.
    fn adopt(&mut self, draft: &Replica, began: Option<u64>, changes: &mut Vec<Change>) {
        for (client, found) in draft.state.members() {
            if self.replica.state.member(client).is_none() {
                let told = self.replica.told;
                let member = self.replica.put(client, found.record_text());
                (member.joined, member.own_seen, member.told) =
                    (found.joined, found.own_seen, told);
                member.own_heard = found.own_heard;
                changes.push(joined(client, found.record_text()));
                self.adopt_entities(client, found, false, changes);
                continue;
            }
            let Some(member) = self.replica.state.member_mut(client) else { continue };
            (member.missing_since, member.is_leaving) = (None, false);
            member.own_seen = member.own_seen.max(found.own_seen);
            let (was_here, held) = (member.is_here(), member.record().connection());
            self.adopt_record(client, found, changes);
            let Some(member) = self.replica.state.member_mut(client) else { continue };
            let is_ours = was_here && member.is_here();
            if is_ours && !self.reader.is_complete && member.record().connection() != held {
                // The place may have been elsewhere between two connections here. News of that are not of an earlier life,
                // and this reading may lack them.
                let arrival = member.arrival.get_or_insert_default();
                (arrival.is_new, arrival.awaits_reading) = (false, true);
                self.reader.want_anew(0);
                continue;
            }
            // Nothing was changed here before the first reading.
            if member.is_moved && self.reader.is_complete {
                // The next reading has all that the connection here changed.
                if member.is_here() && !is_ours {
                    member.arrival.get_or_insert_default().awaits_reading = true;
                }
                continue;
            }
            // Entities have one writer. What it does here may not have reached Redis yet.
            self.adopt_entities(client, found, is_ours, changes);
            if let Some(member) = self.replica.state.member_mut(client) {
                member.end_reading();
            }
        }
        // The news behind the reading have shown that it lacks these.
        for (client, found) in draft.state.members() {
            found.doubted().for_each(|id| self.replica.state.doubt_here(client, id));
        }
        self.forget_missing(draft, began, changes);
    }

    fn adopt_record(&mut self, client: &str, found: &Member, changes: &mut Vec<Change>) {
        let Some(member) = self.replica.state.member(client) else { return };
        if member.record_text() == found.record_text() {
            return;
        }
        let old = member.record().connection.to_owned();
        let record = found.record_text();
        if found.record().connection != old {
            self.replica.put(client, record);
            changes.push(replaced(client, &old, record));
        } else if !member.is_here() {
            self.replica.put(client, record);
            changes.push(Change::Updated { client: client.into(), record: record.into() });
        }
    }

    fn adopt_entities(
        &mut self,
        client: &str,
        found: &Member,
        is_ours: bool,
        changes: &mut Vec<Change>,
    ) {
        let Some(member) = self.replica.state.member(client) else { return };
        let is_kept = |member: &Member, id: &str| match is_ours {
            true => !member.yields(id),
            false => member.has_touched(id),
        };
        let is_gone = |id: &str| found.entity(id).is_none_or(|found| found.snapshot().is_none());
        let spawned = member.entities().filter(|entity| entity.snapshot().is_some());
        let gone = spawned.filter(|entity| is_gone(entity.id()) && !is_kept(member, entity.id()));
        let gone: Vec<Box<str>> = gone.map(|entity| entity.id().into()).collect();
        for entity in gone {
            self.replica.state.despawn(client, &entity);
            changes.push(Change::Despawned { client: client.into(), entity });
        }
        let limits = self.limits.doubled();
        for new in found.entities() {
            let Some(member) = self.replica.state.member(client) else { return };
            let id = new.id();
            if is_kept(member, id) {
                continue;
            }
            let held = member.entity(id);
            let is_live = held.is_some_and(|held| held.is_live);
            let (client, entity): (Box<str>, Box<str>) = (client.into(), id.into());
            let position = new.position().filter(|position| {
                !is_live && held.and_then(|held| held.position()) != Some(position)
            });
            if let Some(snapshot) = new.snapshot()
                && held.and_then(|held| held.snapshot()) != Some(snapshot)
                && self.replica.state.spawn(&client, id, snapshot, &limits).is_ok()
            {
                let (client, entity) = (client.clone(), entity.clone());
                changes.push(Change::Spawned { client, entity });
            }
            if let Some(position) = position
                && let Ok(placed) = self.replica.state.place(&client, id, position, &limits)
            {
                placed.is_live = new.is_live;
                changes.push(Change::Moved { client, entity });
            }
        }
    }

    /// Removes members that this reading lacked and an earlier one too, or whose leave was published.
    fn forget_missing(&mut self, draft: &Replica, began: Option<u64>, changes: &mut Vec<Change>) {
        let mut gone: Vec<Box<str>> = Vec::new();
        let mut look_again: Option<u64> = None;
        let missing =
            self.replica.state.members().filter(|(client, _)| draft.state.member(client).is_none());
        let missing: Vec<Box<str>> = missing.map(|(client, _)| client.into()).collect();
        for client in missing {
            let Some(member) = self.replica.state.member_mut(&client) else { continue };
            let stays_until = began.and_then(|began| {
                let since = NonZeroU64::new(began).unwrap_or(NonZeroU64::MIN);
                let until = member.missing_since.get_or_insert(since).get() + MISSING_MAX;
                // No client was told of a member that the first reading lacks.
                let stays = self.reader.is_complete && !member.is_leaving && began < until;
                stays.then_some(until)
            });
            match stays_until {
                Some(until) => look_again = Some(look_again.map_or(until, |at| at.min(until))),
                None => gone.push(client),
            }
        }
        self.reader.look_again = look_again;
        gone.iter().for_each(|client| self.replica.remove(client, changes));
    }
}

/// Upper bound of the news that wait while a reading is under way, in bytes.
pub const LOG_BYTES_MAX: usize = 4 << 20;

/// Time for which a member stays that a reading lacked, in microseconds: an emptied Redis gets its members back
/// within that time.
pub const MISSING_MAX: u64 = 10_000_000;

/// Time after a reading at which positions are read again, in microseconds: they are written once per second.
pub const POSITIONS_AGAIN: u64 = 2_000_000;

/// Upper bound of the clients whose left fields one reading reports.
const ORPHANS_MAX: usize = 500;
