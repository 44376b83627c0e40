//! Messages to publish, and their outcomes. Knows no backend.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use wsproxy_proto::history::{HistoryLimits, Position};

use crate::store::not_done::NotDone;

/// A message to publish.
pub struct Publish {
    /// Full name of the channel.
    pub channel: Arc<str>,
    /// The payload, verbatim.
    pub payload: Bytes,
    /// Storage of the message beside the publish.
    pub keep: Keep,
    /// Receiver of the outcome.
    pub receipt: Option<Arc<dyn Receipt>>,
}

impl Publish {
    /// Returns whether there is a message for subscribers.
    pub(crate) const fn is_message(&self) -> bool {
        !matches!(self.keep, Keep::Positions(_))
    }

    /// Returns the bytes of the message in a bounded queue.
    pub(crate) fn queued_bytes(&self) -> usize {
        let keep = match &self.keep {
            Keep::History(_) => 2 * QUEUED_OVERHEAD_BYTES,
            Keep::Room(write) => write.bytes(),
            Keep::Positions(write) => write.bytes(),
            Keep::Nothing | Keep::IfNoReceiver { .. } => 0,
        };
        self.channel.len() + self.payload.len() + keep + QUEUED_OVERHEAD_BYTES
    }
}

/// Storage of a message beside its publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// None: without a subscriber the message is gone, as the receipt tells.
    Nothing,
    /// A bounded, expiring stream, if the message reached no subscriber. It is appended under the field `data`,
    /// atomically with the publish.
    IfNoReceiver {
        /// Key of the stream.
        log: Arc<str>,
        /// Upper bound of entries (approximately: Redis trims whole nodes).
        entries_max: u64,
        /// Upper bound of bytes, except for a newest entry that alone is larger.
        bytes_max: u64,
        /// Time after its last entry when the stream expires.
        ttl: Duration,
    },
    /// The history of its channel: the message is appended and published in an envelope, atomically.
    History(Box<History>),
    /// The state of a room's member: it is changed and the message is published, atomically, if the member's connection
    /// still holds its place. Otherwise nothing is done, and the outcome is `Kept`.
    Room(Box<RoomWrite>),
    /// Positions of a room's members, each of which is written if its member's connection still holds its place. There is
    /// no message: the write only has its turn among those of the queue.
    Positions(Box<RoomPositions>),
}

/// Newest positions of a room's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomPositions {
    /// Keys of the room: members, meta, entities, positions.
    pub keys: [String; 4],
    /// Time to live of the room's keys.
    pub ttl: Duration,
    /// The positions, at most 500.
    pub positions: Vec<RoomPosition>,
}

/// Position of an entity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomPosition {
    /// Client id of the member.
    pub client: Box<str>,
    /// Connection of the member, as its record has it.
    pub connection: Box<str>,
    /// Id of the entity.
    pub entity: Box<str>,
    /// The position, as the member sent it.
    pub position: Box<[u8]>,
}

impl RoomPositions {
    fn bytes(&self) -> usize {
        let of = |one: &RoomPosition| {
            one.client.len() + one.connection.len() + one.entity.len() + one.position.len()
        };
        let keys = self.keys.iter().map(String::len).sum::<usize>();
        keys + self.positions.iter().map(|one| of(one) + POSITION_OVERHEAD_BYTES).sum::<usize>()
    }
}

/// Change of the state of a room's member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomWrite {
    /// Keys of the room: members, meta, entities, positions.
    pub keys: [String; 4],
    /// Client id of the member.
    pub client: Box<str>,
    /// Connection of the member, as its record has it.
    pub connection: String,
    /// Time to live of the room's keys.
    pub ttl: Duration,
    /// The change.
    pub op: RoomOp,
}

/// Kind of a [`RoomWrite`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoomOp {
    /// An entity begins or changes.
    Spawn {
        /// Id of the entity.
        entity: Box<str>,
        /// Snapshot of the entity.
        snapshot: Bytes,
    },
    /// An entity ends.
    Despawn {
        /// Id of the entity.
        entity: Box<str>,
    },
    /// The record of the member changes.
    Presence {
        /// JSON of the record.
        json: String,
    },
}

