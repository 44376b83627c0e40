//! The connections of the event endpoint, here and on all instances, and the way to end them.
//!
//! This process holds the state that Redis should have. One task writes the differences in batches, and writes
//! everything again after Redis lost data. No message and no handshake waits for that task.

use std::{net::IpAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    bus::Bus,
    client::Client,
    config::Config,
    hub::Hub,
    registry::{
        commands::Commands, lease::Lease, local::Local, redis::RedisRegistry,
        revocation::Revocations, writer::WriterCounters,
    },
    store::command::StoreError,
    telemetry::{counter::Counter, throttle::Throttle},
};

pub mod agents;
mod changes;
pub(crate) mod commands;
pub mod control;
pub mod lease;
mod local;
mod members;
pub(crate) mod metrics;
mod redis;
pub(crate) mod revocation;
pub mod rooms;
pub mod sessions;
pub mod tunnel;
pub(crate) mod writer;

/// The connections of this instance, and access to those of all others; see [`Self::join`].
pub struct Registry {
    settings: RegistrySettings,
    lease: Arc<Lease>,
    backend: Backend,
    revocations: Revocations,
    hub: Arc<Hub>,
    /// Guards the index and the changes. Held for a few steps, or for one walk after an outage.
    local: Mutex<Local>,
    /// Signals the writer that there are changes.
    changed: Notify,
    /// The latest totals, so that many callers cost one reading.
    totals: tokio::sync::Mutex<Option<(Instant, Totals)>>,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: RegistryCounters,
}

/// Storage of the shared registry.
enum Backend {
    /// This process: there is no other instance.
    Embedded,
    /// Redis.
    Redis(Box<RedisRegistry>),
}

/// Parameters of a registry.
#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// Name of this instance.
    pub server_id: Arc<str>,
    /// Spelling of keys and channels.
    pub names: Names,
    /// Time to live of an entry that its instance does not renew.
    pub ttl: Duration,
    /// Tolerated difference of clocks in seconds: revocations cover tokens that were issued so much later.
    pub leeway: u64,
}

impl RegistrySettings {
    /// Returns the parameters of a configuration.
    #[must_use]
    pub fn new(config: &Config, server_id: &Arc<str>, names: &Names) -> Self {
        Self {
            server_id: Arc::clone(server_id),
            names: names.clone(),
            ttl: config.events.registry_ttl,
            leeway: config.jwt.leeway_seconds(),
        }
    }
}

/// Counters of a registry.
#[derive(Debug, Default)]
pub struct RegistryCounters {
    /// Counters of the writing to Redis.
    pub writer: WriterCounters,
    /// Connections that a command or a revocation closed.
    pub disconnected: Counter,
    /// Commands that could not be read.
    pub bad_commands: Counter,
    /// Throttle of the log lines about these.
    pub bad_command_lines: Throttle,
    /// Readings of revocations because commands may have been missed.
    pub rechecks: Counter,
}

/// A connection that joins the registry.
#[derive(Debug)]
pub struct Joining {
    /// Id of the connection.
    pub connection: Uuid,
    /// The user of the connection.
    pub user: Id,
    /// The client, to close the connection by command.
    pub client: Client,
    /// The name of the client's token (`jti`), if it has one.
    pub token: Option<String>,
    /// Time of issue of the client's token (`iat`), in unix seconds.
    pub issued_at: Option<u64>,
    /// Address of the client.
    pub address: Option<IpAddr>,
    /// The client's `User-Agent`.
    pub user_agent: Option<String>,
    /// Transport of the connection.
    pub transport: Transport,
}

/// Transport of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A WebSocket.
    WebSocket,
    /// Server-sent events.
    Sse,
}

impl Transport {
    /// Returns the name in announcements, logs and the registry.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::WebSocket => "websocket",
            Self::Sse => "sse",
        }
    }
}

/// A connection of a user, on any instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Presence {
    /// Id of the connection.
    pub connection_id: Uuid,
    /// Record of the connection.
    #[serde(flatten)]
    pub record: ConnectionRecord,
}

/// The registry's record of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRecord {
    /// The instance that holds the connection.
    pub server_id: Box<str>,
    /// Time of the opening by that instance's clock: RFC 3339.
    pub connected_at: Box<str>,
    /// Transport of the connection.
    pub transport: Transport,
    /// Address of the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The client's `User-Agent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<Box<str>>,
}

/// Numbers of connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Connections in the registry, of all instances.
    pub total: u64,
    /// Connections of this instance.
    pub local: u64,
    /// Connections of living instances.
    pub alive: u64,
    /// Connections of dead instances that were not removed yet.
    pub dead: u64,
}

/// Guard of a connection in the registry; dropping it removes the connection.
#[must_use = "dropping it takes the connection out of the registry"]
pub struct Membership {
    registry: Arc<Registry>,
    connection: Uuid,
}

