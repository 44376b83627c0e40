//! Skeleton.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
#[allow(unused_imports)]
use wsproxy_proto::names::Names;

use crate::{
    bus::{BusCounters, BusError, Deliver, Publish, Status},
    config,
    store::memory::MemoryStore,
};

/// Skeleton.
#[derive(Clone)]
pub struct MemoryBus {}

#[allow(unused_variables, clippy::unused_async)]
impl MemoryBus {
    pub(super) fn new(
        config: &config::Redis,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        todo!()
    }
    pub(super) fn store(&self) -> MemoryStore {
        todo!()
    }
    pub(super) fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        todo!()
    }
    pub(super) fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        todo!()
    }
    pub(super) fn publish(&self, publish: Publish) -> Result<(), (BusError, Publish)> {
        todo!()
    }
    pub(super) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        todo!()
    }
    pub(super) fn status(&self) -> Status {
        todo!()
    }
    pub(super) fn counters(&self) -> &BusCounters {
        todo!()
    }
}
