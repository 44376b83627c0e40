//! The wall clock, for people and other programs; no timer of the instance depends on it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the present as RFC 3339 in UTC with milliseconds.
#[must_use]
pub fn rfc3339() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// Returns the time since the start of 1970 in UTC; zero if the clock is not set.
#[must_use]
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
