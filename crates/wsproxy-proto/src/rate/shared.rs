//! Rates that many connections read while an operator changes them; without a lock, and without a wait.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{ByteRate, Rate};

/// A [`Rate`] that can change while it is in use, or no limit.
///
/// A reader that meets a change may see one number of the old rate beside one of the new rate. That concerns one event,
/// and [`Bucket`](super::Bucket) forgives a debt that the next rate cannot have.
#[derive(Debug)]
pub struct SharedRate {
    /// [`NO_LIMIT`] where there is none.
    interval: AtomicU64,
    tolerance: AtomicU64,
}

/// A [`ByteRate`] that can change while it is in use, or no limit. As for [`SharedRate`], a change may be seen in part.
#[derive(Debug)]
pub struct SharedByteRate {
    /// [`NO_LIMIT`] where there is none.
    per_second: AtomicU64,
    /// `tolerance` in the high half, `owed_max` in the low one.
    owed: AtomicU64,
}

impl SharedRate {
    /// Returns the rate in force.
    #[must_use]
    pub fn load(&self) -> Option<Rate> {
        let interval = self.interval.load(Relaxed);
        let tolerance = self.tolerance.load(Relaxed);
        (interval != NO_LIMIT).then_some(Rate { interval, tolerance })
    }

    /// Replaces the rate.
    pub fn store(&self, rate: Option<Rate>) {
        let (interval, tolerance) =
            rate.map_or((NO_LIMIT, 0), |rate| (rate.interval, rate.tolerance));
        self.interval.store(interval, Relaxed);
        self.tolerance.store(tolerance, Relaxed);
    }
}

impl From<Option<Rate>> for SharedRate {
    fn from(rate: Option<Rate>) -> Self {
        let shared = Self { interval: AtomicU64::new(NO_LIMIT), tolerance: AtomicU64::new(0) };
        shared.store(rate);
        shared
    }
}

impl SharedByteRate {
    /// Returns the rate in force.
    #[must_use]
    pub fn load(&self) -> Option<ByteRate> {
        let per_second = self.per_second.load(Relaxed);
        let owed = self.owed.load(Relaxed);
        let (tolerance, owed_max) = ((owed >> 32) as u32, owed as u32);
        (per_second != NO_LIMIT).then_some(ByteRate { per_second, tolerance, owed_max })
    }

    /// Replaces the rate.
    pub fn store(&self, rate: Option<ByteRate>) {
        let (per_second, owed) = rate.map_or((NO_LIMIT, 0), |rate| {
            (rate.per_second, u64::from(rate.tolerance) << 32 | u64::from(rate.owed_max))
        });
        self.per_second.store(per_second, Relaxed);
        self.owed.store(owed, Relaxed);
    }
}

impl From<Option<ByteRate>> for SharedByteRate {
    fn from(rate: Option<ByteRate>) -> Self {
        let shared = Self { per_second: AtomicU64::new(NO_LIMIT), owed: AtomicU64::new(0) };
        shared.store(rate);
        shared
    }
}

/// Number that no rate has.
const NO_LIMIT: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_rate_is_the_one_that_was_stored() {
        let shared = SharedRate::from(None);
        assert_eq!(shared.load(), None);
        for rate in [Rate::new(1, 1000, 1), Rate::new(1_000_000, 1000, 2_000_000), None] {
            shared.store(rate);
            assert_eq!(shared.load(), rate);
        }
        let bytes = SharedByteRate::from(ByteRate::new(1, usize::MAX, usize::MAX));
        assert_eq!(bytes.load(), ByteRate::new(1, usize::MAX, usize::MAX));
        for rate in [ByteRate::new(4 << 20, 8 << 20, 65_536), None] {
            bytes.store(rate);
            assert_eq!(bytes.load(), rate);
        }
    }
}
