//! Spans that wait for the exporter.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::traces::span::SpanData;

/// Invariant: never holds more than `spans_max` spans. A span beyond that is dropped, since its request must not wait.
#[derive(Debug)]
pub(super) struct SpanQueue {
    spans_max: usize,
    /// Number of spans at which the exporter need not wait for more.
    batch: usize,
    /// Guards the spans; held for a few steps.
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    spans: VecDeque<SpanData>,
    is_closed: bool,
}

impl SpanQueue {
    pub(super) fn new(spans_max: usize, batch: usize) -> Self {
        Self { spans_max, batch, state: Mutex::default(), changed: Notify::new() }
    }

    /// Appends spans. Returns the number of those that were dropped.
    pub(super) fn push(&self, spans: impl ExactSizeIterator<Item = SpanData>) -> usize {
        let (before, after, dropped) = {
            let mut state = self.state.lock();
            let before = state.spans.len();
            let room = if state.is_closed { 0 } else { self.spans_max - before };
            let dropped = spans.len().saturating_sub(room);
            state.spans.extend(spans.take(room));
            (before, state.spans.len(), dropped)
        };
        if (before == 0 && after > 0) || (before < self.batch && after >= self.batch) {
            self.changed.notify_one();
        }
        dropped
    }

    /// Takes a batch, oldest first.
    pub(super) fn take(&self) -> Vec<SpanData> {
        let mut state = self.state.lock();
        let count = state.spans.len().min(self.batch);
        let batch = state.spans.drain(..count).collect();
        if state.spans.is_empty() {
            // Free the memory of a burst.
            state.spans = VecDeque::new();
        }
        batch
    }

    /// Refuses spans from now on.
    pub(super) fn close(&self) {
        self.state.lock().is_closed = true;
        self.changed.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.state.lock().spans.len()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    /// Returns whether a batch is whole.
    pub(super) fn has_batch(&self) -> bool {
        self.len() >= self.batch
    }

    /// Waits until the queue is no longer empty, has a batch, or is closed; may resolve without such a change.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}
