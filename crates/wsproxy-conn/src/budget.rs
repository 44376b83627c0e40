//! Bytes that all outboxes of the process hold together, and their bound.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Sum of the bytes in outboxes whose socket takes no more.
///
/// Invariant: while the sum is above the limit, every tick ends the connections with the most bytes, so the sum is
/// above for one tick at most. A frame that many clients share counts once for each of them.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// Creates a budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    /// Returns the number of bytes that wait now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Returns whether more bytes wait than the limit allows.
    #[must_use]
    pub fn is_exceeded(&self) -> bool {
        self.used() > self.limit
    }

    /// Notes that one outbox holds `after` bytes instead of `before`.
    pub fn change(&self, before: usize, after: usize) {
        if after >= before {
            self.used.fetch_add(after - before, Relaxed);
        } else {
            self.used.fetch_sub(before - after, Relaxed);
        }
    }
}
