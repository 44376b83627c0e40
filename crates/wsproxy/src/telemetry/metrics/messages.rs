//! Metrics of dropped, refused and unreceived messages, which endpoint families have under the same names.

use crate::telemetry::{
    counter::Counter,
    family::Family,
    scrape::{Scrape, Section},
};

/// Adds messages that failed, each kind with its counter.
pub fn collect_errors<'a>(
    family: Family,
    kinds: impl IntoIterator<Item = (&'static str, &'a Counter)>,
    scrape: &mut Scrape,
) {
    let help = "Messages that met trouble: invalid ones of clients, those that the bus lost or did \
        not take, workers' commands that make no sense, announcements and reports that the bus did not take";
    let kinds = kinds.into_iter();
    let samples = kinds
        .map(|(kind, counter)| ([("endpoint", family.label()), ("kind", kind)], counter.value()));
    scrape.section(Section::Messages).counters("message_errors", help, samples);
}

/// Adds messages from clients that no worker received.
pub fn collect_unheard(family: Family, counter: &Counter, scrape: &mut Scrape) {
    let help = "Messages from clients that no worker received";
    let sample = ([("endpoint", family.label())], counter.value());
    scrape.section(Section::Messages).counters("messages_unheard", help, [sample]);
}
