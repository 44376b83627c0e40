//! Time as a number: microseconds of the monotonic clock since its first reading.
//!
//! The wall clock is never read, so its jumps change nothing.

use std::{sync::OnceLock, time::Duration, time::Instant};

/// Point in time, or span of time, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// Point in time that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// Stands for the time at which a message was read from the bus, for a message that was not. Its latency is not
    /// measured.
    pub const UNTIMED: Self = Self(u64::MAX - 1);

    /// Returns the point that is `span` later. [`Self::NEVER`] stays the same.
    #[must_use]
    pub const fn after(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// Returns the span from `earlier` to this point; zero where `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl From<Duration> for Micros {
    fn from(span: Duration) -> Self {
        Self(u64::try_from(span.as_micros()).unwrap_or(u64::MAX))
    }
}

impl From<Micros> for Duration {
    fn from(span: Micros) -> Self {
        Self::from_micros(span.0)
    }
}

/// Reads the clock. That takes some 20 ns: once per round, not once per message.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
pub fn now() -> Micros {
    static START: OnceLock<Instant> = OnceLock::new();
    // One second is added, so that "long ago" differs from "at the start".
    Micros::from(START.get_or_init(Instant::now).elapsed()).after(Micros(1_000_000))
}
