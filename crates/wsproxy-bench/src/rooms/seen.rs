//! Figures of a crew since the last report.

use std::collections::BTreeMap;

use crate::fleet::Tally;

/// Figures of a phase. Members that are aside are in none of those about moves.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// `latency`: from the schedule of a move until another member has read it. `handshake`: from the schedule of a
    /// connection until the member has read all of its hello. `out_of_order`: moves older than one that was read before.
    /// `repeated`: moves that were read before.
    pub tally: Tally,
    /// Messages of the server.
    pub messages: u64,
    /// Moves that were read, once for each member that read one.
    pub moves: u64,
    /// Moves that a newer one of the same member has replaced on the way.
    pub coalesced: u64,
    /// Moves that came back to the member that made them, by themselves.
    pub own: u64,
    /// Joins that members were told.
    pub joined: u64,
    /// Leaves that members were told.
    pub left: u64,
    /// Arrival of the last of these leaves, in monotonic nanoseconds.
    pub left_last_ns: u64,
    /// Refused messages, by code.
    pub refused: BTreeMap<String, u64>,
}
