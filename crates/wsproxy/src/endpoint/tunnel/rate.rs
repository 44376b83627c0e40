//! The rate of requests of one client to one cluster. Knows no client but the hash of its token or user.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::{
    names::Id,
    rate::{Bucket, Rate},
};

use crate::config::tunnel::rows::TokenHash;

/// Rates of all clients and clusters.
///
/// Bound: at most [`PAIRS_MAX`] pairs of a client and a cluster have a bucket of their own. One that owes nothing any
/// more is forgotten. Beyond the maximum, a pair shares one of [`SHARED`] buckets, so that every request is counted.
#[derive(Debug)]
pub struct Rates {
    /// `None`: no limit.
    rate: Option<Rate>,
    /// Guards the buckets; held for a few steps, or a look at all of them once a second.
    buckets: Mutex<Buckets>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Buckets {
    pairs: HashMap<(TokenHash, Id), Bucket>,
    shared: Vec<Bucket>,
    purged_at: u64,
}

impl Rates {
    /// Allows `per_second` requests, and twice as many at once; 0: no limit.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        let pairs = HashMap::new();
        let shared = vec![Bucket::default(); SHARED];
        Self {
            rate: Rate::new(per_second, 1000, per_second.saturating_mul(2)),
            buckets: Mutex::new(Buckets { pairs, shared, purged_at: 0 }),
            hasher: RandomState::new(),
        }
    }

    /// Counts a request.
    ///
    /// # Errors
    /// Time until the next one passes.
    pub fn take(
        &self,
        client: TokenHash,
        cluster: &Id,
        Micros(now): Micros,
    ) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        let nanos = now.saturating_mul(1000);
        let mut buckets = self.buckets.lock();
        let key = (client, cluster.clone());
        if buckets.pairs.len() >= PAIRS_MAX && !buckets.pairs.contains_key(&key) {
            buckets.purge(nanos);
        }
        let taken = if buckets.pairs.len() < PAIRS_MAX || buckets.pairs.contains_key(&key) {
            buckets.pairs.entry(key).or_default().take(rate, nanos)
        } else {
            let place = self.hasher.hash_one(&key) as usize % SHARED;
            buckets.shared[place].take(rate, nanos)
        };
        taken.map_err(Duration::from_nanos)
    }
}

impl Buckets {
    /// Forgets pairs that owe nothing. That looks at all of them, so it is done once a second at most.
    fn purge(&mut self, now: u64) {
        if now.saturating_sub(self.purged_at) >= PURGE_EVERY {
            self.purged_at = now;
            self.pairs.retain(|_, bucket| !bucket.is_idle(now));
        }
    }
}

/// Upper bound of the pairs with a bucket of their own.
const PAIRS_MAX: usize = 16_384;

/// Buckets that other pairs share.
const SHARED: usize = 256;

/// Nanoseconds between two purges.
const PURGE_EVERY: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn credential(number: usize) -> TokenHash {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&number.to_be_bytes());
        TokenHash(hash)
    }

    fn passed(rates: &Rates, number: usize, cluster: &str, now: u64) -> usize {
        let cluster = Id::parse(cluster).unwrap();
        let take = || rates.take(credential(number), &cluster, Micros(now)).is_ok();
        (0..100).filter(|_| take()).count()
    }

    #[test]
    fn a_credential_has_a_rate_for_each_cluster() {
        let (rates, now) = (Rates::new(5), 50 * SECOND);
        assert_eq!(passed(&rates, 1, "a", now), 10);
        assert_eq!(passed(&rates, 1, "b", now), 10);
        assert_eq!(passed(&rates, 2, "a", now), 10);
        let cluster = Id::parse("a").unwrap();
        let wait = rates.take(credential(1), &cluster, Micros(now)).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        assert_eq!(passed(&rates, 1, "a", now + SECOND), 5);
        assert_eq!(passed(&rates, 1, "a", now + 100 * SECOND), 10);
    }

    #[test]
    fn without_a_rate_all_requests_pass() {
        let rates = Rates::new(0);
        assert_eq!(passed(&rates, 1, "a", 0), 100);
        assert!(rates.buckets.lock().pairs.is_empty());
        let fast = Rates::new(u32::MAX);
        assert_eq!(passed(&fast, 1, "a", 0), 100);
    }

    #[test]
    fn many_credentials_are_bounded_and_still_counted() {
        let (rates, now) = (Rates::new(1), 50 * SECOND);
        assert_eq!(passed(&rates, 0, "a", now), 2);
        let flood: usize = (1..3 * PAIRS_MAX)
            .map(|n| {
                let cluster = Id::parse("a").unwrap();
                usize::from(rates.take(credential(n), &cluster, Micros(now)).is_ok())
            })
            .sum();
        assert_eq!(rates.buckets.lock().pairs.len(), PAIRS_MAX);
        assert!(flood < PAIRS_MAX + 2 * SHARED, "{flood}");
        assert_eq!(passed(&rates, 0, "a", now), 0, "a known pair has its bucket");
        // When the flood owes nothing, a new pair has its own bucket again.
        assert_eq!(passed(&rates, 9 * PAIRS_MAX, "a", now + 10 * SECOND), 2);
        assert_eq!(rates.buckets.lock().pairs.len(), 1);
    }
}
