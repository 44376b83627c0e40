//! The monotonic clock of the host, which client and publisher share; knows nothing of what is timed.

use std::time::Duration;

use rustix::thread::clock_nanosleep_absolute;
use rustix::time::Timespec;
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`, the same for every process of the host.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * NS_PER_SECOND + now.tv_nsec.cast_unsigned()
}

/// Sleeps until a point of [`now_ns`]; returns at once when that point has passed.
pub fn sleep_until(at_ns: u64) {
    let request = Timespec {
        tv_sec: (at_ns / NS_PER_SECOND).cast_signed(),
        tv_nsec: (at_ns % NS_PER_SECOND).cast_signed(),
    };
    // A signal may cut the sleep short; the caller's schedule is absolute, so it only wakes early once.
    let _ = clock_nanosleep_absolute(ClockId::Monotonic, &request);
}

/// Converts a duration to nanoseconds, for arithmetic with [`now_ns`].
#[must_use]
pub fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds in a second.
pub const NS_PER_SECOND: u64 = 1_000_000_000;
