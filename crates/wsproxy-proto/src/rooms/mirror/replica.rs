//! Rules by which joins, leaves and replacements change the members of a room. Knows no readings.

use std::num::NonZeroU64;

use crate::rooms::{
    mirror::{
        Change, Limits, Merge, Refused,
        state::{Member, State},
    },
    wire::{Connection, Record},
};

/// Members of a room, and the version up to which they are complete.
#[derive(Debug)]
pub(super) struct Replica {
    /// Number of this instance's incarnation.
    server: u64,
    pub(super) state: State,
    /// Version up to which the members are complete.
    pub(super) known: u64,
    /// Version up to which news were told before the last reading. A join behind it that the reading has overtaken was
    /// not told.
    pub(super) told: u64,
    /// No news are missing.
    pub(super) is_current: bool,
}

/// Decision about the version of a join or leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counted {
    /// The version follows the known one.
    Next,
    /// The version is known already.
    Old,
    /// Versions between are missing.
    Gap,
}

impl Replica {
    pub(super) fn new(server: u64) -> Self {
        Self { server, state: State::default(), known: 0, told: 0, is_current: false }
    }

    /// Returns an empty replica for what a reading brings.
    pub(super) fn draft(&self, known: u64) -> Self {
        Self { server: self.server, state: State::default(), known, told: known, is_current: true }
    }

    /// Writes the record of a member, present or not.
    pub(super) fn put(&mut self, client: &str, record: &str) -> &mut Member {
        let was_here = self.state.member(client).is_some_and(Member::is_here);
        let member = self.state.put(client, record, self.server);
        if !self.is_current && !was_here && member.is_here() {
            member.arrival.get_or_insert_default().awaits_reading = true;
        }
        member
    }

    fn count(&mut self, version: u64) -> Counted {
        if version <= self.known {
            return Counted::Old;
        }
        // A room that had no version when it was read has had no news: its first version is Redis' time.
        if self.known != 0 && version - 1 != self.known {
            return Counted::Gap;
        }
        self.known = version;
        Counted::Next
    }

    pub(super) fn join(
        &mut self,
        version: u64,
        client: &str,
        record: &str,
        changes: &mut Vec<Change>,
    ) -> Counted {
        let counted = self.count(version);
        let Some(member) = self.state.member_mut(client) else {
            // The reading lacked a member that had left again: its leave is on the way.
            let is_passing = counted == Counted::Old && version > self.told;
            if counted == Counted::Next || is_passing {
                let member = self.put(client, record);
                (member.joined, member.told) = (version, version);
                member.missing_since = is_passing.then_some(NonZeroU64::MIN);
                changes.push(joined(client, record));
            }
            return counted;
        };
        if member.joined == version {
            member.hear_echo(true);
        }
        // Where Redis was emptied a connection may get its place back, and an older replacement seems to fit again.
        if counted == Counted::Old && member.is_replaced && member.joined < version {
            self.put(client, record);
            return counted;
        }
        // A join that was applied here, or one after it, has told more than this.
        if counted != Counted::Next || member.joined >= version {
            if Record::parse(record).is_some_and(|new| new.connection == member.record().connection)
            {
                member.joined = member.joined.max(version);
            }
            return counted;
        }
        // Redis had lost the member, and got it back: no event. Another connection may have brought it back.
        member.missing_since = None;
        let old = member.record().connection.to_owned();
        let member = self.put(client, record);
        (member.joined, member.told) = (version, version);
        if Record::parse(record).is_some_and(|new| new.connection != old) {
            changes.push(replaced(client, &old, record));
        }
        counted
    }

