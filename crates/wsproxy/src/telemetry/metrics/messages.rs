//! What became of messages, and what the event endpoint counts beyond that.

use std::fmt;

use prometheus_client::encoding::EncodeLabelSet;

use super::{Endpoint, scrape::Scrape};
use crate::endpoint::events::Unacknowledged;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    endpoint: &'static str,
    kind: &'static str,
}

impl Scrape<'_, '_> {
    /// Messages that met trouble, of all endpoints under the same names.
    pub(super) fn messages(&mut self) -> fmt::Result {
        let (sessions, events) = (&self.gateway.sessions.counters, &self.gateway.events.counters);
        let values = [
            (Endpoint::Sessions, "invalid", &sessions.invalid),
            (Endpoint::Sessions, "bad_command", &sessions.bad_commands),
            (Endpoint::Sessions, "unannounced", &sessions.unannounced),
            (Endpoint::Sessions, "lost", &sessions.lost),
            (Endpoint::Sessions, "refused", &sessions.refused),
            (Endpoint::Events, "invalid", &events.invalid),
            (Endpoint::Events, "lost", &events.lost),
            (Endpoint::Events, "refused", &events.refused),
            (Endpoint::Events, "unreported", &events.unreported),
        ];
        let help = "Messages that met trouble: invalid ones of clients, those that the bus lost or did \
            not take, workers' commands that make no sense, announcements and reports that the bus did not take";
        let values = values.map(|(endpoint, kind, counter)| {
            (ErrorLabels { endpoint: endpoint.label(), kind }, counter.value())
        });
        self.counters_by("message_errors", help, values)?;
        let help = "Messages from clients that no worker received";
        let values = [
            (Endpoint::Sessions.label(), sessions.unheard.value()),
            (Endpoint::Events.label(), events.unheard.value()),
        ];
        self.counters("messages_unheard", help, values)?;
        let hub = &self.gateway.hub.counters;
        let help = "Messages that came for topics which nobody here wants any more";
        self.counter("messages_unwanted", help, hub.unwanted.value())?;
        let help = "Messages that are not UTF-8, for clients that get text only";
        self.counter("messages_unframeable", help, hub.unframeable.value())?;
        let help = "Connections that were told of a loss of the bus, or closed for it";
        self.counter("bus_loss_notices", help, hub.bus_loss_notices.value())
    }

    /// Acknowledgements and newer tokens of the event endpoint.
    pub(super) fn acks(&mut self) -> fmt::Result {
        let counters = &self.gateway.events.counters;
        let given_up = Unacknowledged::ALL
            .map(|why| (why.label(), counters.unacknowledged[why as usize].value()));
        let others = [
            ("wanted", counters.ack_wanted.value()),
            ("acknowledged", counters.acknowledged.value()),
            ("unknown", counters.acks_unknown.value()),
        ];
        let help = "Messages that wanted an ack, and what became of them: acknowledged, or given up \
            after all tries, for others, or at the end of the connection; and acks that nobody waited for";
        self.outcomes("event_acks", help, others.into_iter().chain(given_up))?;
        let help = "Messages that were sent again since they were not acknowledged";
        self.counter("event_messages_resent", help, counters.resent.value())?;
        let refreshes = [
            ("accepted", counters.refreshed.value()),
            ("refused", counters.refresh_refused.value()),
        ];
        self.outcomes("event_refreshes", "Newer tokens that clients brought", refreshes)
    }

    fn outcomes(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let values = values.into_iter();
        self.counters_by(name, help, values.map(|(outcome, n)| (OutcomeLabels { outcome }, n)))
    }
}
