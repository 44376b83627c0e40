//! A piece of work on the database: named, bounded in time, counted, and tried again where that is harmless.

use std::{
    io,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use tokio::time::timeout;
use tracing::{debug, warn};

use crate::database::{
    Database,
    error::{Cause, DatabaseError, is_answer, is_broken, is_passing},
    metrics::Operation,
    pool::{Access, Connection},
};

/// A piece of work on one connection.
pub trait Statement: Sync {
    /// Its result.
    type Answer: Send;
    /// Its name in metrics and log lines.
    const OPERATION: Operation;
    /// Whether it writes.
    const ACCESS: Access;
    /// Whether it may be done twice. Then it is tried once more after a broken connection.
    const REPEATABLE: bool = true;
    /// Time after which it is given up.
    const TIMEOUT: Duration = STATEMENT_TIMEOUT;

    /// Does the work.
    fn run(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Answer, sqlx::Error>> + Send;
}

impl Database {
    /// Runs a statement: with a log line and a count where it is slow or fails.
    ///
    /// # Errors
    /// See [`DatabaseError`]. After [`DatabaseError::Unavailable`] the work may have been done.
    pub async fn run<S: Statement>(&self, statement: &S) -> Result<S::Answer, DatabaseError> {
        self.attempts(statement).await.map_err(|error| {
            if is_passing(&error) { DatabaseError::Unavailable } else { DatabaseError::Refused }
        })
    }

    /// Runs a statement, as [`Self::run`] does, and returns the cause of a failure.
    ///
    /// # Errors
    /// The error of the library.
    pub async fn attempts<S: Statement>(&self, statement: &S) -> Result<S::Answer, sqlx::Error> {
        let mut result = self.attempt(statement).await;
        if result.as_ref().is_err_and(is_broken) {
            debug!(operation = S::OPERATION.label(), "A connection to the database was broken.");
            self.pool.cut_idle();
            if S::REPEATABLE {
                result = self.attempt(statement).await;
            }
        }
        if S::ACCESS == Access::Write {
            self.writes.note(result.as_ref().err().is_none_or(|error| !is_passing(error)));
        }
        match &result {
            Ok(_) => self.answers.store(true, Relaxed),
            Err(error) => self.note_failure(S::OPERATION, S::ACCESS, error),
        }
        result
    }

    async fn attempt<S: Statement>(&self, statement: &S) -> Result<S::Answer, sqlx::Error> {
        let mut held = Held(Some(self.pool.acquire(S::ACCESS).await?));
        let Some(connection) = &mut held.0 else { return Err(sqlx::Error::PoolClosed) };
        let begun = Instant::now();
        let result = timeout(S::TIMEOUT, statement.run(connection)).await;
        let took = begun.elapsed();
        if took > SLOW {
            self.counters.slow[S::OPERATION as usize].add(1);
            let (operation, ms) = (S::OPERATION.label(), took.as_millis() as u64);
            warn!(operation, ms, "A statement was slow.");
        }
        let Ok(result) = result else {
            return Err(sqlx::Error::Io(io::Error::new(
                io::ErrorKind::TimedOut,
                "no answer in time",
            )));
        };
        if !result.as_ref().is_err_and(is_broken) {
            // The connection is whole: it goes back to the pool.
            drop(held.0.take());
        }
        result
    }

    fn note_failure(&self, operation: Operation, access: Access, error: &sqlx::Error) {
        self.counters.errors[operation as usize].add(1);
        if matches!(error, sqlx::Error::PoolClosed) {
            // This instance ends.
            return;
        }
        // A database that takes no writes still answers handshakes.
        let is_away = is_passing(error) && !(access == Access::Write && is_answer(error));
        if is_away && !self.answers.swap(false, Relaxed) {
            // An outage is told once; the supervisor tells its end.
            debug!(operation = operation.label(), cause = %Cause(error), "The database is still away.");
            return;
        }
        if let Some(left_out) = self.failures.pass() {
            let (operation, cause) = (operation.label(), Cause(error));
            warn!(operation, %cause, left_out, "The database failed.");
        }
    }
}

/// A connection in use. Dropped while a statement runs, it is cut: its next answer would be that of the dropped statement.
struct Held(Option<Connection>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            connection.cut();
        }
    }
}

/// Time after which a statement is given up. A frozen database keeps no task and no connection longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Time from which on a statement is slow.
const SLOW: Duration = Duration::from_secs(1);
