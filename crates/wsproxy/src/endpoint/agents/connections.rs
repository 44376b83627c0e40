//! The connections of users' agents at this instance, by user. Knows no place: a user may have several here for a
//! moment, while a newer one replaces an older one.

use std::{hash::BuildHasher, sync::Arc};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use parking_lot::Mutex;
use wsproxy_proto::names::Id;

use crate::endpoint::agents::{
    inbox::{AgentInbox, Ending},
    presence::control::{Controlled, Opened, Order},
};

/// The inboxes of this instance, handshakes included, by user.
#[derive(Debug, Default)]
pub struct Connections {
    hasher: RandomState,
    /// Guards the table only: no inbox is called while it is locked.
    table: Mutex<HashTable<Arc<AgentInbox>>>,
}

impl Connections {
    /// Adds a connection. Dropping the guard removes it.
    #[must_use]
    pub fn add(self: &Arc<Self>, inbox: &Arc<AgentInbox>) -> Registered {
        let hash = self.hash(&inbox.user);
        let rehash = |inbox: &Arc<AgentInbox>| self.hash(&inbox.user);
        self.table.lock().insert_unique(hash, Arc::clone(inbox), rehash);
        Registered { connections: Arc::clone(self), inbox: Arc::clone(inbox) }
    }

    /// Returns the connections of a user, including those whose handshake runs.
    #[must_use]
    pub fn of(&self, user: &Id) -> Vec<Arc<AgentInbox>> {
        let table = self.table.lock();
        table.iter_hash(self.hash(user)).filter(|inbox| inbox.user == *user).cloned().collect()
    }

    /// Returns at most `count` users that are connected here.
    #[must_use]
    pub fn users(&self, count: usize) -> Vec<Id> {
        let table = self.table.lock();
        let users = table.iter().filter(|inbox| inbox.is_holding()).map(|inbox| inbox.user.clone());
        users.take(count).collect()
    }

    /// Returns whether there is neither a connection, nor a handshake, nor one that still leaves its place.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.lock().is_empty()
    }

    /// Returns the connections with calls in flight.
    #[must_use]
    pub fn busy(&self) -> Vec<Arc<AgentInbox>> {
        self.table.lock().iter().filter(|inbox| inbox.in_flight() > 0).cloned().collect()
    }

    fn hash(&self, user: &Id) -> u64 {
        self.hasher.hash_one(user)
    }

    fn remove(&self, inbox: &Arc<AgentInbox>) {
        let hash = self.hash(&inbox.user);
        let mut table = self.table.lock();
        if let Ok(entry) = table.find_entry(hash, |other| Arc::ptr_eq(other, inbox)) {
            entry.remove();
        }
        let (len, capacity) = (table.len(), table.capacity());
        if capacity > CAPACITY_KEPT && len < capacity / 4 {
            table.shrink_to(len * 2, |inbox| self.hash(&inbox.user));
        }
    }
}

impl Controlled for Connections {
    fn execute(&self, order: &Order) -> usize {
        let inboxes = self.of(&order.user);
        let meant = inboxes.iter().filter(|inbox| inbox.is_meant(order.secret));
        // The instance that gives a command gets it from the bus too.
        let ended = meant.filter(|inbox| {
            let reason = order.reason.as_deref().map(Into::into);
            inbox.close(Ending { why: order.why, reason, secret: order.secret })
        });
        ended.count()
    }

    fn opened(&self) -> Opened {
        let inboxes: Vec<_> = self.table.lock().iter().cloned().collect();
        let mut opened = Opened::default();
        for inbox in inboxes {
            match inbox.secret() {
                Some(secret) => opened.secrets.push((inbox.user.clone(), secret)),
                None => opened.is_judging = true,
            }
        }
        opened
    }
}

/// Guard of a connection in the table.
#[derive(Debug)]
pub struct Registered {
    connections: Arc<Connections>,
    inbox: Arc<AgentInbox>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.remove(&self.inbox);
    }
}

/// Entries for which an empty table keeps room.
const CAPACITY_KEPT: usize = 64;
