//! Changes of members here that other instances may lack, since the bus did not take them or has lost them. They are
//! published again, as the mirror has them by then.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Bound,
};

use tracing::debug;
use wsproxy_conn::clock::{self, Micros};
use wsproxy_proto::rooms::{
    mirror::{Mirror, Reading},
    wire::{self, Record},
};

use crate::endpoint::rooms::room::{Room, State};

/// Changes that are to be published again: clients, each with an entity, or with none for the presence data.
///
/// Invariant: holds at most [`BYTES_MAX`] bytes. Where a change was left out, the room is compared with the store once the
/// bus has taken the others.
#[derive(Debug, Default)]
pub(super) struct Owed {
    changes: BTreeSet<Change>,
    bytes: usize,
    /// The change that was taken last, while others wait behind it.
    last: Option<Change>,
    /// A change was left out.
    is_over: bool,
    /// The next reading shows what was left out.
    compares: bool,
}

/// A client and an entity of it; `None`: the presence data of the client.
type Change = (Box<str>, Option<Box<str>>);

impl Owed {
    fn add(&mut self, client: &str, entity: Option<&str>) {
        let change = (client.into(), entity.map(Into::into));
        let bytes = bytes_of(&change);
        if self.changes.contains(&change) {
            return;
        }
        if self.bytes + bytes > BYTES_MAX {
            debug!(client, entity, "Too many changes wait to be published again.");
            self.is_over = true;
        } else {
            self.changes.insert(change);
            self.bytes += bytes;
        }
    }

    /// Takes some changes. Those that are added again come behind all others.
    fn take(&mut self) -> Vec<Change> {
        let from = self.last.take().map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.changes.range((from, Bound::Unbounded)).take(TOLD_AT_ONCE);
        let taken: Vec<Change> = next.cloned().collect();
        for change in &taken {
            self.changes.remove(change);
            self.bytes -= bytes_of(change);
        }
        self.last = taken.get(TOLD_AT_ONCE - 1).cloned();
        taken
    }

    /// Returns whether nothing waits, but a change was left out: what this is, a reading shows.
    fn begin_to_compare(&mut self) -> bool {
        let begins = self.changes.is_empty() && std::mem::take(&mut self.is_over);
        self.compares |= begins;
        begins
    }

    fn is_settled(&self) -> bool {
        self.changes.is_empty() && !self.is_over
    }

