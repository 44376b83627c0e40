//! The store on Redis: five commands; knows the pipeline, not the connection.

use std::time::Duration;

use bytes::Bytes;

use crate::store::{LogEntry, StoreError};

/// Commands on a connection of their own. Clones share it.
#[derive(Clone)]
pub struct RedisStore {}

#[allow(unused_variables, clippy::unused_async)]
impl RedisStore {
    pub(super) async fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        todo!()
    }
    pub(super) async fn save(
        &self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<(), StoreError> {
        todo!()
    }
    pub(super) async fn remove(&self, key: &str) -> Result<bool, StoreError> {
        todo!()
    }
    pub(super) async fn take_if_equal(
        &self,
        key: &str,
        expected: &[u8],
    ) -> Result<bool, StoreError> {
        todo!()
    }
    pub(super) async fn read_log(
        &self,
        key: &str,
        after: &str,
        count: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        todo!()
    }
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        todo!()
    }
}
