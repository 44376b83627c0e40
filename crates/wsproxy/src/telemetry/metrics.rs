//! Everything that is counted, under the names of contract section 10.
//!
//! Hot counters live where they are counted; a collector reads them when somebody asks.

use std::{
    fmt::{self, Debug},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet, text::encode},
    metrics::{MetricType, counter::Counter, family::Family},
    registry::{Registry, Unit},
};
use wsproxy_conn::{Profile, profile::LATENCY_BUCKETS};
use wsproxy_proto::history::Lost;

use crate::{
    auth::jwt::{JwksCounters, JwtVerifier},
    bus::not_done::NotDone,
    gateway::Gateway,
    registry::{RegistryCounters, lease::LeaseCounters, sessions::SessionLogCounters},
    telemetry::counter,
};

mod events;

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

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiCallLabels {
    key: String,
    outcome: &'static str,
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
        // An instance is connected once, by whoever made it.
        let _ = self.source.0.set(Arc::downgrade(gateway));
    }

    /// A handshake was answered.
    pub fn handshake(&self, endpoint: Option<Endpoint>, outcome: &'static str) {
        let endpoint = endpoint.map_or("none", Endpoint::label);
        self.handshakes.get_or_create(&HandshakeLabels { endpoint, outcome }).inc();
        if !matches!(outcome, "accepted" | "draining") {
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

    /// As JSON: `{"metrics":[{"name","labels":{},"value"}]}`, the samples of the text format.
    #[must_use]
    pub fn json(&self) -> String {
        let text = self.text();
        let samples: Vec<_> = text.lines().filter_map(sample).collect();
        serde_json::json!({ "metrics": samples }).to_string()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// One line of the text format, unless it is a comment. Our own label values hold no quotes.
fn sample(line: &str) -> Option<serde_json::Value> {
    let (series, value) = line.strip_prefix('#').is_none().then(|| line.rsplit_once(' '))??;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let labels: serde_json::Map<_, _> = labels
        .trim_end_matches('}')
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('"').into()))
        .collect();
    let value = value.parse::<f64>().ok()?;
    Some(serde_json::json!({ "name": name, "labels": labels, "value": value }))
}

/// Where the collector reads.
#[derive(Clone, Default)]
struct Source(Arc<OnceLock<Weak<Gateway>>>);

impl Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Source")
    }
}

impl Collector for Source {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(gateway) = self.0.get().and_then(Weak::upgrade) else { return Ok(()) };
        let mut scrape = Scrape { encoder, gateway: &gateway };
        scrape.connections()?;
        scrape.latency()?;
        scrape.sessions()?;
        events::encode(&mut scrape)?;
        scrape.histories()?;
        scrape.bus()?;
        scrape.keys()?;
        scrape.registry()?;
        scrape.api()?;
        scrape.lease()?;
        scrape.session_log()?;
        scrape.process()
    }
}

struct Scrape<'a, 'b> {
    encoder: DescriptorEncoder<'a>,
    gateway: &'b Gateway,
}

impl Scrape<'_, '_> {
    fn connections(&mut self) -> fmt::Result {
        let metrics = &self.gateway.metrics;
        let of = |endpoint: Endpoint| &metrics.connections[endpoint as usize];
        let values = Endpoint::ALL.map(|e| (e.label(), of(e).active.load(Relaxed)));
        self.gauges("active_connections", "Open connections of clients", values)?;
        let values = Endpoint::ALL.map(|e| (e.label(), of(e).opened.load(Relaxed)));
        self.counters("connections", "Connections of clients that were opened", values)?;
        let values = Endpoint::ALL.map(|e| (e.label(), of(e).streams_active.load(Relaxed)));
        let help = "Of the open connections, those that are event streams";
        self.gauges("active_event_streams", help, values)?;
        let values = Endpoint::ALL.map(|e| (e.label(), of(e).streams_opened.load(Relaxed)));
        let help = "Of the opened connections, those that were event streams";
        self.counters("event_streams", help, values)?;
        let help =
            "Data messages that arrived from clients, complete and valid as WebSocket messages";
        self.per_profile("messages_received", help, |p| &p.stats.messages_received)?;
        let help = "Data messages of which the last byte was handed to the kernel; of event streams, taken up for that";
        self.per_profile("messages_sent", help, |p| &p.stats.messages_sent)?;
        let help =
            "Data messages that waited for a client when its connection ended, or came afterwards";
        self.per_profile("messages_discarded", help, |p| &p.stats.messages_discarded)?;
        self.per_profile("bytes_received", "Bytes read from clients", |p| &p.stats.bytes_received)?;
        self.per_profile("bytes_sent", "Bytes handed to the kernel", |p| &p.stats.bytes_sent)?;
        let help = "Times that a client's socket took no more, so that messages had to wait for it";
        self.per_profile("backpressure_events", help, |p| &p.stats.blocked)?;
        let help = "Times that reading from a client paused, since the bus or the client itself took no more";
        self.per_profile("reads_paused", help, |p| &p.stats.reads_paused)?;
        let help =
            "Times that reading from a client paused, since it had sent more bytes than it may";
        self.per_profile("reads_throttled", help, |p| &p.stats.reads_throttled)?;
        let used = self.gateway.runtime.budget.used();
        let help = "Bytes that wait for clients whose sockets take no more";
        self.gauge("buffer_utilization", help, Some(&Unit::Bytes), used as i64)?;
        let help = "Connections that the instance may hold";
        self.gauge("connections_max", help, None, self.gateway.places.max() as i64)?;
        let help = "Handshakes whose credentials are being checked";
        self.gauge("handshakes_waiting", help, None, self.gateway.handshakes.taken() as i64)?;
        let help = "Attempts that were counted for a whole network, since too many addresses try";
        self.counter("attempts_coarse", help, self.gateway.attempts.coarse.value())
    }

