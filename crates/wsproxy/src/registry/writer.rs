//! The one task that brings Redis to what is true here: the lease, and every change in batches.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use crate::{
    registry::{
        Backend, Registry,
        redis::{Before, Lease, RedisRegistry},
    },
    store::StoreError,
};

/// Changes that are written by one command: Redis does nothing else meanwhile.
const BATCH: usize = 128;

/// At the end Redis gets so long.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(5);

/// Runs until the registry closes.
pub(super) async fn run(registry: Arc<Registry>) {
    let Backend::Redis(redis) = &registry.backend else { return };
    let mut writer = Writer {
        registry: &registry,
        redis,
        due: Instant::now(),
        linked: false,
        refreshed: false,
        strays: false,
    };
    writer.work().await;
    match timeout(FAREWELL, writer.farewell()).await {
        Ok(Ok(())) => debug!("The registry is left."),
        Ok(Err(error)) => warn!(%error, "The registry cannot be left; the lease will run out."),
        Err(_) => warn!("There was no time to leave the registry; the lease will run out."),
    }
}

struct Writer<'a> {
    registry: &'a Registry,
    redis: &'a RedisRegistry,
    /// When the lease is refreshed.
    due: Instant,
    /// Redis did what it was asked last.
    linked: bool,
    /// The lease was refreshed at least once.
    refreshed: bool,
    /// Entries under our name may be left from before; they are looked for once the name is ours alone.
    strays: bool,
}

impl Writer<'_> {
    async fn work(&mut self) {
        let registry = self.registry;
        loop {
            if Instant::now() >= self.due {
                tokio::select! {
                    result = self.refresh() => self.note(result),
                    () = registry.closing.cancelled() => return,
                }
            } else if self.linked && registry.local.lock().has_changes() {
                if registry.closing.is_cancelled() {
                    return;
                }
                let result = self.write().await;
                self.note(result);
            } else {
                tokio::select! {
                    () = registry.closing.cancelled() => return,
                    () = sleep_until(self.due) => {}
                    // Whoever comes and goes at once is never written, and a crowd is one batch.
                    () = registry.changed.notified(), if self.linked => {
                        sleep(registry.settings.pace.linger).await;
                    }
                }
            }
        }
    }

    fn note(&mut self, result: Result<(), StoreError>) {
        match result {
            Ok(()) => self.linked = true,
            Err(error) => {
                self.registry.counters.failures.add(1);
                if self.linked {
                    warn!(%error, "The registry cannot be written now; it will be made up for.");
                }
                self.linked = false;
                self.due = Instant::now() + self.registry.settings.pace.retry;
            }
        }
    }

    async fn refresh(&mut self) -> Result<(), StoreError> {
        let Registry { local, settings, counters, .. } = self.registry;
        let (count, settled) = {
            let local = local.lock();
            (local.len(), !local.has_changes())
        };
        // From the beginning: the lease counts from when Redis does it.
        let next = Instant::now() + settings.pace.refresh;
        let Lease { before, entries } = self.redis.refresh(count).await?;
        self.due = next;
        match before {
            Before::Ours if self.strays => {
                self.sweep().await?;
                self.strays = false;
            }
            Before::Ours if settled && entries != count as u64 => {
                warn!(
                    entries,
                    connections = count,
                    "Redis has lost or kept entries: all are written again."
                );
                self.rewrite();
            }
            Before::Ours => {
                let share =
                    settings.pace.refresh.as_secs_f64() / (settings.ttl.as_secs_f64() / 2.0);
                local.lock().rewrite_some((count as f64 * share).ceil() as usize);
            }
            Before::Nobodys => {
                if self.refreshed {
                    info!(
                        connections = count,
                        "The lease was lost: the registry is written again."
                    );
                }
                self.rewrite();
            }
            Before::Anothers => {
                if self.refreshed {
                    error!(
                        server_id = &*settings.server_id,
                        "Another instance has the same SERVER_ID."
                    );
                }
                self.rewrite();
            }
        }
        if !self.refreshed {
            self.refreshed = true;
        } else if before != Before::Ours {
            counters.rewrites.add(1);
        }
        Ok(())
    }

    fn rewrite(&mut self) {
        self.strays = true;
        self.registry.local.lock().rewrite_all();
    }

    /// Finds what is in Redis under our name and not here.
    async fn sweep(&self) -> Result<(), StoreError> {
        let Registry { local, settings, .. } = self.registry;
        let start = Bytes::from_static(b"0");
        let mut cursor = start.clone();
        loop {
            let (next, found) = self.redis.scan(&settings.server_id, &cursor).await?;
            let strays = local.lock().remove_strays(found);
            if strays > 0 {
                info!(strays, "Entries of an earlier run are removed.");
            }
            if next == start {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let Registry { local, settings, counters, .. } = self.registry;
        let writes = local.lock().take(&settings.server_id, BATCH);
        match self.redis.write(&writes).await {
            Ok(0) => counters.written.add(writes.len() as u64),
            Ok(refused) => {
                counters.failures.add(refused);
                warn!(refused, "Redis refused to write entries of the registry.");
            }
            Err(error) => {
                local.lock().give_back(writes);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn farewell(&self) -> Result<(), StoreError> {
        while self.registry.local.lock().has_changes() {
            self.write().await?;
        }
        self.redis.farewell().await
    }
}
