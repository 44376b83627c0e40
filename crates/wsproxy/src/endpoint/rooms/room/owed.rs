//! Changes of members here that other instances may lack, since the bus did not take them or has lost them. They are
//! published again, as the mirror has them by then.

use std::collections::BTreeSet;

use tracing::debug;
use wsproxy_conn::clock::{self, Micros};

use crate::endpoint::rooms::room::{Room, State};

/// Changes that are to be published again: clients, each with an entity, or with none for the presence data.
///
/// Invariant: holds at most [`BYTES_MAX`] bytes. A change beyond that reaches others with the next change of its
/// entity.
#[derive(Debug, Default)]
pub(super) struct Owed {
    changes: BTreeSet<Change>,
    bytes: usize,
}

/// A client and an entity of it; `None`: the presence data of the client.
type Change = (Box<str>, Option<Box<str>>);

impl Owed {
    fn add(&mut self, client: &str, entity: Option<&str>) {
        let change = (client.into(), entity.map(Into::into));
        let bytes = bytes(&change);
        if self.bytes + bytes > BYTES_MAX {
            debug!(client, entity, "Too many changes wait to be published again.");
        } else if self.changes.insert(change) {
            self.bytes += bytes;
        }
    }

    /// Takes some changes.
    fn take(&mut self) -> Vec<Change> {
        let mut taken = Vec::new();
        while taken.len() < TOLD_AT_ONCE
            && let Some(change) = self.changes.pop_first()
        {
            self.bytes -= bytes(&change);
            taken.push(change);
        }
        taken
    }

    fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

fn bytes((client, entity): &Change) -> usize {
    client.len() + entity.as_ref().map_or(0, |entity| entity.len()) + CHANGE_BYTES
}

impl State {
    /// Notes a change of a member here that others may lack.
    pub(super) fn owe(&mut self, client: &str, entity: Option<&str>, now: Micros) {
        self.owed.add(client, entity);
        self.owes_at = self.owes_at.min(now.after(OWE_AFTER));
    }
}

impl Room {
    /// Publishes changes again that others may lack.
    pub(super) fn tell_owed(&self) {
        let now = clock::now();
        let mut state = self.state.lock();
        let mut again = Vec::new();
        for (client, entity) in state.owed.take() {
            match state.holder(&client) {
                Some(holder) => again.push((holder, entity)),
                // Another instance has the member by now, and knows of it what the store has.
                None if state.mirror.member(&client).is_some() => {
                    state.mirror.want_later_reading(now.0);
                }
                None => {}
            }
        }
        if !state.owed.is_empty() {
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
const BYTES_MAX: usize = 1 << 20;

/// Estimate of a change's cost beside its names.
const CHANGE_BYTES: usize = 64;

/// Changes that are published again at a time.
const TOLD_AT_ONCE: usize = 500;

/// Pause after a publish that failed, until what others lack is published.
pub(super) const OWE_AFTER: Micros = Micros(1_000_000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_owed_once_and_their_number_is_bounded() {
        let mut owed = Owed::default();
        for entity in [Some("e"), None, Some("e")] {
            owed.add("ann", entity);
        }
        assert_eq!(owed.take(), [("ann".into(), None), ("ann".into(), Some("e".into()))]);
        assert!(owed.is_empty() && owed.bytes == 0);
        for number in 0..20_000 {
            owed.add("ann", Some(&format!("entity-{number:05}")));
        }
        assert!(owed.bytes <= BYTES_MAX && owed.bytes > BYTES_MAX - 100, "{}", owed.bytes);
        assert_eq!(owed.take().len(), TOLD_AT_ONCE);
    }
}
