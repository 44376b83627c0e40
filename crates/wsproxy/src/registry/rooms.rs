//! The rooms in which this instance has members, here and on all instances. Knows no family.
//!
//! The hash of a room's members alone decides who is in it; this registry is for lists, and for the end of the members
//! of a lost instance, which are found by its rooms. So a room is entered here before its first join, and left behind
//! the last leave. One task writes changes in batches.

use std::{collections::BTreeSet, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::names::Id;

use crate::{
    bus::Bus,
    registry::{
        commands::Commands,
        lease::Lease,
        rooms::{keys::RoomKeys, leftovers::RoomLeftovers, local::LocalRooms},
        writer::WriterCounters,
    },
    store::command::StoreError,
};

mod keys;
pub(super) mod leftovers;
mod local;
mod writer;

/// The rooms with members at this instance, and access to those of all others.
pub struct RoomRegistry {
    /// Number of this run of the instance, as connections of members have it.
    server: u64,
    lease: Arc<Lease>,
    backend: RoomBackend,
    /// Guards the rooms here and the changes. Held for a few steps, or for one walk after an outage.
    local: Mutex<LocalRooms>,
    doubts: watch::Sender<RoomDoubts>,
    /// Signals the writer that there are changes.
    changed: Notify,
    /// Signals the writer that a join waits for a change.
    urgent: Notify,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: WriterCounters,
}

/// Storage of the shared registry.
enum RoomBackend {
    /// This process: there is no other instance.
    Embedded,
    /// Redis.
    Redis(Box<RoomKeys>, Box<RoomLeftovers>),
}

/// Numbers of events since the start after which Redis may lack members of this instance. An event may be counted
/// twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoomDoubts {
    /// Redis lost data, or another Redis answers now, while this instance had its lease: its members are to join again.
    pub emptied: u64,
    /// The lease ran out, or a reaper has ended its work after that: members may have come back at other instances, so
    /// only those join again whose clients give a sign of life.
    pub lapsed: u64,
}

/// A piece of the list of all rooms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomList {
    /// Rooms with members, in the order of their ids.
    pub rooms: Vec<Id>,
    /// There are more rooms than were asked for.
    pub is_cut: bool,
}

/// Guard of a connection in a room; dropping it takes the connection out of the room.
///
/// It lives from before the join until the leave has run. A room stays entered as long as it has a connection. A
/// connection without a guard is none of this instance, so its member may be taken out of the room.
#[must_use = "dropping it takes the connection out of the room"]
pub struct RoomMembership {
    registry: Arc<RoomRegistry>,
    room: Arc<str>,
    connection: u64,
}

