//! Metrics of users' agents.

use wsproxy_proto::agents::outcome::Outcome;

use crate::{
    endpoint::agents::{
        Agents,
        counters::{AgentCounters, CALL_BUCKETS},
        presence::PresenceCounters,
    },
    registry::{metrics::collect_agents, writer::WriterCounters},
    telemetry::{
        counter::Counter,
        family::Family,
        metrics::{connections, messages},
        scrape::{Scrape, Section, Source},
    },
};

impl Source for Agents {
    fn collect(&self, scrape: &mut Scrape) {
        connections::collect_profile(Family::Agents, &self.profile, scrape);
        self.counters.collect(scrape);
        let scrape = scrape.section(Section::Families);
        let help = "Calls that were sent to an agent of this instance and have no outcome yet";
        scrape.gauge("agent_calls_in_flight", help, self.in_flight() as i64);
        let help = "Answers to callers that were lost, since the queue of the bus and the one before it were full";
        scrape.counter("agent_answers_lost", help, self.outcomes.lost.value());
        if let Some(relay) = &self.relay {
            relay.collect(scrape);
        }
        if let Some(database) = &self.database {
            database.collect(scrape);
        }
        if let Some(audit) = &self.audit {
            audit.collect(scrape);
        }
        match &self.presence {
            Some(presence) => presence.collect(scrape),
            None => {
                collect_agents(&WriterCounters::default(), scrape);
                PresenceCounters::default().collect(scrape);
            }
        }
    }
}

impl Source for AgentCounters {
    fn collect(&self, scrape: &mut Scrape) {
        let errors = [
            ("invalid", &self.upstream.invalid),
            ("bad_command", &self.bad_commands),
            ("dropped", &self.dropped),
            ("in_doubt", &self.in_doubt),
            ("repeated", &self.repeated),
        ];
        messages::collect_errors(Family::Agents, errors, scrape);
        let scrape = scrape.section(Section::Families);
        let help = "Calls of tools that this instance took, by their outcome";
        let samples = Outcome::ALL
            .map(|outcome| ([("outcome", outcome.label())], self.calls.of(outcome).count.value()));
        scrape.counters("agent_calls", help, samples);
        for outcome in Outcome::ALL {
            let calls = self.calls.of(outcome);
            let bounds = CALL_BUCKETS.iter().map(|&micros| micros as f64 / 1e6);
            let counts = calls.times.iter().map(Counter::value);
            let buckets = bounds.chain([f64::INFINITY]).zip(counts).collect();
            let sum = calls.sum_micros.value() as f64 / 1e6;
            let help = "Time from the call until its outcome, of calls that were sent to an agent";
            scrape.seconds("agent_call", help, &[("outcome", outcome.label())], (buckets, sum));
        }
        let help = "Responses of agents that answered no call in flight: late, a second time, or to a call that the \
            connection was not sent";
        let samples = [
            ([("kind", "late")], self.late.value()),
            ([("kind", "duplicate")], self.duplicate.value()),
            ([("kind", "unknown")], self.unknown.value()),
        ];
        scrape.counters("agent_responses", help, samples);
        let help = "Connections of agents that replaced another one here or elsewhere, and those that were refused \
            since their user's place changed its holder too often";
        let samples = [
            ([("where", "here")], self.replaced_here.value()),
            ([("where", "elsewhere")], self.replaced_elsewhere.value()),
            ([("where", "flapping")], self.flapping.value()),
        ];
        scrape.counters("agent_replaced", help, samples);
        let help = "Judged credentials of agents, by the result";
        let auth = &self.auth;
        let samples = [
            ([("result", "accepted")], auth.accepted.value()),
            ([("result", "refused")], auth.refused.value()),
            ([("result", "malformed")], auth.malformed.value()),
            ([("result", "limited")], auth.limited.value()),
            ([("result", "unavailable")], auth.unavailable.value()),
        ];
        scrape.counters("agent_auth", help, samples);
    }
}
