//! Rows that wait to be written. Knows no database.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{audit::row::Waiting, telemetry::counter::Counter};

/// Queue of one task that writes.
///
/// Invariant: holds at most `rows_max` rows of at most `bytes_max` bytes, those that are being written included. A
/// further row is dropped and counted: an older row tells more about how an outage began.
#[derive(Debug)]
pub(super) struct RowQueue {
    rows_max: usize,
    bytes_max: usize,
    /// Guards the rows; held for a few steps.
    state: Mutex<QueueState>,
    /// Signals the task that there are rows, or enough for a whole batch.
    filled: Notify,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct QueueState {
    rows: VecDeque<Waiting>,
    /// Rows and bytes that were taken and are being written.
    taken_rows: usize,
    taken_bytes: usize,
    bytes: usize,
    is_closed: bool,
}

impl RowQueue {
    /// Creates an empty queue.
    pub(super) fn new(rows_max: usize, bytes_max: usize) -> Self {
        Self {
            rows_max,
            bytes_max,
            state: Mutex::default(),
            filled: Notify::new(),
            dropped: Counter::default(),
        }
    }

    /// Appends a row, or drops it where there is no room.
    pub(super) fn push(&self, row: Waiting) {
        let bytes = row.bytes();
        let rows = {
            let mut state = self.state.lock();
            let rows = state.rows.len();
            let is_full = state.is_closed
                || rows + state.taken_rows >= self.rows_max
                || state.bytes + state.taken_bytes + bytes > self.bytes_max;
            if is_full {
                None
            } else {
                state.rows.push_back(row);
                state.bytes += bytes;
                Some(rows + 1)
            }
        };
        match rows {
            // The task counts time from the first row, and does not wait any more when a batch is whole.
            Some(1 | BATCH_ROWS) => self.filled.notify_one(),
            Some(_) => {}
            None => self.dropped.add(1),
        }
    }

    /// Takes the oldest rows: at most `count`, and no more once they have `bytes_max` bytes. They count towards the
    /// bounds until [`Self::done`].
    pub(super) fn take(&self, count: usize, bytes_max: usize) -> Vec<Waiting> {
        let mut state = self.state.lock();
        let (mut taken, mut bytes) = (0, 0);
        for row in state.rows.iter().take(count) {
            if bytes >= bytes_max {
                break;
            }
            taken += 1;
            bytes += row.bytes();
        }
        let rows: Vec<_> = state.rows.drain(..taken).collect();
        state.bytes -= bytes;
        state.taken_bytes += bytes;
        state.taken_rows += rows.len();
        if state.rows.is_empty() && state.rows.capacity() > ROWS_KEPT {
            state.rows = VecDeque::new();
        }
        rows
    }

    /// Ends the turn of the rows that were taken.
    pub(super) fn done(&self) {
        let mut state = self.state.lock();
        (state.taken_rows, state.taken_bytes) = (0, 0);
    }

    /// Drops all rows, and those that still come. Returns the number of rows that waited or were being written.
    pub(super) fn close(&self) -> usize {
        let (rows, taken) = {
            let mut state = self.state.lock();
            let taken = state.taken_rows;
            let rows = std::mem::take(&mut state.rows);
            *state = QueueState { is_closed: true, ..QueueState::default() };
            (rows, taken)
        };
        rows.len() + taken
    }

    /// Resolves once after the queue got its first row, or enough for a batch; may resolve without a row.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// Returns the number of rows that wait or are being written.
    pub(super) fn rows(&self) -> usize {
        let state = self.state.lock();
        state.rows.len() + state.taken_rows
    }

    /// Returns the bytes of these rows.
    pub(super) fn bytes(&self) -> usize {
        let state = self.state.lock();
        state.bytes + state.taken_bytes
    }

    /// Returns the number of rows that were dropped.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.value()
    }
}

/// Rows for which the task no longer waits.
pub(super) const BATCH_ROWS: usize = 500;

/// Most rows of one statement. There are more than [`BATCH_ROWS`] where the database was slower than the calls: fewer
/// transactions then let it catch up.
pub(super) const BATCH_ROWS_MAX: usize = 2000;

/// Bytes after which no further row is added to a statement.
pub(super) const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Rows for which memory is kept after a burst.
const ROWS_KEPT: usize = 1024;

#[cfg(test)]
mod tests {
    use wsproxy_proto::{agents::outcome::Outcome, names::Id};

    use super::*;

    fn row(number: i32, bytes: usize) -> Waiting {
        Waiting {
            user: Id::parse("u-1").unwrap(),
            request: Id::parse("q-1").unwrap(),
            tool: "t".into(),
            params: Some("x".repeat(bytes).into()),
            result: None,
            success: true,
            error: None,
            execution_ms: number,
            begun: 0,
            outcome: Outcome::Response,
            details: "{}".into(),
        }
    }

    fn numbers(rows: &[Waiting]) -> Vec<i32> {
        rows.iter().map(|row| row.execution_ms).collect()
    }

    #[test]
    fn the_newest_rows_are_dropped_at_each_bound() {
        let queue = RowQueue::new(3, 10_000);
        (0..5).for_each(|number| queue.push(row(number, 10)));
        assert_eq!((queue.rows(), queue.dropped()), (3, 2));
        assert_eq!(numbers(&queue.take(2, usize::MAX)), [0, 1]);
        queue.push(row(5, 10));
        assert_eq!(queue.dropped(), 3, "rows that are being written count");
        queue.done();
        queue.push(row(6, 10));
        queue.push(row(7, 9_000));
        queue.push(row(8, 1_000));
        assert_eq!((queue.rows(), queue.dropped()), (3, 4));
        assert_eq!(numbers(&queue.take(500, 1_000)), [2, 6, 7]);
        queue.done();
        assert_eq!((queue.rows(), queue.bytes()), (0, 0));
    }

    #[test]
    fn a_closed_queue_takes_no_row() {
        let queue = RowQueue::new(10, 100_000);
        (0..5).for_each(|number| queue.push(row(number, 10)));
        assert_eq!(queue.take(2, usize::MAX).len(), 2);
        assert_eq!(queue.close(), 5);
        queue.push(row(9, 10));
        assert_eq!((queue.rows(), queue.bytes(), queue.dropped()), (0, 0, 1));
    }
}
