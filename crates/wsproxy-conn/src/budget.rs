//! What all outboxes of the process hold together, against what they may hold.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes that wait behind sockets which took no more.
///
/// Invariant: while the sum is above the limit, every tick ends the connection with the most
/// bytes, so it stays above for a tick at most. A frame that many clients share counts once for each of them.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0) }
    }

    /// Bytes that wait now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Whether more waits than may.
    #[must_use]
    pub fn is_exceeded(&self) -> bool {
        self.used() > self.limit
    }

    /// One outbox holds `after` bytes instead of `before`.
    pub fn change(&self, before: usize, after: usize) {
        if after >= before {
            self.used.fetch_add(after - before, Relaxed);
        } else {
            self.used.fetch_sub(before - after, Relaxed);
        }
    }
}
