//! `[events]`: the configuration of the event family.

use std::time::Duration;

use crate::config::{
    OnBusLoss,
    keys::{DAY, HOUR, Key, key},
    kind::{Number, OneOf, Switch, Time},
};

/// `[events]`
#[derive(Debug, Clone)]
pub struct EventsConfig {
    /// Clients can resume; messages published with history are delivered without a gap.
    pub history: bool,
    /// Plain publishes with an `event_id` are taken into the history.
    pub capture: bool,
    /// Invalid messages after which a connection is closed; 0: never.
    pub strikes_max: u32,
    /// Treatment of clients without a history after a loss of the bus.
    pub on_bus_loss: OnBusLoss,
    /// A message that wants an `ack` is sent again after this time.
    pub ack_interval: Duration,
    /// Number of times that a message is sent before it is reported.
    pub ack_tries: u32,
    /// Most messages of a connection that wait for an `ack`.
    pub ack_queue: usize,
    /// Lifetime of registry entries that no instance refreshes.
    pub registry_ttl: Duration,
    /// Longest revocation that the API accepts; at least the lifetime of tokens.
    pub revocation_ttl: Duration,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            history: true,
            capture: false,
            strikes_max: 10,
            on_bus_loss: OnBusLoss::Notice,
            ack_interval: Duration::from_secs(5),
            ack_tries: 3,
            ack_queue: 1000,
            registry_ttl: Duration::from_secs(3600),
            revocation_ttl: Duration::from_secs(24 * 3600),
        }
    }
}

/// The keys of this section, and the switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.events, Switch, "/ws; needs a key in [jwt]."),
    key!(events.history, Switch, "Keep histories: clients can resume, over instances and restarts."),
    key!(events.capture, Switch, "Take plain publishes with an event_id into the history too."),
    key!(events.strikes_max, Number(0, 1_000_000), "Invalid messages after which a connection is closed; 0: never."),
    key!(events.on_bus_loss, OneOf(&[("notice", OnBusLoss::Notice), ("close", OnBusLoss::Close)]), "After a loss of the bus clients without a history get one bus_recovered message, or close code 1012."),
    key!(events.ack_interval, Time(100, HOUR), "A message that wants an ack is sent again after this time.").alias("MESSAGE_RETRY_INTERVAL"),
    key!(events.ack_tries, Number(1, 100), "Number of times that it is sent before it is reported."),
    key!(events.ack_queue, Number(1, 100_000), "Most messages of a connection that wait for an ack.").alias("MESSAGE_QUEUE_SIZE"),
    key!(events.registry_ttl, Time(10_000, 30 * DAY), "Lifetime of registry entries that no instance refreshes."),
    key!(events.revocation_ttl, Time(1_000, 400 * DAY), "Longest revocation (revoke_seconds) that the API accepts. At least the lifetime of tokens."),
];
