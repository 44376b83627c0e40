//! The totals of a fleet's threads while they run; added up once per round, not per message.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use crate::clock::{now_ns, ns};

/// Totals over all clients of a fleet since its start.
#[derive(Debug, Default)]
pub struct Counters {
    opened: AtomicU64,
    failed: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    aside: AtomicU64,
    /// Handshakes that ended, either way.
    settled: Awaited,
    delivered: Awaited,
    waiter: Mutex<Option<Thread>>,
}

/// A total that a thread may be waiting for.
#[derive(Debug, Default)]
struct Awaited {
    total: AtomicU64,
    /// The waiting thread is woken when the total reaches this; 0 while none waits.
    wake_at: AtomicU64,
}

/// The changes of one round of one thread.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) opened: u64,
    pub(crate) failed: u64,
    pub(crate) closed: u64,
    pub(crate) delivered: u64,
    pub(crate) aside: u64,
    pub(crate) sent: u64,
}

impl Counters {
    /// Handshakes that ended with `101`.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Acquire)
    }

    /// Handshakes that ended otherwise.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Acquire)
    }

    /// Open connections that ended, on either side.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.closed.load(Ordering::Acquire)
    }

    /// Connections that are open now.
    #[must_use]
    pub fn open_now(&self) -> u64 {
        self.opened().saturating_sub(self.closed())
    }

    /// Handshakes that ended, either way.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.settled.total.load(Ordering::SeqCst)
    }

    /// Stamped messages that arrived whole at clients that are measured.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.delivered.total.load(Ordering::SeqCst)
    }

    /// Stamped messages that arrived whole at other clients.
    #[must_use]
    pub fn aside(&self) -> u64 {
        self.aside.load(Ordering::Acquire)
    }

    /// Messages that clients sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// Sleeps until `wanted` messages have arrived; false when `timeout` passes without any progress.
    #[must_use]
    pub fn wait_delivered(&self, wanted: u64, timeout: Duration) -> bool {
        self.wait(&self.delivered, wanted, timeout)
    }

    /// Sleeps until `wanted` handshakes have ended; false when `timeout` passes without any progress.
    #[must_use]
    pub fn wait_settled(&self, wanted: u64, timeout: Duration) -> bool {
        self.wait(&self.settled, wanted, timeout)
    }

    fn wait(&self, awaited: &Awaited, wanted: u64, timeout: Duration) -> bool {
        if let Ok(mut waiter) = self.waiter.lock() {
            *waiter = Some(std::thread::current());
        }
        awaited.wake_at.store(wanted, Ordering::SeqCst);
        let mut last = awaited.total.load(Ordering::SeqCst);
        let mut deadline = now_ns().saturating_add(ns(timeout));
        let reached = loop {
            let total = awaited.total.load(Ordering::SeqCst);
            if total >= wanted {
                break true;
            }
            let now = now_ns();
            if total != last {
                last = total;
                deadline = now.saturating_add(ns(timeout));
            }
            if now >= deadline {
                break false;
            }
            std::thread::park_timeout(PARK);
        };
        awaited.wake_at.store(0, Ordering::SeqCst);
        reached
    }

    pub(crate) fn add(&self, round: &Round) {
        let pairs = [
            (&self.opened, round.opened),
            (&self.failed, round.failed),
            (&self.closed, round.closed),
            (&self.sent, round.sent),
            (&self.aside, round.aside),
        ];
        for (counter, amount) in pairs {
            if amount > 0 {
                counter.fetch_add(amount, Ordering::AcqRel);
            }
        }
        let settled = self.settled.add(round.opened + round.failed);
        let delivered = self.delivered.add(round.delivered);
        if (settled || delivered)
            && let Ok(waiter) = self.waiter.lock()
            && let Some(thread) = &*waiter
        {
            thread.unpark();
        }
    }
}

impl Awaited {
    /// Returns true when a thread waits for a total that has now been reached.
    fn add(&self, amount: u64) -> bool {
        if amount == 0 {
            return false;
        }
        let total = self.total.fetch_add(amount, Ordering::SeqCst) + amount;
        let wake_at = self.wake_at.load(Ordering::SeqCst);
        wake_at > 0 && total >= wake_at
    }
}

/// Interval at which a waiting thread checks its timeout.
const PARK: Duration = Duration::from_millis(100);
