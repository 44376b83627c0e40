//! A server of data as an instance uses it: a pipeline for publishes, and one for commands.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::{
    bus::deliver::Slots,
    redis::{
        address::RedisEndpoint,
        answer::{Writes, refusal_of},
        cluster::{Cluster, redirect::Redirect},
        connect::Part,
        fault::tell,
        health::{Link, Purpose},
        pipeline::Pipeline,
        resp::RespValue,
        shared::RedisShared,
    },
};

/// A server to which the instance sends requests.
pub(super) struct Node {
    pub(super) target: Target,
    /// Place among the nodes of a Cluster.
    pub(super) number: usize,
    pub(super) publishes: Arc<Pipeline>,
    pub(super) commands: Arc<Pipeline>,
    pub(super) writes: Writes,
    /// Ends the connections to a server that belongs to the Cluster no more.
    pub(super) removed: CancellationToken,
}

/// The server at the end of a connection.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// The server that the topology names: the master, or in a Cluster the node at which the instance subscribes.
    Named,
    /// One node of a Cluster.
    Node(Arc<RedisEndpoint>),
}

/// The servers to which the instance sends requests.
pub(super) enum Nodes {
    /// One master has every key.
    One(Arc<Node>),
    /// Each master of a Cluster has the keys of its slots.
    Cluster(Arc<Cluster>),
}

impl Node {
    /// Creates a node without connections.
    pub(super) fn new(target: Target, number: usize, publish_queue_bytes: usize) -> Self {
        Self {
            target,
            number,
            publishes: Arc::new(Pipeline::new(Purpose::Publish, publish_queue_bytes)),
            commands: Arc::new(Pipeline::new(Purpose::Command, COMMAND_QUEUE_BYTES)),
            writes: Writes::default(),
            removed: CancellationToken::new(),
        }
    }

    pub(super) fn pipeline(&self, purpose: Purpose) -> &Arc<Pipeline> {
        match purpose {
            Purpose::Publish => &self.publishes,
            Purpose::Command | Purpose::Subscribe => &self.commands,
        }
    }
}

impl Target {
    /// Returns the part that the server must play. The nodes of a Cluster refuse by themselves the keys that they do not
    /// have, and send messages on to each other.
    pub(super) fn part(&self, shared: &RedisShared) -> Part {
        match (self, &shared.nodes) {
            (Self::Named, Nodes::One(_)) => Part::Master,
            _ => Part::Node,
        }
    }

    /// Waits for the address of the server.
    pub(super) async fn server(&self, shared: &RedisShared) -> Arc<RedisEndpoint> {
        match self {
            Self::Named => shared.topology.master().await,
            Self::Node(endpoint) => endpoint.clone(),
        }
    }

    /// Resolves once another server than `old` is meant.
    pub(super) async fn left(&self, shared: &RedisShared, old: &Arc<RedisEndpoint>) {
        match self {
            Self::Named => shared.topology.left(old).await,
            Self::Node(_) => std::future::pending().await,
        }
    }
}

impl Nodes {
    /// Returns the servers that have connections.
    pub(super) fn all(&self) -> Vec<Arc<Node>> {
        match self {
            Self::One(node) => vec![node.clone()],
            Self::Cluster(cluster) => cluster.nodes(),
        }
    }

    /// Returns the Cluster, if it is one.
    pub(super) fn cluster(&self) -> Option<&Arc<Cluster>> {
        match self {
            Self::One(_) => None,
            Self::Cluster(cluster) => Some(cluster),
        }
    }

    /// Resolves once another node of a Cluster has slots of one that failed, with these slots.
    pub(super) async fn failed_over(&self) -> Slots {
        match self {
            Self::One(_) => std::future::pending().await,
            Self::Cluster(cluster) => cluster.failed_over().await,
        }
    }

    /// Returns the token that ends the connections for requests. In a Cluster the receivers of the last messages are counted
    /// before.
    pub(super) fn requests_end<'s>(&'s self, shared: &'s RedisShared) -> &'s CancellationToken {
        match self {
            Self::One(_) => &shared.shutdown,
            Self::Cluster(cluster) => &cluster.receivers.ended,
        }
    }

    /// Returns whether the connections to the only server are up, or in a Cluster those to some master: its keys are
    /// served.
    pub(super) fn are_up(&self) -> bool {
        let is_up = |node: &Node| node.links().iter().all(|link| link.is_up());
        match self {
            Self::One(node) => is_up(node),
            Self::Cluster(cluster) => cluster.masters().iter().any(|node| is_up(node)),
        }
    }
}

impl Node {
    /// Notes a reply that shows that the server takes no writes. A redirection tells of a slot, not of the server.
    pub(super) fn note_refusal(&self, value: &RespValue<'_>) {
        let (Some(refusal), RespValue::Error(error)) = (refusal_of(value), value) else { return };
        let is_redirected = match &self.target {
            Target::Node(at) => Redirect::read(&tell(error), at).is_some(),
            Target::Named => false,
        };
        if !is_redirected {
            self.writes.answered(Some(refusal));
        }
    }

    /// Returns the links of both pipelines.
    pub(super) fn links(&self) -> [&Link; 2] {
        [&self.publishes.link, &self.commands.link]
    }
}

/// Upper bound of commands that wait for a server; handshakes that do not fit are refused.
const COMMAND_QUEUE_BYTES: usize = 8 * 1024 * 1024;
