//! The metrics of an instance under their names for operators; knows none of the parts that count.
//!
//! Hot counters live where they are counted. A [`Source`] reads them when the page is asked for.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family},
    registry::Registry,
};
use wsproxy_proto::disconnect::Disconnect;

use crate::telemetry::{
    family::Family,
    metrics::connections::Connections,
    scrape::{Scrape, Source},
};

pub mod connections;
pub mod format;
pub mod messages;
pub mod process;
pub mod readings;

/// The metrics of an instance.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    handshakes: family::Family<HandshakeLabels, Counter>,
    disconnects: family::Family<DisconnectLabels, Counter>,
    tls_handshakes: family::Family<OutcomeLabels, Counter>,
    proxy_headers: family::Family<OutcomeLabels, Counter>,
    errors: family::Family<ErrorLabels, Counter>,
    connections: Arc<Connections>,
    sources: Sources,
}

/// The parts of the instance that have their own counters.
#[derive(Clone, Default)]
struct Sources(Arc<OnceLock<Vec<Arc<dyn Source>>>>);

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl Collector for Sources {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut scrape = Scrape::new();
        self.0.get().into_iter().flatten().for_each(|source| source.collect(&mut scrape));
        scrape.encode(encoder)
    }
}

/// Guard of an open connection in the gauge; dropping it removes the connection.
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
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    kind: &'static str,
}

impl Metrics {
    /// Creates all metrics at zero; [`Self::read`] adds the parts to read from.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("wsproxy");
        let (handshakes, disconnects, tls_handshakes, proxy_headers, errors) = Default::default();
        let metrics = Self {
            handshakes,
            disconnects,
            tls_handshakes,
            proxy_headers,
            errors,
            connections: Default::default(),
            sources: Sources::default(),
            registry: Registry::default(),
        };
        let help = "WebSocket handshakes by outcome: accepted, or the code of the refusal";
        registry.register("handshakes", help, metrics.handshakes.clone());
        let help = "Connections that ended, by reason";
        registry.register("disconnects", help, metrics.disconnects.clone());
        let help = "TLS handshakes by outcome: full or resumed, or the reason of the failure";
        registry.register("tls_handshakes", help, metrics.tls_handshakes.clone());
        let help = "Headers of the PROXY protocol by outcome: client or local, or the reason of the refusal";
        registry.register("proxy_headers", help, metrics.proxy_headers.clone());
        let help = "Errors by kind: requests, credentials, messages, the bus";
        registry.register("errors", help, metrics.errors.clone());
        registry.register_collector(Box::new(metrics.sources.clone()));
        Self { registry, ..metrics }
    }

    /// Sets the parts that are read for every request of the page; called once.
    pub fn read(&self, parts: impl IntoIterator<Item = Arc<dyn Source>>) {
        let own = Arc::clone(&self.connections) as Arc<dyn Source>;
        let _ = self.sources.0.set([own].into_iter().chain(parts).collect());
    }

    /// Begins every series at zero, for the families that are `served` and the codes of refused handshakes.
    ///
    /// Prometheus does not see the first event of a series that begins with it: an increase needs a value before.
    pub fn begin(&self, served: impl IntoIterator<Item = Family>, refusals: &[&'static str]) {
        for kind in ERRORS {
            drop(self.errors.get_or_create(&ErrorLabels { kind }));
        }
        for outcome in TLS_OUTCOMES {
            drop(self.tls_handshakes.get_or_create(&OutcomeLabels { outcome }));
        }
        for outcome in PROXY_OUTCOMES {
            drop(self.proxy_headers.get_or_create(&OutcomeLabels { outcome }));
        }
        let handshake = |endpoint, outcome| {
            drop(self.handshakes.get_or_create(&HandshakeLabels { endpoint, outcome }));
        };
        handshake(NO_ENDPOINT, "full");
        handshake(NO_ENDPOINT, "not_found");
        Family::ALL.iter().for_each(|family| handshake(family.label(), "not_found"));
        for endpoint in served.into_iter().map(Family::label) {
            handshake(endpoint, ACCEPTED);
            refusals.iter().for_each(|code| handshake(endpoint, code));
            for reason in Disconnect::ALL.iter().map(|ending| ending.label) {
                drop(self.disconnects.get_or_create(&DisconnectLabels { endpoint, reason }));
            }
        }
    }

    /// Counts the answer to a handshake.
    pub fn handshake(&self, family: Option<Family>, outcome: &'static str) {
        let endpoint = family.map_or(NO_ENDPOINT, Family::label);
        self.handshakes.get_or_create(&HandshakeLabels { endpoint, outcome }).inc();
        if !matches!(outcome, ACCEPTED | "draining") {
            self.error("handshake");
        }
    }

    /// Counts an opened connection, which is active as long as the returned guard lives.
    #[must_use]
    pub fn opened(&self, family: Family) -> Active {
        let connections = self.connections.of(family);
        connections.opened.fetch_add(1, Relaxed);
        connections.active.fetch_add(1, Relaxed);
        Active(Arc::clone(&connections.active))
    }

    /// Counts the connection as an event stream, active as long as the returned guard lives.
    #[must_use]
    pub fn opened_stream(&self, family: Family) -> Active {
        let connections = self.connections.of(family);
        connections.streams_opened.fetch_add(1, Relaxed);
        connections.streams_active.fetch_add(1, Relaxed);
        Active(Arc::clone(&connections.streams_active))
    }

    /// Counts an ended connection.
    pub fn ended(&self, family: Family, reason: &'static str) {
        let endpoint = family.label();
        self.disconnects.get_or_create(&DisconnectLabels { endpoint, reason }).inc();
    }

    /// Counts a TLS handshake.
    pub fn tls_handshake(&self, outcome: &'static str) {
        debug_assert!(
            TLS_OUTCOMES.contains(&outcome),
            "{outcome} has no series before its first event"
        );
        self.tls_handshakes.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts a socket of a listener with the PROXY protocol.
    pub fn proxy_header(&self, outcome: &'static str) {
        debug_assert!(
            PROXY_OUTCOMES.contains(&outcome),
            "{outcome} has no series before its first event"
        );
        self.proxy_headers.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts an error.
    pub fn error(&self, kind: &'static str) {
        debug_assert!(ERRORS.contains(&kind), "{kind} has no series before its first event");
        self.errors.get_or_create(&ErrorLabels { kind }).inc();
    }

    /// Returns the metrics in the text format of OpenMetrics.
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

/// The label `endpoint` of a handshake that was answered before its endpoint was known.
const NO_ENDPOINT: &str = "none";

/// Every kind of [`Metrics::error`].
const ERRORS: [&str; 10] = [
    "accept",
    "api_key",
    "bad_request",
    "handshake",
    "silent_socket",
    "slow_request",
    "stream_end_refused",
    "stream_worker_lost",
    "tls_files",
    "tls_to_plain",
];

/// Every outcome of [`Metrics::tls_handshake`].
const TLS_OUTCOMES: [&str; 7] =
    ["displaced", "full", "left", "not_tls", "refused", "resumed", "timeout"];

/// Every outcome of [`Metrics::proxy_header`].
const PROXY_OUTCOMES: [&str; 11] = [
    "checksum",
    "client",
    "displaced",
    "left",
    "local",
    "malformed",
    "missing",
    "none",
    "timeout",
    "too_long",
    "untrusted",
];