    fn latency(&mut self) -> fmt::Result {
        let help = "From the bus's message read to the last byte handed to the kernel";
        let mut family = self.encoder.encode_descriptor(
            "message_latency",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (endpoint, profile) in profiles(self.gateway) {
            let latency = &profile.stats.latency;
            let bounds = LATENCY_BUCKETS.iter().map(|&micros| micros as f64 / 1e6);
            let counts = latency.buckets.iter().map(|count| count.load(Relaxed));
            let buckets: Vec<_> = bounds.chain([f64::INFINITY]).zip(counts).collect();
            let count = buckets.iter().map(|(_, count)| count).sum();
            let sum = latency.sum_micros.load(Relaxed) as f64 / 1e6;
            family
                .encode_family(&EndpointLabels { endpoint })?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn sessions(&mut self) -> fmt::Result {
        let counters = &self.gateway.sessions.counters;
        let values = [
            ("invalid", counters.invalid.value()),
            ("bad_command", counters.bad_commands.value()),
            ("unannounced", counters.unannounced.value()),
            ("lost", counters.lost.value()),
            ("refused", counters.refused.value()),
        ];
        let help = "Session messages that met trouble: clients' that are no JSON, workers' commands \
            that make no sense, announcements and clients' messages that the bus did not take or lost";
        let mut family =
            self.encoder.encode_descriptor("message_errors", help, None, MetricType::Counter)?;
        for (kind, value) in values {
            family
                .encode_family(&KindLabels { kind })?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        let help = "Messages from clients that no worker received";
        self.counter("messages_unheard", help, counters.unheard.value())?;
        let hub = &self.gateway.hub.counters;
        let help = "Messages that came for topics which nobody here wants any more";
        self.counter("messages_unwanted", help, hub.unwanted.value())?;
        let help = "Messages that are not UTF-8, for clients that get text only";
        self.counter("messages_unframeable", help, hub.unframeable.value())?;
        let help = "Connections that were told of a loss of the bus, or closed for it";
        self.counter("bus_loss_notices", help, hub.bus_loss_notices.value())
    }

    fn histories(&mut self) -> fmt::Result {
        let hub = &self.gateway.hub.counters;
        for (name, help, counter) in [
            ("resumed", "Clients that resumed and have missed nothing", &hub.resumed),
            ("replayed_messages", "Messages that these had missed and got", &hub.replayed),
            (
                "history_duplicates",
                "Messages that came again and were not delivered again",
                &hub.duplicates,
            ),
            (
                "histories_healed",
                "Histories that were read again after a loss and are whole",
                &hub.healed,
            ),
            ("healed_messages", "Messages found there that had been missed", &hub.healed_messages),
            ("captured_messages", "Plain messages that were taken into a history", &hub.captured),
            (
                "uncaptured_messages",
                "Plain messages that should have been, but have no id or met a full queue",
                &hub.uncaptured,
            ),
        ] {
            self.counter(name, help, counter.value())?;
        }
        let help = "Clients that were told that something is missing, by reason";
        let mut family =
            self.encoder.encode_descriptor("history_lost", help, None, MetricType::Counter)?;
        for lost in Lost::ALL {
            family
                .encode_family(&ReasonLabels { reason: lost.label() })?
                .encode_counter::<NoLabelSet, _, u64>(
                    &hub.history_lost[lost as usize].value(),
                    None,
                )?;
        }
        Ok(())
    }

    fn bus(&mut self) -> fmt::Result {
        let status = self.gateway.bus.status();
        let help = "Channels subscribed on the bus";
        self.gauge("redis_pubsub_channels_active", help, None, status.channels as i64)?;
        self.gauge(
            "bus_connected",
            "Whether every link to the bus is up",
            None,
            status.connected.into(),
        )?;
        let help = "Whether every subscription is confirmed and every probe comes back";
        self.gauge("bus_subscribed", help, None, status.subscribed.into())?;
        let help = "Bytes that wait to be published";
        self.gauge("bus_publish_queue", help, Some(&Unit::Bytes), status.queued_bytes as i64)?;
        let counters = self.gateway.bus.counters();
        for (name, help, counter) in [
            ("bus_messages_received", "Messages read from the bus", &counters.messages_in),
            ("bus_publishes", "Messages whose publishing the bus answered", &counters.published),
            (
                "bus_publishes_stored",
                "Of these, messages that are in a history",
                &counters.publish_stored,
            ),
            (
                "bus_publishes_kept",
                "Of these, kept in a log since nobody listened",
                &counters.publish_kept,
            ),
            (
                "bus_publishes_lost",
                "Messages that were on their way when a link was lost",
                &counters.publish_lost,
            ),
            (
                "bus_publishes_refused_full",
                "Messages that met a full queue",
                &counters.publish_full,
            ),
            ("bus_links_lost", "Times that a link to the bus was lost", &counters.links_lost),
            ("bus_connects", "Times that a link was made", &counters.connects),
            ("bus_connects_failed", "Attempts to connect that failed", &counters.connects_failed),
            ("bus_probe_failures", "Probes that did not come back", &counters.probe_failures),
            ("bus_subscribe_errors", "Channels that the bus refused", &counters.subscribe_errors),
            (
                "bus_role_refused",
                "Servers that were left since they were no master",
                &counters.role_refused,
            ),
        ] {
            self.counter(name, help, counter.value())?;
        }
        let help = "Messages that were certainly not published, by why the bus refused them";
        let mut family = self.encoder.encode_descriptor(
            "bus_publishes_refused",
            help,
            None,
            MetricType::Counter,
        )?;
        for refusal in NotDone::ALL {
            let refused = counters.publish_refused[refusal as usize].value();
            family
                .encode_family(&ReasonLabels { reason: refusal.label() })?
                .encode_counter::<NoLabelSet, _, u64>(&refused, None)?;
        }
        let help = "Whether the bus takes writes";
        self.gauge("bus_writable", help, None, status.refusal.is_none().into())
    }

    fn keys(&mut self) -> fmt::Result {
        let counters = self.gateway.jwt.as_ref().and_then(JwtVerifier::jwks_counters);
        let value = |counter: fn(&JwksCounters) -> &counter::Counter| {
            counters.map_or(0, |c| counter(c).value())
        };
        let help = "Times that the keys which the issuer of tokens publishes were fetched";
        self.counter("jwks_fetches", help, value(|counters| &counters.fetches))?;
        let help = "Of these, those that brought no keys: the known ones stay in use";
        self.counter("jwks_fetch_failures", help, value(|counters| &counters.failures))
    }

    fn registry(&mut self) -> fmt::Result {
        let counters = self.gateway.registry.as_ref().map(|registry| &registry.counters);
        type Field = fn(&RegistryCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 6] = [
            ("registry_written", "Changes written to the registry", |c| &c.written),
            ("registry_failures", "Times that Redis did not do what the registry asked", |c| {
                &c.failures
            }),
            (
                "registry_rewrites",
                "Times that all was written again since Redis had lost it",
                |c| &c.rewrites,
            ),
            ("control_disconnects", "Connections ended by a command or a revocation", |c| {
                &c.disconnected
            }),
            ("control_errors", "Commands to all instances that make no sense", |c| &c.bad_commands),
            ("revocation_rechecks", "Times that revocations were read again after a gap", |c| {
                &c.rechecks
            }),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, counters.map_or(0, |counters| field(counters).value()))?;
        }
        Ok(())
    }

    /// By the names of keys, which the operator chose and which are as many as the configuration has.
    fn api(&mut self) -> fmt::Result {
        let help = "Calls of the worker API with a known key: accepted, or refused since the key \
            lacks the scope";
        let mut family =
            self.encoder.encode_descriptor("api_calls", help, None, MetricType::Counter)?;
        for entry in self.gateway.api_keys.entries() {
            for (outcome, counter) in
                [("accepted", &entry.accepted), ("missing_scope", &entry.refused)]
            {
                family
                    .encode_family(&ApiCallLabels { key: entry.name().to_owned(), outcome })?
                    .encode_counter::<NoLabelSet, _, u64>(&counter.value(), None)?;
            }
        }
        Ok(())
    }

    fn lease(&mut self) -> fmt::Result {
        let counters = self.gateway.lease.as_ref().map(|lease| &lease.counters);
        type Field = fn(&LeaseCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 4] = [
            ("lease_failures", "Renewals of the lease that Redis did not do", |c| &c.failures),
            ("registry_servers_reaped", "Lost instances that this one removed", |c| {
                &c.servers_reaped
            }),
            ("registry_connections_reaped", "Connections of lost instances that it removed", |c| {
                &c.connections_reaped
            }),
            (
                "registry_sessions_reaped",
                "Sessions of lost instances whose end it announced",
                |c| &c.sessions_reaped,
            ),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, counters.map_or(0, |counters| field(counters).value()))?;
        }
        Ok(())
    }

    fn session_log(&mut self) -> fmt::Result {
        let log = self.gateway.session_log.as_ref();
        type Field = fn(&SessionLogCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 5] = [
            ("session_log_appended", "Announcements that are in a log", |c| &c.appended),
            ("session_log_retried", "Announcements that a log did not take yet", |c| &c.retried),
            ("session_log_dropped", "Announcements that did not fit into what may wait", |c| {
                &c.dropped
            }),
            (
                "session_log_lost",
                "Sessions of an earlier run of this instance whose end was announced",
                |c| &c.lost,
            ),
            ("session_log_reopened", "Open sessions that were announced again", |c| &c.reopened),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, log.map_or(0, |log| field(&log.counters).value()))?;
        }
        let help = "Bytes of announcements that wait for a log";
        let waiting = log.map_or(0, |log| log.waiting_bytes());
        self.gauge("session_log_waiting", help, Some(&Unit::Bytes), waiting as i64)
    }

    fn process(&mut self) -> fmt::Result {
        let help = "Log lines that were dropped since standard error did not take them";
        self.counter("log_lines_dropped", help, crate::telemetry::log::dropped_lines())?;
        let uptime = self.gateway.uptime().as_secs();
        self.gauge("uptime", "Time since the start", Some(&Unit::Seconds), uptime as i64)?;
        let memory = resident_bytes().unwrap_or_default();
        self.gauge("process_resident_memory", "Memory in use", Some(&Unit::Bytes), memory as i64)
    }

    fn gauges(&mut self, name: &str, help: &str, values: [(&'static str, i64); 3]) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (endpoint, value) in values {
            family.encode_family(&EndpointLabels { endpoint })?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        values: [(&'static str, u64); 3],
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (endpoint, value) in values {
            family
                .encode_family(&EndpointLabels { endpoint })?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    fn per_profile(
        &mut self,
        name: &str,
        help: &str,
        counter: impl Fn(&Profile) -> &AtomicU64,
    ) -> fmt::Result {
        let values = profiles(self.gateway)
            .map(|(endpoint, profile)| (endpoint, counter(profile).load(Relaxed)));
        self.counters(name, help, values)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: i64) -> fmt::Result {
        self.encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }
}

fn profiles(gateway: &Gateway) -> [(&'static str, &Profile); 3] {
    [
        (Endpoint::Sessions.label(), &gateway.session_profile),
        (Endpoint::Events.label(), &gateway.event_profile),
        (Endpoint::Echo.label(), &gateway.echo_profile),
    ]
}

/// Resident memory of this process; `None` where the system does not tell.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_form_holds_the_samples_of_the_text_form() {
        let metrics = Metrics::new();
        metrics.handshake(Some(Endpoint::Sessions), "full");
        let json: serde_json::Value = serde_json::from_str(&metrics.json()).unwrap();
        let found = json["metrics"].as_array().unwrap().iter().any(|sample| {
            sample["name"] == "wsproxy_handshakes_total"
                && sample["labels"]["outcome"] == "full"
                && sample["value"] == 1.0
        });
        assert!(found, "{json}");
    }
}
