//! Everything that is counted, under the names of contract section 10.
//!
//! Hot counters live where they are counted; a collector reads them when somebody asks.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use wsproxy_proto::disconnect::Disconnect;

use crate::{config::Endpoints, gateway::Gateway, http::rejection};

mod bus;
mod connections;
pub mod format;
mod instance;
mod messages;
mod scrape;

use scrape::Source;

/// An endpoint family, as a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/{agent_id}/ws/{session_id}`
    Sessions,
    /// `/ws`
    Events,
    /// `/echo`
    Echo,
}

impl Endpoint {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Sessions, Self::Events, Self::Echo];

    /// The value of the label `endpoint`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Events => "events",
            Self::Echo => "echo",
        }
    }

    /// Whether an instance with these settings serves it.
    #[must_use]
    pub const fn is_served(self, endpoints: &Endpoints) -> bool {
        match self {
            Self::Sessions => endpoints.sessions,
            Self::Events => endpoints.events,
            Self::Echo => endpoints.echo,
        }
    }
}

/// The metrics of an instance.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    handshakes: Family<HandshakeLabels, Counter>,
    disconnects: Family<DisconnectLabels, Counter>,
    errors: Family<ErrorLabels, Counter>,
    /// By [`Endpoint`].
    connections: [Connections; Endpoint::ALL.len()],
    source: Source,
}

/// The connections of one endpoint.
#[derive(Debug, Clone, Default)]
struct Connections {
    opened: Arc<AtomicU64>,
    active: Arc<AtomicI64>,
    streams_opened: Arc<AtomicU64>,
    streams_active: Arc<AtomicI64>,
}

/// An open connection in the gauge; dropping it takes it out.
#[derive(Debug)]
pub struct Active(Arc<AtomicI64>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    endpoint: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DisconnectLabels {
    endpoint: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabels {
    endpoint: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

impl Metrics {
    /// All metrics at zero; [`Self::connect`] gives them the instance they read from.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("wsproxy");
        let (handshakes, disconnects, errors) = Default::default();
        let metrics = Self {
            handshakes,
            disconnects,
            errors,
            connections: Default::default(),
            source: Source::default(),
            registry: Registry::default(),
        };
        let help = "WebSocket handshakes by outcome: accepted, or the code of the refusal";
        registry.register("handshakes", help, metrics.handshakes.clone());
        let help = "Connections that ended, by reason";
        registry.register("disconnects", help, metrics.disconnects.clone());
        let help = "Errors by kind: requests, credentials, messages, the bus";
        registry.register("errors", help, metrics.errors.clone());
        registry.register_collector(Box::new(metrics.source.clone()));
        Self { registry, ..metrics }
    }

    /// The instance to read from; it is not kept alive.
    pub fn connect(&self, gateway: &Arc<Gateway>) {
        self.begin(&gateway.config.endpoints);
        self.source.connect(gateway);
    }

    /// Every series begins at zero. Of one that begins with its first event, Prometheus would not see that event: it
    /// knows no increase from nothing.
    fn begin(&self, endpoints: &Endpoints) {
        for kind in ERRORS {
            drop(self.errors.get_or_create(&ErrorLabels { kind }));
        }
        let handshake = |endpoint, outcome| {
            drop(self.handshakes.get_or_create(&HandshakeLabels { endpoint, outcome }));
        };
        handshake(NO_ENDPOINT, "full");
        handshake(NO_ENDPOINT, "not_found");
        Endpoint::ALL.iter().for_each(|endpoint| handshake(endpoint.label(), "not_found"));
        let served = Endpoint::ALL.into_iter().filter(|endpoint| endpoint.is_served(endpoints));
        for endpoint in served.map(Endpoint::label) {
            handshake(endpoint, ACCEPTED);
            rejection::OF_HANDSHAKES.iter().for_each(|code| handshake(endpoint, code));
            for reason in Disconnect::ALL.iter().map(|ending| ending.label) {
                drop(self.disconnects.get_or_create(&DisconnectLabels { endpoint, reason }));
            }
        }
    }

    /// A handshake was answered.
    pub fn handshake(&self, endpoint: Option<Endpoint>, outcome: &'static str) {
        let endpoint = endpoint.map_or(NO_ENDPOINT, Endpoint::label);
        self.handshakes.get_or_create(&HandshakeLabels { endpoint, outcome }).inc();
        if !matches!(outcome, ACCEPTED | "draining") {
            self.error("handshake");
        }
    }

    /// A connection opened; it is active as long as the returned guard lives.
    #[must_use]
    pub fn opened(&self, endpoint: Endpoint) -> Active {
        let connections = &self.connections[endpoint as usize];
        connections.opened.fetch_add(1, Relaxed);
        connections.active.fetch_add(1, Relaxed);
        Active(Arc::clone(&connections.active))
    }

    /// The connection is an event stream; it is active as long as the returned guard lives.
    #[must_use]
    pub fn opened_stream(&self, endpoint: Endpoint) -> Active {
        let connections = &self.connections[endpoint as usize];
        connections.streams_opened.fetch_add(1, Relaxed);
        connections.streams_active.fetch_add(1, Relaxed);
        Active(Arc::clone(&connections.streams_active))
    }

    /// A connection ended.
    pub fn ended(&self, endpoint: Endpoint, reason: &'static str) {
        let endpoint = endpoint.label();
        self.disconnects.get_or_create(&DisconnectLabels { endpoint, reason }).inc();
    }

    /// Something went wrong.
    pub fn error(&self, kind: &'static str) {
        debug_assert!(ERRORS.contains(&kind), "{kind} has no series before its first event");
        self.errors.get_or_create(&ErrorLabels { kind }).inc();
    }

    /// In the text format of OpenMetrics.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// The label `outcome` of a handshake that became a connection.
pub const ACCEPTED: &str = "accepted";

/// The label `endpoint` of a handshake that was answered before anybody knew which one it is for.
const NO_ENDPOINT: &str = "none";

/// Every kind of [`Metrics::error`].
const ERRORS: [&str; 8] = [
    "accept",
    "api_key",
    "bad_request",
    "handshake",
    "silent_socket",
    "slow_request",
    "stream_end_refused",
    "stream_worker_lost",
];
