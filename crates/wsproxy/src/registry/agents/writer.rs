//! The agents of this instance as entries that Redis should have.

use std::sync::Arc;

use tokio::sync::Notify;
use tracing::info;

use crate::{
    registry::{
        agents::{
            AgentBackend, AgentRegistry,
            keys::{AgentKeys, Field},
            leftovers::AgentLeftovers,
        },
        commands::SCAN_START,
        writer::{self, BATCH, Mirrored, WriterCounters},
    },
    store::command::StoreError,
};

/// Writes the agents until the registry closes.
pub(super) async fn run(registry: Arc<AgentRegistry>) {
    let AgentBackend::Redis(keys, leftovers) = &registry.backend else { return };
    let agents = Agents { registry: &registry, keys, leftovers };
    writer::run(agents, &registry.lease, &registry.closing).await;
}

struct Agents<'a> {
    registry: &'a AgentRegistry,
    keys: &'a AgentKeys,
    leftovers: &'a AgentLeftovers,
}

impl Mirrored for Agents<'_> {
    const NAME: &'static str = "agents";

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

    fn rewrite_all(&self) {
        self.registry.local.lock().rewrite_all();
    }

    /// All entries are in one hash, whose time to live each count renews.
    fn renew(&self) {}

    async fn count(&self) -> Result<u64, StoreError> {
        self.keys.count_own().await
    }

    /// Entries without an agent here are those of an earlier run that was killed: their places are released too.
    async fn sweep(&self) -> Result<(), StoreError> {
        let AgentRegistry { local, server_id, .. } = self.registry;
        let mut cursor = SCAN_START;
        loop {
            let (next, mut found) = self.keys.scan(server_id, &cursor).await?;
            {
                let local = local.lock();
                found.retain(|field| user_of(field).is_none_or(|user| !local.has(user)));
            }
            if !found.is_empty() {
                info!(agents = found.len(), "Agents of an earlier run are removed.");
                let (_, done) = self.leftovers.end(server_id, found).await?;
                // Removed by the rules of all changes: an agent may have connected meanwhile.
                let users = done.iter().filter_map(user_of).map(Arc::from);
                local.lock().remove_strays(users);
            }
            if next == SCAN_START {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let AgentRegistry { local, counters, .. } = self.registry;
        let writes = local.lock().take(BATCH);
        match self.keys.write(&writes).await {
            Ok(()) => {
                local.lock().changes.answered();
                counters.written.add(writes.len() as u64);
                Ok(())
            }
            Err(error) => {
                local.lock().give_back(writes);
                Err(error)
            }
        }
    }
}

fn user_of((user, _): &Field) -> Option<&str> {
    std::str::from_utf8(user).ok()
}