    /// Returns whether a reading that begins now is to be compared with the mirror.
    pub(super) const fn compares(&self) -> bool {
        self.compares
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

fn bytes_of((client, entity): &Change) -> usize {
    client.len() + entity.as_ref().map_or(0, |entity| entity.len()) + CHANGE_BYTES
}

/// Returns the changes of members here that a reading lacks, whose news the mirror has applied.
fn lacking(mirror: &Mirror, reading: &Reading) -> Vec<Change> {
    let here = |client: &str| mirror.member(client).filter(|member| member.is_here());
    let mut lacking: Vec<Change> = Vec::new();
    let stored: HashMap<_, _> =
        reading.entities.iter().map(|(key, value)| (&key[..], value)).collect();
    for (client, member) in mirror.members().filter(|(_, member)| member.is_here()) {
        for entity in member.entities() {
            let field = wire::field(client, entity.id());
            let found = stored.get(field.as_bytes()).map(|found| &found[..]);
            if found != entity.snapshot() {
                lacking.push((client.into(), Some(entity.id().into())));
            }
        }
    }
    for (field, _) in reading.entities.iter().chain(&reading.positions) {
        let Some((client, id)) = wire::parse_field(field) else { continue };
        if here(client).is_some_and(|member| member.entity(id).is_none()) {
            lacking.push((client.into(), Some(id.into())));
        }
    }
    for (client, record) in &reading.members {
        let (Ok(client), Ok(record)) = (str::from_utf8(client), str::from_utf8(record)) else {
            continue;
        };
        let json = Record::parse(record).map(|record| record.json);
        if here(client).is_some_and(|member| Some(member.record().json) != json) {
            lacking.push((client.into(), None));
        }
    }
    lacking
}

impl State {
    /// Notes a change of a member here that others may lack.
    pub(super) fn owe(&mut self, client: &str, entity: Option<&str>, now: Micros) {
        self.owed.add(client, entity);
        self.owes_at = self.owes_at.min(now.after(OWE_AFTER));
    }

    /// Notes the changes of members here that the store lacks, as a reading shows that was applied.
    pub(super) fn owe_lacking(&mut self, reading: &Reading, now: Micros) {
        self.owed.compares = false;
        for (client, entity) in lacking(&self.mirror, reading) {
            self.owe(&client, entity.as_deref(), now);
        }
    }
}

impl Room {
    /// Publishes changes again that others may lack.
    pub(super) fn tell_owed(&self) {
        let now = clock::now();
        let mut state = self.state.lock();
        if state.owed.begin_to_compare() {
            state.mirror.want_later_reading(now.0);
        }
        let mut again = Vec::new();
        for (client, entity) in state.owed.take() {
            let is_here = state.mirror.member(&client).map(|member| member.is_here());
            match (state.holder(&client), is_here) {
                (Some(holder), _) => again.push((holder, entity)),
                // Its connection has ended: the next one here is the one that publishes, unless the member leaves.
                (None, Some(true)) => state.owe(&client, entity.as_deref(), now),
                // Another instance has the member by now, and knows of it what the store has.
                (None, Some(false)) => state.mirror.want_later_reading(now.0),
                (None, None) => {}
            }
        }
        if !state.owed.is_settled() {
            state.owes_at = state.owes_at.min(now.after(OWE_AFTER));
        }
        self.release(state, now);
        // Outside the lock, which the last owner of a membership takes.
        let again = again.into_iter();
        for (holder, entity) in again.filter_map(|(holder, of)| Some((holder.upgrade()?, of))) {
            match entity {
                Some(entity) => self.tell_again(&holder, &entity),
                None => self.tell_presence_again(&holder),
            }
        }
    }
}

/// Upper bound of the changes that wait, in bytes.
const BYTES_MAX: usize = 128 << 10;

/// Estimate of a change's cost beside its names.
const CHANGE_BYTES: usize = 64;

/// Changes that are published again at a time.
const TOLD_AT_ONCE: usize = 500;

/// Pause after a publish that failed, until what others lack is published.
pub(super) const OWE_AFTER: Micros = Micros(1_000_000);

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use wsproxy_proto::rooms::{
        mirror::{Limits, Origin},
        wire::Connection,
    };

    use super::*;
    use crate::endpoint::rooms::room::MERGE;

    #[test]
    fn a_change_is_owed_once_and_their_number_is_bounded() {
        let mut owed = Owed::default();
        for entity in [Some("e"), None, Some("e")] {
            owed.add("ann", entity);
        }
        assert_eq!(owed.take(), [("ann".into(), None), ("ann".into(), Some("e".into()))]);
        assert!(owed.is_settled() && owed.bytes == 0);
        for number in 0..20_000 {
            owed.add("ann", Some(&format!("entity-{number:05}")));
        }
        assert!(owed.bytes <= BYTES_MAX && owed.bytes > BYTES_MAX - 100, "{}", owed.bytes);
        let mut taken = owed.take();
        assert_eq!(taken.len(), TOLD_AT_ONCE);
        // What still waits comes behind the others.
        taken.iter().for_each(|(client, entity)| owed.add(client, entity.as_deref()));
        assert_ne!(owed.take()[0], taken[0]);
        while !taken.is_empty() {
            taken = owed.take();
        }
        assert_eq!((owed.changes.len(), owed.bytes), (0, 0));
        assert!(owed.begin_to_compare() && owed.is_settled(), "some were left out");
        assert!(!owed.begin_to_compare() && owed.compares());
    }

    #[test]
    fn what_a_reading_lacks_of_members_here_is_owed() {
        let mut mirror = Mirror::new(SERVER, Limits::default(), MERGE, 0);
        let own = Connection { server: SERVER, number: 1 }.to_string();
        let other = Connection { server: 2, number: 1 }.to_string();
        let pairs = |pairs: &[(&str, &str)]| {
            let bytes = |text: &str| Bytes::copy_from_slice(text.as_bytes());
            pairs.iter().map(|(key, value)| (bytes(key), bytes(value))).collect::<Vec<_>>()
        };
        let members = [("me", &*format!("{own} u {{}}")), ("far", &*format!("{other} u {{}}"))];
        let mut reading = Reading { version: 1, members: pairs(&members), ..Reading::default() };
        let ticket = mirror.begin_reading(0);
        mirror.apply_reading(ticket, &reading, 0, &mut Vec::new());
        for (client, entity) in [("me", "same"), ("me", "other"), ("me", "lost"), ("far", "f")] {
            mirror.spawn(Origin::Here, client, entity, b"s").unwrap();
        }
        let presence = Record { connection: &own, user: "u", json: "old" }.to_string();
        reading.members = pairs(&[("me", &presence), members[1]]);
        reading.entities = pairs(&[("me same", "s"), ("me other", "old"), ("me gone", "s")]);
        reading.positions = pairs(&[("me same", "p"), ("me ended", "p"), ("far ended", "p")]);
        let mut lacking = lacking(&mirror, &reading);
        lacking.sort();
        let me = |entity: &str| ("me".into(), Some(entity.into()));
        let entities = ["ended", "gone", "lost", "other"].map(me);
        assert_eq!(lacking, [&[("me".into(), None)], &entities[..]].concat());
    }

    const SERVER: u64 = 1;
}
