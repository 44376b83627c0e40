//! What the event endpoint counts beyond what every endpoint does.

use std::fmt;

use prometheus_client::{
    encoding::{EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
};

use super::{KindLabels, Scrape};
use crate::endpoint::events::Unacknowledged;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

pub(super) fn encode(scrape: &mut Scrape<'_, '_>) -> fmt::Result {
    let counters = &scrape.gateway.events.counters;
    let given_up =
        Unacknowledged::ALL.map(|why| (why.label(), counters.unacknowledged[why as usize].value()));
    let others = [
        ("wanted", counters.ack_wanted.value()),
        ("acknowledged", counters.acknowledged.value()),
        ("unknown", counters.acks_unknown.value()),
    ];
    let help = "Messages that wanted an ack, and what became of them: acknowledged, or given up \
        after all tries, for others, or at the end of the connection; and acks that nobody waited for";
    outcomes(scrape, "event_acks", help, others.into_iter().chain(given_up))?;
    let help = "Messages that were sent again since they were not acknowledged";
    scrape.counter("event_messages_resent", help, counters.resent.value())?;
    let refreshes =
        [("accepted", counters.refreshed.value()), ("refused", counters.refresh_refused.value())];
    let help = "Newer tokens that clients brought";
    outcomes(scrape, "event_refreshes", help, refreshes)?;
    let kinds = [
        ("invalid", counters.invalid.value()),
        ("lost", counters.lost.value()),
        ("refused", counters.refused.value()),
        ("unheard", counters.unheard.value()),
        ("unreported", counters.unreported.value()),
    ];
    let help = "Messages of the event endpoint that met trouble: invalid ones of clients, those that \
        the bus did not take, lost, or no worker received, and reports on acks that the bus did not take";
    let mut family =
        scrape.encoder.encode_descriptor("event_errors", help, None, MetricType::Counter)?;
    for (kind, value) in kinds {
        family
            .encode_family(&KindLabels { kind })?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

fn outcomes(
    scrape: &mut Scrape<'_, '_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
) -> fmt::Result {
    let mut family = scrape.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (outcome, value) in values {
        family
            .encode_family(&OutcomeLabels { outcome })?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}
