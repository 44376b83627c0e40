//! Tells running gateways to close connections: a command on the bus. Without Redis no gateway can be told.

use anyhow::Context;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    bus::{
        Bus,
        publish::{Keep, Outcome, Publish, awaited},
    },
    cli::{exit::Failure, token::Nobody},
    config::Config,
    endpoint::agents::presence::control::Order,
    redis,
};

/// Outcome of the command.
pub(super) enum Told {
    /// Number of instances that received it.
    Instances(u64),
    /// No Redis is configured.
    NoRedis,
}

impl Told {
    /// Returns the number of instances; `None` without Redis.
    pub(super) const fn instances(&self) -> Option<u64> {
        match self {
            Self::Instances(count) => Some(*count),
            Self::NoRedis => None,
        }
    }

    /// Returns a sentence for the operator.
    pub(super) fn sentence(&self, user: &Id) -> String {
        match self {
            Self::Instances(0) => "No running instance was there to close a connection.".into(),
            Self::Instances(1) => "1 instance was told to close its connection.".into(),
            Self::Instances(count) => {
                format!("{count} instances were told to close its connection.")
            }
            Self::NoRedis => format!(
                "Without redis.url no running gateway was told: an open connection stays until it ends. The API of the \
                 gateway closes it: POST /api/v1/agents/{user}/disconnect."
            ),
        }
    }
}

/// Tells all instances that secrets of a user are revoked.
///
/// # Errors
/// [`Failure::Config`], [`Failure::Unavailable`].
pub(super) async fn revoked(
    config: &Config,
    user: &Id,
    secret: Option<Uuid>,
) -> anyhow::Result<Told> {
    if config.redis.url.is_none() {
        return Ok(Told::NoRedis);
    }
    // One attempt, so that the command fails at once: the bus of a gateway would try again for ever.
    let reached = redis::connect::try_once(&config.redis).await;
    reached.map_err(anyhow::Error::msg).context(Failure::Unavailable)?;
    let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
    let names = Names::new(&config.redis.channel_prefix);
    let bus = Bus::redis(&config.redis, "agents", &names, Box::new(Nobody), &tasks, end.clone());
    let bus = bus.context(Failure::Config)?;
    let told =
        tokio::time::timeout(config.server.handshake_timeout, publish(&bus, &names, user, secret));
    let told = told.await.context("Redis stopped answering").context(Failure::Unavailable)?;
    end.cancel();
    told.context(Failure::Unavailable).map(Told::Instances)
}

async fn publish(bus: &Bus, names: &Names, user: &Id, secret: Option<Uuid>) -> anyhow::Result<u64> {
    bus.publishable().await;
    let (receipt, outcome) = awaited();
    let publish = Publish {
        channel: names.agents_control().into(),
        payload: Order::revoke(user.clone(), secret).payload(),
        keep: Keep::Nothing,
        receipt: Some(receipt),
    };
    bus.publish(publish).map_err(|(error, _)| error)?;
    match outcome.await {
        Ok(Outcome::Received(instances)) => Ok(instances),
        _ => anyhow::bail!("Redis did not take the command"),
    }
}
