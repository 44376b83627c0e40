//! Where messages of the instance's own leave it, and whether one came back over the subscribing link.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::bus::{Outcome, Publish};

/// The number of a connection: later ones of an instance have larger numbers. 0: none.
pub(super) type Birth = u64;

/// A slot for one message that overtakes a link's queue, and the proof that the link ends at the same
/// server as the subscribing link. A proof belongs to one connection.
#[derive(Default)]
pub(super) struct Outlet {
    slot: Mutex<Option<Publish>>,
    nudged: Notify,
    born: AtomicU64,
    proven: AtomicU64,
}

impl Outlet {
    /// Publishes ahead of the queue; of several that wait, the last one.
    pub(super) fn publish(&self, publish: Publish) {
        *self.slot.lock() = Some(publish);
        self.nudged.notify_one();
    }

    /// The message that overtakes the queue, if there is one.
    pub(super) fn take(&self) -> Option<Publish> {
        self.slot.lock().take()
    }

    /// Resolves once after a message was put in.
    pub(super) async fn nudged(&self) {
        self.nudged.notified().await;
    }

    /// There is a new connection. A message that waits was meant for the one before.
    pub(super) fn connected(&self, birth: Birth) {
        self.born.store(birth, Ordering::Release);
        self.give_up();
    }

    /// The message that waits, if any, will not be published.
    pub(super) fn give_up(&self) {
        if let Some(receipt) = self.take().and_then(|publish| publish.receipt) {
            receipt.published(Outcome::Lost);
        }
    }

    /// The number of the connection.
    pub(super) fn born(&self) -> Birth {
        self.born.load(Ordering::Acquire)
    }

    /// What was published over this connection came back.
    pub(super) fn prove(&self, birth: Birth) {
        self.proven.store(birth, Ordering::Release);
    }

    /// The proof does not count any more: the subscribing link is another one.
    pub(super) fn doubt(&self) {
        self.prove(0);
    }

    /// Whether there is a proof for the present connection.
    pub(super) fn is_proven(&self) -> bool {
        let born = self.born();
        born != 0 && self.proven.load(Ordering::Acquire) == born
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_belongs_to_one_connection() {
        let outlet = Outlet::default();
        assert!(!outlet.is_proven());
        outlet.connected(1);
        outlet.prove(1);
        assert!(outlet.is_proven());
        outlet.connected(2);
        // A probe that went out over the connection before comes back late.
        outlet.prove(1);
        assert!(!outlet.is_proven());
        outlet.prove(2);
        outlet.doubt();
        assert!(!outlet.is_proven());
    }
}
