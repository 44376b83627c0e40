//! The rooms of this instance as entries that Redis should have, and the signs that Redis may lack their members.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep};
use tracing::info;
use wsproxy_proto::{names::Id, rooms::wire::Connection};

use crate::{
    registry::{
        commands::SCAN_START,
        lease::{Beat, Holder},
        rooms::{
            RoomBackend, RoomRegistry,
            keys::RoomKeys,
            leftovers::{LEAVES_AT_A_TIME, ROOMS_AT_A_TIME, RoomLeftovers},
        },
        writer::{self, BATCH, Mirrored, WriterCounters},
    },
    store::command::StoreError,
};

/// Writes the rooms until the registry closes.
pub(super) async fn run(registry: Arc<RoomRegistry>) {
    let RoomBackend::Redis(keys, leftovers) = &registry.backend else { return };
    let rooms = Rooms { registry: &registry, keys, leftovers, seen: Mutex::default() };
    writer::run(rooms, &registry.lease, &registry.closing).await;
}

struct Rooms<'a> {
    registry: &'a RoomRegistry,
    keys: &'a RoomKeys,
    leftovers: &'a RoomLeftovers,
    /// Guards what only the writer's task uses.
    seen: Mutex<Seen>,
}

/// Events of the lease that were told.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    beat: Beat,
    /// Set while a reaper may be at work since before the lease was taken again.
    is_claimed: bool,
    /// Set if this check has seen a lapse of the lease.
    has_lapsed: bool,
    /// Set if this check has looked for members without a connection here.
    is_swept: bool,
}

impl Rooms<'_> {
    /// Tells what the latest renewals of the lease have shown.
    async fn note_beat(&self) -> Result<(), StoreError> {
        let RoomRegistry { lease, local, .. } = self.registry;
        let (beat, mut seen) = (*lease.beats().borrow(), *self.seen.lock());
        let has_lapsed = beat.lapses > seen.beat.lapses;
        let has_expired = beat.expired > seen.beat.expired;
        // No member joined before the first renewal.
        let is_first = seen.beat.lapses == 0;
        let mut is_over = false;
        if has_expired || seen.is_claimed {
            // The lease was taken before this look, and a reaper claims before it looks at the lease.
            let is_claimed = lease.is_claimed().await?;
            is_over = seen.is_claimed && !is_claimed;
            seen.is_claimed = is_claimed;
        }
        if has_lapsed && !is_first {
            // Before it is told: those who join members again wait until their rooms are written.
            local.lock().rewrite_all();
        }
        if has_expired || is_over {
            self.registry.tell(|doubts| doubts.lapsed += 1);
        } else if has_lapsed && !is_first {
            self.registry.tell(|doubts| doubts.emptied += 1);
        }
        seen.beat = beat;
        (seen.has_lapsed, seen.is_swept) = (has_lapsed, false);
        *self.seen.lock() = seen;
        Ok(())
    }
}

impl Mirrored for Rooms<'_> {
    const NAME: &'static str = "rooms";

    fn changed(&self) -> &Notify {
        &self.registry.changed
    }

    fn counters(&self) -> &WriterCounters {
        &self.registry.counters
    }

    fn state(&self) -> (usize, bool) {
        let local = self.registry.local.lock();
        (local.len(), !local.changes.is_empty())
    }

    /// A join does not wait for other changes.
    async fn linger(&self, pause: Duration) {
        tokio::select! {
            () = sleep(pause) => {}
            () = self.registry.urgent.notified() => {}
        }
    }

    /// Redis may have lost members too.
    fn differs(&self) {
        self.registry.local.lock().rewrite_all();
        if !self.seen.lock().has_lapsed {
            self.registry.tell(|doubts| doubts.emptied += 1);
        }
    }

    fn rewrite_all(&self) {
        self.registry.local.lock().rewrite_all();
    }

    /// All entries are in one hash, whose time to live each count renews.
    fn renew(&self) {}

    async fn count(&self) -> Result<u64, StoreError> {
        let count = self.keys.count_own().await?;
        self.registry.compare_link(self.keys);
        self.note_beat().await?;
        if self.seen.lock().beat.holder == Holder::Us {
            self.sweep_unswept().await?;
        }
        Ok(count)
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let is_swept = self.seen.lock().is_swept;
        if is_swept { Ok(()) } else { self.sweep_all().await }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let RoomRegistry { local, counters, .. } = self.registry;
        self.registry.compare_link(self.keys);
        let writes = local.lock().take(BATCH);
        match self.keys.write(&writes).await {
            Ok(()) => {
                counters.written.add(writes.len() as u64);
                local.lock().written(writes);
                Ok(())
            }
            Err(error) => {
                local.lock().give_back(writes);
                Err(error)
            }
        }
    }
}

impl Rooms<'_> {
    /// Looks for members without a connection here where there may be some: after a new connection to Redis, which may
    /// have been rolled back, and where leaves could not run.
    async fn sweep_unswept(&self) -> Result<(), StoreError> {
        let local = &self.registry.local;
        let link = local.lock().unswept_link();
        if let Some(link) = link {
            self.sweep_all().await?;
            local.lock().swept_link(link);
            self.seen.lock().is_swept = true;
        }
        let abandoned = local.lock().abandoned(ABANDONED_AT_A_TIME);
        for rooms in abandoned.chunks(ROOMS_AT_A_TIME) {
            let name = |room: &Arc<str>| Bytes::copy_from_slice(room.as_bytes());
            let names = rooms.iter().map(|(room, _)| name(room));
            self.sweep_rooms(&names.collect::<Vec<_>>()).await?;
            let mut local = local.lock();
            rooms.iter().for_each(|(room, number)| local.swept(room, *number));
        }
        Ok(())
    }

    /// Looks for members without a connection here in all rooms that Redis has under this instance's name: those of an
    /// earlier run that was killed, or of a Redis that was rolled back. They leave.
    async fn sweep_all(&self) -> Result<(), StoreError> {
        let local = &self.registry.local;
        let mut cursor = SCAN_START;
        loop {
            let (next, found) = self.keys.scan_own(&cursor).await?;
            let names: Vec<_> = found.into_iter().map(|(room, _)| room).collect();
            for names in names.chunks(ROOMS_AT_A_TIME) {
                self.sweep_rooms(names).await?;
                let mut local = local.lock();
                let names = names.iter().filter_map(|name| std::str::from_utf8(name).ok());
                let strays: Vec<_> = names.filter(|name| !local.has_room(name)).collect();
                local.remove_strays(strays.into_iter().map(Arc::from));
            }
            if next == SCAN_START {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn sweep_rooms(&self, rooms: &[Bytes]) -> Result<(), StoreError> {
        let RoomRegistry { local, lease, server, .. } = self.registry;
        let is_in_use = |room: &Id, connection: &str| {
            let connection = Connection::parse(connection).filter(|found| found.server == *server);
            connection.is_some_and(|found| local.lock().has(room.as_str(), found.number))
        };
        let leaving = self.leftovers.find(&lease.settings().server_id, rooms, is_in_use).await?;
        for some in leaving.chunks(LEAVES_AT_A_TIME) {
            if !lease.is_held() {
                return Err(StoreError::Lost("the lease ran out".into()));
            }
            let members = self.leftovers.end(some).await?;
            if members > 0 {
                info!(members, "Members without a connection left their rooms.");
            }
        }
        Ok(())
    }
}

/// Rooms with abandoned members that are looked at in one check. Others follow in the next one.
const ABANDONED_AT_A_TIME: usize = 1024;
