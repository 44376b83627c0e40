//! The outlet for messages of the instance's own, and the proof that one came back over the subscribing connection.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::bus::publish::{Outcome, Publish};

/// The number of a connection: later ones of an instance have larger numbers. 0: none.
pub(super) type Birth = u64;

/// A slot for one message that overtakes a connection's queue, and the proof that the connection ends at the same
/// server as the subscribing connection. A proof belongs to one connection.
#[derive(Default)]
pub(super) struct Outlet {
    slot: Mutex<Option<Publish>>,
    nudged: Notify,
    born: AtomicU64,
    proven: AtomicU64,
}

impl Outlet {
    /// Publishes a message ahead of the queue; replaces one that still waits.
    pub(super) fn publish(&self, publish: Publish) {
        *self.slot.lock() = Some(publish);
        self.nudged.notify_one();
    }

    /// Takes the message that overtakes the queue, if there is one.
    pub(super) fn take(&self) -> Option<Publish> {
        self.slot.lock().take()
    }

    /// Resolves once after [`Self::publish`].
    pub(super) async fn nudged(&self) {
        self.nudged.notified().await;
    }

    /// Notes a new connection, and drops a message that waits: it was meant for the connection before.
    pub(super) fn connected(&self, birth: Birth) {
        self.born.store(birth, Ordering::Release);
        self.give_up();
    }

    /// Drops the message that waits, if any.
    pub(super) fn give_up(&self) {
        if let Some(receipt) = self.take().and_then(|publish| publish.receipt) {
            receipt.published(Outcome::Lost);
        }
    }

    /// Returns the number of the connection.
    pub(super) fn born(&self) -> Birth {
        self.born.load(Ordering::Acquire)
    }

    /// Notes that a message came back that was published over this connection.
    pub(super) fn prove(&self, birth: Birth) {
        self.proven.store(birth, Ordering::Release);
    }

    /// Removes the proof, since the subscribing connection is another one.
    pub(super) fn doubt(&self) {
        self.prove(0);
    }

    /// Returns whether there is a proof for the present connection.
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
        // A probe that was sent over the connection before comes back late.
        outlet.prove(1);
        assert!(!outlet.is_proven());
        outlet.prove(2);
        outlet.doubt();
        assert!(!outlet.is_proven());
    }
}
