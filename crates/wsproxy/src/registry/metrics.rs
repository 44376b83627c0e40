//! The numbers of the registry, of leases and of the log of sessions, on the page of metrics.
//!
//! Counters are sources themselves: without a registry an instance shows counters at zero.

use prometheus_client::registry::Unit;

use crate::{
    registry::{
        Registry, RegistryCounters,
        agents::AgentRegistry,
        lease::{Lease, LeaseCounters},
        rooms::RoomRegistry,
        sessions::{SessionLog, SessionLogCounters},
        tunnel::{LaneCounters, LaneRegistry},
        writer::WriterCounters,
    },
    telemetry::scrape::{Scrape, Section, Source},
};

impl Source for Registry {
    fn collect(&self, scrape: &mut Scrape) {
        self.counters.collect(scrape);
    }
}

impl Source for RegistryCounters {
    fn collect(&self, scrape: &mut Scrape) {
        scrape.section(Section::Registry);
        for (name, help, counter) in [
            ("registry_written", "Changes written to the registry", &self.writer.written),
            (
                "registry_failures",
                "Commands of the registry that Redis refused or did not answer",
                &self.writer.failures,
            ),
            (
                "registry_rewrites",
                "Times that all connections were written again since Redis had lost them",
                &self.writer.rewrites,
            ),
            (
                "control_disconnects",
                "Connections closed by a command or a revocation",
                &self.disconnected,
            ),
            (
                "control_errors",
                "Commands to all instances that could not be read",
                &self.bad_commands,
            ),
            (
                "revocation_rechecks",
                "Times that revocations were read again after a gap",
                &self.rechecks,
            ),
        ] {
            scrape.counter(name, help, counter.value());
        }
    }
}

impl Source for AgentRegistry {
    fn collect(&self, scrape: &mut Scrape) {
        collect_agents(&self.counters, scrape);
    }
}

/// Adds the numbers of the registry of agents. An instance without one shows zeros.
pub(crate) fn collect_agents(counters: &WriterCounters, scrape: &mut Scrape) {
    scrape.section(Section::Registry);
    for (name, help, counter) in [
        ("agent_registry_written", "Changes of agents written to the registry", &counters.written),
        (
            "agent_registry_failures",
            "Commands of the registry of agents that Redis refused or did not answer",
            &counters.failures,
        ),
        (
            "agent_registry_rewrites",
            "Times that all agents were written again since Redis had lost them",
            &counters.rewrites,
        ),
    ] {
        scrape.counter(name, help, counter.value());
    }
}

impl Source for RoomRegistry {
    fn collect(&self, scrape: &mut Scrape) {
        collect_rooms(&self.counters, scrape);
    }
}

/// Adds the numbers of the registry of rooms. An instance without one shows zeros.
pub(crate) fn collect_rooms(counters: &WriterCounters, scrape: &mut Scrape) {
    scrape.section(Section::Registry);
    for (name, help, counter) in [
        ("room_registry_written", "Changes of rooms written to the registry", &counters.written),
        (
            "room_registry_failures",
            "Commands of the registry of rooms that Redis refused or did not answer",
            &counters.failures,
        ),
        (
            "room_registry_rewrites",
            "Times that all rooms were written again since Redis had lost them",
            &counters.rewrites,
        ),
    ] {
        scrape.counter(name, help, counter.value());
    }
}

impl Source for LaneRegistry {
    fn collect(&self, scrape: &mut Scrape) {
        collect_lanes(&self.counters, self.superseded(), scrape);
    }
}

/// Adds the numbers of the registry of lanes. An instance without one shows zeros.
pub(crate) fn collect_lanes(counters: &LaneCounters, superseded: u64, scrape: &mut Scrape) {
    scrape.section(Section::Registry);
    for (name, help, value) in [
        (
            "lane_registry_written",
            "Changes of lanes written to the registry",
            counters.writer.written.value(),
        ),
        (
            "lane_registry_failures",
            "Commands of the registry of lanes that Redis refused or did not answer",
            counters.writer.failures.value(),
        ),
        (
            "lane_registry_rewrites",
            "Times that all lanes were written again since Redis had lost them",
            counters.writer.rewrites.value(),
        ),
        ("lane_registry_readings", "Readings of the lanes of a cluster", counters.readings.value()),
        (
            "lane_registry_unreadable",
            "Entries and announcements of lanes that could not be read",
            counters.unreadable.value(),
        ),
        ("lanes_superseded", "Lanes that gave way to a newer lane of their agent id", superseded),
    ] {
        scrape.counter(name, help, value);
    }
}

impl Source for Lease {
    fn collect(&self, scrape: &mut Scrape) {
        self.counters.collect(scrape);
    }
}

impl Source for LeaseCounters {
    fn collect(&self, scrape: &mut Scrape) {
        scrape.section(Section::Leases);
        for (name, help, counter) in [
            (
                "lease_failures",
                "Renewals of the lease that Redis refused or did not answer",
                &self.failures,
            ),
            (
                "registry_servers_reaped",
                "Lost instances that this one removed",
                &self.servers_reaped,
            ),
            (
                "registry_connections_reaped",
                "Connections of lost instances that this one removed",
                &self.connections_reaped,
            ),
            (
                "registry_sessions_reaped",
                "Sessions of lost instances whose end this one announced",
                &self.sessions_reaped,
            ),
            (
                "registry_agents_reaped",
                "Agents of lost instances whose places this one released",
                &self.agents_reaped,
            ),
            (
                "registry_room_members_reaped",
                "Members of lost instances that this one took out of their rooms",
                &self.room_members_reaped,
            ),
            (
                "registry_lanes_reaped",
                "Lanes of lost instances that this one removed",
                &self.lanes_reaped,
            ),
        ] {
            scrape.counter(name, help, counter.value());
        }
    }
}

impl Source for SessionLog {
    fn collect(&self, scrape: &mut Scrape) {
        self.counters.collect_with(self.waiting_bytes(), scrape);
    }
}

impl Source for SessionLogCounters {
    fn collect(&self, scrape: &mut Scrape) {
        self.collect_with(0, scrape);
    }
}

impl SessionLogCounters {
    fn collect_with(&self, waiting_bytes: usize, scrape: &mut Scrape) {
        scrape.section(Section::SessionLog);
        for (name, help, counter) in [
            ("session_log_appended", "Announcements that are in a log", &self.appended),
            ("session_log_retried", "Announcements that a log did not take yet", &self.retried),
            (
                "session_log_dropped",
                "Announcements that were dropped since too many waited",
                &self.dropped,
            ),
            (
                "session_log_lost",
                "Sessions of an earlier run of this instance whose end was announced",
                &self.lost,
            ),
            ("session_log_reopened", "Open sessions that were announced again", &self.reopened),
        ] {
            scrape.counter(name, help, counter.value());
        }
        let help = "Bytes of announcements that wait for a log";
        scrape.gauge_in(Unit::Bytes, "session_log_waiting", help, waiting_bytes as i64);
    }
}
