//! Who may try at all: how many connections there are, and how often an address comes.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tracing::warn;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::rate::{Bucket, Rate};

use crate::telemetry::counter::Counter;

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

    /// Takes a place although there may be none, for somebody whose predecessor is about to leave.
    #[must_use]
    pub fn take_more(self: &Arc<Self>) -> Place {
        self.taken.fetch_add(1, Relaxed);
        Place(Arc::clone(self))
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.taken() >= self.max
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
/// An address is remembered as long as it owes something. Invariant: at most [`ADDRESSES_MAX`] addresses are
/// remembered one by one. While there are as many, a further one shares a bucket with its network (/24, or /48 of
/// IPv6), and where too many of these are known, with the larger one around it (/16, /32); so nobody is let through
/// uncounted, and those remembered before stay what they were. A network's bucket allows more than an address's.
#[derive(Debug)]
pub struct Attempts {
    /// By level; `None`: no limit.
    rates: Option<[Rate; LEVELS]>,
    window: Duration,
    known: Mutex<Known>,
    /// Attempts that were counted for a network, since too many addresses were known.
    pub coarse: Counter,
}

#[derive(Debug, Default)]
struct Known {
    /// One by one, then networks, then larger ones.
    levels: [HashMap<IpAddr, Bucket, foldhash::fast::RandomState>; LEVELS],
    /// For those who have no place even in the last of these.
    rest: Bucket,
    /// Looking through all of them is only worth it now and then.
    purged_at: u64,
    warned_at: Option<u64>,
}

impl Attempts {
    /// `max_requests` in any `window`; 0: no limit.
    #[must_use]
    pub fn new(max_requests: u32, window: Duration) -> Self {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX / 1_000_000);
        let rates = FACTORS.map(|factor| {
            let events = max_requests.saturating_mul(factor);
            Rate::new(events, window_ms, events)
        });
        let [Some(one), Some(network), Some(larger)] = rates else {
            return Self {
                rates: None,
                window,
                known: Mutex::default(),
                coarse: Counter::default(),
            };
        };
        let rates = Some([one, network, larger]);
        Self { rates, window, known: Mutex::default(), coarse: Counter::default() }
    }

    /// Counts an attempt at `now_nanos` of a monotonic clock.
    ///
    /// # Errors
    /// How long until another one can succeed.
    pub fn take(&self, address: IpAddr, now_nanos: u64) -> Result<(), Duration> {
        let Some(rates) = self.rates else { return Ok(()) };
        let mut known = self.known.lock();
        let (level, bucket) = known.bucket(address, now_nanos);
        let taken = bucket.take(rates[level.min(LEVELS - 1)], now_nanos);
        let warns = level > 0 && known.is_time_to_warn(now_nanos);
        drop(known);
        if level > 0 {
            self.coarse.add(1);
        }
        if warns {
            warn!(addresses = ADDRESSES_MAX, window = ?self.window,
                "Too many addresses try to connect: further ones are limited by network.");
        }
        taken.map_err(Duration::from_nanos)
    }

    /// Forgets who has nothing owed; called now and then.
    pub fn forget_idle(&self, now_nanos: u64) {
        let mut known = self.known.lock();
        known.purge(now_nanos);
        known.levels.iter_mut().for_each(HashMap::shrink_to_fit);
    }
}

impl Known {
    /// The finest bucket for an address that is known or has room, and its level.
    fn bucket(&mut self, address: IpAddr, now_nanos: u64) -> (usize, &mut Bucket) {
        let full = |known: &Self, level: usize, key| {
            let map = &known.levels[level];
            map.len() >= MAXIMA[level] && !map.contains_key(key)
        };
        let keys = PREFIXES.map(|bits| prefix(address, bits));
        if full(self, 0, &keys[0]) && now_nanos.saturating_sub(self.purged_at) > PURGE_EVERY_NANOS {
            self.purge(now_nanos);
        }
        match (0..LEVELS).find(|&level| !full(self, level, &keys[level])) {
            Some(level) => (level, self.levels[level].entry(keys[level]).or_default()),
            None => (LEVELS, &mut self.rest),
        }
    }

    fn is_time_to_warn(&mut self, now_nanos: u64) -> bool {
        let is_due = |at: u64| now_nanos.saturating_sub(at) > WARN_EVERY_NANOS;
        let is_time = self.warned_at.is_none_or(is_due);
        if is_time {
            self.warned_at = Some(now_nanos);
        }
        is_time
    }

    fn purge(&mut self, now_nanos: u64) {
        for map in &mut self.levels {
            map.retain(|_, bucket| !bucket.is_idle(now_nanos));
        }
        self.purged_at = now_nanos;
    }
}

/// What counts as one address: a user of IPv6 has a whole /64.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    prefix(address, PREFIXES[0])
}

/// The first so many bits of an address of each family.
fn prefix(address: IpAddr, (v4_bits, v6_bits): (u32, u32)) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - v4_bits).unwrap_or(0);
            IpAddr::from((u32::from(v4) & mask).to_be_bytes())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - v6_bits).unwrap_or(0);
            IpAddr::from((u128::from(v6) & mask).to_be_bytes())
        }
    }
}

