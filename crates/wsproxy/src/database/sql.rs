//! Statements that both databases understand: values, rows, transactions, and the few differences in spelling. Knows
//! no table.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::{
    AssertSqlSafe, Executor, Row as _,
    postgres::{PgQueryResult, PgRow},
    sqlite::SqliteRow,
};

use crate::database::{error::is_broken, pool::Connection};

/// The spelling of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// PostgreSQL.
    Postgres,
    /// SQLite.
    Sqlite,
}

/// A value of a statement, `$1` and so on. Times travel as milliseconds since 1970.
#[derive(Debug, Clone, Copy)]
pub enum Value<'a> {
    /// A text.
    Text(&'a str),
    /// A whole number, or no value.
    Number(Option<i64>),
}

/// A row of an answer.
#[derive(Debug)]
pub enum Row {
    /// Of PostgreSQL.
    Postgres(PgRow),
    /// Of SQLite.
    Sqlite(SqliteRow),
}

impl Dialect {
    /// Spells milliseconds as a time of a column with a time zone; of a column without one where the session's zone is
    /// UTC, which is so on every connection.
    #[must_use]
    pub fn time(self, millis: &str) -> String {
        match self {
            Self::Postgres => format!("to_timestamp({millis}::float8 / 1000)"),
            Self::Sqlite => {
                format!("strftime('%Y-%m-%d %H:%M:%f', {millis} / 1000.0, 'unixepoch')")
            }
        }
    }

    /// Spells milliseconds as a time of a column without a time zone, in UTC.
    #[must_use]
    pub fn utc(self, millis: &str) -> String {
        match self {
            Self::Postgres => format!("({} AT TIME ZONE 'UTC')", self.time(millis)),
            Self::Sqlite => self.time(millis),
        }
    }

    /// Spells the elements of a JSON array of strings as a set of texts.
    #[must_use]
    pub fn texts(self, array: &str) -> String {
        match self {
            Self::Postgres => format!("(SELECT jsonb_array_elements_text({array}::jsonb))"),
            Self::Sqlite => format!("(SELECT value FROM json_each({array}))"),
        }
    }

    /// Spells a time as milliseconds.
    #[must_use]
    pub fn millis(self, time: &str) -> String {
        match self {
            Self::Postgres => format!("round(extract(epoch FROM {time}) * 1000)::int8"),
            Self::Sqlite => format!("CAST(round(unixepoch({time}, 'subsec') * 1000) AS INTEGER)"),
        }
    }
}

/// A query with its values; a macro, since its type depends on the database.
macro_rules! bound {
    ($sql:ident, $values:ident) => {
        $values.iter().fold(sqlx::query($sql), |query, value| match *value {
            Value::Text(text) => query.bind(text.to_owned()),
            Value::Number(number) => query.bind(number),
        })
    };
}

impl Connection {
    /// Returns the spelling of the database.
    #[must_use]
    pub const fn dialect(&self) -> Dialect {
        match self {
            Self::Postgres(_) => Dialect::Postgres,
            Self::Sqlite(_) => Dialect::Sqlite,
        }
    }

    /// Runs a statement. Returns the number of rows that it changed.
    ///
    /// # Errors
    /// The database refused, or is away.
    pub async fn execute(
        &mut self,
        sql: impl Into<String>,
        values: &[Value<'_>],
    ) -> Result<u64, sqlx::Error> {
        let sql = AssertSqlSafe(sql.into());
        match self {
            Self::Postgres(connection) => {
                let query = bound!(sql, values);
                let done = query.execute(&mut **connection).await;
                done.map(|done: PgQueryResult| done.rows_affected())
            }
            Self::Sqlite(connection) => {
                let query = bound!(sql, values);
                query.execute(&mut **connection).await.map(|done| done.rows_affected())
            }
        }
    }

    /// Asks for rows.
    ///
    /// # Errors
    /// The database refused, or is away.
    pub async fn fetch(
        &mut self,
        sql: impl Into<String>,
        values: &[Value<'_>],
    ) -> Result<Vec<Row>, sqlx::Error> {
        let sql = AssertSqlSafe(sql.into());
        match self {
            Self::Postgres(connection) => {
                let query = bound!(sql, values);
                let rows = query.fetch_all(&mut **connection).await;
                Ok(rows?.into_iter().map(Row::Postgres).collect())
            }
            Self::Sqlite(connection) => {
                let query = bound!(sql, values);
                let rows = query.fetch_all(&mut **connection).await;
                Ok(rows?.into_iter().map(Row::Sqlite).collect())
            }
        }
    }

    /// Runs statements without values, separated by semicolons. They are not prepared.
    ///
    /// # Errors
    /// The database refused, or is away.
    pub async fn script(&mut self, sql: impl Into<String>) -> Result<(), sqlx::Error> {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.into()));
        match self {
            Self::Postgres(connection) => (&mut **connection).execute(sql).await.map(drop),
            Self::Sqlite(connection) => (&mut **connection).execute(sql).await.map(drop),
        }
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// The database is away; SQLite is locked.
    pub async fn begin(&mut self) -> Result<(), sqlx::Error> {
        // SQLite's plain BEGIN takes the lock at the first write, and then it does not wait for it.
        let begin = match self.dialect() {
            Dialect::Postgres => "BEGIN",
            Dialect::Sqlite => "BEGIN IMMEDIATE",
        };
        self.script(begin).await
    }

    /// Ends a transaction: commits, or undoes everything where its work failed.
    ///
    /// # Errors
    /// The error of the work; the transaction cannot end.
    pub async fn end<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        match result {
            Ok(value) => self.script("COMMIT").await.map(|()| value),
            Err(error) => {
                // A rollback that fails leaves a connection that is of no more use.
                let rolled_back = self.script("ROLLBACK").await;
                Err(rolled_back.err().filter(is_broken).unwrap_or(error))
            }
        }
    }
}

impl Row {
    /// Returns a text; `None` for no value.
    ///
    /// # Errors
    /// The column has another type.
    pub fn text(&self, index: usize) -> Result<Option<String>, sqlx::Error> {
        match self {
            Self::Postgres(row) => row.try_get(index),
            Self::Sqlite(row) => row.try_get(index),
        }
    }

    /// Returns a whole number; `None` for no value.
    ///
    /// # Errors
    /// The column has another type.
    pub fn number(&self, index: usize) -> Result<Option<i64>, sqlx::Error> {
        match self {
            Self::Postgres(row) => row.try_get(index),
            Self::Sqlite(row) => row.try_get(index),
        }
    }

    /// Returns a time from its milliseconds; `None` for no value.
    ///
    /// # Errors
    /// The column has another type.
    pub fn time(&self, index: usize) -> Result<Option<SystemTime>, sqlx::Error> {
        Ok(self.number(index)?.map(from_millis))
    }
}

/// Returns milliseconds since 1970; a time before that is 0.
#[must_use]
pub fn to_millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn from_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
