//! The statements that write rows. Knows neither the queue nor when rows are written.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use sqlx::{AssertSqlSafe, PgConnection, Row, SqliteConnection, raw_sql};

use crate::{
    audit::row::Waiting,
    database::{
        metrics::Operation,
        pool::{Access, Connection},
        sql::Dialect,
        statement::Statement,
    },
};

/// Writes rows in one transaction.
#[derive(Debug)]
pub(super) struct Insert<'a> {
    rows: &'a [Waiting],
    /// Whether the table has the columns `outcome` and `details`.
    has_outcome: bool,
    /// Id of the transaction from the moment when PostgreSQL was told to commit it; 0 before.
    committing: AtomicI64,
}

/// Result of a statement that the database answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All rows are written.
    Written,
    /// None is, since the database takes no row that has one of these values. With its code.
    Refused(String),
}

impl<'a> Insert<'a> {
    pub(super) fn new(rows: &'a [Waiting], has_outcome: bool) -> Self {
        Self { rows, has_outcome, committing: AtomicI64::new(0) }
    }

    /// Returns the id of the transaction if it may be committed, though no answer came.
    pub(super) fn committing(&self) -> Option<i64> {
        Some(self.committing.load(Relaxed)).filter(|id| *id != 0)
    }

    async fn run_postgres(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let begun = raw_sql("BEGIN; SELECT txid_current()").fetch_one(&mut *connection).await?;
        let transaction = begun.try_get(0)?;
        let columns = if self.has_outcome { ", outcome, details" } else { "" };
        let values = if self.has_outcome { ", outcome, details::jsonb" } else { "" };
        let time = Dialect::Postgres.utc("begun");
        let sql = format!(
            "INSERT INTO tool_execution_logs ({COLUMNS}{columns}) \
             SELECT user_id, request_id, tool, params::jsonb, result::jsonb, success, error, ms, {time}{values} \
             FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::text[], \
             $8::int4[], $9::int8[], $10::text[], $11::text[]) \
             AS waiting (user_id, request_id, tool, params, result, success, error, ms, begun, outcome, details)"
        );
        let texts = |of: fn(&Waiting) -> &str| self.rows.iter().map(of).collect::<Vec<_>>();
        let maybe = |of: fn(&Waiting) -> Option<&str>| self.rows.iter().map(of).collect::<Vec<_>>();
        sqlx::query(AssertSqlSafe(sql))
            // A named statement would stay at a server that a pooler gives to others next.
            .persistent(false)
            .bind(texts(|row| row.user.as_str()))
            .bind(texts(|row| row.request.as_str()))
            .bind(texts(|row| &row.tool))
            .bind(maybe(|row| row.params.as_deref()))
            .bind(maybe(|row| row.result.as_deref()))
            .bind(self.rows.iter().map(|row| row.success).collect::<Vec<_>>())
            .bind(maybe(|row| row.error.as_deref()))
            .bind(self.rows.iter().map(|row| row.execution_ms).collect::<Vec<_>>())
            .bind(self.rows.iter().map(|row| row.begun).collect::<Vec<_>>())
            .bind(texts(|row| row.outcome.label()))
            .bind(texts(|row| &row.details))
            .execute(&mut *connection)
            .await?;
        self.committing.store(transaction, Relaxed);
        raw_sql("COMMIT").execute(connection).await?;
        Ok(())
    }

