//! `[agents]`: the configuration of the agents family.

use std::time::Duration;

use crate::config::{
    keys::{DAY, Key, key},
    kind::{Number, OneOf, Switch, Time},
    rule,
};

/// `[agents]`
#[derive(Debug, Clone)]
pub struct AgentsConfig {
    /// Path of the endpoint.
    pub path: String,
    /// Time for which a call over HTTP waits for an agent that was connected a moment ago; zero: it does not wait.
    pub offline_wait: Duration,
    /// Deadline of a call that names none.
    pub call_timeout: Duration,
    /// Longest deadline of a call.
    pub call_timeout_max: Duration,
    /// Most calls in flight to one agent.
    pub in_flight_max: u32,
    /// Treatment of clear secrets in an application's own table.
    pub legacy_secrets: LegacySecrets,
    /// Replacements of one user's connection per minute, over all instances; 0: no limit.
    pub replacements_per_minute: u32,
    /// Invalid messages after which a connection is closed; 0: never.
    pub strikes_max: u32,
}

/// Treatment of secrets that an application stored in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegacySecrets {
    /// They open connections.
    Accept,
    /// They open none.
    Reject,
}

impl Default for AgentsConfig {
    fn default() -> Self {
        Self {
            path: "/".into(),
            offline_wait: Duration::from_secs(5),
            call_timeout: Duration::from_secs(60),
            call_timeout_max: Duration::from_secs(3600),
            in_flight_max: 256,
            legacy_secrets: LegacySecrets::Accept,
            replacements_per_minute: 20,
            strikes_max: 10,
        }
    }
}

/// The keys of this section, and the switch of the family.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(endpoints.agents, Switch, "Users' agents, at the path of agents.path; needs the database of [database]."),
    key!(agents.path, rule::ENDPOINT_PATH, "Path of the endpoint. Only requests for an upgrade reach it; all others find what else is at the path."),
    key!(agents.offline_wait, Time(0, 60_000), "Time for which a call over HTTP waits for an agent that was connected a moment ago; 0: such a call fails at once."),
    key!(agents.call_timeout, Time(100, DAY), "Deadline of a call that names none."),
    key!(agents.call_timeout_max, Time(100, DAY), "Longest deadline of a call."),
    key!(agents.in_flight_max, Number(1, 65_536), "Most calls in flight to one agent; a further one is refused with busy."),
    key!(agents.legacy_secrets, OneOf(&[("accept", LegacySecrets::Accept), ("reject", LegacySecrets::Reject)]), "Secrets that an application stored in clear in agent_credentials: accept, or reject until `wsproxy agents adopt` has replaced them by hashes."),
    key!(agents.replacements_per_minute, Number(0, 100_000), "Times that a user's newer connection may replace the older one within a minute, over all instances; 429 beyond it. 0: no limit."),
    key!(agents.strikes_max, Number(0, 1_000_000), "Invalid messages after which a connection is closed; 0: never."),
];
