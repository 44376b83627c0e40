//! Connections and what passes over them, by endpoint.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use prometheus_client::{encoding::NoLabelSet, metrics::MetricType, registry::Unit};
use wsproxy_conn::{Profile, profile::LATENCY_BUCKETS};

use super::{Endpoint, EndpointLabels, scrape::Scrape};
use crate::gateway::Gateway;

impl Scrape<'_, '_> {
    pub(super) fn connections(&mut self) -> fmt::Result {
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

    pub(super) fn latency(&mut self) -> fmt::Result {
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
}

fn profiles(gateway: &Gateway) -> [(&'static str, &Profile); 3] {
    [
        (Endpoint::Sessions.label(), &gateway.session_profile),
        (Endpoint::Events.label(), &gateway.event_profile),
        (Endpoint::Echo.label(), &gateway.echo_profile),
    ]
}
