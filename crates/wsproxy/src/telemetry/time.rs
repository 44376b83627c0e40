//! The wall clock, for people and other programs; nothing inside depends on it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The present as RFC 3339 in UTC with milliseconds.
#[must_use]
pub fn rfc3339() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// The time since the start of 1970 in UTC; zero where the clock is not set.
#[must_use]
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
