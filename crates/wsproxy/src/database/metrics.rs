//! Kinds of work on the database, and its numbers on the page of metrics.

use crate::{
    database::Database,
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
};

/// A kind of work: a label of metrics and the name of a statement in log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads the credential of a handshake.
    Credential,
    /// Writes status and last_seen of agents.
    Status,
    /// Writes rows of the audit log.
    Audit,
    /// Deletes old rows of the audit log.
    Retention,
    /// Reads or changes credentials for an operator or an application.
    Secrets,
    /// Looks at tables, or creates them.
    Schema,
    /// Asks whether the database answers.
    Probe,
}

impl Operation {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Credential,
        Self::Status,
        Self::Audit,
        Self::Retention,
        Self::Secrets,
        Self::Schema,
        Self::Probe,
    ];

    /// Returns the label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Credential => "credential",
            Self::Status => "status",
            Self::Audit => "audit",
            Self::Retention => "retention",
            Self::Secrets => "secrets",
            Self::Schema => "schema",
            Self::Probe => "probe",
        }
    }
}

/// Counters of the database.
#[derive(Debug, Default)]
pub struct DatabaseCounters {
    /// Failed statements, by operation.
    pub errors: [Counter; Operation::ALL.len()],
    /// Slow statements, by operation.
    pub slow: [Counter; Operation::ALL.len()],
    /// Changes of status and last_seen that were not written.
    pub status_lost: Counter,
}

impl Source for Database {
    fn collect(&self, scrape: &mut Scrape) {
        let (status, counters) = (self.status(), self.counters());
        let scrape = scrape.section(Section::Database);
        let help = "Whether the database answers and its tables can be used";
        scrape.gauge("database_up", help, status.connected.into());
        let help = "Whether the database takes what is written: 0 where its disk is full, it is read-only or locked";
        scrape.gauge("database_writable", help, status.writable.into());
        let by_operation = |counters: &[Counter; Operation::ALL.len()]| {
            Operation::ALL.map(|operation| {
                ([("operation", operation.label())], counters[operation as usize].value())
            })
        };
        let help = "Statements that failed, by operation";
        scrape.counters("database_errors", help, by_operation(&counters.errors));
        let help = "Statements that took over a second, by operation";
        scrape.counters("database_slow", help, by_operation(&counters.slow));
        let help = "Changes of an agent's status in the database that were not written";
        scrape.counter("database_status_lost", help, counters.status_lost.value());
    }
}
