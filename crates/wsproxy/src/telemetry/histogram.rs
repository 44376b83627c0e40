//! A histogram for parts of an instance; knows no metrics, which read it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Histogram of whole numbers. Its buckets end at 2 to the power of `FIRST`, `FIRST + STEP`, …, and the last one has no
/// bound.
#[derive(Debug, Default)]
pub struct Histogram<const FIRST: u32, const STEP: u32> {
    counts: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl<const FIRST: u32, const STEP: u32> Histogram<FIRST, STEP> {
    /// Counts a value.
    pub fn observe(&self, value: u64) {
        let bits = u64::BITS - value.saturating_sub(1).leading_zeros();
        let bucket = bits.saturating_sub(FIRST).div_ceil(STEP) as usize;
        self.counts[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    /// Returns the upper bounds of the buckets with the count of each, and the sum of all values. `unit` is the size of
    /// the counted values' unit in that of the answer.
    #[must_use]
    pub fn read(&self, unit: f64) -> (Vec<(f64, u64)>, f64) {
        let buckets = self.counts.iter().enumerate().map(|(bucket, count)| {
            let is_last = bucket + 1 == BUCKETS;
            let bound = (1_u64 << (FIRST + STEP * bucket as u32)) as f64 * unit;
            (if is_last { f64::INFINITY } else { bound }, count.load(Relaxed))
        });
        (buckets.collect(), self.sum.load(Relaxed) as f64 * unit)
    }
}

const BUCKETS: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_counts_a_bound_in_its_bucket() {
        let times = Histogram::<4, 2>::default();
        for micros in [0, 16, 17, 64, 65, u64::from(u32::MAX)] {
            times.observe(micros);
        }
        let (buckets, sum) = times.read(1e-6);
        let counts: Vec<_> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(buckets[1].0, 64.0 * 1e-6);
        assert_eq!((buckets[11].0, sum > 4294.0), (f64::INFINITY, true));
        let sizes = Histogram::<0, 1>::default();
        for size in [0, 1, 2, 3, 1024, 1025] {
            sizes.observe(size);
        }
        let counts: Vec<_> = sizes.read(1.0).0.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    }
}
