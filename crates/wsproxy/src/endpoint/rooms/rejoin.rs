//! Members that join again, because Redis may have lost them or another instance may have removed them.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::stream::{self, StreamExt};
use hashbrown::HashMap;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};
use wsproxy_conn::clock;
use wsproxy_proto::{disconnect::Disconnect, names::Id};

use crate::{
    endpoint::rooms::{
        Rooms,
        keeper::{Joined, KEYS_TTL},
        member::Membership,
        room::Room,
    },
    store::command::StoreError,
};

/// Lets members join again whenever the registry tells of a doubt, until `end`.
pub(super) async fn run(rooms: Arc<Rooms>, end: CancellationToken) {
    let Some(registry) = &rooms.registry else { return };
    let mut doubts = registry.doubts();
    let mut seen = *doubts.borrow_and_update();
    let mut renewals = interval(KEYS_TTL / 4);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            changed = doubts.changed() => if changed.is_err() { return },
            _ = renewals.tick() => {
                tokio::select! {
                    () = end.cancelled() => return,
                    () = renew(&rooms) => {}
                }
            }
        }
        let now = *doubts.borrow_and_update();
        let (is_emptied, is_lapsed) = (now.emptied != seen.emptied, now.lapsed != seen.lapsed);
        seen = now;
        if is_lapsed {
            let members = memberships(&rooms);
            info!(
                members = members.len(),
                "This instance's lease ran out: members join again as they are heard."
            );
            let members = members.iter().map(Arc::downgrade).collect();
            rooms.tasks.spawn(join_living(Arc::clone(&rooms), members));
        } else if is_emptied {
            tokio::select! {
                () = end.cancelled() => return,
                () = join_all(&rooms) => {}
            }
        }
    }
}

/// Renews the time to live of the keys of all rooms here: a join does, and changes nothing else.
async fn renew(rooms: &Rooms) {
    let of_room =
        |room: &Arc<Room>| room.memberships().into_iter().find(|member| member.has_joined());
    join(rooms.table.all().iter().filter_map(of_room).collect()).await;
}

/// Lets all members of this instance join again, and writes the state of its rooms again.
async fn join_all(rooms: &Rooms) {
    let members = memberships(rooms);
    info!(
        members = members.len(),
        "Redis may have lost the members of this instance: they join again."
    );
    join(members).await;
    for room in rooms.table.all() {
        room.doubt();
    }
}

/// Lets members join again as they give a sign of life. This instance was frozen or cut off: others may have removed its
/// members, and clients may be at other instances by now. A member that is never heard is closed by its heartbeat.
pub(super) async fn join_living(rooms: Arc<Rooms>, mut silent: Vec<Weak<Membership>>) {
    let asked = clock::now();
    let mut of_rooms: HashMap<Id, Weak<Room>> = HashMap::new();
    for membership in silent.iter().filter_map(Weak::upgrade) {
        let room = membership.room.room();
        room.probe(membership.connection.number, asked);
        of_rooms.entry_ref(&room.id).or_insert_with(|| Arc::downgrade(room));
    }
    while !silent.is_empty() && !rooms.end.is_cancelled() {
        let mut heard = Vec::new();
        silent.retain(|member| {
            let membership = member.upgrade().filter(|membership| membership.has_joined());
            let Some(membership) = membership else { return false };
            let is_heard = membership.room.has_heard(membership.connection.number, asked);
            if is_heard {
                heard.push(membership);
            }
            !is_heard
        });
        if !heard.is_empty() {
            join(heard).await;
        }
        sleep(LOOK_EVERY).await;
    }
    // Only these: a storm of leaves begins this task once for each.
    of_rooms.values().filter_map(Weak::upgrade).for_each(|room| room.doubt());
}

fn memberships(rooms: &Rooms) -> Vec<Arc<Membership>> {
    let members = rooms.table.all().into_iter().flat_map(|room| room.memberships());
    members.filter(|membership| membership.has_joined()).collect()
}

/// Lets members join again, a few at a time.
async fn join(members: Vec<Arc<Membership>>) {
    stream::iter(members)
        .for_each_concurrent(JOINS_AT_ONCE, |membership| async move { join_one(&membership).await })
        .await;
}

async fn join_one(membership: &Membership) {
    for attempt in 1..=TRIES {
        let now = clock::now();
        match write(membership).await {
            Ok(Joined::Held { .. }) => return,
            Ok(Joined::Replaced | Joined::Taken) => {
                membership.replace();
                return membership.room.end(
                    membership.connection.number,
                    &Disconnect::REPLACED,
                    now,
                );
            }
            Ok(Joined::Full) => {
                membership.replace();
                return membership.room.end(
                    membership.connection.number,
                    &Disconnect::TRY_LATER,
                    now,
                );
            }
            Err(error) => {
                debug!(room = membership.room.id.as_str(), %error, attempt, "A member cannot join again now.");
                sleep(PAUSE * attempt).await;
            }
        }
    }
}

/// Writes a member with its entities in one step: none is without its member, for others that read them.
async fn write(membership: &Membership) -> Result<Joined, StoreError> {
    let entities = membership.room.snapshots_of(membership);
    let joined = membership.join_again(&entities).await?;
    if matches!(joined, Joined::Held { .. }) {
        // Changes of the member meanwhile may have been refused, since it was no member.
        membership.room.joined_again(membership, &entities);
    }
    Ok(joined)
}

/// Joins that run at once.
const JOINS_AT_ONCE: usize = 64;

const TRIES: u32 = 5;

const PAUSE: Duration = Duration::from_millis(200);

const LOOK_EVERY: Duration = Duration::from_millis(100);
