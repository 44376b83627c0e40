//! What an instance does beside carrying messages: keys, API, registries, the process.

use std::fmt;

use prometheus_client::{encoding::EncodeLabelSet, registry::Unit};

use super::scrape::Scrape;
use crate::{
    auth::jwt::{JwksCounters, JwtVerifier},
    registry::{RegistryCounters, lease::LeaseCounters, sessions::SessionLogCounters},
    telemetry::{counter, log},
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiCallLabels {
    key: String,
    outcome: &'static str,
}

impl Scrape<'_, '_> {
    pub(super) fn keys(&mut self) -> fmt::Result {
        let counters = self.gateway.jwt.as_ref().and_then(JwtVerifier::jwks_counters);
        let value = |counter: fn(&JwksCounters) -> &counter::Counter| {
            counters.map_or(0, |c| counter(c).value())
        };
        let help = "Times that the keys which the issuer of tokens publishes were fetched";
        self.counter("jwks_fetches", help, value(|counters| &counters.fetches))?;
        let help = "Of these, those that brought no keys: the known ones stay in use";
        self.counter("jwks_fetch_failures", help, value(|counters| &counters.failures))
    }

    pub(super) fn registry(&mut self) -> fmt::Result {
        let counters = self.gateway.registry.as_ref().map(|registry| &registry.counters);
        type Field = fn(&RegistryCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 6] = [
            ("registry_written", "Changes written to the registry", |c| &c.written),
            ("registry_failures", "Times that Redis did not do what the registry asked", |c| {
                &c.failures
            }),
            (
                "registry_rewrites",
                "Times that all was written again since Redis had lost it",
                |c| &c.rewrites,
            ),
            ("control_disconnects", "Connections ended by a command or a revocation", |c| {
                &c.disconnected
            }),
            ("control_errors", "Commands to all instances that make no sense", |c| &c.bad_commands),
            ("revocation_rechecks", "Times that revocations were read again after a gap", |c| {
                &c.rechecks
            }),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, counters.map_or(0, |counters| field(counters).value()))?;
        }
        Ok(())
    }

    /// By the names of keys, which the operator chose and which are as many as the configuration has.
    pub(super) fn api(&mut self) -> fmt::Result {
        let help = "Calls of the worker API with a known key: accepted, or refused since the key \
            lacks the scope";
        let entries = self.gateway.api_keys.entries();
        let values = entries.flat_map(|entry| {
            [("accepted", &entry.accepted), ("missing_scope", &entry.refused)].map(
                |(outcome, counter)| {
                    (ApiCallLabels { key: entry.name().to_owned(), outcome }, counter.value())
                },
            )
        });
        self.counters_by("api_calls", help, values)
    }

    pub(super) fn lease(&mut self) -> fmt::Result {
        let counters = self.gateway.lease.as_ref().map(|lease| &lease.counters);
        type Field = fn(&LeaseCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 4] = [
            ("lease_failures", "Renewals of the lease that Redis did not do", |c| &c.failures),
            ("registry_servers_reaped", "Lost instances that this one removed", |c| {
                &c.servers_reaped
            }),
            ("registry_connections_reaped", "Connections of lost instances that it removed", |c| {
                &c.connections_reaped
            }),
            (
                "registry_sessions_reaped",
                "Sessions of lost instances whose end it announced",
                |c| &c.sessions_reaped,
            ),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, counters.map_or(0, |counters| field(counters).value()))?;
        }
        Ok(())
    }

    pub(super) fn session_log(&mut self) -> fmt::Result {
        let log = self.gateway.session_log.as_ref();
        type Field = fn(&SessionLogCounters) -> &counter::Counter;
        let fields: [(&str, &str, Field); 5] = [
            ("session_log_appended", "Announcements that are in a log", |c| &c.appended),
            ("session_log_retried", "Announcements that a log did not take yet", |c| &c.retried),
            ("session_log_dropped", "Announcements that did not fit into what may wait", |c| {
                &c.dropped
            }),
            (
                "session_log_lost",
                "Sessions of an earlier run of this instance whose end was announced",
                |c| &c.lost,
            ),
            ("session_log_reopened", "Open sessions that were announced again", |c| &c.reopened),
        ];
        for (name, help, field) in fields {
            self.counter(name, help, log.map_or(0, |log| field(&log.counters).value()))?;
        }
        let help = "Bytes of announcements that wait for a log";
        let waiting = log.map_or(0, |log| log.waiting_bytes());
        self.gauge("session_log_waiting", help, Some(&Unit::Bytes), waiting as i64)
    }

    pub(super) fn process(&mut self) -> fmt::Result {
        let help = "Log lines that were dropped since standard error did not take them";
        self.counter("log_lines_dropped", help, log::dropped_lines())?;
        let uptime = self.gateway.uptime().as_secs();
        self.gauge("uptime", "Time since the start", Some(&Unit::Seconds), uptime as i64)?;
        let memory = resident_bytes().unwrap_or_default();
        self.gauge("process_resident_memory", "Memory in use", Some(&Unit::Bytes), memory as i64)
    }
}

/// Resident memory of this process; `None` where the system does not tell.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}
