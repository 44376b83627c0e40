//! Looks for lost instances and removes their state, kind by kind. Every instance looks; the one that claims a
//! lost instance removes it.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use crate::{
    registry::lease::{
        Lease, LeaseCounters, LostInstance,
        keys::{LeaseKeys, Removal},
    },
    store::command::StoreError,
    telemetry::counter::Counter,
};

/// Looks for lost instances until the lease is closed.
pub(super) async fn run(lease: Arc<Lease>) {
    let Some(keys) = &lease.keys else { return };
    loop {
        // A random pause, so that most instances find the work done.
        let pause = lease.timing().refresh.mul_f64(rand::random_range(0.75..1.25));
        tokio::select! {
            () = lease.closing.cancelled() => return,
            () = sleep(pause) => {}
        }
        if !lease.may_judge() {
            continue;
        }
        let round = tokio::select! {
            () = lease.closing.cancelled() => return,
            round = reap(&lease, keys) => round,
        };
        if let Err(error) = round {
            debug!(%error, "Lost instances cannot be looked for now.");
        }
    }
}

async fn reap(lease: &Lease, keys: &LeaseKeys) -> Result<(), StoreError> {
    for server in keys.expired().await? {
        // Our own lease may have run out in an outage, and will be renewed in a moment.
        if *server == *lease.settings.server_id {
            continue;
        }
        let Some(claim) = keys.claim(&server).await? else { continue };
        match reap_server(lease, keys, &server).await {
            Ok(true) => keys.unclaim(&server, &claim).await?,
            // The claim stays until it expires, so that no instance tries again at once.
            Ok(false) => debug!(server, "A lost instance is not removed yet."),
            Err(error @ (StoreError::Lost(_) | StoreError::Closed)) => return Err(error),
            // An instance that cannot be removed must not delay others.
            Err(error) => debug!(server, %error, "A lost instance cannot be removed now."),
        }
    }
    Ok(())
}

/// Removes a lost instance, and returns whether nothing is left to do.
async fn reap_server(lease: &Lease, keys: &LeaseKeys, server: &str) -> Result<bool, StoreError> {
    let until = Instant::now() + CLAIM_USED;
    let lost = LostInstance { server, keys, counters: &lease.counters, until };
    // An instance first renews its lease and then looks for a claim; a reaper first claims and then looks
    // at the lease. So at least one of the two sees the other.
    if !lost.is_certain().await? {
        return Ok(true);
    }
    let counters = &lease.counters;
    let counts = || {
        let LeaseCounters { connections_reaped, sessions_reaped, agents_reaped, .. } = counters;
        let LeaseCounters { room_members_reaped, lanes_reaped, .. } = counters;
        [connections_reaped, sessions_reaped, agents_reaped, room_members_reaped, lanes_reaped]
            .map(Counter::value)
    };
    let before = counts();
    for state in &lease.leased {
        if !state.clean(&lost).await? {
            // The instance is alive again, or the claim is about to expire.
            return keys.is_alive(server).await;
        }
    }
    if keys.remove_dead(server).await? == Removal::Removed {
        counters.servers_reaped.add(1);
        let counts = counts();
        let [connections, sessions, agents, room_members, lanes] =
            std::array::from_fn(|kind| counts[kind] - before[kind]);
        info!(
            server,
            connections, sessions, agents, room_members, lanes, "A lost instance was removed."
        );
    }
    Ok(true)
}

/// Time for which a claim is used: less than its lifetime, so that two reapers never work at once.
const CLAIM_USED: Duration = Duration::from_secs(20);
