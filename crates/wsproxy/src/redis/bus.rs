//! The bus on Redis: subscriptions, publishes, and the state of the connections.

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
    queue::Back,
    redis::{client::RedisClient, node::Nodes, shared::RedisShared},
};

/// Channels and messages on a Redis. Clones share one bus.
#[derive(Clone)]
pub struct RedisBus(RedisClient);

impl RedisBus {
    /// Connects in the background, for ever.
    ///
    /// # Errors
    /// [`BusError::Refused`]: the URL or the CA file cannot be used.
    pub(crate) fn new(
        config: &config::RedisConfig,
        server_id: &str,
        names: &Names,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        let shared = RedisShared::new(config, server_id, names, shutdown)?;
        Ok(Self(RedisClient::start(Arc::new(shared), deliver, tasks)))
    }

    /// Returns the client for commands to the same Redis.
    pub(crate) fn client(&self) -> &RedisClient {
        &self.0
    }

    /// Returns the database of keys.
    pub(crate) fn database(&self) -> u32 {
        self.0.shared().connector.address().database
    }

    pub(crate) async fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        let Some(waiting) = self.0.shared().subscriptions.want(channels)? else { return Ok(()) };
        waiting
            .await
            .unwrap_or_else(|_| Err(BusError::Unreachable("unsubscribed meanwhile".into())))
    }

    pub(crate) fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        self.0.shared().subscriptions.unwant(channels);
    }

    pub(crate) fn publish(&self, publish: Publish) -> Result<(), (Back, Publish)> {
        match &self.0.shared().nodes {
            Nodes::One(node) => {
                let bytes = publish.queued_bytes();
                node.publishes.queue.push(publish, bytes)
            }
            Nodes::Cluster(cluster) => cluster.publish_counted(publish),
        }
    }

    pub(crate) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.0.shared().nodes {
            Nodes::One(node) => node.publishes.queue.poll_open(cx),
            Nodes::Cluster(cluster) => cluster.poll_publishable(cx),
        }
    }

    pub(crate) fn status(&self) -> Status {
        let shared = self.0.shared();
        let (connected, last_error) = shared.report();
        let nodes = shared.nodes.all();
        let queued = nodes.iter().map(|node| node.publishes.queue.bytes());
        let counted = shared.nodes.cluster().map_or(0, |cluster| cluster.receivers.bytes());
        Status {
            connected,
            subscribed: shared.health.is_subscribed() && shared.is_some_connection_proven(),
            refusal: shared.refusal(),
            // The probe's own channel does not count.
            channels: shared.subscriptions.len().saturating_sub(1),
            queued_bytes: queued.sum::<usize>() + counted,
            away: shared.nodes.cluster().and_then(|cluster| cluster.away()),
            last_error,
        }
    }

    pub(crate) fn counters(&self) -> &BusCounters {
        &self.0.shared().counters
    }
}
