//! The one task that brings Redis to what is true here: every change in batches, and all again where
//! Redis has lost it.

use std::sync::Arc;

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    registry::{
        Backend, Registry,
        commands::SCAN_START,
        lease::{Beat, Holder},
        redis::RedisRegistry,
    },
    store::StoreError,
};

/// Changes that are written at a time: others have their turns in between.
const BATCH: usize = 128;

/// At the end Redis gets so long.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(5);

/// Runs until the registry closes.
pub(super) async fn run(registry: Arc<Registry>) {
    let Backend::Redis(redis) = &registry.backend else { return };
    let mut writer = Writer {
        beats: registry.lease.beats(),
        registry: &registry,
        redis,
        due: None,
        linked: false,
        lapses: 0,
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
    beats: watch::Receiver<Beat>,
    /// When Redis' entries are counted: after a renewal of the lease, or some time after a failure.
    due: Option<Instant>,
    /// Redis did what it was asked last.
    linked: bool,
    /// Lapses of the lease that were made up for.
    lapses: u64,
    /// Entries under our name may be left from before; they are looked for once the name is ours alone.
    strays: bool,
}

impl Writer<'_> {
    async fn work(&mut self) {
        let registry = self.registry;
        loop {
            if registry.closing.is_cancelled() {
                return;
            }
            // Before anything is written: the lease may have lapsed, and a reaper may have been here.
            if self.beats.has_changed().unwrap_or(false) {
                self.due = Some(Instant::now());
            }
            let is_due = self.due.is_some_and(|due| Instant::now() >= due);
            if is_due {
                self.due = None;
                tokio::select! {
                    result = self.check() => self.note(result),
                    () = registry.closing.cancelled() => return,
                }
            } else if self.may_write() && registry.local.lock().has_changes() {
                let result = self.write().await;
                self.note(result);
            } else {
                let due = self.due.unwrap_or_else(Instant::now);
                tokio::select! {
                    () = registry.closing.cancelled() => return,
                    () = sleep_until(due), if self.due.is_some() => {}
                    changed = self.beats.changed() => match changed {
                        Ok(()) => self.due = Some(Instant::now()),
                        Err(_) => return,
                    },
                    // Wait a little: short-lived connections cancel out, and bursts become one write.
                    () = registry.changed.notified(), if self.linked => {
                        sleep(registry.lease.pace().linger).await;
                    }
                }
            }
        }
    }

    /// Whether changes that are written now stay: Redis answers, and the lease runs.
    fn may_write(&self) -> bool {
        self.linked && self.registry.lease.is_held()
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
                self.due = Some(Instant::now() + self.registry.lease.pace().retry);
            }
        }
    }

    /// Compares what Redis has with what is here.
    async fn check(&mut self) -> Result<(), StoreError> {
        let Registry { local, settings, lease, counters, .. } = self.registry;
        let beat = *self.beats.borrow_and_update();
        let (count, settled) = {
            let local = local.lock();
            (local.len(), !local.has_changes())
        };
        lease.tell_connections(count);
        let entries = self.redis.count_own().await?;
        if beat.lapses > self.lapses {
            let first = std::mem::replace(&mut self.lapses, beat.lapses) == 0;
            if !first {
                info!(connections = count, "The registry is written again.");
                counters.rewrites.add(1);
            }
            self.rewrite();
        } else if self.strays && beat.holder == Holder::Us {
            self.sweep().await?;
            self.strays = false;
        } else if settled && entries != count as u64 {
            warn!(
                entries,
                connections = count,
                "Redis has lost or kept entries: all are written again."
            );
            self.rewrite();
        } else {
            let refresh = lease.pace().refresh;
            let share = refresh.as_secs_f64() / (settings.ttl.as_secs_f64() / 2.0);
            local.lock().rewrite_some((count as f64 * share).ceil() as usize);
        }
        Ok(())
    }

    fn rewrite(&mut self) {
        self.strays = true;
        self.registry.local.lock().rewrite_all();
    }

    /// Finds what is in Redis under our name and not here.
    async fn sweep(&self) -> Result<(), StoreError> {
        let Registry { local, .. } = self.registry;
        let mut cursor = SCAN_START;
        loop {
            let (next, found) = self.redis.scan_own(&cursor).await?;
            let strays = local.lock().remove_strays(found);
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
            Ok(0) => {
                local.lock().written();
                counters.written.add(writes.len() as u64);
            }
            Ok(refused) => {
                local.lock().written();
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
        Ok(())
    }
}
