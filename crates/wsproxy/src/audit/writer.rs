//! The one task that writes rows, in batches. A row that the database refuses never holds up the others.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::time::{Instant, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use wsproxy_proto::backoff::Backoff;

use crate::{
    audit::{
        insert::{AskFate, Fate, Insert, Verdict},
        metrics::AuditCounters,
        queue::{BATCH_BYTES, BATCH_ROWS, BATCH_ROWS_MAX, RowQueue},
        row::Waiting,
    },
    database::Database,
};

/// The writer.
pub(super) struct AuditWriter {
    pub(super) queue: Arc<RowQueue>,
    pub(super) counters: Arc<AuditCounters>,
    pub(super) database: Arc<Database>,
    /// Tells the writer to write what waits, and to end.
    pub(super) closing: CancellationToken,
}

impl AuditWriter {
    /// Runs until all rows are written after `closing`, or until `abort`.
    pub(super) async fn run(self, abort: CancellationToken) {
        tokio::select! {
            () = self.work() => {}
            () = self.report() => {}
            () = abort.cancelled() => {}
        }
        let rows = self.queue.close();
        if rows > 0 {
            self.counters.lost.add(rows as u64);
            warn!(rows, "Rows of the audit log are lost: there was no time to write them.");
        }
    }

    async fn work(&self) {
        let idle = async {
            self.closing.cancelled().await;
            if self.queue.rows() > 0 {
                pending::<()>().await;
            }
        };
        tokio::select! {
            _ = self.database.ready() => {}
            // Without rows there is no need for a database.
            () = idle => return,
        }
        while self.wait_for_rows().await {
            let rows = self.queue.take(BATCH_ROWS_MAX, BATCH_BYTES);
            self.write(&rows).await;
            self.queue.done();
        }
    }

    /// Waits until a batch is whole, or for a while after its first row. Returns `false` at the end.
    async fn wait_for_rows(&self) -> bool {
        while self.queue.rows() == 0 {
            tokio::select! {
                () = self.queue.filled() => {}
                () = self.closing.cancelled() => return self.queue.rows() > 0,
            }
        }
        let until = Instant::now() + LINGER;
        while self.queue.rows() < BATCH_ROWS {
            tokio::select! {
                () = self.queue.filled() => {}
                () = sleep_until(until) => break,
                () = self.closing.cancelled() => break,
            }
        }
        true
    }

    /// Writes a batch. While the database refuses a part, that part is halved until the guilty row stands alone.
    async fn write(&self, rows: &[Waiting]) {
        let mut parts = vec![rows];
        while let Some(rows) = parts.pop() {
            let begun = Instant::now();
            match self.insert(rows).await {
                Verdict::Written => {
                    self.counters.written.add(rows.len() as u64);
                    self.counters.flush.add(begun.elapsed());
                }
                Verdict::Refused(code) => match rows {
                    [row] => self.write_encoded(row, &code).await,
                    _ => {
                        let (first, second) = rows.split_at(rows.len() / 2);
                        parts.extend([second, first]);
                    }
                },
            }
        }
    }

    /// Writes a row that the database refused, in a form that any database takes.
    async fn write_encoded(&self, row: &Waiting, code: &str) {
        let encoded = row.encoded(code);
        let (user_id, request_id) = (&row.user, &row.request);
        match self.insert(std::slice::from_ref(&encoded)).await {
            Verdict::Written => {
                self.counters.encoded.add(1);
                warn!(%user_id, %request_id, code, "The database refused a row of the audit log; it is stored as base64.");
            }
            Verdict::Refused(code) => {
                self.counters.refused.add(1);
                warn!(%user_id, %request_id, code, "The database refused a row of the audit log, as base64 too; it is lost.");
            }
        }
    }

    /// Writes rows in one transaction; tries until the database answers.
    async fn insert(&self, rows: &[Waiting]) -> Verdict {
        let mut outage = Outage::default();
        loop {
            let has_outcome = self.database.schema().is_some_and(|schema| schema.log_has_outcome);
            let insert = Insert::new(rows, has_outcome);
            match self.database.attempts(&insert).await {
                Ok(verdict) => {
                    outage.end(self.queue.rows());
                    return verdict;
                }
                Err(_) => outage.wait(self.queue.rows()).await,
            }
            let Some(transaction) = insert.committing() else { continue };
            loop {
                match self.database.attempts(&AskFate(transaction)).await {
                    Ok(Fate::Committed) => {
                        outage.end(self.queue.rows());
                        return Verdict::Written;
                    }
                    Ok(Fate::Undone) => break,
                    Ok(Fate::Open) | Err(_) => outage.wait(self.queue.rows()).await,
                }
            }
        }
    }

    /// Tells the log at intervals that rows were dropped.
    async fn report(&self) {
        let mut ticks = interval(REPORT_EVERY);
        let mut told = 0;
        loop {
            ticks.tick().await;
            let total = self.queue.dropped();
            if total > told {
                let (dropped, queued) = (total - told, self.queue.rows());
                warn!(
                    dropped,
                    total,
                    queued,
                    "Rows of the audit log were dropped: the database does not keep up."
                );
                told = total;
            }
        }
    }
}

/// Failed attempts in a row.
#[derive(Default)]
struct Outage {
    attempts: u32,
}

impl Outage {
    async fn wait(&mut self, queued: usize) {
        if self.attempts == 0 {
            warn!(queued, "Rows of the audit log wait for the database.");
        }
        sleep(BACKOFF.delay(self.attempts, rand::random())).await;
        self.attempts = self.attempts.saturating_add(1);
    }

    fn end(&self, queued: usize) {
        if self.attempts > 0 {
            info!(queued, "Rows of the audit log are written again.");
        }
    }
}

/// Time for which rows wait for others, so that many are written at once.
const LINGER: Duration = Duration::from_millis(100);

/// Waits while the database is away.
const BACKOFF: Backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(2) };

/// Interval of the lines about dropped rows.
const REPORT_EVERY: Duration = Duration::from_secs(10);
