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
    store::redis::RedisStore,
};

/// Skeleton.
#[derive(Clone)]
pub struct RedisBus {}

#[allow(unused_variables, clippy::unused_async)]
impl RedisBus {
    pub(super) fn new(
        config: &config::Redis,
        server_id: &str,
        names: &Names,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, BusError> {
        todo!()
    }
    pub(super) fn store(&self) -> RedisStore {
        todo!()
    }
    pub(super) async fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
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
