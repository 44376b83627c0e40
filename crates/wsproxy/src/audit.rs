//! The audit log: one row in the database for each call that this instance took. Knows neither agents nor callers.
//!
//! A call never waits for the database. A row that ended waits in a bounded queue, and one task writes it. While the
//! queue is full the newest rows are dropped and counted.

use std::{
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    audit::{
        metrics::AuditCounters,
        queue::RowQueue,
        redaction::Redaction,
        row::{AuditRow, Held, Stored, Waiting},
        writer::AuditWriter,
    },
    config::{Config, database::AuditConfig},
    database::Database,
};

mod insert;
mod metrics;
mod queue;
mod redaction;
mod retention;
pub mod row;
mod writer;

/// The audit log of this instance.
#[derive(Debug)]
pub struct Audit {
    server_id: Arc<str>,
    params: Redaction,
    results: Redaction,
    /// Bytes of parameters of calls that did not end yet.
    held: Arc<AtomicUsize>,
    queue: Arc<RowQueue>,
    counters: Arc<AuditCounters>,
    /// Ends the writer when it has written all rows.
    closing: CancellationToken,
    /// Ends the writer at once.
    abort: CancellationToken,
    tasks: TaskTracker,
}

/// State of the audit log, for `/health` and log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditStatus {
    /// Rows that wait to be written.
    pub queued: usize,
    /// Rows that were dropped since the start, since the queue was full.
    pub dropped: u64,
}

impl Audit {
    /// Starts writing in the background, until [`Self::close`]; at the latest until `end`.
    #[must_use]
    pub fn start(
        config: &Config,
        server_id: &Arc<str>,
        database: &Arc<Database>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let AuditConfig { params, results, redact, keep } = &config.audit;
        let audit = Arc::new(Self {
            server_id: Arc::clone(server_id),
            params: Redaction::new(*params, redact),
            results: Redaction::new(*results, redact),
            held: Arc::default(),
            queue: Arc::new(RowQueue::new(ROWS_MAX, BYTES_MAX)),
            counters: Arc::default(),
            closing: CancellationToken::new(),
            abort: end.child_token(),
            tasks: TaskTracker::new(),
        });
        let writer = AuditWriter {
            queue: Arc::clone(&audit.queue),
            counters: Arc::clone(&audit.counters),
            database: Arc::clone(database),
            closing: audit.closing.clone(),
        };
        audit.tasks.spawn(writer.run(audit.abort.clone()));
        if !keep.is_zero() {
            let (database, counters) = (Arc::clone(database), Arc::clone(&audit.counters));
            background.spawn(retention::run(*keep, database, counters, end.clone()));
        }
        audit
    }

    /// Refuses a configuration that the tables do not allow. Waits for a while for a database that is away, and then
    /// refuses nothing.
    ///
    /// # Errors
    /// `audit.keep` is set, and the table has no index on `created_at`; with the SQL that makes it.
    pub async fn check(config: &Config, database: &Database) -> Result<(), String> {
        retention::check(config.audit.keep, database).await
    }

    /// Returns the parameters of a call as the log will store them; called once, when the call begins.
    ///
    /// While parameters of many calls are held already, only the length and the hash of these remain.
    #[must_use]
    pub fn params(&self, raw: &[u8]) -> Stored {
        let stored = self.params.store(raw);
        let bytes = stored.text.as_ref().map_or(0, |text| text.len());
        match Held::take(&self.held, bytes, HELD_BYTES_MAX) {
            Some(held) => Stored { _held: Some(held), ..stored },
            None => self.params.store_nothing_of(raw),
        }
    }

    /// Takes the row of a call that ended. Never blocks; a row that does not fit is dropped and counted.
    pub fn record(&self, row: AuditRow<'_>) {
        self.queue.push(Waiting::new(row, &self.results, &self.server_id));
    }

    /// Writes the rows that wait, for at most 5 s, and ends. Connections must be gone by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        if timeout(CLOSE_TIMEOUT, self.tasks.wait()).await.is_err() {
            self.abort.cancel();
            self.tasks.wait().await;
        }
    }

    /// Returns the state.
    #[must_use]
    pub fn status(&self) -> AuditStatus {
        AuditStatus { queued: self.queue.rows(), dropped: self.queue.dropped() }
    }
}

/// Upper bound of parameters of calls that did not end yet. A call of an agent holds up to 64 KiB of them, and an
/// instance has up to 200,000 calls.
const HELD_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Upper bounds of rows that wait for the database.
const ROWS_MAX: usize = 10_000;
const BYTES_MAX: usize = 32 * 1024 * 1024;

/// Time to write rows at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
