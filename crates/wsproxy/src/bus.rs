//! The transport between instances and workers: what carries messages, not who wants them.
//!
//! The hub above is known only through [`Deliver`]; which backend runs is decided by whoever starts it.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use secrecy::ExposeSecret;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::{history::Position, names::Names};

use crate::{
    bus::{memory::MemoryBus, not_done::NotDone, redis::RedisBus},
    config,
    store::{Store, memory::StoreLimits},
    telemetry::counter::Counter,
};

pub mod memory;
pub mod not_done;
pub(crate) mod queue;
pub mod redis;
pub mod watch;

/// The backend that runs. Cheap to clone: all clones are one bus.
#[derive(Clone)]
pub enum Bus {
    /// Inside this process, for one instance without Redis.
    Memory(MemoryBus),
    /// Redis or what speaks like it.
    Redis(RedisBus),
}

/// Checks that the URL of Redis, where there is one, can be used; opens nothing.
///
/// # Errors
/// What is wrong with it, without quoting it.
pub(crate) fn check_url(config: &config::Redis) -> Result<(), String> {
    let url = config.url.as_ref().map(|url| redis::check_url(url.expose_secret()));
    url.transpose().map(drop).map_err(str::to_owned)
}

/// Connects to Redis once, as every connection of an instance does, and leaves.
///
/// # Errors
/// Where Redis should be, and why it cannot be used; without secrets.
pub(crate) async fn try_redis(config: &config::Redis) -> Result<(), String> {
    redis::try_once(config).await
}

impl Bus {
    /// The embedded bus. Its one task runs on `tasks` until `shutdown`, then delivers what is queued.
    #[must_use]
    pub fn memory(
        config: &config::Redis,
        limits: &config::Limits,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let share = limits.store_bytes as f64 * limits.store_logs_share;
        let limits = StoreLimits { bytes: limits.store_bytes, log_bytes: share as usize };
        Self::Memory(MemoryBus::new(config, limits, deliver, tasks, shutdown))
    }

    /// The bus on Redis. Returns at once and connects in the background, for ever.
    ///
    /// At `shutdown` what is queued is still published, for at most `response_timeout`: cancel it last.
    ///
    /// # Errors
    /// [`BusError::Refused`] where the URL or the CA file cannot be used.
    pub fn redis(
        config: &config::Redis,
        server_id: &str,
        names: &Names,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        RedisBus::new(config, server_id, names, deliver, tasks, shutdown).map(Self::Redis)
    }

    /// The keyed state that lives beside this bus: the embedded one, or the same Redis.
    #[must_use]
    pub fn store(&self) -> Store {
        match self {
            Self::Memory(bus) => Store::Memory(bus.store()),
            Self::Redis(bus) => Store::Redis(bus.store()),
        }
    }

    /// Resolves when the bus has confirmed every channel. Confirmed ones cost nothing.
    ///
    /// Waits for the connection where there is none: set a deadline. Where the future was dropped or
    /// failed, the channels count as wanted until [`Self::unsubscribe`].
    ///
    /// # Errors
    /// [`BusError::Refused`] where the server denied one of these channels, [`BusError::Closed`] at the end.
    pub async fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        match self {
            Self::Memory(bus) => bus.subscribe(channels),
            Self::Redis(bus) => bus.subscribe(channels).await,
        }
    }

    /// Nobody wants these channels any more. Never blocks; messages on their way may still come.
    pub fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        match self {
            Self::Memory(bus) => bus.unsubscribe(channels),
            Self::Redis(bus) => bus.unsubscribe(channels),
        }
    }

    /// Puts a message into the bounded queue; what one caller puts in keeps its order.
    ///
    /// # Errors
    /// [`BusError::Full`] or [`BusError::Closed`], with the message, whose receipt is not called then.
    #[expect(clippy::result_large_err, reason = "the message goes back without an allocation")]
    pub fn publish(&self, publish: Publish) -> Result<(), (BusError, Publish)> {
        match self {
            Self::Memory(bus) => bus.publish(publish),
            Self::Redis(bus) => bus.publish(publish),
        }
    }

    /// Pending from the time the queue is three quarters full until it is half empty: a client's reads
    /// pause on this.
    pub fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Memory(bus) => bus.poll_publishable(cx),
            Self::Redis(bus) => bus.poll_publishable(cx),
        }
    }

    /// [`Self::poll_publishable`] as a future.
    pub async fn publishable(&self) {
        std::future::poll_fn(|cx| self.poll_publishable(cx)).await;
    }

    /// The name of the backend, in answers and logs.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::Redis(_) => "redis",
        }
    }

    /// The backend, and the part of it where keys are, for the log.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Memory(_) => "bus memory".to_owned(),
            Self::Redis(redis) => format!("bus redis, database {}", redis.database()),
        }
    }

    /// How the bus is.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Memory(bus) => bus.status(),
            Self::Redis(bus) => bus.status(),
        }
    }

    /// What the bus has counted since the start.
    #[must_use]
    pub fn counters(&self) -> &BusCounters {
        match self {
            Self::Memory(bus) => bus.counters(),
            Self::Redis(bus) => bus.counters(),
        }
    }
}

