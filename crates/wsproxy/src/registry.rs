//! Who of the event endpoint is connected, here and over all instances, and how they are sent away.
//!
//! What should be there is kept in this process; one task brings Redis to it, in batches, and again
//! after Redis lost anything. No message and no handshake waits for that.

use std::{net::IpAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_conn::{Link, clock::Micros};
use wsproxy_proto::{
    disconnect::Disconnect,
    names::{Id, Names},
};

use crate::{
    bus::Bus,
    config::Config,
    hub::{
        Hub,
        tap::{Ending, Tap},
    },
    registry::{lease::Lease, local::Local, redis::RedisRegistry},
    store::{StoreError, memory::MemoryStore},
    telemetry::{counter::Counter, throttle::Throttle},
};

mod commands;
pub mod control;
pub mod lease;
mod local;
mod members;
mod redis;
mod revocation;
pub mod sessions;
mod writer;

/// The connections of this instance, and the way to all others. Cheap to read; see [`Self::join`].
pub struct Registry {
    settings: Settings,
    lease: Arc<Lease>,
    backend: Backend,
    hub: Arc<Hub>,
    /// Guards the index and the changes; held for a few steps, or one walk after an outage.
    local: Mutex<Local>,
    /// There is something to write.
    changed: Notify,
    /// The latest reading, so that many who ask cost one.
    totals: tokio::sync::Mutex<Option<(Instant, Totals)>>,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// What it counts; the metrics read it.
    pub counters: RegistryCounters,
}

/// Where the instances meet.
enum Backend {
    /// There is one instance: what is here is all, but for revocations, which are in the embedded store.
    Memory(MemoryStore),
    /// In Redis.
    Redis(Box<RedisRegistry>),
}

/// What a registry has to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which instance this is.
    pub server_id: Arc<str>,
    /// How keys and channels are spelled.
    pub names: Names,
    /// How long an entry is kept that nobody renews.
    pub ttl: Duration,
    /// By how many seconds clocks may differ: revocations cover what was issued so much later.
    pub leeway: u64,
}

impl Settings {
    /// What an instance with this configuration has to know.
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

/// What the registry counts.
#[derive(Debug, Default)]
pub struct RegistryCounters {
    /// Changes that were written to Redis.
    pub written: Counter,
    /// Times that Redis did not do what the registry asked.
    pub failures: Counter,
    /// Times that all connections were written again since Redis had lost them.
    pub rewrites: Counter,
    /// Connections that were sent away by a command or a revocation.
    pub disconnected: Counter,
    /// Commands that made no sense.
    pub bad_commands: Counter,
    /// Of log lines about these.
    pub bad_command_lines: Throttle,
    /// Times that revocations were read again since commands may have been missed.
    pub rechecks: Counter,
}

/// A connection that wants into the registry.
#[derive(Debug)]
pub struct Joining {
    /// Its id.
    pub connection: Uuid,
    /// Whose it is.
    pub user: Id,
    /// How it is sent away.
    pub peer: Peer,
    /// The name of its token (`jti`), if it has one.
    pub token: Option<String>,
    /// When its token was made (`iat`), in unix seconds.
    pub issued_at: Option<u64>,
    /// Where the client is.
    pub address: Option<IpAddr>,
    /// What the client calls itself.
    pub user_agent: Option<String>,
    /// How it is connected.
    pub transport: Transport,
}

/// A connection as far as it can be sent away.
#[derive(Debug, Clone)]
pub enum Peer {
    /// A WebSocket.
    Link(Arc<Link>),
    /// An event stream.
    Stream(Arc<Tap>),
}

/// How a client is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A WebSocket.
    WebSocket,
    /// Server-sent events.
    Sse,
}

impl Transport {
    /// As announcements, logs and the registry name it.
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
    /// Its id.
    pub connection_id: Uuid,
    /// What is known of it.
    #[serde(flatten)]
    pub record: Record,
}

/// What the registry holds of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The instance that holds it.
    pub server_id: Box<str>,
    /// Since when, by that instance's clock: RFC 3339.
    pub connected_at: Box<str>,
    /// How it is connected.
    pub transport: Transport,
    /// Where the client is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// What the client calls itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<Box<str>>,
}

/// How many connections there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// In the registry, of all instances.
    pub total: u64,
    /// Of this instance.
    pub local: u64,
    /// Of instances that are alive.
    pub alive: u64,
    /// Of instances that died and were not removed yet.
    pub dead: u64,
}

/// A connection in the registry; dropping it takes it out.
#[must_use = "dropping it takes the connection out of the registry"]
pub struct Entry {
    registry: Arc<Registry>,
    connection: Uuid,
}

