//! The bus and the histories on it.

use std::fmt;

use prometheus_client::registry::Unit;
use wsproxy_proto::history::Lost;

use super::{ReasonLabels, scrape::Scrape};
use crate::bus::not_done::NotDone;

impl Scrape<'_, '_> {
    pub(super) fn histories(&mut self) -> fmt::Result {
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
        let values = Lost::ALL.map(|lost| {
            (ReasonLabels { reason: lost.label() }, hub.history_lost[lost as usize].value())
        });
        self.counters_by("history_lost", help, values)
    }

    pub(super) fn bus(&mut self) -> fmt::Result {
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
        let refused = NotDone::ALL.map(|refusal| {
            let count = counters.publish_refused[refusal as usize].value();
            (ReasonLabels { reason: refusal.label() }, count)
        });
        self.counters_by("bus_publishes_refused", help, refused)?;
        let help = "Whether the bus takes writes";
        self.gauge("bus_writable", help, None, status.refusal.is_none().into())
    }
}
