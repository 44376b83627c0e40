//! The embedded store: a map with expiry and a bound; knows nothing of channels.

use std::time::Duration;

use bytes::Bytes;

use crate::store::{LogEntry, StoreError};

/// Keys and logs of this process. Clones share one state.
#[derive(Clone, Default)]
pub struct MemoryStore {}

#[allow(unused_variables)]
impl MemoryStore {
    pub(super) fn load(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        todo!()
    }
    pub(super) fn save(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), StoreError> {
        todo!()
    }
    pub(super) fn remove(&self, key: &str) -> Result<bool, StoreError> {
        todo!()
    }
    pub(super) fn take_if_equal(&self, key: &str, expected: &[u8]) -> Result<bool, StoreError> {
        todo!()
    }
    pub(super) fn read_log(
        &self,
        key: &str,
        after: &str,
        count: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        todo!()
    }
}
