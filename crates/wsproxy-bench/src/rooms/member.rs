//! One member: its connection, and what it has seen of the others in its room.

use crate::fleet::Client;

use super::dialect::Sight;
use super::inbox::Inbox;
use super::seen::Seen;

/// One member of a crew; its slot is used again when it connects again.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) client: Client,
    pub(super) inbox: Inbox,
    /// Set when the hello is complete.
    pub(super) ready: bool,
    /// Not measured: its reading is disturbed on purpose.
    pub(super) aside: bool,
    /// Number of its own last move.
    pub(super) moved: u32,
    /// Number of the newest move that it has read of each other member, by their place in the room.
    newest: Vec<u32>,
    /// Number of joins and leaves of each member that it was told; empty for members that do not watch.
    pub(super) told: Vec<(u8, u8)>,
}

impl Member {
    pub(super) fn new() -> Self {
        Self {
            client: Client::new(),
            inbox: Inbox::default(),
            ready: false,
            aside: false,
            moved: 0,
            newest: Vec::new(),
            told: Vec::new(),
        }
    }

    /// Forgets an earlier connection, before a new one.
    pub(super) fn start_over(&mut self) {
        self.inbox = Inbox::default();
        self.ready = false;
        self.newest.clear();
    }

    /// Notes a move of the member at `place` of the room, which was to be sent `took_ns` ago.
    pub(super) fn note(&mut self, place: usize, sight: Sight, took_ns: u64, seen: &mut Seen) {
        if self.newest.len() <= place {
            self.newest.resize(place + 1, 0);
        }
        let newest = std::mem::replace(&mut self.newest[place], sight.number);
        if self.aside {
            return;
        }
        if sight.number <= newest {
            self.newest[place] = newest;
            let of = &mut seen.tally;
            let count =
                if sight.number == newest { &mut of.repeated } else { &mut of.out_of_order };
            *count += 1;
            return;
        }
        seen.moves += 1;
        // The first move that a member reads of another says nothing about those before it joined.
        if newest > 0 {
            seen.coalesced += u64::from(sight.number - newest - 1);
        }
        seen.tally.latency.saturating_record(took_ns);
    }

    /// Notes a join or a leave of a member.
    pub(super) fn hear(&mut self, of: u32, joined: bool) {
        if let Some((joins, leaves)) = self.told.get_mut(of as usize) {
            let count = if joined { joins } else { leaves };
            *count = count.saturating_add(1);
        }
    }

    /// Returns the number of the newest move that it has read of the member at `place` of its room.
    pub(super) fn newest(&self, place: usize) -> u32 {
        self.newest.get(place).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_repeated_and_old_moves_are_told_apart() {
        let (mut member, mut seen) = (Member::new(), Seen::default());
        for number in [4, 5, 8, 8, 7, 9] {
            member.note(2, Sight { mover: 2, number, sent_us: 0 }, 1_000, &mut seen);
        }
        assert_eq!((seen.moves, seen.coalesced), (4, 2));
        assert_eq!((seen.tally.repeated, seen.tally.out_of_order), (1, 1));
        assert_eq!((member.newest(2), member.newest(1)), (9, 0));
    }
}
