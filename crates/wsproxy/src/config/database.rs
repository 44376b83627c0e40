//! `[database]` and `[audit]`: the configuration of the SQL database, and of the audit log in it.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;

use crate::config::{
    keys::{DAY, Key, key},
    kind::{FilePath, List, Number, OneOf, Optional, Secret, Switch, Time},
    rule,
};

/// `[database]`: credentials of agents, and the audit log. Opened only where agents are served.
#[derive(Debug, Clone)]
pub struct DatabaseConfig {
    /// URL of a PostgreSQL; secret, since it may hold a password. `None`: the embedded SQLite.
    pub url: Option<SecretString>,
    /// File of the embedded SQLite; `None`: see [`Self::file`].
    pub path: Option<PathBuf>,
    /// `$STATE_DIRECTORY`, which systemd sets.
    pub state_directory: Option<PathBuf>,
    /// Create absent tables at the start; otherwise only check them.
    pub migrate: bool,
    /// Most connections to PostgreSQL.
    pub pool: u32,
}

/// `[audit]`: the log of calls.
#[derive(Debug, Clone)]
pub struct AuditConfig {
    /// Form of stored parameters.
    pub params: AuditForm,
    /// Form of stored results.
    pub results: AuditForm,
    /// Names of members that are redacted, beside the built-in ones.
    pub redact: Vec<String>,
    /// Age at which rows are deleted; zero: never.
    pub keep: Duration,
}

/// Form in which the audit log stores a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditForm {
    /// With secrets replaced.
    Redacted,
    /// Not at all.
    Nothing,
    /// As it was.
    Full,
}

impl DatabaseConfig {
    /// Returns the file of the embedded SQLite: `database.path`, else `wsproxy.db` in `$STATE_DIRECTORY`, else in the
    /// working directory.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        let named = self.path.clone();
        named.unwrap_or_else(|| self.state_directory.clone().unwrap_or_default().join(FILE))
    }
}

impl Default for DatabaseConfig {
    fn default() -> Self {
        Self { url: None, path: None, state_directory: None, migrate: true, pool: 8 }
    }
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            params: AuditForm::Redacted,
            results: AuditForm::Redacted,
            redact: Vec::new(),
            keep: Duration::ZERO,
        }
    }
}

/// The keys of both sections.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key!(database.url, Optional(Secret(rule::DATABASE_URL)), "The PostgreSQL with credentials of agents and the audit log. Not set: the embedded SQLite, for one instance.").alias_of_agents("DATABASE_URL").secret(),
    key!(database.path, Optional(FilePath), "File of the embedded SQLite. Not set: wsproxy.db in $STATE_DIRECTORY, else in the working directory."),
    key!(database.migrate, Switch, "Create absent tables at the start. false: only check them, and leave changes to `wsproxy migrate`."),
    key!(database.pool, Number(1, 1000), "Most connections to PostgreSQL."),

    key!(audit.params, OneOf(STORED), "Parameters of calls in the audit log: with secrets replaced, not at all, or as they were."),
    key!(audit.results, OneOf(STORED), "Results of calls in the audit log, likewise."),
    key!(audit.redact, List(rule::MEMBER), "Names of members whose values are redacted, beside password, token, secret and their like."),
    key!(audit.keep, Time(0, 3650 * DAY), "Age at which rows of the audit log are deleted; 0: never."),
];

/// Name of the embedded SQLite where none is configured.
const FILE: &str = "wsproxy.db";

const STORED: &[(&str, AuditForm)] =
    &[("redacted", AuditForm::Redacted), ("none", AuditForm::Nothing), ("full", AuditForm::Full)];
