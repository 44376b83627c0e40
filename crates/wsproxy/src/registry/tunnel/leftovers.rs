//! Removes the lanes of a lost instance; done by another instance.

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};

use crate::{
    registry::{
        commands::{Commands, SCAN_START},
        lease::{LeaseSettings, LeasedState, LostInstance},
        tunnel::{keys::LaneKeys, writer},
    },
    store::command::StoreError,
};

/// Removes the lanes of a lost instance from the hashes of their clusters.
pub(in crate::registry) struct LaneLeftovers(LaneKeys);

impl LaneLeftovers {
    pub(in crate::registry) fn new(commands: Commands, settings: &LeaseSettings) -> Self {
        Self(LaneKeys::new(commands, settings))
    }

    async fn clean_up(&self, lost: &LostInstance<'_>) -> Result<bool, StoreError> {
        for _ in 0..WALKS_MAX {
            let mut cursor: Bytes = SCAN_START;
            loop {
                let (next, fields) = self.0.scan(lost.server, &cursor).await?;
                if !fields.is_empty() {
                    if !lost.is_certain().await? {
                        return Ok(false);
                    }
                    let count = writer::release(&self.0, lost.server, &fields).await?;
                    lost.counters.lanes_reaped.add(count);
                    self.0.remove_equal(lost.server, fields.into_iter()).await?;
                }
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            if self.0.len(lost.server).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl LeasedState for LaneLeftovers {
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.clean_up(lost).boxed()
    }

    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move { Ok(self.0.len(server).await? == 0) }.boxed()
    }
}

/// Upper bound of walks over the lanes of one instance: a walk may miss lanes that move.
const WALKS_MAX: usize = 10;
