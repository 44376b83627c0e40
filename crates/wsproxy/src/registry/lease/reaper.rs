//! Looks for lost instances and has every family remove what they left. Every instance looks; the one
//! that claims a lost instance does it.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use crate::{
    registry::lease::{
        Lease, Lost,
        keys::{Buried, LeaseKeys},
    },
    store::StoreError,
};

/// Time that one claim is used: less than it lasts, so that two reapers never work at once.
const CLAIM_USED: Duration = Duration::from_secs(20);

/// Looks for lost instances until the lease is closed.
pub(super) async fn run(lease: Arc<Lease>) {
    let Some(keys) = &lease.keys else { return };
    loop {
        // Not all instances at once: those that come later find it done.
        let pause = lease.pace().refresh.mul_f64(rand::random_range(0.75..1.25));
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
        // Our own lease may have run out in an outage; it is about to be taken up again.
        if *server == *lease.settings.server_id {
            continue;
        }
        let Some(claim) = keys.claim(&server).await? else { continue };
        match reap_server(lease, keys, &server).await {
            Ok(true) => keys.unclaim(&server, &claim).await?,
            // The claim stays, so that what cannot be cleaned up now is not tried again at once.
            Ok(false) => debug!(server, "A lost instance is not cleaned up yet."),
            Err(error @ (StoreError::Lost(_) | StoreError::Closed)) => return Err(error),
            // One instance that cannot be cleaned up keeps no other one waiting.
            Err(error) => debug!(server, %error, "A lost instance cannot be cleaned up now."),
        }
    }
    Ok(())
}

/// Says whether nothing is left to do.
async fn reap_server(lease: &Lease, keys: &LeaseKeys, server: &str) -> Result<bool, StoreError> {
    let until = Instant::now() + CLAIM_USED;
    let lost = Lost { server, keys, counters: &lease.counters, until };
    // An instance first renews its lease and then looks for a claim; a reaper first claims and then looks
    // at the lease. So at least one of the two sees the other.
    if !lost.is_certain().await? {
        return Ok(true);
    }
    let counters = &lease.counters;
    let (connections, sessions) =
        (counters.connections_reaped.value(), counters.sessions_reaped.value());
    for family in &lease.families {
        if !family.clean(&lost).await? {
            // Alive again, or out of time.
            return keys.is_alive(server).await;
        }
    }
    if keys.bury(server).await? == Buried::Removed {
        counters.servers_reaped.add(1);
        let connections = counters.connections_reaped.value() - connections;
        let sessions = counters.sessions_reaped.value() - sessions;
        info!(server, connections, sessions, "A lost instance was removed.");
    }
    Ok(true)
}
