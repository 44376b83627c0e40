//! Deletion of rows that are older than `audit.keep`. It is off by default, since the log may hold an application's
//! own history.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    audit::metrics::AuditCounters,
    database::{
        Database,
        metrics::Operation,
        pool::{Access, Connection},
        sql::{Dialect, Value, to_millis},
        statement::Statement,
    },
};

/// Deletes old rows at intervals, until `end`. Of several instances one does it.
pub(super) async fn run(
    keep: Duration,
    database: Arc<Database>,
    counters: Arc<AuditCounters>,
    end: CancellationToken,
) {
    let work = async {
        let mut schema = database.ready().await;
        if !schema.log_has_index {
            error!(
                sql = INDEX_SQL,
                "audit.keep deletes nothing: the table has no index on created_at. The SQL makes it."
            );
        }
        loop {
            if schema.log_has_index {
                delete_old(keep, &database, &counters).await;
            }
            sleep(EVERY).await;
            schema = database.ready().await;
        }
    };
    tokio::select! {
        () = work => {}
        () = end.cancelled() => {}
    }
}

/// Refuses `audit.keep` where the database answers in time and its table has no index for it.
///
/// # Errors
/// The index is absent; with the SQL that makes it.
pub(super) async fn check(keep: Duration, database: &Database) -> Result<(), String> {
    if keep.is_zero() {
        return Ok(());
    }
    match timeout(CHECK_TIMEOUT, database.ready()).await {
        Ok(schema) if !schema.log_has_index => Err(format!(
            "audit.keep cannot be used: without an index every deletion would read the whole table \
             tool_execution_logs. `wsproxy migrate` makes it, or this SQL:\n{INDEX_SQL}"
        )),
        _ => Ok(()),
    }
}

async fn delete_old(keep: Duration, database: &Database, counters: &AuditCounters) {
    let mut total = 0;
    // A failure has its line in the log already, and the next hour tries again.
    while let Ok(Some(rows)) = database.run(&DeleteOld { keep }).await {
        counters.expired.add(rows);
        total += rows;
        if rows < CHUNK_ROWS {
            break;
        }
        sleep(PAUSE).await;
    }
    if total > 0 {
        info!(rows = total, "Old rows of the audit log were deleted.");
    }
}

/// Deletes a chunk of the oldest rows. Answers with their number; `None`: another instance is at it.
struct DeleteOld {
    keep: Duration,
}

impl Statement for DeleteOld {
    type Answer = Option<u64>;
    const OPERATION: Operation = Operation::Retention;
    const ACCESS: Access = Access::Write;

    async fn run(&self, connection: &mut Connection) -> Result<Option<u64>, sqlx::Error> {
        let dialect = connection.dialect();
        let now = to_millis(SystemTime::now());
        let keep = i64::try_from(self.keep.as_millis()).unwrap_or(i64::MAX);
        let before = match dialect {
            // Of the clocks of the instance and of the database the slower one counts, so that none deletes too much.
            Dialect::Postgres => "(least(to_timestamp(($1::int8 - $2::int8)::float8 / 1000), \
                 now() - $2::int8 * interval '1 millisecond') AT TIME ZONE 'UTC')"
                .into(),
            Dialect::Sqlite => dialect.utc("($1 - $2)"),
        };
        let delete = format!(
            "DELETE FROM tool_execution_logs WHERE created_at < {before} AND id IN (\
             SELECT id FROM tool_execution_logs WHERE created_at < {before} ORDER BY created_at LIMIT {CHUNK_ROWS})"
        );
        connection.begin().await?;
        let done = async {
            if dialect == Dialect::Postgres {
                let lock = format!("SELECT pg_try_advisory_xact_lock({LOCK})::int::int8");
                let locked = connection.fetch(lock, &[]).await?;
                if locked.first().map(|row| row.number(0)).transpose()?.flatten() != Some(1) {
                    return Ok(None);
                }
            }
            let values = [Value::Number(Some(now)), Value::Number(Some(keep))];
            connection.execute(delete, &values).await.map(Some)
        };
        let done = done.await;
        connection.end(done).await
    }
}

/// Statement that makes the index. It does not lock the table against writes.
const INDEX_SQL: &str =
    "CREATE INDEX CONCURRENTLY tool_execution_logs_created_at ON tool_execution_logs (created_at)";

/// Number of the lock in PostgreSQL: the letters `wsaudit`.
const LOCK: i64 = 0x77_73_61_75_64_69_74;

/// Most rows of one deletion: it holds no lock for long.
const CHUNK_ROWS: u64 = 5000;

/// Pause between deletions.
const PAUSE: Duration = Duration::from_millis(200);

/// Pause between looks for old rows.
const EVERY: Duration = Duration::from_secs(3600);

/// Time for which a start waits for the database.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
