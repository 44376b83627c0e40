//! `[rooms]`: the configuration of the rooms family.

use std::time::Duration;

use crate::config::{
    keys::{DAY, HOUR, Key, key},
    kind::{Bytes, Number, OneOf, Switch, Time},
};

/// `[rooms]`
#[derive(Debug, Clone)]
pub struct RoomsConfig {
    /// Acceptance of clients without a token.
    pub development: Development,
    /// Treatment of messages that are no envelope.
    pub validate: Validate,
    /// Interval in which positions are sent; zero: each at once.
    pub tick: Duration,
    /// Time for which a member whose connection was lost stays in its room.
    pub leave_grace: Duration,
    /// Time for which the keys of an empty room stay in Redis.
    pub empty_ttl: Duration,
    /// Most rooms with members at this instance.
    pub rooms_max: usize,
    /// Most members of a room, over all instances.
    pub members_max: u32,
    /// Most entities of a member.
    pub entities_max: u32,
    /// Most bytes of the state of all rooms at this instance.
    pub state_bytes: usize,
    /// Messages per second of a connection.
    pub messages_per_second: u32,
    /// Messages per second of all rooms of this instance; 0: no limit.
    pub messages_per_second_total: u32,
    /// Treatment of a connection with too many unacknowledged messages.
    pub overflow: Overflow,
    /// Most messages of a connection that wait for an `ack`.
    pub ack_queue: usize,
    /// A reliable message is sent again after this time.
    pub ack_interval: Duration,
    /// Number of times that a reliable message is sent before it is given up.
    pub ack_tries: u32,
}

/// Acceptance of clients without a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Development {
    /// None.
    Off,
    /// Clients name themselves, where the port is on a loopback address.
    Loopback,
    /// Clients name themselves on any address.
    Anywhere,
}

/// Treatment of messages that are no envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validate {
    /// They are refused.
    Strict,
    /// They go to all others as they came.
    Relay,
}

/// Treatment of a connection with too many unacknowledged messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The oldest message is given up.
    DropOldest,
    /// The newest message is sent once.
    DropNewest,
    /// The connection is closed with 1008.
    Disconnect,
}

impl Default for RoomsConfig {
    fn default() -> Self {
        Self {
            development: Development::Off,
            validate: Validate::Strict,
            tick: Duration::from_millis(50),
            leave_grace: Duration::from_secs(5),
            empty_ttl: Duration::from_secs(60),
            rooms_max: 100_000,
            members_max: 1000,
            entities_max: 100,
            state_bytes: 256 << 20,
            messages_per_second: 100,
            messages_per_second_total: 0,
            overflow: Overflow::DropOldest,
            ack_queue: 1000,
            ack_interval: Duration::from_secs(5),
            ack_tries: 3,
        }
    }
}

/// Attempts to open a room per window, while `rate_limit.max_requests` is not set.
pub const ROOM_ATTEMPTS: u32 = 60;

/// The keys of this section, and the switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.rooms, Switch, "/ws/{room_id}; needs a key in [jwt], or rooms.development."),
    key!(rooms.development, OneOf(&[("false", Development::Off), ("true", Development::Loopback), ("anywhere", Development::Anywhere)]), "Clients without a token name themselves by ?user_id= and ?client_id=. true only together with a server.bind on a loopback address; anywhere on any address. Never for production."),
    key!(rooms.validate, OneOf(&[("strict", Validate::Strict), ("relay", Validate::Relay)]), "Messages that are no envelope: strict refuses them, relay passes them on to all others as they came."),
    key!(rooms.tick, Time(0, 1_000), "Interval in which the newest position of each entity is sent; 0: each position at once."),
    key!(rooms.leave_grace, Time(0, 60_000), "Time for which a member whose connection was lost stays in its room: a client that is back by then has never left."),
    key!(rooms.empty_ttl, Time(1_000, DAY), "Time for which the keys of a room without members stay in Redis."),
    key!(rooms.rooms_max, Number(1, 10_000_000), "Most rooms with members at this instance."),
    key!(rooms.members_max, Number(1, 100_000), "Most members of a room, over all instances. About 100 members that move 20 times a second are 16 MB/s to clients."),
    key!(rooms.entities_max, Number(0, 10_000), "Most entities of a member."),
    key!(rooms.state_bytes, Bytes(1 << 20, 1 << 40), "Most bytes of members, entities and positions that this instance holds, of all rooms; 503 for a further room."),
    key!(rooms.messages_per_second, Number(0, 1_000_000), "Messages per second of a connection, and twice as many at once. Beyond it the newest positions wait, and other messages are refused; 0: no limit.").reloads(),
    key!(rooms.messages_per_second_total, Number(0, 100_000_000), "The same for all rooms of this instance together; 0: no limit.").reloads(),
    key!(rooms.overflow, OneOf(&[("drop_oldest", Overflow::DropOldest), ("drop_newest", Overflow::DropNewest), ("disconnect", Overflow::Disconnect)]), "Beyond rooms.ack_queue: drop_oldest gives up the oldest reliable message, drop_newest sends the newest one once, disconnect closes the connection with 1008."),
    key!(rooms.ack_queue, Number(1, 100_000), "Most reliable messages of a connection that wait for an ack.").alias("MESSAGE_QUEUE_SIZE"),
    key!(rooms.ack_interval, Time(100, HOUR), "A reliable message is sent again after this time.").alias("MESSAGE_RETRY_INTERVAL"),
    key!(rooms.ack_tries, Number(1, 100), "Number of times that it is sent before it is given up."),
];
