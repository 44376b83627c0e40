//! The schedule of a crew's moves; knows no sockets.

use crate::clock::NS_PER_SECOND;
use crate::fleet::Span;

/// Members that move, how often, and until when.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The members that move. Their moves are spread evenly over an interval, and those of one room too.
    pub span: Span,
    /// Moves per second of each.
    pub hz: f64,
    /// Begin, in monotonic nanoseconds.
    pub start_ns: u64,
    /// End, in monotonic nanoseconds.
    pub end_ns: u64,
}

/// Moves that are left of a [`Pace`].
#[derive(Debug)]
pub(super) struct Moves {
    pace: Pace,
    /// Rooms that take turns.
    rooms: u64,
    done: u64,
}

impl Moves {
    /// Members of a room are next to each other; `rooms` divides their number, or all are in one.
    pub(super) fn new(pace: Pace, rooms: u32) -> Self {
        Self { pace, rooms: u64::from(rooms), done: 0 }
    }

    /// Returns when the next move is due; `None` when there is none any more.
    pub(super) fn due_ns(&self) -> Option<u64> {
        let per_second = self.pace.hz * f64::from(self.pace.span.count);
        if per_second <= 0.0 {
            return None;
        }
        let after_ns = self.done as f64 * NS_PER_SECOND as f64 / per_second;
        let due_ns = self.pace.start_ns + after_ns as u64;
        (due_ns < self.pace.end_ns).then_some(due_ns)
    }

    /// Takes the next move: the member that makes it.
    pub(super) fn take(&mut self) -> u32 {
        let count = u64::from(self.pace.span.count.max(1));
        let turn = self.done % count;
        self.done += 1;
        let member = turn % self.rooms * (count / self.rooms) + turn / self.rooms;
        self.pace.span.first + member as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_spread_evenly_over_members_and_time() {
        let span = Span { first: 5, count: 2 };
        let pace = Pace { span, hz: 10.0, start_ns: 1_000, end_ns: 1_000 + NS_PER_SECOND / 5 };
        let mut moves = Moves::new(pace, 1);
        let mut all = Vec::new();
        while let Some(due_ns) = moves.due_ns() {
            all.push((due_ns, moves.take()));
        }
        let expected = [(0, 5), (50, 6), (100, 5), (150, 6)];
        assert_eq!(all, expected.map(|(ms, member)| (1_000 + ms * 1_000_000, member)));
    }

    #[test]
    fn rooms_take_turns() {
        let span = Span { first: 0, count: 6 };
        let mut moves = Moves::new(Pace { span, hz: 1.0, start_ns: 0, end_ns: u64::MAX }, 3);
        let turns: Vec<u32> = (0..7).map(|_| moves.take()).collect();
        assert_eq!(turns, [0, 2, 4, 1, 3, 5, 0]);
    }
}
