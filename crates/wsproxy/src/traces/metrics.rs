//! Numbers of traces on the page of metrics.

use crate::{
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
    traces::Tracer,
};

/// Counters of spans.
#[derive(Debug, Default)]
pub(super) struct TraceCounters {
    /// Spans that a collector took.
    pub(super) sent: Counter,
    /// Spans for which the queue had no room.
    pub(super) dropped_queue_full: Counter,
    /// Spans of batches that could not be sent in time.
    pub(super) dropped_unsent: Counter,
    /// Spans that a collector refused.
    pub(super) dropped_refused: Counter,
    /// Spans for which there was no time at the end of the instance.
    pub(super) dropped_shutdown: Counter,
    /// Requests to the collector that failed.
    pub(super) failures: Counter,
}

impl Source for Tracer {
    fn collect(&self, scrape: &mut Scrape) {
        let none = TraceCounters::default();
        let counters = self.0.as_ref().map_or(&none, |recorder| &recorder.counters);
        let scrape = scrape.section(Section::Traces);
        let help = "Spans that the collector took";
        scrape.counter("trace_spans_sent", help, counters.sent.value());
        let dropped = [
            ("queue_full", &counters.dropped_queue_full),
            ("unsent", &counters.dropped_unsent),
            ("refused", &counters.dropped_refused),
            ("shutdown", &counters.dropped_shutdown),
        ];
        let dropped = dropped.map(|(reason, counter)| ([("reason", reason)], counter.value()));
        scrape.counters("trace_spans_dropped", "Spans that were dropped, by reason", dropped);
        let help = "Requests to the collector that failed; some are tried again";
        scrape.counter("trace_export_failures", help, counters.failures.value());
        let waiting = self.0.as_ref().map_or(0, |recorder| recorder.queue.len());
        scrape.gauge("trace_spans_waiting", "Spans that wait for the collector", waiting as i64);
    }
}