impl RoomRegistry {
    /// Starts the registry's task, which runs until [`Self::close`]. The lease must outlive it. `server` is the number
    /// of this run of the instance, as connections of members have it.
    #[must_use]
    pub fn start(lease: &Arc<Lease>, bus: &Bus, server: u64) -> Arc<Self> {
        let settings = lease.settings();
        let mut link = 0;
        let backend = match bus {
            Bus::Embedded(_) => RoomBackend::Embedded,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                link = commands.connections_made();
                let keys = RoomKeys::new(commands.clone(), settings, server);
                RoomBackend::Redis(keys.into(), RoomLeftovers::new(commands, settings).into())
            }
        };
        let registry = Arc::new(Self {
            server,
            lease: Arc::clone(lease),
            local: Mutex::new(LocalRooms::new(matches!(backend, RoomBackend::Redis(..)), link)),
            backend,
            doubts: watch::Sender::default(),
            changed: Notify::new(),
            urgent: Notify::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: WriterCounters::default(),
        });
        if matches!(registry.backend, RoomBackend::Redis(..)) {
            registry.tasks.spawn(writer::run(Arc::clone(&registry)));
        }
        registry
    }

    /// Adds a connection to a room for as long as the returned guard lives. `connection` is its number in this process.
    /// Never waits: before the join the caller awaits [`RoomMembership::entered`].
    pub fn enter(self: &Arc<Self>, room: &Id, connection: u64) -> RoomMembership {
        let (room, changed) = self.local.lock().enter(room.as_str(), connection);
        if changed {
            self.urgent.notify_one();
            self.changed.notify_one();
        }
        RoomMembership { registry: Arc::clone(self), room, connection }
    }

    /// Returns the events after which Redis may lack members of this instance, as they are told. Never changes on the
    /// embedded bus.
    ///
    /// A family that joins members again awaits [`RoomMembership::entered`] first.
    #[must_use]
    pub fn doubts(&self) -> watch::Receiver<RoomDoubts> {
        self.doubts.subscribe()
    }

    /// Returns the number of rooms here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.local.lock().len()
    }

    /// Returns whether no room is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether Redis has every room here, as far as this instance knows. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.local.lock().changes.is_written()
    }

    /// Returns at most `limit` rooms with members at living instances. Which rooms are left out is not defined.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn rooms(&self, limit: usize) -> Result<RoomList, StoreError> {
        let mut found = match &self.backend {
            RoomBackend::Embedded => self.local.lock().first(limit.saturating_add(1)),
            RoomBackend::Redis(keys, _) => keys.rooms(limit.saturating_add(1)).await?,
        };
        let is_cut = found.len() > limit;
        while found.len() > limit {
            found.pop_last();
        }
        let rooms = found.iter().filter_map(|room| Id::parse(room).ok()).collect();
        Ok(RoomList { rooms, is_cut })
    }

    /// Removes the rooms of this instance from Redis and ends. Guards must be dropped or abandoned by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Waits until Redis has a room of this instance; see [`RoomMembership::entered`].
    pub(crate) async fn entered(&self, room: &str) -> Result<(), StoreError> {
        let RoomBackend::Redis(keys, _) = &self.backend else { return Ok(()) };
        let written = async {
            loop {
                self.compare_link(keys);
                let Some(signal) = self.local.lock().unwritten(room) else { return };
                let written = signal.notified();
                // It may have been written before the wait began.
                if self.local.lock().unwritten(room).is_some() {
                    written.await;
                }
            }
        };
        let deadline = self.lease.settings().response_timeout;
        timeout(deadline, written)
            .await
            .map_err(|_| StoreError::Lost("the room of this instance was not written".into()))
    }

    /// Notes whether commands may reach another Redis by now. Then all is to be written again.
    fn compare_link(&self, keys: &RoomKeys) {
        let link = keys.connections_made();
        let is_new = self.local.lock().relink(link);
        if is_new {
            // Otherwise the next renewal finds that the lease ran out, and tells that.
            if self.lease.is_held() {
                self.tell(|doubts| doubts.emptied += 1);
            }
            self.urgent.notify_one();
            self.changed.notify_one();
        }
    }

    fn tell(&self, change: impl FnOnce(&mut RoomDoubts)) {
        self.doubts.send_modify(change);
    }
}

impl RoomMembership {
    /// Waits until Redis has the room under this instance's name, so that another instance finds the member after a
    /// crash of this one. Costs no command where another member is here already. Has the deadline
    /// `redis.response_timeout`.
    ///
    /// # Errors
    /// [`StoreError::Lost`]: it was not written in time.
    pub async fn entered(&self) -> Result<(), StoreError> {
        self.registry.entered(&self.room).await
    }

    /// Takes the connection out of the room though its leave could not run. The registry runs the leave as soon as it
    /// can; where this instance ends before, another one does.
    pub fn abandon(self) {
        self.registry.local.lock().abandon(&self.room, self.connection);
    }
}

impl Drop for RoomMembership {
    fn drop(&mut self) {
        let changed = self.registry.local.lock().leave(&self.room, self.connection);
        if changed {
            self.registry.changed.notify_one();
        }
    }
}

/// Ids of rooms, in order.
type RoomIds = BTreeSet<Box<str>>;
