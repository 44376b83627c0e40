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
        address::RedisServers,
        cluster::Cluster,
        connect::Connector,
        health::{Health, Link},
        node::{Node, Nodes, Target},
        outlet::{Birth, Outlet},
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
    pub(super) nodes: Nodes,
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
        let queue_bytes = config.publish_queue_bytes;
        Ok(Self {
            topology: Topology::new(&connector.address().servers),
            nodes: match &connector.address().servers {
                RedisServers::Cluster { seeds } => Nodes::Cluster(Arc::new(Cluster::new(
                    seeds.clone(),
                    names.clone(),
                    queue_bytes,
                ))),
                RedisServers::One(_) | RedisServers::Sentinel { .. } => {
                    Nodes::One(Arc::new(Node::new(Target::Named, 0, queue_bytes)))
                }
            },
            connector,
            client_name: client_name(server_id),
            names: names.clone(),
            probe_channel: names.probe(server_id).into(),
            probe_interval: config.probe_interval,
            response_timeout: config.response_timeout,
            subscriptions: Subscriptions::default(),
            scout: Outlet::default(),
            births: AtomicU64::new(0),
            command_connections: AtomicU64::new(0),
            connections_changed: Notify::new(),
            health: Health::new(),
            counters: BusCounters::default(),
            shutdown,
        })
    }

    /// Returns the number for a connection that is about to be made.
    pub(super) fn next_birth(&self) -> Birth {
        self.births.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Uses the outlet of a route.
    pub(super) fn with_outlet<T: Default>(
        &self,
        route: Route,
        take: impl FnOnce(&Outlet) -> T,
    ) -> T {
        match (route, &self.nodes) {
            (Route::Fresh, _) => take(&self.scout),
            (Route::Publish, Nodes::One(node)) => take(&node.publishes.outlet),
            (Route::Command, Nodes::One(node)) => take(&node.commands.outlet),
            (Route::Node(number), Nodes::Cluster(cluster)) => {
                cluster.node(number).map_or_else(T::default, |node| take(&node.publishes.outlet))
            }
            (Route::Node(_), Nodes::One(_)) => T::default(),
            (Route::Publish | Route::Command, Nodes::Cluster(_)) => T::default(),
        }
    }

    /// Returns whether a probe through every other connection came back over the subscribing one. Of a Cluster the
    /// connections count that are up, since the other nodes' messages are away with their slots.
    pub(super) fn are_connections_proven(&self) -> bool {
        match &self.nodes {
            Nodes::One(node) => {
                node.publishes.outlet.is_proven() && node.commands.outlet.is_proven()
            }
            Nodes::Cluster(cluster) => {
                let mut up = cluster.masters();
                up.retain(|node| node.publishes.link.is_up());
                !up.is_empty() && up.iter().all(|node| node.publishes.outlet.is_proven())
            }
        }
    }

    /// Returns whether messages come: in a Cluster those of some node, while others are proven or away.
    pub(super) fn is_some_connection_proven(&self) -> bool {
        match &self.nodes {
            Nodes::One(_) => self.are_connections_proven(),
            Nodes::Cluster(cluster) => {
                let masters = cluster.masters();
                masters.iter().any(|node| node.publishes.outlet.is_proven())
            }
        }
    }

    /// Returns whether the subscribing connection and those of the nodes are up, and the latest trouble.
    pub(super) fn report(&self) -> (bool, Option<String>) {
        let nodes = self.nodes.all();
        let links = nodes.iter().flat_map(|node| node.links());
        let fault = [&self.health.subscribe].into_iter().chain(links).find_map(Link::fault);
        let is_up = self.health.subscribe.is_up() && self.nodes.are_up();
        let away = self.nodes.cluster().and_then(|cluster| cluster.away());
        let trouble = self.topology.trouble().or(away).or(fault);
        (is_up, trouble.or_else(|| self.health.trouble()))
    }

    /// Returns the reason why Redis takes no writes. A refusal counts as over once the probes' writes no longer repeat it.
    pub(super) fn refusal(&self) -> Option<NotDone> {
        let forget_after = self.probe_interval * 3 + self.response_timeout;
        match &self.nodes {
            Nodes::One(node) => node.writes.refusal(forget_after),
            // The clients of a master that takes writes are served.
            Nodes::Cluster(cluster) => {
                let masters = cluster.masters();
                let mut refusals = masters.iter().map(|node| node.writes.refusal(forget_after));
                refusals.try_fold(None, |_, refusal| refusal.map(Some)).flatten()
            }
        }
    }
}

/// Returns the client name, without characters that Redis refuses.
fn client_name(server_id: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() { c } else { '_' };
    format!("wsproxy-{}", server_id.chars().map(plain).collect::<String>())
}
