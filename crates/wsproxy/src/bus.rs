//! The transport of messages between instances and workers. Knows channels, but not their subscribers.
//!
//! Knows the hub only through [`Deliver`]. The caller that starts a bus chooses the backend.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::names::Names;

use crate::{
    bus::{
        deliver::Deliver,
        publish::{BusError, Publish},
        status::{BusCounters, Status},
    },
    config,
    embedded::{bus::EmbeddedBus, store::StoreLimits},
    queue::Back,
    redis::{bus::RedisBus, store::RedisStore},
    store::Store,
};

pub mod deliver;
mod metrics;
pub mod publish;
pub mod status;
pub mod watch;

/// The bus, by backend. Cheap to clone: all clones are one bus.
#[derive(Clone)]
pub enum Bus {
    /// The embedded bus inside this process, for one instance without Redis.
    Embedded(EmbeddedBus),
    /// Redis, or a compatible server.
    Redis(RedisBus),
}

impl Bus {
    /// Starts the embedded bus. Its one task runs on `tasks` until `shutdown`, then delivers the queued messages.
    #[must_use]
    pub fn embedded(
        config: &config::RedisConfig,
        limits: &config::LimitsConfig,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let share = limits.store_bytes as f64 * limits.store_logs_share;
        let limits = StoreLimits { bytes: limits.store_bytes, log_bytes: share as usize };
        Self::Embedded(EmbeddedBus::new(config, limits, deliver, tasks, shutdown))
    }

    /// Starts the bus on Redis. Returns at once and connects in the background, for ever.
    ///
    /// At `shutdown` queued messages are still published, for at most `response_timeout`: cancel it last.
    ///
    /// # Errors
    /// [`BusError::Refused`] if the URL or the CA file cannot be used.
    pub fn redis(
        config: &config::RedisConfig,
        server_id: &str,
        names: &Names,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        RedisBus::new(config, server_id, names, deliver, tasks, shutdown).map(Self::Redis)
    }

    /// Returns the store beside this bus: the embedded one, or the same Redis.
    #[must_use]
    pub fn store(&self) -> Store {
        match self {
            Self::Embedded(bus) => Store::Embedded(bus.store()),
            Self::Redis(bus) => Store::Redis(RedisStore::new(bus.client())),
        }
    }

    /// Subscribes to channels; resolves when the bus has confirmed all of them. Confirmed ones cost nothing.
    ///
    /// Waits for the connection if there is none: set a deadline. The channels count as wanted until
    /// [`Self::unsubscribe`], even if the future is dropped or fails.
    ///
    /// # Errors
    /// [`BusError::Refused`] if the server denied one of these channels, [`BusError::Closed`] at the end.
    pub async fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        match self {
            Self::Embedded(bus) => bus.subscribe(channels),
            Self::Redis(bus) => bus.subscribe(channels).await,
        }
    }

    /// Unsubscribes from channels. Never blocks; messages on their way may still come.
    pub fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        match self {
            Self::Embedded(bus) => bus.unsubscribe(channels),
            Self::Redis(bus) => bus.unsubscribe(channels),
        }
    }

    /// Puts a message into the bounded queue; the messages of one caller keep their order.
    ///
    /// # Errors
    /// [`BusError::Full`] or [`BusError::Closed`], with the message; its receipt is not called.
    #[expect(clippy::result_large_err, reason = "the message goes back without an allocation")]
    pub fn publish(&self, publish: Publish) -> Result<(), (BusError, Publish)> {
        let given_back = match self {
            Self::Embedded(bus) => bus.publish(publish),
            Self::Redis(bus) => bus.publish(publish),
        };
        given_back.map_err(|(back, publish)| match back {
            Back::Full => {
                self.counters().publish_full.add(1);
                (BusError::Full, publish)
            }
            Back::Closed => (BusError::Closed, publish),
        })
    }

    /// Returns `Pending` from when the queue is three quarters full until it is half empty: reading from clients
    /// pauses.
    pub fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Embedded(bus) => bus.poll_publishable(cx),
            Self::Redis(bus) => bus.poll_publishable(cx),
        }
    }

    /// Waits for [`Self::poll_publishable`].
    pub async fn publishable(&self) {
        std::future::poll_fn(|cx| self.poll_publishable(cx)).await;
    }

    /// Returns the name of the backend, for answers and logs.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Embedded(_) => "memory",
            Self::Redis(_) => "redis",
        }
    }

    /// Returns the backend and the database of its keys, for the log.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Embedded(_) => "bus memory".to_owned(),
            Self::Redis(redis) => format!("bus redis, database {}", redis.database()),
        }
    }

    /// Returns the state of the bus.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Embedded(bus) => bus.status(),
            Self::Redis(bus) => bus.status(),
        }
    }

    /// Returns the counters of the bus since the start.
    #[must_use]
    pub fn counters(&self) -> &BusCounters {
        match self {
            Self::Embedded(bus) => bus.counters(),
            Self::Redis(bus) => bus.counters(),
        }
    }
}
