//! Creates absent tables, and prepares the tables of an application where an operator wishes that.
//!
//! Not the migrations of sqlx: those need the right to create even where nothing is to be created, keep their lock where
//! they fail, have no lock for SQLite, and know no table that another program has made already.

use std::{sync::Arc, time::Duration};

use tracing::{info, warn};

use crate::database::{
    Database,
    error::{Cause, is_passing},
    metrics::Operation,
    pool::{Access, Connection},
    schema::{CREDENTIALS, Found, LOG, MIGRATIONS, SECRETS, Schema},
    sql::Dialect,
    statement::Statement,
};

/// The reason why the tables cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The database is away, or does not let the gateway in; the text is the cause.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The tables are not those of this version; the text says why.
    #[error("the database cannot be used: {0}")]
    Unusable(String),
}

/// A change of the tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The change, for people.
    pub name: &'static str,
    /// Its SQL.
    pub sql: String,
    /// It runs outside of a transaction.
    is_alone: bool,
}

/// Extent of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Absent tables only: at a start.
    Absent,
    /// Also columns and an index of tables that an application made: for an operator.
    Full {
        /// Rows of the log are deleted by age, so that it needs its index.
        with_index: bool,
    },
}

impl Database {
    /// Looks at the tables, and creates absent ones where `creates` says so. Without the right to create, and where the
    /// tables suffice to serve, a warning tells the SQL.
    pub(super) async fn prepare(&self, creates: bool) -> Result<Schema, NotReady> {
        let found = self.look().await?;
        if !found.unreadable.is_empty() {
            let tables = found.unreadable.join(", ");
            warn!(
                tables,
                "The gateway may not read its own tables, so that they count as absent. Their owner must GRANT SELECT, \
                 INSERT, UPDATE, DELETE on them."
            );
            return found.usable().map_err(NotReady::Unusable);
        }
        let absent = steps(&found, self.dialect(), Extent::Absent);
        if absent.is_empty() {
            return found.usable().map_err(NotReady::Unusable);
        }
        let sql = script(&absent);
        if !creates {
            let schema = found.usable().map_err(|why| unusable(&why, &sql))?;
            warn!(
                sql,
                "Tables are absent, and database.migrate is off: `wsproxy migrate` creates them."
            );
            return Ok(schema);
        }
        match self.attempts(&Apply { extent: Extent::Absent }).await {
            Ok(names) => {
                info!(tables = names.join(", "), "Absent tables are created.");
                self.look().await?.usable().map_err(NotReady::Unusable)
            }
            Err(error) if is_passing(&error) => {
                Err(NotReady::Unavailable(Cause(&error).to_string()))
            }
            Err(error) => {
                let cause = Cause(&error).to_string();
                let schema =
                    found.usable().map_err(|why| unusable(&format!("{why} {cause}"), &sql))?;
                warn!(
                    cause,
                    sql,
                    "Absent tables cannot be created. Agents are served without them; commands that need them are refused."
                );
                Ok(schema)
            }
        }
    }

    /// Looks at the tables again: an operator may have added what was absent. Creates nothing, and keeps what is known
    /// where it fails.
    pub async fn look_again(&self) {
        let Ok(schema) =
            self.look().await.and_then(|found| found.usable().map_err(NotReady::Unusable))
        else {
            return;
        };
        self.schema.send_if_modified(|known| {
            let is_new = known.as_deref().is_some_and(|known| *known != schema);
            if is_new {
                info!(?schema, "The tables of the database have changed.");
                *known = Some(Arc::new(schema));
            }
            is_new
        });
    }

    /// Returns the changes that [`Self::migrate`] would do.
    ///
    /// # Errors
    /// [`NotReady`]
    pub async fn plan(&self, with_index: bool) -> Result<Vec<Step>, NotReady> {
        Ok(steps(&self.look().await?, self.dialect(), Extent::Full { with_index }))
    }

    /// Creates absent tables, and adds to tables of an application what the gateway can use. Returns the changes.
    ///
    /// # Errors
    /// [`NotReady`]. [`NotReady::Unusable`] also without the right to do so.
    pub async fn migrate(&self, with_index: bool) -> Result<Vec<Step>, NotReady> {
        let extent = Extent::Full { with_index };
        let plan = steps(&self.look().await?, self.dialect(), extent);
        if plan.iter().any(|step| !step.is_alone) {
            self.attempts(&Apply { extent }).await.map_err(|error| not_ready(&error))?;
        }
        for step in plan.iter().filter(|step| step.is_alone) {
            self.attempts(&Alone(step)).await.map_err(|error| not_ready(&error))?;
        }
        let found = self.look().await?;
        found.usable().map_err(NotReady::Unusable)?;
        let left = steps(&found, self.dialect(), extent);
        let Some(step) = left.first() else { return Ok(plan) };
        // CREATE INDEX CONCURRENTLY leaves an invalid index behind where it fails.
        let why = format!(
            "{} was not done. Drop what is left of it and try again: {}",
            step.name, step.sql
        );
        Err(NotReady::Unusable(why))
    }

