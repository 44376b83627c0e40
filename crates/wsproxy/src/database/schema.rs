//! The tables of the database, as they are found. Changes nothing.

use hashbrown::HashMap;

use crate::database::{
    pool::Connection,
    sql::{Dialect, Row},
};

/// The tables that serve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Schema {
    /// The table `agent_secrets` is there.
    pub has_secrets: bool,
    /// The columns `outcome` and `details` of the log are there.
    pub log_has_outcome: bool,
    /// The log has an index that begins with `created_at`.
    pub log_has_index: bool,
}

impl Schema {
    /// The tables with everything that the gateway can use.
    pub(super) const WHOLE: Self =
        Self { has_secrets: true, log_has_outcome: true, log_has_index: true };
}

/// Everything that was found, whether it can be used or not.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Columns by table.
    tables: HashMap<String, Vec<String>, foldhash::fast::RandomState>,
    /// The gateway's own tables that it may not read: they count as absent, so that agents are served without them.
    pub(super) unreadable: Vec<String>,
    /// The log has an index that begins with `created_at`.
    log_has_index: bool,
    /// Number of the last migration, where the table of migrations is there.
    pub(super) version: Option<i64>,
}

impl Found {
    /// Looks at the tables that a statement would find by their plain names.
    pub(super) async fn look(connection: &mut Connection) -> Result<Self, sqlx::Error> {
        let (columns, index) = match connection.dialect() {
            Dialect::Postgres => (POSTGRES_COLUMNS, POSTGRES_INDEX),
            Dialect::Sqlite => (SQLITE_COLUMNS, SQLITE_INDEX),
        };
        let mut found = Self::default();
        for row in connection.fetch(columns, &[]).await? {
            let (Some(table), Some(column)) = (row.text(0)?, row.text(1)?) else { continue };
            let is_readable = row.number(2)? == Some(1);
            if is_readable || [CREDENTIALS, LOG].contains(&table.as_str()) {
                found.tables.entry(table).or_default().push(column);
            } else if !found.unreadable.contains(&table) {
                found.unreadable.push(table);
            }
        }
        let count = |rows: &[Row]| rows.first().map_or(Ok(None), |row| row.number(0));
        if found.has(LOG) {
            found.log_has_index =
                count(&connection.fetch(index, &[]).await?)?.is_some_and(|n| n > 0);
        }
        if found.has(MIGRATIONS) {
            let rows = connection.fetch("SELECT max(version) FROM wsproxy_migrations", &[]).await?;
            found.version = count(&rows)?;
        }
        Ok(found)
    }

    /// Returns whether a table is there.
    pub(super) fn has(&self, table: &str) -> bool {
        self.tables.contains_key(table)
    }

    /// Returns whether the log has the columns that an operator adds.
    pub(super) fn log_has_outcome(&self) -> bool {
        self.has_column(LOG, "outcome") && self.has_column(LOG, "details")
    }

    /// Returns whether a table has a column.
    pub(super) fn has_column(&self, table: &str, column: &str) -> bool {
        self.tables.get(table).is_some_and(|columns| columns.iter().any(|name| name == column))
    }

    /// Returns whether the log has an index that begins with `created_at`.
    pub(super) const fn log_has_index(&self) -> bool {
        self.log_has_index
    }

    /// Returns the tables that serve.
    ///
    /// # Errors
    /// What cannot be used, as a sentence.
    pub(super) fn usable(&self) -> Result<Schema, String> {
        for (table, columns) in NEEDED {
            let Some(there) = self.tables.get(*table) else {
                return Err(format!("The table {table} is absent."));
            };
            let missing = columns.iter().find(|column| !there.iter().any(|name| name == *column));
            if let Some(column) = missing {
                return Err(format!("The table {table} has no column {column}."));
            }
        }
        Ok(Schema {
            has_secrets: self.has(SECRETS),
            log_has_outcome: self.log_has_outcome(),
            log_has_index: self.log_has_index,
        })
    }
}

/// Users and, of an application, their secrets.
pub(super) const CREDENTIALS: &str = "agent_credentials";

/// The audit log.
pub(super) const LOG: &str = "tool_execution_logs";

/// The secrets of users.
pub(super) const SECRETS: &str = "agent_secrets";

/// The gateway's own migrations. The application may own sqlx's table.
pub(super) const MIGRATIONS: &str = "wsproxy_migrations";

/// Tables and columns without which agents cannot be served.
const NEEDED: &[(&str, &[&str])] = &[
    (CREDENTIALS, &["user_id", "shared_secret", "status", "last_seen"]),
    (
        LOG,
        &[
            "user_id",
            "request_id",
            "tool_name",
            "params",
            "result",
            "success",
            "error",
            "execution_time_ms",
            "created_at",
        ],
    ),
];

const POSTGRES_COLUMNS: &str = "SELECT t.name, a.attname::text, \
    has_table_privilege(a.attrelid, 'SELECT')::int::int8 FROM unnest(ARRAY['agent_credentials', \
    'tool_execution_logs', 'agent_secrets', 'wsproxy_migrations']) AS t(name) \
    JOIN pg_catalog.pg_attribute a ON a.attrelid = to_regclass(t.name) AND a.attnum > 0 AND NOT a.attisdropped";

const POSTGRES_INDEX: &str = "SELECT count(*) FROM pg_catalog.pg_index i JOIN pg_catalog.pg_attribute a \
    ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
    WHERE i.indrelid = to_regclass('tool_execution_logs') AND a.attname = 'created_at' \
    AND i.indisvalid AND i.indpred IS NULL";

const SQLITE_COLUMNS: &str = "SELECT m.name, p.name, 1 FROM sqlite_master m JOIN pragma_table_info(m.name) p \
    WHERE m.type IN ('table', 'view') AND m.name IN ('agent_credentials', 'tool_execution_logs', \
    'agent_secrets', 'wsproxy_migrations')";

const SQLITE_INDEX: &str = "SELECT count(*) FROM pragma_index_list('tool_execution_logs') l \
    JOIN pragma_index_info(l.name) i WHERE i.seqno = 0 AND i.name = 'created_at'";