    pub(super) fn leave(
        &mut self,
        version: u64,
        client: &str,
        changes: &mut Vec<Change>,
    ) -> Counted {
        let counted = self.count(version);
        let Some(member) = self.state.member(client) else { return counted };
        let is_back = match counted {
            Counted::Gap => return counted,
            // A reading has overtaken the leave, and found the member in a later life. What the channel has brought of the
            // earlier one goes; the later one's news follow on the channel.
            Counted::Old if version <= member.told => {
                let gone = self.state.end_earlier_life(client);
                let spawned = gone.iter().filter(|entity| entity.snapshot().is_some());
                changes.extend(spawned.map(|entity| Change::Despawned {
                    client: client.into(),
                    entity: entity.id().into(),
                }));
                return counted;
            }
            _ if member.joined > version => true,
            Counted::Next => false,
            // A reading has overtaken the leave. It lacked the member, or found it in another life.
            Counted::Old => member.missing_since.is_none(),
        };
        match is_back {
            true => self.end_earlier_life(version, client, changes),
            false => self.remove(client, changes),
        }
        counted
    }

    /// Removes a member.
    pub(super) fn remove(&mut self, client: &str, changes: &mut Vec<Change>) {
        if let Some(member) = self.state.remove(client) {
            let entities = member.into_entities();
            changes.push(Change::Left { client: client.into(), entities });
        }
    }

    /// Applies the leave of an earlier life of a client that has joined here since: all instances see a leave and a
    /// join. Entities of the earlier life go.
    fn end_earlier_life(&mut self, version: u64, client: &str, changes: &mut Vec<Change>) {
        let mut entities = self.state.end_earlier_life(client);
        let Some(member) = self.state.member_mut(client) else { return };
        member.told = member.told.max(version);
        entities.extend(member.entities().cloned());
        entities.sort_unstable_by(|one, other| one.id().cmp(other.id()));
        changes.push(Change::Left { client: client.into(), entities });
        changes.push(joined(client, member.record_text()));
        for kept in member.entities() {
            let (client, entity) = (client.into(), kept.id().into());
            match kept.snapshot() {
                Some(_) => changes.push(Change::Spawned { client, entity }),
                None => changes.push(Change::Moved { client, entity }),
            }
        }
    }

    /// Applies that a member has another connection. Returns `false` where the client is no member.
    pub(super) fn replace(&mut self, old_connection: &str, client: &str, record: &str) -> bool {
        let server = self.server;
        let Some(member) = self.state.member_mut(client) else { return false };
        member.is_leaving = false;
        let new = Record::parse(record).map_or("", |record| record.connection);
        let current = member.record().connection;
        let is_echo = current == new;
        // Otherwise the news are older than the record.
        let is_next = current == old_connection;
        for own in [old_connection, new].into_iter().filter_map(Connection::parse) {
            if own.server == server {
                member.own_seen = member.own_seen.max(own.number);
            }
        }
        if let Some(own) = Connection::parse(new).filter(|own| own.server == server) {
            member.own_heard = member.own_heard.max(own.number);
        }
        if is_echo {
            member.hear_echo(false);
        } else if is_next {
            self.put(client, record).is_replaced = true;
        }
        true
    }

    /// Returns whether a join here may be older than the record that is known: a replacement has no version. Where the
    /// channel has not brought the version yet, it brings later replacements too.
    pub(super) fn is_doubtful(
        &self,
        client: &str,
        record: &str,
        version: u64,
        before: Option<&str>,
    ) -> bool {
        let own = Record::parse(record).map(|record| record.connection);
        let held = self.state.member(client).map(|member| member.record().connection);
        let is_other = held.is_some() && held != own && held != before;
        is_other && before.is_some() && version <= self.known
    }

