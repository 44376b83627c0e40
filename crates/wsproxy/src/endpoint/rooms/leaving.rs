//! Members whose connection has ended: each leaves its room after a grace, unless it is back by then.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use wsproxy_proto::{names::Id, rooms::wire::Connection};

use crate::{
    endpoint::rooms::{Rooms, table::RoomHold},
    registry::rooms::RoomMembership,
};

/// A member that is to leave.
pub(super) struct Leave {
    /// The room, which stays here until the leave has run.
    pub(super) room: RoomHold,
    /// The member's name in the room.
    pub(super) client: Id,
    /// The connection that has ended.
    pub(super) connection: Connection,
    /// The room in the registry, which another instance needs to find the member.
    pub(super) entry: RoomMembership,
    /// Another connection has the member's place by now.
    pub(super) is_back: bool,
}

/// The waiting leaves of an instance. All wait for the same time, so that the first that came is the first that is due.
#[derive(Default)]
pub(super) struct Leaving {
    waiting: Mutex<VecDeque<(Instant, Leave)>>,
    changed: Notify,
}

impl Leaving {
    /// Adds a leave that is due after `grace`.
    pub(super) fn wait(&self, leave: Leave, grace: Duration) {
        self.waiting.lock().push_back((Instant::now() + grace, leave));
        self.changed.notify_one();
    }

    /// Returns whether a member may still come back, whose leave waits.
    fn is_awaited(&self) -> bool {
        let mut waiting = self.waiting.lock();
        // A member that has another connection needs no leave but the one that finds it gone.
        for (_, leave) in waiting.iter_mut().filter(|(_, leave)| !leave.is_back) {
            leave.is_back = !leave.room.is_held_by(leave.client.as_str(), leave.connection);
        }
        waiting.iter().any(|(_, leave)| !leave.is_back)
    }

    /// Returns the number of waiting leaves.
    pub(super) fn len(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Takes the leaves that are due at `now`, or all of them.
    fn take(&self, now: Option<Instant>) -> Vec<Leave> {
        let mut waiting = self.waiting.lock();
        let is_due = |due: &Instant| now.is_none_or(|now| *due <= now);
        let count = waiting.iter().take_while(|(due, _)| is_due(due)).count();
        waiting.drain(..count).map(|(_, leave)| leave).collect()
    }

    fn next(&self) -> Option<Instant> {
        self.waiting.lock().front().map(|(due, _)| *due)
    }
}

/// Runs the leaves that are due, until `end`.
pub(super) async fn run(rooms: Arc<Rooms>, end: CancellationToken) {
    loop {
        let next = rooms.leaving.next();
        let due = async {
            match next {
                Some(due) => sleep_until(due).await,
                None => rooms.leaving.changed.notified().await,
            }
        };
        tokio::select! {
            () = end.cancelled() => return,
            () = due => {}
        }
        leave_all(&rooms, rooms.leaving.take(Some(Instant::now())));
    }
}

/// Runs leaves in the background, those of one room together.
pub(super) fn leave_all(rooms: &Arc<Rooms>, mut leaves: Vec<Leave>) {
    leaves.sort_by(|a, b| a.room.id.as_str().cmp(b.room.id.as_str()));
    while let Some(first) = leaves.pop() {
        let mut of_room = vec![first];
        while of_room.len() < LEAVES_AT_ONCE
            && leaves.last().is_some_and(|leave| leave.room.id == of_room[0].room.id)
        {
            of_room.extend(leaves.pop());
        }
        let rooms_too = Arc::clone(rooms);
        rooms.leave_tasks.spawn(async move { leave(&rooms_too, of_room).await });
    }
}

/// Runs all waiting leaves, for an instance that ends: at `deadline` at the latest, and at once when all of these members
/// are back at other instances.
pub(super) async fn close(rooms: &Arc<Rooms>, deadline: Instant) {
    // In one process there is nowhere else to come back to.
    let waits = rooms.keeper.is_shared();
    while waits && rooms.leaving.is_awaited() && Instant::now() < deadline {
        sleep_until(deadline.min(Instant::now() + LOOK_EVERY)).await;
    }
    leave_all(rooms, rooms.leaving.take(None));
    rooms.leave_tasks.close();
    rooms.leave_tasks.wait().await;
}

/// Removes members of one room. What the store does not answer is tried again: a member that did not leave would be
/// seen by all others until this instance ends.
async fn leave(rooms: &Rooms, leaves: Vec<Leave>) {
    let Some(room) = leaves.first().map(|leave| leave.room.id.clone()) else { return };
    let members: Vec<_> =
        leaves.iter().map(|leave| (leave.client.clone(), leave.connection)).collect();
    let fields = leaves[0].room.fields_of(members.iter().map(|(client, _)| client.as_str()));
    for attempt in 0..TRIES {
        let Ok(permit) = rooms.leave_permits.acquire().await else { return };
        let left = rooms.keeper.leave(&room, &members, &fields).await;
        drop(permit);
        match left {
            Ok(gone) => {
                debug!(room = room.as_str(), members = gone.len(), "Members left a room.");
                return;
            }
            // The key is of another type: it holds no members.
            Err(error) if error.is_of_one_key() => {
                warn!(room = room.as_str(), %error, "Members of a room cannot be removed.");
                return;
            }
            Err(error) => debug!(room = room.as_str(), %error, "A leave is tried again."),
        }
        tokio::time::sleep(PAUSE * (attempt + 1)).await;
    }
    leaves.into_iter().for_each(|leave| leave.entry.abandon());
    warn!(room = room.as_str(), members = members.len(), "The store did not take a leave.");
}

/// Returns permits for leaves that run at once, so that the end of many connections does not flood the store.
pub(super) fn permits() -> Semaphore {
    Semaphore::new(LEAVES_IN_FLIGHT)
}

/// Most members that one script removes.
const LEAVES_AT_ONCE: usize = 500;

const LEAVES_IN_FLIGHT: usize = 64;

/// Tries of a leave. An instance that ends waits for them.
const TRIES: u32 = 10;

const PAUSE: Duration = Duration::from_millis(200);

/// Interval of looks for members that are back, while the instance ends.
const LOOK_EVERY: Duration = Duration::from_millis(50);
