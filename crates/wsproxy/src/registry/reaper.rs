//! Removes what dead instances left behind. Every instance looks; one of them does it.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::sleep;
use tracing::{debug, info};

use crate::{
    registry::{
        Backend, Registry,
        redis::{Reaped, RedisRegistry},
    },
    store::StoreError,
};

/// Walks over the entries of one instance: some may be missed by the first.
const WALKS_MAX: usize = 10;

/// Looks for dead instances until the registry closes.
pub(super) async fn run(registry: Arc<Registry>) {
    let Backend::Redis(redis) = &registry.backend else { return };
    loop {
        // Not all at once: those that come later find it done.
        let pause = registry.settings.pace.refresh.mul_f64(rand::random_range(0.75..1.25));
        tokio::select! {
            () = registry.closing.cancelled() => return,
            () = sleep(pause) => {}
        }
        let round = tokio::select! {
            () = registry.closing.cancelled() => return,
            round = reap(&registry, redis) => round,
        };
        if let Err(error) = round {
            debug!(%error, "Dead instances cannot be looked for now.");
        }
    }
}

async fn reap(registry: &Registry, redis: &RedisRegistry) -> Result<(), StoreError> {
    for server in redis.expired().await? {
        // Our own lease may have run out in an outage; the writer is about to take it up again.
        if *server != *registry.settings.server_id && redis.claim(&server).await? {
            reap_server(registry, redis, &server).await?;
        }
    }
    Ok(())
}

async fn reap_server(
    registry: &Registry,
    redis: &RedisRegistry,
    server: &str,
) -> Result<(), StoreError> {
    let start = Bytes::from_static(b"0");
    let mut removed = 0;
    for _ in 0..WALKS_MAX {
        let mut cursor = start.clone();
        loop {
            let (next, entries) = redis.scan(server, &cursor).await?;
            if !entries.is_empty() && !redis.remove(server, &entries).await? {
                break;
            }
            removed += entries.len() as u64;
            registry.counters.connections_reaped.add(entries.len() as u64);
            if next == start {
                break;
            }
            cursor = next;
        }
        match redis.bury(server).await? {
            Reaped::Unfinished => {}
            Reaped::Removed => {
                registry.counters.servers_reaped.add(1);
                info!(
                    server,
                    connections = removed,
                    "A dead instance was removed from the registry."
                );
                return Ok(());
            }
            Reaped::Alive | Reaped::Gone => return Ok(()),
        }
    }
    Ok(())
}
