//! Bounds of a history's log, and the time for which its head is kept.

use std::time::Duration;

/// Bounds of a history's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Upper bound of the entries.
    pub entries_max: u64,
    /// Upper bound of the bytes of data. The newest entry stays even if it alone is larger.
    pub bytes_max: u64,
    /// Time after which an entry is removed, and after its last entry the log.
    pub ttl: Duration,
}

impl HistoryLimits {
    /// Returns the time for which the head of a log without new entries is kept. Every message and every client that
    /// opens renews it.
    #[must_use]
    pub fn head_ttl(&self) -> Duration {
        let longer = self.ttl.max(HEAD_TTL_MIN);
        longer + longer / 8
    }
}

/// Lower bound of the time for which the scripts keep heads. Workers may write with a smaller ttl than the gateway's.
const HEAD_TTL_MIN: Duration = Duration::from_secs(3600);
