//! `[sessions]`: the configuration of the session family.

use std::time::Duration;

use crate::config::{
    DownFrames, EventIds, NoReceiver, OnBusLoss,
    keys::{DAY, Key, key},
    kind::{Bytes, Number, OneOf, Switch, Time},
};

/// `[sessions]`
#[derive(Debug, Clone)]
pub struct SessionsConfig {
    /// Treatment of a client's message when no worker listens.
    pub no_receiver: NoReceiver,
    /// Most entries of `{session:<id>:up}:log`.
    pub up_log_entries_max: u64,
    /// Most bytes of that stream.
    pub up_log_bytes_max: usize,
    /// Time after its last entry when that stream expires.
    pub up_log_ttl: Duration,
    /// Invalid messages after which the connection is closed; 0: never.
    pub strikes_max: u32,
    /// Frames of messages from workers.
    pub down_frames: DownFrames,
    /// Treatment of clients after a loss of the bus.
    pub on_bus_loss: OnBusLoss,
    /// Lifetime of tokens from the API and `wsproxy token`.
    pub token_ttl: Duration,
    /// Clients can resume messages published with history.
    pub history: bool,
    /// Plain publishes of JSON with an `event_id` are taken into the history.
    pub capture: bool,
    /// Announcements of opened and closed sessions are kept in a log.
    pub events_log: bool,
    /// Most entries of an agent's log.
    pub events_log_entries_max: u64,
    /// Lifetime of an entry, and of a log after its last entry.
    pub events_log_ttl: Duration,
    /// Form in which messages of the history carry their positions.
    pub event_ids: EventIds,
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self {
            no_receiver: NoReceiver::Ignore,
            up_log_entries_max: 1000,
            up_log_bytes_max: 1024 * 1024,
            up_log_ttl: Duration::from_secs(3600),
            strikes_max: 10,
            down_frames: DownFrames::Auto,
            on_bus_loss: OnBusLoss::Notice,
            token_ttl: Duration::from_secs(60),
            history: false,
            capture: false,
            events_log: false,
            events_log_entries_max: 10_000,
            events_log_ttl: Duration::from_secs(24 * 3600),
            event_ids: EventIds::Json,
        }
    }
}

/// The keys of this section, and the switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.sessions, Switch, "/{agent_id}/ws/{session_id}"),
    key!(sessions.no_receiver, OneOf(&[("ignore", NoReceiver::Ignore), ("error", NoReceiver::Error), ("queue", NoReceiver::Queue)]), "Treatment of a client's message when no worker listens: ignored, answered with an error, or kept in the stream {session:<id>:up}:log."),
    key!(sessions.up_log_entries_max, Number(1, 1_000_000), "Most entries of that stream."),
    key!(sessions.up_log_bytes_max, Bytes(1 << 10, 1 << 30), "Most bytes of that stream."),
    key!(sessions.up_log_ttl, Time(1_000, 30 * DAY), "Time after its last entry when that stream expires."),
    key!(sessions.strikes_max, Number(0, 1_000_000), "Invalid messages after which a connection is closed; 0: never."),
    key!(sessions.down_frames, OneOf(&[("auto", DownFrames::Auto), ("text", DownFrames::Text), ("binary", DownFrames::Binary)]), "Frames of messages from workers; auto: text where they are UTF-8, else binary."),
    key!(sessions.on_bus_loss, OneOf(&[("notice", OnBusLoss::Notice), ("close", OnBusLoss::Close)]), "After a loss of the bus clients get one bus_recovered message, or close code 1012."),
    key!(sessions.token_ttl, Time(1_000, DAY), "Lifetime of tokens from the API and `wsproxy token`."),
    key!(sessions.history, Switch, "Keep histories: clients can resume messages published with history, over instances and restarts."),
    key!(sessions.capture, Switch, "Take plain publishes of JSON with an event_id into the history too."),
    key!(sessions.events_log, Switch, "Keep announcements of opened and closed sessions in the stream {agent:{agent_id}:sessions}:log: at least once, also those of an instance that was killed."),
    key!(sessions.events_log_entries_max, Number(1, 10_000_000), "Most entries of such a log."),
    key!(sessions.events_log_ttl, Time(1_000, 30 * DAY), "Lifetime of an entry, and of a log after its last entry."),
    key!(sessions.event_ids, OneOf(&[("json", EventIds::Json), ("none", EventIds::None)]), "json: JSON objects of the history carry their position as first member event_id. none: only the subprotocol wsproxy.id.v1 carries positions."),
];
