//! Metrics of events.

use crate::{
    auth::jwt::JwksCounters,
    endpoint::events::{EventCounters, Events, Unacknowledged},
    registry::RegistryCounters,
    telemetry::{
        family::Family,
        metrics::{connections, messages},
        scrape::{Scrape, Section, Source},
    },
};

impl Source for Events {
    fn collect(&self, scrape: &mut Scrape) {
        connections::collect_profile(Family::Events, &self.profile, scrape);
        self.counters.collect(scrape);
        match &self.jwt {
            Some(jwt) => jwt.collect(scrape),
            None => JwksCounters::default().collect(scrape),
        }
        match &self.registry {
            Some(registry) => registry.collect(scrape),
            None => RegistryCounters::default().collect(scrape),
        }
    }
}

impl Source for EventCounters {
    fn collect(&self, scrape: &mut Scrape) {
        let errors = [
            ("invalid", &self.upstream.invalid),
            ("lost", &self.upstream.lost),
            ("refused", &self.upstream.refused),
            ("unreported", &self.unreported),
        ];
        messages::collect_errors(Family::Events, errors, scrape);
        messages::collect_unheard(Family::Events, &self.upstream.unheard, scrape);

        scrape.section(Section::Families);
        let given_up =
            Unacknowledged::ALL.map(|why| (why.label(), &self.unacknowledged[why as usize]));
        let acks = [
            ("wanted", &self.ack_wanted),
            ("acknowledged", &self.acknowledged),
            ("unknown", &self.acks_unknown),
        ];
        let help = "Messages that wanted an ack, by outcome: acknowledged, or given up after all tries, \
            for newer messages, or at the end of the connection; and acks for messages that did not wait";
        let acks = acks.into_iter().chain(given_up);
        let acks = acks.map(|(outcome, counter)| ([("outcome", outcome)], counter.value()));
        scrape.counters("event_acks", help, acks);
        let help = "Messages that were sent again since they were not acknowledged";
        scrape.counter("event_messages_resent", help, self.resent.value());
        let refreshes = [("accepted", &self.refreshed), ("refused", &self.refresh_refused)];
        let refreshes =
            refreshes.map(|(outcome, counter)| ([("outcome", outcome)], counter.value()));
        scrape.counters("event_refreshes", "Newer tokens that clients brought", refreshes);
    }
}
