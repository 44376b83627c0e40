//! The wall clock, for people and other programs; nothing inside depends on it.

use std::time::SystemTime;

/// The present as RFC 3339 in UTC with milliseconds.
#[must_use]
pub fn rfc3339() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}
