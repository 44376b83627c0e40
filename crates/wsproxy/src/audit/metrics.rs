//! Numbers of the audit log on the page of metrics.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use prometheus_client::registry::Unit;

use crate::{
    audit::Audit,
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
};

/// Counters of the writer.
#[derive(Debug, Default)]
pub(super) struct AuditCounters {
    /// Rows that were written.
    pub(super) written: Counter,
    /// Rows that the database refused, and that were then written as base64.
    pub(super) encoded: Counter,
    /// Rows that the database refused in this form too.
    pub(super) refused: Counter,
    /// Rows that waited at the end of the instance.
    pub(super) lost: Counter,
    /// Rows that were deleted, since they were older than `audit.keep`.
    pub(super) expired: Counter,
    /// Times of batches.
    pub(super) flush: Times,
}

/// A histogram of times.
#[derive(Debug, Default)]
pub(super) struct Times {
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_micros: AtomicU64,
}

impl Times {
    pub(super) fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(time.as_micros() as u64, Relaxed);
    }

    fn read(&self) -> (Vec<(f64, u64)>, f64) {
        let counts = self.counts.iter().map(|count| count.load(Relaxed));
        let buckets = BOUNDS.into_iter().chain([f64::INFINITY]).zip(counts).collect();
        (buckets, self.sum_micros.load(Relaxed) as f64 / 1e6)
    }
}

impl Source for Audit {
    fn collect(&self, scrape: &mut Scrape) {
        let AuditCounters { written, encoded, refused, lost, expired, flush } = &*self.counters;
        let scrape = scrape.section(Section::Audit);
        let rows = [
            ("written", written.value()),
            ("encoded", encoded.value()),
            ("dropped", self.queue.dropped()),
            ("refused", refused.value()),
            ("lost", lost.value()),
        ];
        let rows = rows.map(|(outcome, rows)| ([("outcome", outcome)], rows));
        scrape.counters("audit_rows", "Rows of the audit log, by what became of them", rows);
        let help = "Rows of the audit log that were deleted, since they were older than audit.keep";
        scrape.counter("audit_rows_expired", help, expired.value());
        let help = "Rows of the audit log that wait to be written";
        scrape.gauge("audit_queue_rows", help, self.queue.rows() as i64);
        let help = "Bytes of these rows";
        scrape.gauge_in(Unit::Bytes, "audit_queue", help, self.queue.bytes() as i64);
        let help = "Time to write a batch of rows, attempts while the database was away included";
        scrape.seconds("audit_flush", help, &[], flush.read());
    }
}

/// Upper bounds of the buckets, in seconds.
const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 30.0];