/// How the bus is, for readiness and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Every link is up.
    pub connected: bool,
    /// The first or latest (re)subscription is complete, and a probe through every other link came back.
    pub subscribed: bool,
    /// Why nothing can be written now, though the links are up.
    pub refusal: Option<NotDone>,
    /// Channels that are wanted.
    pub channels: usize,
    /// Bytes that wait to be published.
    pub queued_bytes: usize,
    /// The latest trouble of a link, without secrets; `None` while every link is up.
    pub last_error: Option<String>,
}

/// What the bus has counted since the start; read by metrics.
#[derive(Debug, Default)]
pub struct BusCounters {
    /// Messages that were read, the probe's included.
    pub messages_in: Counter,
    /// Messages whose publishing was answered.
    pub published: Counter,
    /// Of these, messages that nobody received and that were kept in a log.
    pub publish_kept: Counter,
    /// Of these, messages that are in a history now.
    pub publish_stored: Counter,
    /// Messages that were on their way when the link was lost.
    pub publish_lost: Counter,
    /// Messages that were refused and certainly not published, by [`NotDone`].
    pub publish_refused: [Counter; NotDone::ALL.len()],
    /// Messages that met a full queue.
    pub publish_full: Counter,
    /// Times that a link was lost.
    pub links_lost: Counter,
    /// Times that a link was made, the first time included.
    pub connects: Counter,
    /// Connection attempts that failed.
    pub connects_failed: Counter,
    /// Probes which did not come back: a link is deaf, or two links end at different servers.
    pub probe_failures: Counter,
    /// Channels that the server refused.
    pub subscribe_errors: Counter,
    /// Servers that were left or refused because they were no master.
    pub role_refused: Counter,
}

/// What the bus tells the hub. Called from the one task that reads the bus, so it must never block.
pub trait Deliver: Send + 'static {
    /// A message that was read. Fill outboxes; do not write to sockets yet, unless it is the
    /// `last` that was there to read.
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool);
    /// Everything that was there to read has been delivered: write what was filled.
    fn flush(&mut self);
    /// A link was lost, again or for the first time: messages may have been missed.
    fn lost(&mut self, cause: &str);
    /// Every subscription is confirmed again. `gap` is how long messages may have been missed.
    fn recovered(&mut self, gap: Duration);
}

/// A message on its way to the bus.
pub struct Publish {
    /// Full name of the channel.
    pub channel: Arc<str>,
    /// The payload, verbatim.
    pub payload: Bytes,
    /// What is kept of it.
    pub keep: Keep,
    /// Told what became of it, where somebody wants to know.
    pub receipt: Option<Arc<dyn Receipt>>,
}

impl Publish {
    /// What it weighs in a bounded queue.
    pub(crate) fn queued_bytes(&self) -> usize {
        let keep = match &self.keep {
            Keep::History(_) => 2 * QUEUED_OVERHEAD_BYTES,
            Keep::Nothing | Keep::Unheard { .. } => 0,
        };
        self.channel.len() + self.payload.len() + keep + QUEUED_OVERHEAD_BYTES
    }
}

