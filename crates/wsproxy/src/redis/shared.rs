//! State that an instance's connections to Redis and their callers share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wsproxy_proto::names::Names;

use crate::{
    bus::{publish::BusError, status::BusCounters},
    config,
    redis::{
        connect::Connector,
        health::Health,
        outlet::{Birth, Outlet},
        pipeline::Pipeline,
        probe::Route,
        subscriptions::Subscriptions,
        topology::Topology,
    },
    store::not_done::NotDone,
};

/// State that connections and callers share.
pub(super) struct RedisShared {
    pub(super) connector: Connector,
    pub(super) topology: Topology,
    pub(super) client_name: String,
    pub(super) names: Names,
    pub(super) probe_channel: Arc<str>,
    pub(super) probe_interval: Duration,
    pub(super) response_timeout: Duration,
    pub(super) subscriptions: Subscriptions,
    pub(super) publishes: Arc<Pipeline>,
    pub(super) commands: Arc<Pipeline>,
    /// Outlet whose messages are each published over a connection of its own.
    pub(super) scout: Outlet,
    /// The number of the newest connection.
    pub(super) births: AtomicU64,
    /// Number of command connections so far.
    pub(super) command_connections: AtomicU64,
    /// Signals that a publishing or command connection was made.
    pub(super) connections_changed: Notify,
    pub(super) health: Health,
    pub(super) counters: BusCounters,
    pub(super) shutdown: CancellationToken,
}

impl RedisShared {
    /// Creates the state; makes no connection.
    ///
    /// # Errors
    /// [`BusError::Refused`]: the URL or the CA file cannot be used.
    pub(super) fn new(
        config: &config::RedisConfig,
        server_id: &str,
        names: &Names,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let connector =
            Connector::of(config).map_err(|why| BusError::Refused(format!("redis.url: {why}")))?;
        let database = connector.address().database;
        if database != 0 && config.channel_prefix.is_empty() {
            tracing::warn!(
                database,
                "Databases of one Redis do not separate channels: set redis.channel_prefix, \
                unless nothing else uses this Redis."
            );
        }
        Ok(Self {
            topology: Topology::new(&connector.address().servers),
            connector,
            client_name: client_name(server_id),
            names: names.clone(),
            probe_channel: names.probe(server_id).into(),
            probe_interval: config.probe_interval,
            response_timeout: config.response_timeout,
            subscriptions: Subscriptions::default(),
            publishes: Arc::new(Pipeline::new(config.publish_queue_bytes)),
            commands: Arc::new(Pipeline::new(COMMAND_QUEUE_BYTES)),
            scout: Outlet::default(),
            births: AtomicU64::new(0),
            command_connections: AtomicU64::new(0),
            connections_changed: Notify::new(),
            health: Health::default(),
            counters: BusCounters::default(),
            shutdown,
        })
    }

    /// Returns the number for a connection that is about to be made.
    pub(super) fn next_birth(&self) -> Birth {
        self.births.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn outlet(&self, route: Route) -> &Outlet {
        match route {
            Route::Publish => &self.publishes.outlet,
            Route::Command => &self.commands.outlet,
            Route::Fresh => &self.scout,
        }
    }

    /// Returns whether a probe through every other connection came back over the subscribing one.
    pub(super) fn are_connections_proven(&self) -> bool {
        self.publishes.outlet.is_proven() && self.commands.outlet.is_proven()
    }

    /// Returns the reason why Redis takes no writes. A refusal counts as over once the probes' writes no longer repeat it.
    pub(super) fn refusal(&self) -> Option<NotDone> {
        self.health.writes.refusal(self.probe_interval * 3 + self.response_timeout)
    }
}

/// Returns the client name, without characters that Redis refuses.
fn client_name(server_id: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() { c } else { '_' };
    format!("wsproxy-{}", server_id.chars().map(plain).collect::<String>())
}

/// Upper bound of commands that wait for the store; handshakes that do not fit are refused.
const COMMAND_QUEUE_BYTES: usize = 8 * 1024 * 1024;