    /// Returns the SQL that makes the table of secrets, for a message.
    pub(super) fn secrets_sql(&self) -> String {
        create_secrets(self.dialect())
    }

    async fn look(&self) -> Result<Found, NotReady> {
        let found = self.attempts(&Look).await.map_err(|error| not_ready(&error))?;
        let Some(version) = found.version.filter(|version| *version > VERSION) else {
            return Ok(found);
        };
        let why = format!(
            "a newer version of wsproxy made its tables (schema {version}, this version knows {VERSION})"
        );
        Err(NotReady::Unusable(why))
    }
}

struct Look;

impl Statement for Look {
    type Answer = Found;
    const OPERATION: Operation = Operation::Schema;
    const ACCESS: Access = Access::Read;

    async fn run(&self, connection: &mut Connection) -> Result<Found, sqlx::Error> {
        Found::look(connection).await
    }
}

/// All changes that fit into a transaction, under a lock against other instances.
struct Apply {
    extent: Extent,
}

impl Statement for Apply {
    type Answer = Vec<&'static str>;
    const OPERATION: Operation = Operation::Schema;
    const ACCESS: Access = Access::Write;
    // Other instances may hold the lock.
    const TIMEOUT: Duration = Duration::from_secs(60);

    async fn run(&self, connection: &mut Connection) -> Result<Self::Answer, sqlx::Error> {
        connection.begin().await?;
        let result = self.apply(connection).await;
        connection.end(result).await
    }
}

impl Apply {
    async fn apply(&self, connection: &mut Connection) -> Result<Vec<&'static str>, sqlx::Error> {
        let dialect = connection.dialect();
        if dialect == Dialect::Postgres {
            // It ends with the transaction. SQLite's transaction is a lock itself.
            connection.script(format!("SELECT pg_advisory_xact_lock({LOCK})")).await?;
        }
        // Another instance may have done it while this one waited.
        let found = Found::look(connection).await?;
        let mut done = Vec::new();
        for step in steps(&found, dialect, self.extent).iter().filter(|step| !step.is_alone) {
            connection.script(step.sql.as_str()).await?;
            done.push(step.name);
        }
        Ok(done)
    }
}

/// A change that does not fit into a transaction.
struct Alone<'a>(&'a Step);

impl Statement for Alone<'_> {
    type Answer = ();
    const OPERATION: Operation = Operation::Schema;
    const ACCESS: Access = Access::Write;
    const REPEATABLE: bool = false;
    // An index over a large log takes its time, and an operator waits for it.
    const TIMEOUT: Duration = Duration::from_secs(24 * 3600);

    async fn run(&self, connection: &mut Connection) -> Result<(), sqlx::Error> {
        connection.script(self.0.sql.as_str()).await
    }
}

/// Returns the changes that are missing, in their order.
fn steps(found: &Found, dialect: Dialect, extent: Extent) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut step = |is_missing: bool, name, sql: String, is_alone| {
        if is_missing {
            steps.push(Step { name, sql, is_alone });
        }
    };
    step(!found.has(CREDENTIALS), "table agent_credentials", create_credentials(dialect), false);
    step(!found.has(SECRETS), "table agent_secrets", create_secrets(dialect), false);
    step(!found.has(LOG), "table tool_execution_logs", create_log(dialect), false);
    step(!found.has(MIGRATIONS), "table wsproxy_migrations", create_migrations(dialect), false);
    step(
        found.version.is_none_or(|version| version < VERSION),
        "row of wsproxy_migrations",
        format!("INSERT INTO wsproxy_migrations (version) VALUES ({VERSION})"),
        false,
    );
    let Extent::Full { with_index } = extent else { return steps };
    if found.has(LOG) {
        let json = json(dialect);
        for (column, name, kind) in [
            ("outcome", "column outcome of tool_execution_logs", "TEXT"),
            ("details", "column details of tool_execution_logs", json),
        ] {
            let sql = format!("ALTER TABLE tool_execution_logs ADD COLUMN {column} {kind}");
            step(!found.has_column(LOG, column), name, sql, false);
        }
        let concurrently = if dialect == Dialect::Postgres { "CONCURRENTLY " } else { "" };
        let sql = format!(
            "CREATE INDEX {concurrently}IF NOT EXISTS {INDEX} ON tool_execution_logs (created_at)"
        );
        let is_missing = with_index && !found.log_has_index();
        step(
            is_missing,
            "index of tool_execution_logs on created_at",
            sql,
            dialect == Dialect::Postgres,
        );
    }
    steps
}

