//! Metrics of the hub.

use wsproxy_proto::history::Lost;

use crate::{
    hub::Hub,
    telemetry::scrape::{Scrape, Section, Source},
};

impl Source for Hub {
    fn collect(&self, scrape: &mut Scrape) {
        let hub = &self.counters;
        scrape.section(Section::Messages);
        let help = "Messages that came for topics which nobody here wants any more";
        scrape.counter("messages_unwanted", help, hub.unwanted.value());
        let help = "Messages that are not UTF-8, for clients that get text only";
        scrape.counter("messages_unframeable", help, hub.unframeable.value());
        let help = "Connections that were told of a loss of the bus, or closed for it";
        scrape.counter("bus_loss_notices", help, hub.bus_loss_notices.value());

        scrape.section(Section::Histories);
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
            scrape.counter(name, help, counter.value());
        }
        let help = "Clients that were told that something is missing, by reason";
        let samples = Lost::ALL
            .map(|lost| ([("reason", lost.label())], hub.history_lost[lost as usize].value()));
        scrape.counters("history_lost", help, samples);
    }
}
