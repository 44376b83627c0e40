//! The connections of the event endpoint as entries that Redis should have.

use std::sync::Arc;

use tokio::sync::Notify;
use tracing::{info, warn};

use crate::{
    registry::{
        Backend, Registry,
        commands::SCAN_START,
        redis::RedisRegistry,
        writer::{self, BATCH, Mirrored, WriterCounters},
    },
    store::command::StoreError,
};

/// Writes the connections until the registry closes.
pub(in crate::registry) async fn run(registry: Arc<Registry>) {
    let Backend::Redis(redis) = &registry.backend else { return };
    let connections = Connections { registry: &registry, redis };
    writer::run(connections, &registry.lease, &registry.closing).await;
}

struct Connections<'a> {
    registry: &'a Registry,
    redis: &'a RedisRegistry,
}

impl Mirrored for Connections<'_> {
    const NAME: &'static str = "connections";

    fn changed(&self) -> &Notify {
        &self.registry.changed
    }

    fn counters(&self) -> &WriterCounters {
        &self.registry.counters.writer
    }

    fn state(&self) -> (usize, bool) {
        let local = self.registry.local.lock();
        (local.len(), !local.changes.is_empty())
    }

    fn rewrite_all(&self) {
        self.registry.local.lock().rewrite_all();
    }

    /// Entries of users expire by themselves. So a part of them is written again each time.
    fn renew(&self) {
        let Registry { local, lease, settings, .. } = self.registry;
        let refresh = lease.timing().refresh;
        let share = refresh.as_secs_f64() / (settings.ttl.as_secs_f64() / 2.0);
        let mut local = local.lock();
        let count = (local.len() as f64 * share).ceil() as usize;
        local.rewrite_some(count);
    }

    async fn count(&self) -> Result<u64, StoreError> {
        self.registry.lease.tell_connections(self.registry.len());
        self.redis.count_own().await
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let mut cursor = SCAN_START;
        loop {
            let (next, found) = self.redis.scan_own(&cursor).await?;
            let strays = self.registry.local.lock().remove_strays(found);
            if strays > 0 {
                info!(strays, "Entries of an earlier run are removed.");
            }
            if next == SCAN_START {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let Registry { local, settings, counters, .. } = self.registry;
        let writes = local.lock().take(&settings.server_id, BATCH);
        match self.redis.write(&writes).await {
            Ok(refused) => {
                local.lock().changes.answered();
                if refused == 0 {
                    counters.writer.written.add(writes.len() as u64);
                } else {
                    counters.writer.failures.add(refused);
                    warn!(refused, "Redis refused to write entries of the registry.");
                }
                Ok(())
            }
            Err(error) => {
                local.lock().give_back(writes);
                Err(error)
            }
        }
    }
}