impl Registry {
    /// Starts the registry's tasks, which run until [`Self::close`]. The lease must outlive them.
    #[must_use]
    pub fn start(
        settings: RegistrySettings,
        hub: Arc<Hub>,
        bus: &Bus,
        lease: &Arc<Lease>,
    ) -> Arc<Self> {
        let timeout = lease.settings().response_timeout;
        let backend = match bus {
            Bus::Embedded(_) => Backend::Embedded,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), timeout);
                let redis = RedisRegistry::new(commands, &settings, lease.settings());
                Backend::Redis(redis.into())
            }
        };
        let (names, leeway) = (settings.names.clone(), settings.leeway);
        let registry = Arc::new(Self {
            local: Mutex::new(Local::new(matches!(backend, Backend::Redis(_)))),
            settings,
            lease: Arc::clone(lease),
            backend,
            revocations: Revocations::new(bus, timeout, names, leeway),
            hub,
            changed: Notify::new(),
            totals: tokio::sync::Mutex::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: RegistryCounters::default(),
        });
        registry.tasks.spawn(control::run(Arc::clone(&registry)));
        if matches!(registry.backend, Backend::Redis(_)) {
            registry.tasks.spawn(writer::connections::run(Arc::clone(&registry)));
        }
        registry
    }

    /// Adds a connection for as long as the returned guard lives. Never waits.
    ///
    /// Call this before [`Self::is_revoked`]: then a revocation in between closes the connection, or is found by
    /// `is_revoked`.
    pub fn join(self: &Arc<Self>, joining: Joining) -> Membership {
        let connection = joining.connection;
        if self.local.lock().join(joining) {
            self.changed.notify_one();
        }
        Membership { registry: Arc::clone(self), connection }
    }

    /// Adds a connection as [`Self::join`] does, unless the user has `user_max` connections here.
    pub fn join_within(self: &Arc<Self>, joining: Joining, user_max: usize) -> Option<Membership> {
        let connection = joining.connection;
        let mut local = self.local.lock();
        if local.of_user(joining.user.as_str()).take(user_max).count() >= user_max {
            return None;
        }
        let is_changed = local.join(joining);
        drop(local);
        if is_changed {
            self.changed.notify_one();
        }
        Some(Membership { registry: Arc::clone(self), connection })
    }

    /// Returns whether a token was revoked, by its name or with all tokens of its user. Takes one round trip
    /// without a deadline of its own.
    ///
    /// A token without `iat` is refused as long as the store has any revocation of its user.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn is_revoked(
        &self,
        user: &Id,
        token: Option<&str>,
        issued_at: Option<u64>,
    ) -> Result<bool, StoreError> {
        self.revocations.cover(user, token, issued_at).await
    }

    /// Returns the number of connections here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.local.lock().len()
    }

    /// Returns whether no connection is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether Redis has every connection here, as far as this instance knows. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.local.lock().changes.is_written()
    }

    /// Returns the connections of a user on all living instances.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn connections_of(&self, user: &Id) -> Result<Vec<Presence>, StoreError> {
        match &self.backend {
            Backend::Embedded => {
                Ok(self.local.lock().presence(&self.settings.server_id, user.as_str()))
            }
            Backend::Redis(redis) => redis.connections_of(user.as_str()).await,
        }
    }

    /// Returns the connections of a user at this instance, each with its client.
    #[must_use]
    pub fn here(&self, user: &Id) -> Vec<(Presence, Client)> {
        let local = self.local.lock();
        let all = local.presence(&self.settings.server_id, user.as_str()).into_iter();
        all.filter_map(|one| local.client(one.connection_id).pop().map(|client| (one, client)))
            .collect()
    }

    /// Returns the numbers of connections. Those of other instances may be a second old, and are unknown while
    /// Redis does not answer.
    pub async fn totals(&self) -> Totals {
        let local = self.len() as u64;
        let here = Totals { total: local, local, alive: local, dead: 0 };
        let Backend::Redis(redis) = &self.backend else { return here };
        let mut known = self.totals.lock().await;
        let fresh = |at: &Instant| at.elapsed() < TOTALS_KEPT;
        if known.as_ref().is_none_or(|(at, _)| !fresh(at)) {
            let read = timeout(TOTALS_TIMEOUT, redis.totals()).await;
            // A failure is kept as long: more callers that wait for Redis would help none.
            let (alive, dead) = match read {
                Ok(Ok(counts)) => counts,
                _ => (local, 0),
            };
            *known = Some((Instant::now(), Totals { total: alive + dead, local, alive, dead }));
        }
        known.as_ref().map_or(here, |(_, totals)| Totals { local, ..*totals })
    }

    /// Removes the entries of this instance from Redis and ends. Connections must be gone by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Membership {
    /// Returns whether the connection is one of this user.
    #[must_use]
    pub fn is_of(&self, user: &Id) -> bool {
        self.registry.local.lock().is_of(self.connection, user.as_str())
    }

    /// Replaces the connection's token by another one of the same user.
    pub fn renew(&self, token: Option<&str>, issued_at: Option<u64>) {
        self.registry.local.lock().renew(self.connection, token, issued_at);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if self.registry.local.lock().leave(self.connection) {
            self.registry.changed.notify_one();
        }
    }
}

/// Lifetime of totals that were read: more frequent health checks are answered from memory.
const TOTALS_KEPT: Duration = Duration::from_secs(1);

/// Time limit of reading totals, so that a health check does not hang with Redis.
const TOTALS_TIMEOUT: Duration = Duration::from_secs(1);
