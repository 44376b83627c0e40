//! Connections and their traffic, by endpoint family.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
};

use prometheus_client::registry::Unit;
use wsproxy_conn::{Profile, Runtime, profile::LATENCY_BUCKETS};

use crate::telemetry::{
    family::Family,
    scrape::{Scrape, Section, Source},
};

/// The connections of each family.
#[derive(Debug, Default)]
pub(super) struct Connections([OfFamily; Family::ALL.len()]);

/// The connections of one family.
#[derive(Debug, Default)]
pub(super) struct OfFamily {
    pub(super) opened: AtomicU64,
    pub(super) active: Arc<AtomicI64>,
    pub(super) streams_opened: AtomicU64,
    pub(super) streams_active: Arc<AtomicI64>,
}

impl Connections {
    pub(super) const fn of(&self, family: Family) -> &OfFamily {
        &self.0[family as usize]
    }
}

impl Source for Connections {
    fn collect(&self, scrape: &mut Scrape) {
        let scrape = scrape.section(Section::Connections);
        for family in Family::ALL {
            let OfFamily { opened, active, streams_opened, streams_active } = self.of(family);
            let labels = [("endpoint", family.label())];
            let help = "Open connections of clients";
            scrape.gauges("active_connections", help, [(labels, active.load(Relaxed))]);
            let help = "Connections of clients that were opened";
            scrape.counters("connections", help, [(labels, opened.load(Relaxed))]);
            let help = "Of the open connections, those that are event streams";
            scrape.gauges("active_event_streams", help, [(labels, streams_active.load(Relaxed))]);
            let help = "Of the opened connections, those that were event streams";
            scrape.counters("event_streams", help, [(labels, streams_opened.load(Relaxed))]);
        }
    }
}

/// Adds the numbers that all families have.
pub fn collect_profile(family: Family, profile: &Profile, scrape: &mut Scrape) {
    let stats = &profile.stats;
    let labels = [("endpoint", family.label())];
    scrape.section(Section::Connections);
    for (name, help, counter) in [
        (
            "messages_received",
            "Data messages that arrived from clients, complete and valid as WebSocket messages",
            &stats.messages_received,
        ),
        (
            "messages_sent",
            "Data messages whose last byte was given to the kernel; for event streams, begun to be written",
            &stats.messages_sent,
        ),
        (
            "messages_discarded",
            "Data messages that waited for a client when its connection ended, or came afterwards",
            &stats.messages_discarded,
        ),
        ("bytes_received", "Bytes read from clients", &stats.bytes_received),
        ("bytes_sent", "Bytes given to the kernel", &stats.bytes_sent),
        (
            "backpressure_events",
            "Times that a client's socket was full, so that messages had to wait",
            &stats.blocked,
        ),
        (
            "reads_paused",
            "Times that reading from a client paused, since the queue of the bus or of the client was full",
            &stats.reads_paused,
        ),
        (
            "reads_throttled",
            "Times that reading from a client paused, since it had sent more bytes than allowed",
            &stats.reads_throttled,
        ),
    ] {
        scrape.counters(name, help, [(labels, counter.load(Relaxed))]);
    }
    let bounds = LATENCY_BUCKETS.iter().map(|&micros| micros as f64 / 1e6);
    let counts = stats.latency.buckets.iter().map(|count| count.load(Relaxed));
    let buckets = bounds.chain([f64::INFINITY]).zip(counts).collect();
    let sum = stats.latency.sum_micros.load(Relaxed) as f64 / 1e6;
    let help = "Time from reading a message of the bus until its last byte was given to the kernel";
    scrape.section(Section::Latency).seconds("message_latency", help, &labels, (buckets, sum));
}

impl Source for Runtime {
    fn collect(&self, scrape: &mut Scrape) {
        let help = "Bytes that wait for clients whose sockets are full";
        let used = self.budget.used() as i64;
        scrape.section(Section::Connections).gauge_in(
            Unit::Bytes,
            "buffer_utilization",
            help,
            used,
        );
    }
}