/// What is kept of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: where nobody listens it is gone, and the receipt says so.
    Nothing,
    /// Where it reached no subscriber it is appended to a bounded, expiring stream under the field
    /// `data`, atomically with the publish.
    Unheard {
        /// Key of the stream.
        log: Arc<str>,
        /// Most entries kept (approximately: Redis trims whole nodes).
        entries_max: u64,
        /// Most bytes kept, except for a newest entry that alone is larger.
        bytes_max: u64,
        /// The stream expires this long after its last entry.
        ttl: Duration,
    },
    /// It is appended to the history of its channel and published in an envelope, atomically.
    History(Box<History>),
}

/// Where and how a message is kept in the history of its channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// Key of the log.
    pub log: Arc<str>,
    /// Key of the clock that gives the ids, for logs which share one order; `None`: the log's own.
    pub clock: Option<Arc<str>>,
    /// The id that the worker gave it, which the payload carries.
    pub event_id: Option<Box<str>>,
    /// A key that is set with it for so long; where it is set already nothing is published again.
    pub dedup: Option<(Arc<str>, Duration)>,
    /// Nothing is published where the log knows the event id already.
    pub unique: bool,
    /// Bounds of the log.
    pub limits: HistoryLimits,
}

/// Bounds of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Most entries.
    pub entries_max: u64,
    /// Most bytes of data, except for a newest entry that alone is larger.
    pub bytes_max: u64,
    /// Entries are removed, and logs expire, this long after the (last) entry.
    pub ttl: Duration,
}

impl HistoryLimits {
    /// How long it is known of a log without new entries that it has none. Every message and every client that
    /// opens renews it.
    #[must_use]
    pub fn head_ttl(&self) -> Duration {
        let longer = self.ttl.max(HEAD_TTL_MIN);
        longer + longer / 8
    }
}

/// What became of a published message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// So many subscribers received it; 0 means that nobody listened.
    Received(u64),
    /// Nobody listened, and it was kept in the log.
    Kept,
    /// It is in the history of its channel.
    Stored {
        /// So many subscribers received it.
        receivers: u64,
        /// Its id there.
        id: Position,
        /// It was there already, and was not published again.
        duplicate: bool,
    },
    /// It was certainly neither published nor kept.
    Refused(NotDone),
    /// The bus was lost while it was on its way: nobody knows whether it has arrived.
    Lost,
}

/// Somebody who waits for an [`Outcome`]. Called on the bus's task: must not block.
pub trait Receipt: Send + Sync {
    /// Called exactly once for every publish which was accepted into the queue.
    fn published(&self, outcome: Outcome);
}

/// A receipt for somebody who awaits the outcome.
#[must_use]
pub fn awaited() -> (Arc<dyn Receipt>, oneshot::Receiver<Outcome>) {
    let (sender, outcome) = oneshot::channel();
    (Arc::new(Awaited(Mutex::new(Some(sender)))), outcome)
}

struct Awaited(Mutex<Option<oneshot::Sender<Outcome>>>);

impl Receipt for Awaited {
    fn published(&self, outcome: Outcome) {
        if let Some(sender) = self.0.lock().take() {
            // Whoever waited may have given up at its deadline.
            let _ = sender.send(outcome);
        }
    }
}

/// Why the bus did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Not connected; a retry may help.
    #[error("the bus is unreachable: {0}")]
    Unreachable(String),
    /// The publish queue is full; wait until it is not.
    #[error("the publish queue is full")]
    Full,
    /// Nothing was done, for a reason that is known.
    #[error("{}", .0.reason())]
    NotDone(NotDone),
    /// The bus answered with an error (an ACL): a retry will not help.
    #[error("the bus refused: {0}")]
    Refused(String),
    /// The instance is ending.
    #[error("the bus is closed")]
    Closed,
}

/// Workers may write with a smaller ttl than the gateway's; the scripts keep heads for so long at least.
const HEAD_TTL_MIN: Duration = Duration::from_secs(3600);

/// What a queued message costs beside its bytes, roughly.
const QUEUED_OVERHEAD_BYTES: usize = 128;