/// Returns the SQL of changes, for people.
#[must_use]
pub fn script(steps: &[Step]) -> String {
    steps.iter().map(|step| format!("{};\n", step.sql)).collect()
}

fn create_credentials(dialect: Dialect) -> String {
    let (now, json) = (now(dialect), json(dialect));
    format!(
        "CREATE TABLE agent_credentials (\
         user_id TEXT PRIMARY KEY, \
         shared_secret TEXT NOT NULL UNIQUE, \
         platform TEXT NOT NULL CHECK (platform IN ('win32', 'linux', 'darwin')), \
         status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'connected', 'disconnected')), \
         created_at TIMESTAMP NOT NULL DEFAULT {now}, \
         last_seen TIMESTAMP, \
         metadata {json})"
    )
}

fn create_secrets(dialect: Dialect) -> String {
    let (id, time) = match dialect {
        Dialect::Postgres => ("UUID", "TIMESTAMPTZ"),
        Dialect::Sqlite => ("TEXT", "TIMESTAMP"),
    };
    let now = if dialect == Dialect::Postgres { "now()" } else { now(dialect) };
    format!(
        "CREATE TABLE agent_secrets (\
         id {id} PRIMARY KEY, \
         user_id TEXT NOT NULL REFERENCES agent_credentials (user_id) ON DELETE CASCADE, \
         digest TEXT NOT NULL, \
         created_at {time} NOT NULL DEFAULT {now}, \
         expires_at {time}, \
         revoked_at {time});\n\
         CREATE INDEX agent_secrets_user_id ON agent_secrets (user_id)"
    )
}

fn create_log(dialect: Dialect) -> String {
    let (id, json) = match dialect {
        Dialect::Postgres => ("BIGSERIAL PRIMARY KEY", "JSONB"),
        Dialect::Sqlite => ("INTEGER PRIMARY KEY AUTOINCREMENT", "TEXT"),
    };
    let now = now(dialect);
    format!(
        "CREATE TABLE tool_execution_logs (\
         id {id}, \
         user_id TEXT NOT NULL, \
         request_id TEXT NOT NULL, \
         tool_name TEXT NOT NULL, \
         params {json}, \
         result {json}, \
         success BOOLEAN, \
         error TEXT, \
         execution_time_ms INTEGER, \
         created_at TIMESTAMP NOT NULL DEFAULT {now}, \
         outcome TEXT, \
         details {json});\n\
         CREATE INDEX {INDEX} ON tool_execution_logs (created_at)"
    )
}

fn create_migrations(dialect: Dialect) -> String {
    format!(
        "CREATE TABLE wsproxy_migrations (\
         version BIGINT PRIMARY KEY, \
         installed_at TIMESTAMP NOT NULL DEFAULT {})",
        now(dialect)
    )
}

const fn json(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Postgres => "JSONB",
        Dialect::Sqlite => "TEXT",
    }
}

/// Spells the time of a row of a column without a time zone, in UTC whatever the session's zone is.
const fn now(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Postgres => "(now() AT TIME ZONE 'UTC')",
        Dialect::Sqlite => "(strftime('%Y-%m-%d %H:%M:%f', 'now'))",
    }
}

fn unusable(why: &str, sql: &str) -> NotReady {
    NotReady::Unusable(format!(
        "{why} Run `wsproxy migrate` with a role that may create tables, or this:\n{sql}"
    ))
}

fn not_ready(error: &sqlx::Error) -> NotReady {
    let cause = Cause(error).to_string();
    if is_passing(error) { NotReady::Unavailable(cause) } else { NotReady::Unusable(cause) }
}

/// Number of the newest migration. A table or column that this version adds raises it.
const VERSION: i64 = 1;

/// Key of the advisory lock of PostgreSQL: the first bytes of "wsproxy".
const LOCK: i64 = 0x0077_7370_726f_7879;

const INDEX: &str = "tool_execution_logs_created_at";
