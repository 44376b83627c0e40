//! The numbers of the bus, on the page of metrics.

use prometheus_client::registry::Unit;

use crate::{
    bus::Bus,
    store::not_done::NotDone,
    telemetry::scrape::{Scrape, Section, Source},
};

impl Source for Bus {
    fn collect(&self, scrape: &mut Scrape) {
        let (status, counters) = (self.status(), self.counters());
        let scrape = scrape.section(Section::Bus);
        let help = "Channels subscribed on the bus";
        scrape.gauge("redis_pubsub_channels_active", help, status.channels as i64);
        let help = "Whether every connection to the bus is up";
        scrape.gauge("bus_connected", help, status.connected.into());
        let help = "Whether every subscription is confirmed and every probe comes back";
        scrape.gauge("bus_subscribed", help, status.subscribed.into());
        let help = "Bytes of messages that wait to be published";
        scrape.gauge_in(Unit::Bytes, "bus_publish_queue", help, status.queued_bytes as i64);
        for (name, help, counter) in [
            ("bus_messages_received", "Messages read from the bus", &counters.messages_in),
            ("bus_publishes", "Publishes that the bus answered", &counters.published),
            (
                "bus_publishes_stored",
                "Of these, messages that are in a history",
                &counters.publish_stored,
            ),
            (
                "bus_publishes_kept",
                "Of these, messages without a receiver that were kept in a stream",
                &counters.publish_kept,
            ),
            (
                "bus_publishes_lost",
                "Publishes without an answer when a connection was lost",
                &counters.publish_lost,
            ),
            (
                "bus_publishes_refused_full",
                "Publishes that did not fit into the queue",
                &counters.publish_full,
            ),
            ("bus_links_lost", "Lost connections to the bus", &counters.links_lost),
            ("bus_connects", "Connections to the bus that were made", &counters.connects),
            ("bus_connects_failed", "Attempts to connect that failed", &counters.connects_failed),
            ("bus_probe_failures", "Probes that did not come back", &counters.probe_failures),
            ("bus_subscribe_errors", "Channels that the bus refused", &counters.subscribe_errors),
            (
                "bus_role_refused",
                "Connections that were refused or closed since the server was no master",
                &counters.role_refused,
            ),
        ] {
            scrape.counter(name, help, counter.value());
        }
        let help = "Publishes that were certainly not done, by the reason of the refusal";
        let samples = NotDone::ALL.map(|refusal| {
            let count = counters.publish_refused[refusal as usize].value();
            ([("reason", refusal.label())], count)
        });
        scrape.counters("bus_publishes_refused", help, samples);
        let help = "Whether every part of a Redis Cluster is there";
        scrape.gauge("bus_whole", help, status.away.is_none().into());
        let help = "Whether the bus takes writes";
        scrape.gauge("bus_writable", help, status.refusal.is_none().into());
    }
}
