//! Who may try at all: how many connections there are, and how often an address comes.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_proto::rate::{Bucket, Rate};

/// Most addresses remembered. An attacker with more of them has to wait for nobody to be forgotten.
const ADDRESSES_MAX: usize = 100_000;

const PURGE_EVERY_NANOS: u64 = 1_000_000_000;

/// A number of places.
#[derive(Debug)]
pub struct Places {
    max: usize,
    taken: AtomicUsize,
}

/// A place that is taken; dropping it frees it.
#[derive(Debug)]
pub struct Place(Arc<Places>);

impl Places {
    /// So many.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: AtomicUsize::new(0) })
    }

    /// Takes a place, if there is one.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Place> {
        let free = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, free).ok().map(|_| Place(Arc::clone(self)))
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// How many there are.
    #[must_use]
    pub const fn max(&self) -> usize {
        self.max
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Relaxed);
    }
}

/// Attempts per address and window.
///
/// Invariant: remembers at most `ADDRESSES_MAX` addresses. When they are full of active ones, a
/// further address is let through uncounted: shutting everybody out would be the attacker's aim.
#[derive(Debug)]
pub struct Attempts {
    rate: Option<Rate>,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    by_address: HashMap<IpAddr, Bucket, foldhash::fast::RandomState>,
    /// Looking through all of them is only worth it now and then.
    purged_at: u64,
}

impl Attempts {
    /// `max_requests` in any `window`; 0: no limit.
    #[must_use]
    pub fn new(max_requests: u32, window: Duration) -> Self {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX / 1_000_000);
        Self { rate: Rate::new(max_requests, window_ms, max_requests), buckets: Mutex::default() }
    }

    /// Counts an attempt at `now_nanos` of a monotonic clock.
    ///
    /// # Errors
    /// How long until another one can succeed.
    pub fn take(&self, address: IpAddr, now_nanos: u64) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        let mut buckets = self.buckets.lock();
        if buckets.by_address.len() >= ADDRESSES_MAX {
            if now_nanos.saturating_sub(buckets.purged_at) > PURGE_EVERY_NANOS {
                buckets.purge(now_nanos);
            }
            if buckets.by_address.len() >= ADDRESSES_MAX {
                return Ok(());
            }
        }
        let bucket = buckets.by_address.entry(network(address)).or_default();
        bucket.take(rate, now_nanos).map_err(Duration::from_nanos)
    }

    /// Forgets who has nothing owed; called now and then.
    pub fn forget_idle(&self, now_nanos: u64) {
        let mut buckets = self.buckets.lock();
        buckets.purge(now_nanos);
        buckets.by_address.shrink_to_fit();
    }
}

impl Buckets {
    fn purge(&mut self, now_nanos: u64) {
        self.by_address.retain(|_, bucket| !bucket.is_idle(now_nanos));
        self.purged_at = now_nanos;
    }
}

/// An IPv6 user has a whole /64, so that is what counts as one address.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) & !u128::from(u64::MAX)).to_be_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back() {
        let places = Places::new(2);
        let (a, b) = (places.take(), places.take());
        assert!(a.is_some() && b.is_some() && places.take().is_none());
        drop(a);
        assert!(places.take().is_some());
        assert_eq!(places.taken(), 1);
    }

    #[test]
    fn an_address_is_told_how_long_to_wait_and_others_are_not_disturbed() {
        let attempts = Attempts::new(60, Duration::from_secs(60));
        let now = 1_000_000_000_000;
        let (a, b) = ("2001:db8::1".parse().unwrap(), "2001:db8:0:1::1".parse().unwrap());
        assert!((0..60).all(|_| attempts.take(a, now).is_ok()));
        assert_eq!(attempts.take("2001:db8::2".parse().unwrap(), now), Err(Duration::from_secs(1)));
        assert!(attempts.take(b, now).is_ok());
        attempts.forget_idle(now + 3_600_000_000_000);
        assert_eq!(attempts.buckets.lock().by_address.len(), 0);
    }
}