impl Registry {
    /// Starts what it does in the background, until [`Self::close`]. The lease must outlive it.
    #[must_use]
    pub fn start(settings: Settings, hub: Arc<Hub>, bus: &Bus, lease: &Arc<Lease>) -> Arc<Self> {
        let backend = match bus {
            Bus::Memory(bus) => Backend::Memory(bus.store()),
            Bus::Redis(bus) => {
                Backend::Redis(RedisRegistry::new(bus.clone(), &settings, lease.settings()).into())
            }
        };
        let registry = Arc::new(Self {
            local: Mutex::new(Local::new(matches!(backend, Backend::Redis(_)))),
            settings,
            lease: Arc::clone(lease),
            backend,
            hub,
            changed: Notify::new(),
            totals: tokio::sync::Mutex::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: RegistryCounters::default(),
        });
        registry.tasks.spawn(control::run(Arc::clone(&registry)));
        if matches!(registry.backend, Backend::Redis(_)) {
            registry.tasks.spawn(writer::run(Arc::clone(&registry)));
        }
        registry
    }

    /// Takes in a connection, for as long as the returned guard lives. Never waits.
    ///
    /// Join before [`Self::is_revoked`] is asked: a revocation in between reaches the connection
    /// then, by one way or by the other.
    pub fn join(self: &Arc<Self>, joining: Joining) -> Entry {
        let connection = joining.connection;
        if self.local.lock().join(joining) {
            self.changed.notify_one();
        }
        Entry { registry: Arc::clone(self), connection }
    }

    /// The same, unless the user has `user_max` connections here.
    pub fn join_within(self: &Arc<Self>, joining: Joining, user_max: usize) -> Option<Entry> {
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
        Some(Entry { registry: Arc::clone(self), connection })
    }

    /// How many connections are here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.local.lock().len()
    }

    /// Whether none is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether everything here is in Redis, as far as this instance knows.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.local.lock().is_written()
    }

    /// The connections of a user, on all instances that are alive.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn connections_of(&self, user: &Id) -> Result<Vec<Presence>, StoreError> {
        match &self.backend {
            Backend::Memory(_) => {
                Ok(self.local.lock().presence(&self.settings.server_id, user.as_str()))
            }
            Backend::Redis(redis) => redis.connections_of(user.as_str()).await,
        }
    }

    /// How many connections there are. What others hold may be a second old; while Redis does not
    /// answer only our own are known.
    pub async fn totals(&self) -> Totals {
        let local = self.len() as u64;
        let here = Totals { total: local, local, alive: local, dead: 0 };
        let Backend::Redis(redis) = &self.backend else { return here };
        let mut known = self.totals.lock().await;
        let fresh = |at: &Instant| at.elapsed() < TOTALS_KEPT;
        if known.as_ref().is_none_or(|(at, _)| !fresh(at)) {
            let read = timeout(TOTALS_TIMEOUT, redis.totals()).await;
            // A failure is kept as long: nobody is helped by many who wait for Redis.
            let (alive, dead) = match read {
                Ok(Ok(counts)) => counts,
                _ => (local, 0),
            };
            *known = Some((Instant::now(), Totals { total: alive + dead, local, alive, dead }));
        }
        known.as_ref().map_or(here, |(_, totals)| Totals { local, ..*totals })
    }

    /// Takes everything of this instance out of Redis and ends. Connections must be gone by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Entry {
    /// Whether it is a connection of this user.
    #[must_use]
    pub fn is_of(&self, user: &Id) -> bool {
        self.registry.local.lock().is_of(self.connection, user.as_str())
    }

    /// The connection goes on with another token of the same user.
    pub fn renew(&self, token: Option<&str>, issued_at: Option<u64>) {
        self.registry.local.lock().renew(self.connection, token, issued_at);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.registry.local.lock().leave(self.connection) {
            self.registry.changed.notify_one();
        }
    }
}

impl Peer {
    /// Whether it is on its way out already.
    fn is_ending(&self) -> bool {
        match self {
            Self::Link(link) => link.is_closing(),
            Self::Stream(tap) => tap.is_closed(),
        }
    }

    /// Sends it away. Whoever is revoked gets nothing more of what waits.
    fn end(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        match self {
            Self::Link(link) if *why == Disconnect::REVOKED => {
                link.disconnect_with(why, code, reason, now);
            }
            Self::Link(link) => link.finish_with(why, code, reason, now),
            Self::Stream(tap) => {
                let ending = Ending { why, code, reason: reason.into() };
                if *why == Disconnect::REVOKED { tap.cut_off(ending) } else { tap.end(ending) }
            }
        }
    }
}

/// Health checks more often than this are answered from memory.
const TOTALS_KEPT: Duration = Duration::from_secs(1);

/// A health check must not hang with Redis.
const TOTALS_TIMEOUT: Duration = Duration::from_secs(1);
