//! Limits on handshakes: seats for connections, attempts per address, and resumes per user or session.

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
use parking_lot::{Mutex, RwLock};
use tracing::warn;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::rate::{Bucket, Rate, shared::SharedRate};

use crate::telemetry::{
    counter::Counter,
    scrape::{Scrape, Section, Source},
};

/// Metrics of the limits on handshakes.
#[derive(Debug)]
pub struct Bounds {
    /// Seats for connections.
    pub connections: Arc<Seats>,
    /// Seats for handshakes whose credentials are not checked yet.
    pub handshakes: Arc<Seats>,
    /// Attempts per client address.
    pub attempts: Arc<Attempts>,
}

impl Source for Bounds {
    fn collect(&self, scrape: &mut Scrape) {
        let scrape = scrape.section(Section::Connections);
        let help = "Connections that the instance may hold";
        scrape.gauge("connections_max", help, self.connections.max() as i64);
        let help = "Handshakes whose credentials are being checked";
        scrape.gauge("handshakes_waiting", help, self.handshakes.taken() as i64);
        let help = "Attempts that were counted for a whole network, since too many addresses try";
        scrape.counter("attempts_coarse", help, self.attempts.coarse.value());
    }
}

/// A bounded number of seats. Each connection or handshake takes one.
#[derive(Debug)]
pub struct Seats {
    max: usize,
    taken: AtomicUsize,
}

/// A seat that is taken. Dropping it frees the seat.
#[derive(Debug)]
pub struct Seat(Arc<Seats>);

impl Seats {
    /// Makes `max` free seats.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, taken: AtomicUsize::new(0) })
    }

    /// Takes a seat; `None` if all are taken.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Seat> {
        let free = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, free).ok().map(|_| Seat(Arc::clone(self)))
    }

    /// Takes a seat beyond the maximum. For a client in whose favor another one is about to leave.
    #[must_use]
    pub fn take_more(self: &Arc<Self>) -> Seat {
        self.taken.fetch_add(1, Relaxed);
        Seat(Arc::clone(self))
    }

    /// Returns the number of taken seats.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// Returns whether all seats are taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.taken() >= self.max
    }

    /// Returns the number of seats.
    #[must_use]
    pub const fn max(&self) -> usize {
        self.max
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Relaxed);
    }
}

/// Limit of attempts per address and window.
///
/// Invariant: at most [`ADDRESSES_MAX`] addresses have a bucket of their own. A bucket is forgotten when it is full
/// again. Beyond the maximum, a new address shares the bucket of its network (/24, or /48 of IPv6). When too many
/// networks have one too, it shares the bucket of the larger network (/16, /32). So every attempt is counted, and
/// known addresses keep their buckets. A network's bucket allows more attempts than an address's.
#[derive(Debug)]
pub struct Attempts {
    /// Guards the limit, which a reload of the configuration replaces.
    limit: RwLock<AttemptLimit>,
    known: Mutex<Known>,
    /// Attempts that were counted for a network, since too many addresses had buckets.
    pub coarse: Counter,
}

#[derive(Debug, Clone, Copy)]
struct AttemptLimit {
    /// Rate of each level; `None`: no limit.
    rates: Option<[Rate; LEVELS]>,
    window: Duration,
}

impl AttemptLimit {
    fn new(max_requests: u32, window: Duration) -> Self {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX / 1_000_000);
        let rates = FACTORS.map(|factor| {
            let events = max_requests.saturating_mul(factor);
            Rate::new(events, window_ms, events)
        });
        let rates = match rates {
            [Some(one), Some(network), Some(larger)] => Some([one, network, larger]),
            _ => None,
        };
        Self { rates, window }
    }
}

#[derive(Debug, Default)]
struct Known {
    /// Buckets of addresses, of networks, and of larger networks.
    levels: [HashMap<IpAddr, Bucket, foldhash::fast::RandomState>; LEVELS],
    /// Bucket of all addresses for which every level is full.
    rest: Bucket,
    /// Time of the last purge. A purge visits all buckets, so it is done once a second at most.
    purged_at: u64,
    warned_at: Option<u64>,
}

