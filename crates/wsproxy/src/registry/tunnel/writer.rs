//! The lanes of this instance as entries that Redis should have.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::sleep};
use tracing::{info, warn};

use crate::{
    registry::{
        commands::SCAN_START,
        tunnel::{
            LaneBackend, LaneRegistry,
            keys::{self, Field, Identity, LaneKeys},
            local::{Entered, Write},
        },
        writer::{self, BATCH, Mirrored, WriterCounters},
    },
    store::command::StoreError,
};

/// Writes the lanes until the registry closes.
pub(super) async fn run(registry: Arc<LaneRegistry>) {
    let LaneBackend::Redis(keys) = &registry.backend else { return };
    let lanes = Lanes { registry: &registry, keys };
    writer::run(lanes, &registry.lease, &registry.closing).await;
}

struct Lanes<'a> {
    registry: &'a LaneRegistry,
    keys: &'a LaneKeys,
}

impl Mirrored for Lanes<'_> {
    const NAME: &'static str = "lanes";

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

    /// A handshake does not wait for other changes.
    async fn linger(&self, pause: Duration) {
        tokio::select! {
            () = sleep(pause) => {}
            () = self.registry.urgent.notified() => {}
        }
    }

    fn rewrite_all(&self) {
        self.registry.local.lock().rewrite_all();
    }

    /// Each count renews the instance's own hash, and some of the clusters'.
    fn renew(&self) {}

    async fn count(&self) -> Result<u64, StoreError> {
        let count = self.keys.count_own().await?;
        let clusters = self.registry.local.lock().clusters_to_renew();
        for cluster in self.keys.keep(clusters).await? {
            // The lane may not have been written yet. Then this changes nothing.
            self.registry.local.lock().rewrite(&cluster);
        }
        Ok(count)
    }

    /// Entries without a lane here are those of an earlier run that was killed.
    async fn sweep(&self) -> Result<(), StoreError> {
        let LaneRegistry { local, server_id, .. } = self.registry;
        let mut cursor = SCAN_START;
        loop {
            let (next, mut found) = self.keys.scan(server_id, &cursor).await?;
            {
                let local = local.lock();
                found.retain(|(key, _)| name(key).is_none_or(|key| !local.has(key)));
            }
            if !found.is_empty() {
                info!(lanes = found.len(), "Lanes of an earlier run are removed.");
                release(self.keys, server_id, &found).await?;
                // Removed by the rules of all changes: an agent may have connected meanwhile.
                let keys = found.iter().filter_map(|(key, _)| name(key)).map(Arc::from);
                local.lock().remove_strays(keys);
            }
            if next == SCAN_START {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let LaneRegistry { local, counters, .. } = self.registry;
        let writes = local.lock().take(BATCH);
        let count = writes.len() as u64;
        match self.write_all(writes).await {
            Ok(()) => {
                local.lock().changes.answered();
                counters.writer.written.add(count);
                Ok(())
            }
            Err((error, writes)) => {
                local.lock().give_back(writes.into_iter());
                Err(error)
            }
        }
    }
}

impl Lanes<'_> {
    /// Writes changes. Gives back those that may not have been done.
    async fn write_all(&self, writes: Vec<Write>) -> Result<(), (StoreError, Vec<Write>)> {
        let LaneRegistry { local, counters, server_id, peer, .. } = self.registry;
        if let Err(error) = self.keys.enter_own(&writes).await {
            return Err((error, writes));
        }
        let (entries, left): (Vec<_>, Vec<_>) =
            writes.into_iter().partition(|write| write.entry.is_some());
        let here = entries.iter().filter_map(|write| write.entry.as_ref());
        let gone = left.iter().map(|write| (write.key.as_bytes(), Identity::default()));
        let (entered, released) = tokio::join!(
            self.keys.enter(here, peer.as_deref()),
            self.keys.release(server_id, gone),
        );
        let (mut failed, mut error, mut done) = (Vec::new(), None, Vec::new());
        for (write, answer) in entries.into_iter().zip(entered) {
            let entered = match answer {
                Ok(entered) => entered,
                Err(refusal) if refusal.is_of_one_key() => {
                    counters.writer.failures.add(1);
                    warn!(lane = &*write.key, error = %refusal, "Redis refuses the entry of a lane.");
                    Entered::Refused(refusal.to_string().into())
                }
                Err(lost) => {
                    error = Some(lost);
                    failed.push(write);
                    continue;
                }
            };
            let Some(entry) = &write.entry else { continue };
            local.lock().entered(&write.key, entry.id, entered);
        }
        for (write, answer) in left.into_iter().zip(released) {
            match answer {
                Err(lost) if !lost.is_of_one_key() => {
                    error = Some(lost);
                    failed.push(write);
                }
                // A key of another type has no lane.
                Ok(_) | Err(_) => done.push(write),
            }
        }
        if let Err(lost) = self.keys.leave_own(&done).await {
            error = Some(lost);
            failed.extend(done);
        }
        error.map_or(Ok(()), |error| Err((error, failed)))
    }
}

/// Removes lanes of an instance from the hashes of their clusters. Returns the number of those that were there.
pub(super) async fn release(
    keys: &LaneKeys,
    server: &str,
    fields: &[Field],
) -> Result<u64, StoreError> {
    let lanes = fields.iter().filter_map(|(key, value)| Some((&key[..], keys::identity(value)?)));
    let mut count = 0;
    for answer in keys.release(server, lanes).await {
        match answer {
            Ok(was_there) => count += u64::from(was_there),
            // A key of another type has no lane.
            Err(error) if error.is_of_one_key() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

fn name(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key).ok()
}