/// Resumes of each session and each user: to read what was missed costs the store far more than it costs a client to
/// ask for it.
///
/// The table has a fixed size. A secret of this process says which place a name has, so that nobody can choose
/// whose limit he shares.
#[derive(Debug)]
pub struct Resumes {
    /// `None`: no limit.
    rate: Option<Rate>,
    buckets: Mutex<Vec<Bucket>>,
    secret: RandomState,
}

impl Resumes {
    /// `per_second` of each name, and [`RESUMES_BURST_SECONDS`] times as many at once; 0: no limit.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        let rate = Rate::new(per_second, 1000, per_second.saturating_mul(RESUMES_BURST_SECONDS));
        let places = if rate.is_some() { RESUMES_TABLE } else { 0 };
        let buckets = Mutex::new(vec![Bucket::default(); places]);
        Self { rate, buckets, secret: RandomState::new() }
    }

    /// Counts a resume of whoever has this `name`, at `now`.
    ///
    /// # Errors
    /// How long until another one can succeed.
    pub fn take(&self, name: &str, now: Micros) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        let place = self.secret.hash_one(name) % RESUMES_TABLE as u64;
        let mut buckets = self.buckets.lock();
        let taken = buckets[place as usize].take(rate, now.0.saturating_mul(1000));
        taken.map_err(Duration::from_nanos)
    }
}

const RESUMES_BURST_SECONDS: u32 = 5;

/// Half a MiB.
const RESUMES_TABLE: usize = 65_536;

const LEVELS: usize = 3;

/// Bits that a level looks at, of IPv4 and of IPv6.
const PREFIXES: [(u32, u32); LEVELS] = [(32, 64), (24, 48), (16, 32)];

/// Most addresses that are remembered one by one: some 4 MB.
const ADDRESSES_MAX: usize = 100_000;

/// Buckets of a level at most.
const MAXIMA: [usize; LEVELS] = [ADDRESSES_MAX, 32_768, 65_536];

/// A network has so many times the attempts of an address: not everybody there is an offender.
const FACTORS: [u32; LEVELS] = [1, 4, 16];

const PURGE_EVERY_NANOS: u64 = 1_000_000_000;

const WARN_EVERY_NANOS: u64 = 60_000_000_000;

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
    fn a_name_resumes_so_often_and_others_are_not_disturbed() {
        let resumes = Resumes::new(2);
        let now = Micros(1_000_000);
        assert!((0..10).all(|_| resumes.take("user:a", now).is_ok()));
        assert_eq!(resumes.take("user:a", now), Err(Duration::from_millis(500)));
        // One name of a few may share its place; all of them cannot.
        assert!((0..8).any(|n| resumes.take(&format!("user:{n}"), now).is_ok()));
        assert!(resumes.take("user:a", Micros(1_500_000)).is_ok());
        assert!((0..1000).all(|_| Resumes::new(0).take("user:a", now).is_ok()));
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
        assert!(attempts.known.lock().levels.iter().all(HashMap::is_empty));
    }

    /// Attempts of an address that pass, of ten times as many as it may have.
    fn passed(attempts: &Attempts, address: &str, now: u64) -> usize {
        let address = address.parse().unwrap();
        (0..200).filter(|_| attempts.take(address, now).is_ok()).count()
    }

    #[test]
    fn offenders_stay_offenders_however_many_addresses_come() {
        let attempts = Attempts::new(2, Duration::from_secs(3600));
        let now = 1_000_000_000_000;
        assert_eq!(passed(&attempts, "203.0.113.9", now), 2);
        assert_eq!(attempts.coarse.value(), 0);
        for n in 0..120_000_u32 {
            let _ = attempts.take(IpAddr::from((0x0a00_0000 + n).to_be_bytes()), now);
        }
        assert_eq!(passed(&attempts, "203.0.113.9", now), 0);
        // Others are limited by network: one that is new, one that the flood came from.
        assert_eq!(passed(&attempts, "198.51.100.1", now), 8);
        assert_eq!(passed(&attempts, "198.51.100.2", now), 0);
        assert_eq!(passed(&attempts, "198.51.101.1", now), 8);
        assert_eq!(passed(&attempts, "10.1.200.1", now), 0);
        assert!(attempts.coarse.value() > 20_000);
        // Once the flood is forgotten all is as it was.
        assert_eq!(passed(&attempts, "198.51.100.2", now + 3_600_000_000_001 * 2), 2);
    }

    #[test]
    fn a_flood_from_a_large_ipv6_network_leaves_others_their_attempts() {
        let attempts = Attempts::new(2, Duration::from_secs(3600));
        let now = 1_000_000_000_000;
        for n in 0..300_000_u128 {
            // A new /48 each time, all of one /32.
            let address =
                0x2001_0db8_0000_0000_0000_0000_0000_0001 | (n % 65_536) << 80 | (n >> 16) << 64;
            let _ = attempts.take(IpAddr::from(address.to_be_bytes()), now);
        }
        let known = attempts.known.lock();
        let sizes = known.levels.each_ref().map(HashMap::len);
        drop(known);
        assert_eq!(sizes, [ADDRESSES_MAX, 32_768, 1]);
        // Its networks that have no bucket of their own share what the larger one has, which is used up.
        assert_eq!(passed(&attempts, "2001:db8:4000:ffff::1", now), 0);
        assert_eq!(passed(&attempts, "2001:db9::1", now), 32);
    }
}