    /// Applies a join of a connection here; see [`super::Mirror::join_here`].
    pub(super) fn join_here(
        &mut self,
        client: &str,
        record: &str,
        version: u64,
        before: Option<&str>,
        changes: &mut Vec<Change>,
    ) -> bool {
        let own = Record::parse(record).map_or("", |record| record.connection);
        let number = Connection::parse(own).map_or(0, |own| own.number);
        let (known, told, is_current) = (self.known, self.told, self.is_current);
        // The place passes from one connection here to the next, and with it all that they have changed.
        let mut is_passed_on = false;
        let is_known = match self.state.member_mut(client) {
            None if version <= known => return false,
            None => {
                changes.push(joined(client, record));
                false
            }
            Some(member) => {
                let current = member.record().connection;
                let is_held = current == own;
                if is_held && before == Some(own) {
                    self.put(client, record);
                    return true;
                }
                // The latest reading lacked the member.
                if before.is_some() && version <= known && member.missing_since.is_some() {
                    return false;
                }
                // A join that is known and younger than this one, or one after which the client was no member.
                let is_younger = before.is_some() && member.joined > version;
                let is_newer = is_younger || (before.is_none() && version <= known);
                let is_overtaken = before != Some(current) && member.own_seen >= number;
                if !is_held && (is_newer || is_overtaken) {
                    return false;
                }
                is_passed_on = member.is_here() && (is_held || before == Some(current));
                member.is_moved |= member.is_here() && !is_passed_on;
                true
            }
        };
        let member = self.put(client, record);
        let is_echoed = match before {
            None => member.joined >= version,
            Some(before) => before == own || member.own_heard >= number,
        };
        member.joined = member.joined.max(version);
        if !is_known {
            // Earlier lives of the client may still be on their way.
            member.told = told;
        }
        // Otherwise the reading that lacked the member knew of this join: its leave is on the way.
        if version > known {
            member.missing_since = None;
        }
        let awaits_reading = before.is_some() && !is_passed_on && !(is_known && is_current);
        if !is_passed_on && before.is_none() {
            // Those of an earlier life.
            member.age_positions();
        }
        let arrival = member.arrival.get_or_insert_default();
        if !is_passed_on {
            // Changes of an earlier life, or before the place was elsewhere.
            arrival.touched.clear();
        }
        arrival.awaits_echo = !is_echoed;
        arrival.is_new = before.is_none();
        arrival.awaits_reading |= awaits_reading;
        member.settle();
        true
    }

    pub(super) fn presence(
        &mut self,
        client: &str,
        presence: &[u8],
        merge: Merge,
        limits: &Limits,
    ) -> Result<&Member, Refused> {
        let member = self.state.member(client).ok_or(Refused::NotMember)?;
        if presence.len() > limits.entity_bytes_max {
            return Err(Refused::TooLarge);
        }
        let record = member.record();
        let json = (merge.presence)(record.json, presence).ok_or(Refused::Unknown)?;
        let growth = json.len().saturating_sub(record.json.len());
        // A full room still takes a change that does not make it larger.
        if growth > 0 && self.state.bytes() + growth > limits.bytes_max {
            return Err(Refused::StateFull);
        }
        let record = Record { json: &json, ..record }.to_string();
        Ok(self.put(client, &record))
    }

    pub(super) fn update(
        &mut self,
        client: &str,
        entity: &str,
        update: &[u8],
        merge: Merge,
        limits: &Limits,
    ) -> Result<(), Refused> {
        let member = self.state.member(client).ok_or(Refused::NotMember)?;
        let snapshot = member.entity(entity).and_then(|entity| entity.snapshot());
        let snapshot = snapshot.ok_or(Refused::Unknown)?;
        let merged = (merge.entity)(snapshot, update).ok_or(Refused::Unknown)?;
        self.state.spawn(client, entity, &merged, limits)
    }
}

pub(super) fn joined(client: &str, record: &str) -> Change {
    Change::Joined { client: client.into(), record: record.into() }
}

pub(super) fn replaced(client: &str, old_connection: &str, record: &str) -> Change {
    let old_connection = old_connection.into();
    Change::Replaced { client: client.into(), old_connection, record: record.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_version_of_a_new_room_follows() {
        let mut replica = Replica::new(1);
        assert_eq!(replica.count(1_795_871_806_413_021), Counted::Next);
        assert_eq!(replica.count(1_795_871_806_413_022), Counted::Next);
        assert_eq!(replica.count(1_795_871_806_413_024), Counted::Gap);
        assert_eq!(replica.count(1_795_871_806_413_021), Counted::Old);
    }
}