impl Attempts {
    /// Allows `max_requests` per address in any `window`; 0: no limit.
    #[must_use]
    pub fn new(max_requests: u32, window: Duration) -> Self {
        let limit = RwLock::new(AttemptLimit::new(max_requests, window));
        Self { limit, known: Mutex::default(), coarse: Counter::default() }
    }

    /// Allows `max_requests` per address in any `window` from now on; 0: no limit. Earlier attempts count on.
    pub fn allow(&self, max_requests: u32, window: Duration) {
        *self.limit.write() = AttemptLimit::new(max_requests, window);
    }

    /// Counts an attempt at `now_nanos` of a monotonic clock.
    ///
    /// # Errors
    /// Time until another attempt can succeed.
    pub fn take(&self, address: IpAddr, now_nanos: u64) -> Result<(), Duration> {
        let Some(rates) = self.limit.read().rates else { return Ok(()) };
        let mut known = self.known.lock();
        let (level, bucket) = known.bucket(address, now_nanos);
        let taken = bucket.take(rates[level.min(LEVELS - 1)], now_nanos);
        drop(known);
        if level > 0 {
            self.note_coarse(now_nanos);
        }
        taken.map_err(Duration::from_nanos)
    }

    /// Notes an attempt that was counted for a whole network, and warns of these. For a family that counts attempts
    /// itself, too.
    pub fn note_coarse(&self, now_nanos: u64) {
        self.coarse.add(1);
        let warns = self.known.lock().is_time_to_warn(now_nanos);
        if warns {
            let window = self.limit.read().window;
            warn!(
                addresses = ADDRESSES_MAX,
                ?window,
                "Too many addresses try to connect: further ones are limited by network."
            );
        }
    }

    /// Forgets the buckets that are full again, and frees their memory. Called at intervals.
    pub fn forget_idle(&self, now_nanos: u64) {
        let mut known = self.known.lock();
        known.purge(now_nanos);
        known.levels.iter_mut().for_each(HashMap::shrink_to_fit);
    }
}

impl Known {
    /// Finds the bucket of the finest level that knows the address or has room for it. Also returns the level.
    fn bucket(&mut self, address: IpAddr, now_nanos: u64) -> (usize, &mut Bucket) {
        let full = |known: &Self, level: usize, key| {
            let map = &known.levels[level];
            map.len() >= MAXIMA[level] && !map.contains_key(key)
        };
        let keys = networks(address);
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

/// Returns the network that counts as one address: a user of IPv6 has a whole /64.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    prefix(address, PREFIXES[0])
}

/// Returns the network of an address at each level: one address, its network, the larger network.
#[must_use]
pub fn networks(address: IpAddr) -> [IpAddr; LEVELS] {
    PREFIXES.map(|bits| prefix(address, bits))
}

/// Masks an address to its first bits.
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

/// Limit of resumes per session and per user: a resume costs the store far more than it costs the client.
///
/// The table has a fixed size, so names may share a bucket. The bucket of a name depends on a secret of this process,
/// so that a client cannot choose a name that uses up another one's limit.
#[derive(Debug)]
pub struct Resumes {
    rate: SharedRate,
    /// Guards the buckets; none until there is a limit.
    buckets: Mutex<Vec<Bucket>>,
    secret: RandomState,
}

impl Resumes {
    /// Allows `per_second` of each name, and [`RESUMES_BURST_SECONDS`] times as many at once; 0: no limit.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        let rate = None.into();
        let resumes = Self { rate, buckets: Mutex::default(), secret: RandomState::new() };
        resumes.allow(per_second);
        resumes
    }

    /// Allows `per_second` of each name from now on; 0: no limit.
    pub fn allow(&self, per_second: u32) {
        let rate = Rate::new(per_second, 1000, per_second.saturating_mul(RESUMES_BURST_SECONDS));
        if rate.is_some() {
            self.buckets.lock().resize(RESUMES_TABLE, Bucket::default());
        }
        self.rate.store(rate);
    }

