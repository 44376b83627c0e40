//! Events: one connection of each user for everything that a backend wants to tell. State that all clients share.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_conn::{Profile, clock::Micros};
use wsproxy_proto::names::Names;

use crate::{
    auth::jwt::JwtVerifier,
    config::{self, Config, HeartbeatConfig},
    core::{self, Core, acks::Patience},
    hub::track::Histories,
    logic::upstream::UpstreamCounters,
    registry::{self, Registry},
    telemetry::{counter::Counter, throttle::Throttle},
};

pub mod api;
pub mod entrance;
pub mod health;
pub mod logic;
pub mod messages;
mod metrics;
pub mod refresh;

/// The event endpoint of an instance.
pub struct Events {
    /// Section `[events]` of the configuration.
    pub config: config::events::EventsConfig,
    /// Section `[heartbeat]` of the configuration.
    pub heartbeat: HeartbeatConfig,
    /// Id of this instance.
    pub server_id: Arc<str>,
    /// Channel of all clients' messages to the workers.
    up: Arc<str>,
    /// Channel of reports on acknowledgements.
    reports: Arc<str>,
    patience: Patience,
    /// `jwt.leeway`: seconds for which a token stays valid after its `exp`.
    leeway: u64,
    /// Counters that the metrics read.
    pub counters: EventCounters,
    /// Settings and counters that all connections share.
    pub profile: Arc<Profile>,
    /// Histories of events; `None` if `events.history` is off.
    histories: Option<Arc<Histories>>,
    /// Verifier of tokens; `None` if events are not served.
    jwt: Option<JwtVerifier>,
    /// Registry of connections; `None` if events are not served.
    pub registry: Option<Arc<Registry>>,
}

/// Counters of the event endpoint, beyond those of each connection.
#[derive(Debug, Default)]
pub struct EventCounters {
    /// Messages of clients.
    pub upstream: UpstreamCounters,
    /// Messages that wanted an `ack`.
    pub ack_wanted: Counter,
    /// Messages that were acknowledged.
    pub acknowledged: Counter,
    /// Messages that were sent again.
    pub resent: Counter,
    /// Messages that were given up, indexed by [`Unacknowledged`].
    pub unacknowledged: [Counter; Unacknowledged::ALL.len()],
    /// Acknowledgements of messages that did not wait for one.
    pub acks_unknown: Counter,
    /// Reports on acknowledgements that the bus did not take.
    pub unreported: Counter,
    /// Throttle of log lines about lost reports.
    pub unreported_lines: Throttle,
    /// Newer tokens that were accepted.
    pub refreshed: Counter,
    /// Newer tokens that were refused.
    pub refresh_refused: Counter,
}

/// Reason for which a message is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unacknowledged {
    /// The message was sent `events.ack_tries` times.
    Tries,
    /// Too many messages wait.
    Overflow,
    /// The connection has ended.
    Closed,
}

impl Unacknowledged {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Tries, Self::Overflow, Self::Closed];

    /// Returns the reason's name in reports and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tries => "tries",
            Self::Overflow => "overflow",
            Self::Closed => "closed",
        }
    }
}

impl Events {
    /// Starts the family: the verifier of tokens and the registry.
    ///
    /// # Errors
    /// A sentence for the operator: the keys for tokens cannot be used.
    pub(super) fn start(
        core: &Core,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let (config, names) = (&core.config, &core.names);
        let mut events = Self::new(config, names, &core.server_id);
        events.histories = config.events.history.then(|| {
            Arc::new(Histories {
                limits: config.history.limits(),
                names: names.clone(),
                clock: Some(names.events_clock().into()),
                unresumable_prefix: Some(names.events_connection("").into()),
                adopt_plain: config.events.capture,
            })
        });
        if config.endpoints.events {
            events.jwt =
                Some(JwtVerifier::new(&config.jwt, &core.jwt_keys, background, end.clone())?);
            let settings = registry::RegistrySettings::new(config, &core.server_id, names);
            let hub = Arc::clone(&core.hub);
            events.registry = Some(Registry::start(settings, hub, &core.bus, core.lease()));
        }
        Ok(Arc::new(events))
    }

    /// Removes this instance's connections from the registry.
    pub(super) async fn close(&self) {
        if let Some(registry) = &self.registry {
            registry.close().await;
        }
    }

    /// Makes the family without verifier, histories and registry.
    fn new(config: &Config, names: &Names, server_id: &Arc<str>) -> Self {
        let leeway = config.jwt.leeway_seconds();
        let profile = Arc::new(profile(config));
        let (config, heartbeat) = (config.events.clone(), config.heartbeat.clone());
        let patience = Patience {
            interval: config.ack_interval.into(),
            tries_max: config.ack_tries,
            messages_max: config.ack_queue,
            bytes_max: ACK_BYTES_MAX,
        };
        Self {
            patience,
            leeway,
            heartbeat,
            server_id: Arc::clone(server_id),
            up: names.events_up().into(),
            reports: names.events_acks().into(),
            config,
            counters: EventCounters::default(),
            profile,
            histories: None,
            jwt: None,
            registry: None,
        }
    }
}

/// Makes the profile of the family's connections.
fn profile(config: &Config) -> Profile {
    let base = core::profile(config);
    Profile {
        heartbeat: wsproxy_conn::Heartbeat::Messages,
        // Heartbeats are messages here, so that no connection is ever idle.
        idle_timeout: Micros::NEVER,
        // A client that resumes may get all entries of three logs at once, and every message may want an `ack`.
        events_max: base.events_max.saturating_add(
            usize::try_from(config.history.entries_max).unwrap_or(usize::MAX).saturating_mul(3),
        ),
        event_bytes_max: config.limits.send_buffer_bytes.saturating_mul(2),
        ..base
    }
}

/// Upper bound of the bytes that wait for one client's `ack`. Events are small.
const ACK_BYTES_MAX: usize = 1024 * 1024;