impl RoomWrite {
    fn bytes(&self) -> usize {
        let op = match &self.op {
            RoomOp::Spawn { entity, snapshot } => entity.len() + snapshot.len(),
            RoomOp::Despawn { entity } => entity.len(),
            RoomOp::Presence { json } => json.len(),
        };
        let keys = self.keys.iter().map(String::len).sum::<usize>();
        keys + self.client.len() + self.connection.len() + op + 2 * QUEUED_OVERHEAD_BYTES
    }
}

/// Storage of a message in the history of its channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// Key of the log.
    pub log: Arc<str>,
    /// Key of the clock that gives the ids, for logs that share one order; `None`: the log's own.
    pub clock: Option<Arc<str>>,
    /// The worker's id of the message, which the payload has.
    pub event_id: Option<Box<str>>,
    /// A key that is set with the message, and its time to live. If the key is set already, nothing is published.
    pub dedup: Option<(Arc<str>, Duration)>,
    /// Set to publish nothing if the log has the event id already.
    pub unique: bool,
    /// Bounds of the log.
    pub limits: HistoryLimits,
}

/// Outcome of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// This number of subscribers received the message.
    Received(u64),
    /// No subscriber received the message, and it was kept in the stream.
    Kept,
    /// The message is in the history of its channel.
    Stored {
        /// Number of subscribers that received the message.
        receivers: u64,
        /// Id of the message in the history.
        id: Position,
        /// Set if the message was there already, and was not published again.
        duplicate: bool,
    },
    /// The message was certainly neither published nor kept.
    Refused(NotDone),
    /// The connection was lost before the answer: the message may or may not have arrived.
    Lost,
}

/// Use that a [`Receipt`] makes of the number of receivers. The nodes of a Redis Cluster count their own only, and are
/// asked for as much as is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counts {
    /// None.
    Nothing,
    /// Whether there is one. The number may be too low, but is 0 only if there is none.
    Any,
    /// Their number, which is too low while a node does not answer.
    All,
    /// Their number. While a node does not answer the outcome is [`Outcome::Lost`].
    Exact,
}

/// Receiver of an [`Outcome`]. Called on the bus's task: must not block.
pub trait Receipt: Send + Sync {
    /// Returns the use that is made of the number of receivers.
    fn counts(&self) -> Counts {
        Counts::Nothing
    }

    /// Takes the outcome, exactly once for every publish that was accepted into the queue.
    fn published(&self, outcome: Outcome);
}

/// Creates a receipt and the future of its outcome.
#[must_use]
pub fn awaited() -> (Arc<dyn Receipt>, oneshot::Receiver<Outcome>) {
    let (sender, outcome) = oneshot::channel();
    (Arc::new(Awaited(Mutex::new(Some(sender)))), outcome)
}

struct Awaited(Mutex<Option<oneshot::Sender<Outcome>>>);

impl Receipt for Awaited {
    fn counts(&self) -> Counts {
        Counts::All
    }

    fn published(&self, outcome: Outcome) {
        if let Some(sender) = self.0.lock().take() {
            // The caller may have given up at its deadline.
            let _ = sender.send(outcome);
        }
    }
}

/// The reason why the bus did not do a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Not connected; a retry may help.
    #[error("the bus is unreachable: {0}")]
    Unreachable(String),
    /// The publish queue is full; wait until it has room.
    #[error("the publish queue is full")]
    Full,
    /// Nothing was done, for this reason.
    #[error("{}", .0.reason())]
    NotDone(NotDone),
    /// The bus answered with an error (such as an ACL): a retry will not help.
    #[error("the bus refused: {0}")]
    Refused(String),
    /// The instance is ending.
    #[error("the bus is closed")]
    Closed,
}

/// Estimate of a queued position's cost beside its bytes.
const POSITION_OVERHEAD_BYTES: usize = 64;

/// Estimate of a queued message's cost beside its bytes.
const QUEUED_OVERHEAD_BYTES: usize = 128;