    /// Counts a resume of the session or user `name`.
    ///
    /// # Errors
    /// Time until another resume can succeed.
    pub fn take(&self, name: &str, now: Micros) -> Result<(), Duration> {
        let Some(rate) = self.rate.load() else { return Ok(()) };
        let place = self.secret.hash_one(name) % RESUMES_TABLE as u64;
        let mut buckets = self.buckets.lock();
        let taken = buckets[place as usize].take(rate, now.0.saturating_mul(1000));
        taken.map_err(Duration::from_nanos)
    }
}

/// Seconds of the rate that a name may use at once.
const RESUMES_BURST_SECONDS: u32 = 5;

/// Buckets of the table: half a MiB.
const RESUMES_TABLE: usize = 65_536;

/// Levels of buckets: addresses, networks, larger networks.
pub const LEVELS: usize = 3;

/// Bits of IPv4 and IPv6 addresses that a level distinguishes.
const PREFIXES: [(u32, u32); LEVELS] = [(32, 64), (24, 48), (16, 32)];

/// Upper bound of addresses with a bucket of their own: some 4 MB.
const ADDRESSES_MAX: usize = 100_000;

/// Upper bound of the buckets of each level.
pub const MAXIMA: [usize; LEVELS] = [ADDRESSES_MAX, 32_768, 65_536];

/// Factor by which a level allows more attempts than an address: most clients of a network do no harm.
pub const FACTORS: [u32; LEVELS] = [1, 4, 16];

const PURGE_EVERY_NANOS: u64 = 1_000_000_000;

const WARN_EVERY_NANOS: u64 = 60_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_come_back() {
        let seats = Seats::new(2);
        let (a, b) = (seats.take(), seats.take());
        assert!(a.is_some() && b.is_some() && seats.take().is_none());
        drop(a);
        assert!(seats.take().is_some());
        assert_eq!(seats.taken(), 1);
    }

    #[test]
    fn a_name_resumes_so_often_and_others_are_not_disturbed() {
        let resumes = Resumes::new(2);
        let now = Micros(1_000_000);
        assert!((0..10).all(|_| resumes.take("user:a", now).is_ok()));
        assert_eq!(resumes.take("user:a", now), Err(Duration::from_millis(500)));
        // One of these names may share the bucket of `user:a`, but not all of them.
        assert!((0..8).any(|n| resumes.take(&format!("user:{n}"), now).is_ok()));
        assert!(resumes.take("user:a", Micros(1_500_000)).is_ok());
        assert!((0..1000).all(|_| Resumes::new(0).take("user:a", now).is_ok()));
    }

    #[test]
    fn limits_change_while_they_are_in_use() {
        let (attempts, resumes) = (Attempts::new(0, Duration::from_secs(60)), Resumes::new(0));
        let now = 1_000_000_000_000;
        assert_eq!(passed(&attempts, "203.0.113.9", now), 200);
        attempts.allow(2, Duration::from_secs(60));
        assert_eq!(passed(&attempts, "203.0.113.9", now), 2);
        // The debt of the slow limit is none of the fast one.
        attempts.allow(200, Duration::from_secs(1));
        assert!(passed(&attempts, "203.0.113.9", now) > 0);
        attempts.allow(0, Duration::from_secs(1));
        assert_eq!(passed(&attempts, "203.0.113.9", now), 200);
        resumes.allow(1);
        let now = Micros(1_000_000);
        assert_eq!((0..10).filter(|_| resumes.take("user:a", now).is_ok()).count(), 5);
        resumes.allow(0);
        assert!(resumes.take("user:a", now).is_ok());
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

    /// Returns how many of 200 attempts of an address pass.
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
        // New addresses are limited by network: some of other networks, one of the flood's.
        assert_eq!(passed(&attempts, "198.51.100.1", now), 8);
        assert_eq!(passed(&attempts, "198.51.100.2", now), 0);
        assert_eq!(passed(&attempts, "198.51.101.1", now), 8);
        assert_eq!(passed(&attempts, "10.1.200.1", now), 0);
        assert!(attempts.coarse.value() > 20_000);
        // When the flood is forgotten, addresses have buckets of their own again.
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
        // Further networks of the flood share the larger network's bucket, which is used up.
        assert_eq!(passed(&attempts, "2001:db8:4000:ffff::1", now), 0);
        assert_eq!(passed(&attempts, "2001:db9::1", now), 32);
    }
}
