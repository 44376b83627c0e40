//! Counters of rooms, which many files add to and the metrics read.

use wsproxy_proto::rooms::check::Kind;

use crate::telemetry::{counter::Counter, histogram::Histogram, throttle::Throttle};

/// Counters of the rooms family, beyond those of each connection.
#[derive(Debug, Default)]
pub struct RoomCounters {
    /// Messages of clients by kind, indexed by [`Kind`].
    pub received: [Counter; Kind::ALL.len()],
    /// Messages to clients by kind.
    pub sent: [Counter; Kind::ALL.len()],
    /// Messages of clients that are no envelope and were passed on.
    pub opaque: Counter,
    /// Messages to clients that are no envelope.
    pub opaque_sent: Counter,
    /// Messages that were refused.
    pub invalid: Counter,
    /// Messages that were dropped because of a rate.
    pub rate_limited: Counter,
    /// Messages of workers.
    pub from_workers: Counter,
    /// Messages on the channels of rooms that cannot be read.
    pub bad_frames: Counter,
    /// Throttle of the log lines about these.
    pub bad_frame_lines: Throttle,
    /// Joins of which members here were told.
    pub joins_seen: Counter,
    /// Leaves of which members here were told.
    pub leaves_seen: Counter,
    /// Publishes into rooms that others may hear.
    pub published_shared: Counter,
    /// Publishes of positions into rooms that no other instance and no worker hears.
    pub published_local: Counter,
    /// Positions that a newer one replaced within a tick.
    pub coalesced_tick: Counter,
    /// Positions that a newer one replaced while the client was above its rate.
    pub coalesced_rate: Counter,
    /// Batches that were left out for a slow client, which gets all newest positions later.
    pub coalesced_slow: Counter,
    /// Sizes of batches.
    pub batch_entries: Histogram<0, 1>,
    /// Reliable messages to members that acknowledge.
    pub reliable: Counter,
    /// Reliable messages that were acknowledged.
    pub acks: Counter,
    /// Reliable messages that were sent again.
    pub resent: Counter,
    /// Reliable messages that were given up after all tries.
    pub acks_tries: Counter,
    /// Reliable messages that were given up because too many wait.
    pub acks_overflow: Counter,
    /// Reliable messages that waited when the connection ended.
    pub acks_closed: Counter,
    /// Throttle of the log lines about messages that were given up after all tries.
    pub tries_lines: Throttle,
    /// Throttle of the log lines about messages that were given up because too many wait.
    pub overflow_lines: Throttle,
    /// Members that a worker has sent away.
    pub kicked: Counter,
    /// Readings of rooms from the store, beyond the first of each.
    pub readings: Counter,
    /// Joins by their result, indexed by [`JoinResult`].
    pub joins: [Counter; JoinResult::ALL.len()],
    /// Times to send the positions of a tick to all members here.
    pub tick: Histogram<MICROS_FIRST, MICROS_STEP>,
    /// Times to write the state of a room for a member, with which its ServerHello begins.
    pub snapshot: Histogram<MICROS_FIRST, MICROS_STEP>,
    /// Bytes of these states.
    pub snapshot_bytes: Histogram<BYTES_FIRST, BYTES_STEP>,
}

/// Messages and bytes of the members of one room at this instance.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// Messages of members.
    pub(super) messages_in: Counter,
    /// Bytes of these, without their frames.
    pub(super) bytes_in: Counter,
    /// Messages to members.
    pub(super) messages_out: Counter,
    /// Bytes of these, as protobuf and before compression.
    pub(super) bytes_out: Counter,
}

/// Results of joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinResult {
    /// The client is a new member.
    Joined,
    /// The connection took the place of an older one.
    Replaced,
    /// The member was written again, since Redis may have lost it.
    Again,
    /// Another user has the client's name.
    Taken,
    /// The room was full.
    Full,
    /// Another connection had the member's place when it was to be written again.
    Overtaken,
    /// The store did not answer.
    Failed,
}

impl JoinResult {
    /// All results.
    pub const ALL: [Self; 7] = [
        Self::Joined,
        Self::Replaced,
        Self::Again,
        Self::Taken,
        Self::Full,
        Self::Overtaken,
        Self::Failed,
    ];

    /// Returns the value of the label `result`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Joined => "joined",
            Self::Replaced => "replaced",
            Self::Again => "again",
            Self::Taken => "taken",
            Self::Full => "full",
            Self::Overtaken => "overtaken",
            Self::Failed => "failed",
        }
    }
}

impl RoomCounters {
    /// Counts messages to clients of one kind; `None`: of no envelope.
    pub(super) fn sent(&self, kind: Option<Kind>, messages: u64) {
        let counter = kind.map_or(&self.opaque_sent, |kind| &self.sent[kind as usize]);
        counter.add(messages);
    }
}

/// Bounds of times: 16 µs, 64 µs, … 16 s.
const MICROS_FIRST: u32 = 4;
const MICROS_STEP: u32 = 2;

/// Bounds of bytes: 64, 256, … 64 MiB.
const BYTES_FIRST: u32 = 6;
const BYTES_STEP: u32 = 2;