    async fn run_sqlite(&self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        // A plain BEGIN takes the lock at the first write, and then SQLite does not wait for it.
        raw_sql("BEGIN IMMEDIATE").execute(&mut *connection).await?;
        let columns = if self.has_outcome { ", outcome, details" } else { "" };
        let values = if self.has_outcome { ", $10, $11" } else { "" };
        let time = Dialect::Sqlite.utc("$9");
        let sql = format!(
            "INSERT INTO tool_execution_logs ({COLUMNS}{columns}) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, {time}{values})"
        );
        for row in self.rows {
            let query = sqlx::query(AssertSqlSafe(sql.as_str()))
                .bind(row.user.as_str())
                .bind(row.request.as_str())
                .bind(&*row.tool)
                .bind(row.params.as_deref())
                .bind(row.result.as_deref())
                .bind(row.success)
                .bind(row.error.as_deref())
                .bind(row.execution_ms)
                .bind(row.begun);
            let query = if self.has_outcome {
                query.bind(row.outcome.label()).bind(&*row.details)
            } else {
                query
            };
            query.execute(&mut *connection).await?;
        }
        raw_sql("COMMIT").execute(connection).await?;
        Ok(())
    }
}

impl Statement for Insert<'_> {
    type Answer = Verdict;
    const OPERATION: Operation = Operation::Audit;
    const ACCESS: Access = Access::Write;
    const REPEATABLE: bool = false;

    async fn run(&self, connection: &mut Connection) -> Result<Verdict, sqlx::Error> {
        let done = match connection {
            Connection::Postgres(connection) => self.run_postgres(connection).await,
            Connection::Sqlite(connection) => self.run_sqlite(connection).await,
        };
        let Err(error) = done else { return Ok(Verdict::Written) };
        if matches!(error, sqlx::Error::Database(_)) {
            // After some errors SQLite has undone the transaction already, and refuses this.
            let _ = connection.script("ROLLBACK").await;
        }
        refusal(&error).map(Verdict::Refused).ok_or(error)
    }
}

/// Asks PostgreSQL what became of a transaction whose commit was not answered.
#[derive(Debug)]
pub(super) struct AskFate(pub(super) i64);

/// End of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Committed,
    /// Undone, or this server has never heard of it.
    Undone,
    /// The server has not ended it yet.
    Open,
}

impl Statement for AskFate {
    type Answer = Fate;
    const OPERATION: Operation = Operation::Audit;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<Fate, sqlx::Error> {
        let Connection::Postgres(connection) = connection else { return Ok(Fate::Undone) };
        let asked = sqlx::query_scalar::<_, Option<String>>("SELECT txid_status($1)");
        let asked = asked.persistent(false).bind(self.0);
        match asked.fetch_one(&mut **connection).await {
            Ok(status) => Ok(match status.as_deref() {
                Some("committed") => Fate::Committed,
                Some("in progress") => Fate::Open,
                _ => Fate::Undone,
            }),
            // The id lies in the server's future: another server has taken over, which never got the rows.
            Err(error) if refusal(&error).is_some() => Ok(Fate::Undone),
            Err(error) => Err(error),
        }
    }
}

/// Returns the code of an error that the values of some row cause. All others are of the connection, of the server's
/// state, or of the table, and pass without the rows being changed.
fn refusal(error: &sqlx::Error) -> Option<String> {
    let error = match error {
        sqlx::Error::Database(error) => error,
        sqlx::Error::Encode(_) => return Some("encoding".into()),
        _ => return None,
    };
    let code = error.code().unwrap_or_default();
    let is_of_values = if code.len() < SQLSTATE_LEN {
        code.parse::<u32>().is_ok_and(|code| SQLITE_OF_VALUES.contains(&(code & 0xff)))
    } else {
        !NOT_OF_VALUES.iter().any(|class| code.starts_with(class))
    };
    is_of_values.then(|| code.into())
}

/// Columns that every table of the log has.
const COLUMNS: &str =
    "user_id, request_id, tool_name, params, result, success, error, execution_time_ms, created_at";

const SQLSTATE_LEN: usize = 5;

/// Classes of SQLSTATE that no row is guilty of: connection, state of the transaction (a server that is read-only),
/// credentials, catalog, deadlock, name or right of a table, resources, locks, operator, system.
const NOT_OF_VALUES: [&str; 11] =
    ["08", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "58"];

/// Codes of SQLite for values: too big, constraint, mismatch.
const SQLITE_OF_VALUES: [u32; 3] = [18, 19, 20];
