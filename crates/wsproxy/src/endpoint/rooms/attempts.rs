//! The limit of attempts to open a room: a sliding window for each user and each client address. Knows no tokens.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::{Mutex, RwLock};
use wsproxy_conn::clock::Micros;
use wsproxy_proto::names::Id;

use crate::{
    config::{RateLimit, rooms::ROOM_ATTEMPTS},
    core::admission::{Attempts, FACTORS, LEVELS, MAXIMA, networks},
    http::rejection::Rejection,
};

/// The limit of attempts to open a room.
///
/// An attempt with a valid token counts for its user, every other one for the client's address. Refused attempts do not
/// count, so a client that waits as long as it was told is accepted.
///
/// Users and addresses have a table each: addresses of a flood take no room from users.
#[derive(Debug)]
pub(super) struct RoomAttempts {
    /// Guards the limit, which a reload of the configuration replaces; `None`: no limit.
    limit: RwLock<Option<Limit>>,
    users: Mutex<Table<u64>>,
    addresses: Mutex<Table<IpAddr>>,
    /// Users are known by a hash with this secret, so that no user can choose whom to share a window with.
    secret: RandomState,
    /// Counts the attempts that share a window, of all families.
    shared: Arc<Attempts>,
}

/// The subject that an attempt counts for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subject<'s> {
    /// The user of a valid token.
    User(&'s Id),
    /// The address of a client without one.
    Address(IpAddr),
}

impl RoomAttempts {
    /// Reads the limit from the configuration. `shared` counts the attempts that share a window with those of others.
    #[must_use]
    pub(super) fn new(config: &RateLimit, shared: &Arc<Attempts>) -> Self {
        let (users, addresses) = (Mutex::default(), Mutex::default());
        let (limit, shared) = (RwLock::new(Limit::new(config)), Arc::clone(shared));
        Self { limit, users, addresses, secret: RandomState::new(), shared }
    }

    /// Reads the limit from another configuration. Earlier attempts count on, unless there is no limit any more.
    pub(super) fn allow(&self, config: &RateLimit) {
        let limit = Limit::new(config);
        *self.limit.write() = limit;
        if limit.is_none() {
            *self.users.lock() = Table::default();
            *self.addresses.lock() = Table::default();
        }
    }

    /// Returns whether there is a limit.
    #[must_use]
    pub(super) fn is_on(&self) -> bool {
        self.limit.read().is_some()
    }

    /// Checks whether an address may try again, before its token is looked at. Counts nothing.
    ///
    /// # Errors
    /// 429: the address has used up its attempts.
    pub(super) fn check_address(&self, address: IpAddr, now: Micros) -> Result<(), Rejection> {
        let Some(limit) = *self.limit.read() else { return Ok(()) };
        let (wait, level) = self.addresses.lock().wait(networks(address), limit, now);
        let Some(wait) = wait else { return Ok(()) };
        if level != Some(0) {
            self.shared.note_coarse(now.0.saturating_mul(1000));
        }
        Err(Rejection::too_often_for_rooms(wait))
    }

    /// Counts an attempt.
    ///
    /// # Errors
    /// 429: the user or the address has used up its attempts.
    pub(super) fn count(&self, subject: Subject<'_>, now: Micros) -> Result<(), Rejection> {
        let Some(limit) = *self.limit.read() else { return Ok(()) };
        let (counted, level) = match subject {
            Subject::User(user) => {
                let hash = self.secret.hash_one(user.as_str());
                let keys = [hash, hash % MAXIMA[1] as u64, hash % LAST_USERS];
                self.users.lock().count(keys, limit, now)
            }
            Subject::Address(address) => self.addresses.lock().count(networks(address), limit, now),
        };
        match subject {
            _ if level == Some(0) => {}
            Subject::User(_) => self.shared.coarse.add(1),
            Subject::Address(_) => self.shared.note_coarse(now.0.saturating_mul(1000)),
        }
        counted.map_err(Rejection::too_often_for_rooms)
    }
}

/// The limit, in the numbers that the tables need.
#[derive(Debug, Clone, Copy)]
struct Limit {
    attempts: u32,
    window: u64,
    /// Attempts within this time share an entry. One microsecond unless the limit is high.
    grain: u64,
}

impl Limit {
    fn new(config: &RateLimit) -> Option<Self> {
        let attempts = config.max_requests_or(ROOM_ATTEMPTS);
        let window = Micros::from(config.window).0;
        let grain = if attempts <= EXACT_MAX { 1 } else { window.div_ceil(EXACT_MAX.into()) };
        (attempts > 0).then_some(Self { attempts, window, grain })
    }

    /// Returns the attempts that a key of this level may make.
    fn attempts_of(self, level: Option<usize>) -> u32 {
        self.attempts.saturating_mul(FACTORS[level.unwrap_or(LEVELS - 1)])
    }
}

/// The windows of users or of addresses.
///
/// Invariant: at most [`MAXIMA`] keys are known at each level. Beyond that a new key of the first level shares the window
/// of the next one, which allows more attempts: addresses that of their network, users one that a part of all users
/// share. Where no level has room, keys share one window. From [`ENTRIES_MAX`] entries on, windows are kept in fewer and
/// coarser entries, which end late rather than early.
#[derive(Debug)]
struct Table<K> {
    levels: [HashMap<K, Window, foldhash::fast::RandomState>; LEVELS],
    /// Window of all keys for which every level is full.
    rest: Window,
    /// Entries of all levels.
    entries: usize,
    cleaned_at: u64,
}

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self { levels: Default::default(), rest: Window::default(), entries: 0, cleaned_at: 0 }
    }
}

impl<K: Eq + std::hash::Hash + Copy> Table<K> {
    /// Returns the time until another attempt can succeed; `None` if it can now. Also returns the level of the window.
    fn wait(
        &mut self,
        keys: [K; LEVELS],
        limit: Limit,
        Micros(now): Micros,
    ) -> (Option<Duration>, Option<usize>) {
        self.clean(limit, now);
        let level = self.level(&keys);
        let window = match level {
            Some(level) => self.levels[level].get(&keys[level]),
            None => Some(&self.rest),
        };
        let wait =
            window.and_then(|window| window.wait(limit.attempts_of(level), limit.window, now));
        (wait, level)
    }

    /// Counts an attempt, or returns the time until one can succeed. Also returns the level of the window.
    fn count(
        &mut self,
        keys: [K; LEVELS],
        limit: Limit,
        Micros(now): Micros,
    ) -> (Result<(), Duration>, Option<usize>) {
        self.clean(limit, now);
        let is_crowded = self.entries >= ENTRIES_MAX;
        let grain = if is_crowded { limit.window.div_ceil(COARSE_PARTS) } else { limit.grain };
        let level = self.level(&keys);
        let window = match level {
            Some(level) => self.levels[level].entry(keys[level]).or_default(),
            None => &mut self.rest,
        };
        let before = window.0.len();
        window.forget(limit.window, now);
        let wait = window.wait(limit.attempts_of(level), limit.window, now);
        if wait.is_none() {
            window.add(now.next_multiple_of(grain));
        }
        if level.is_some() {
            self.entries = self.entries - before + window.0.len();
        }
        (wait.map_or(Ok(()), Err), level)
    }

    /// Returns the finest level that knows the key or has room for it.
    fn level(&self, keys: &[K; LEVELS]) -> Option<usize> {
        (0..LEVELS).find(|&level| {
            let map = &self.levels[level];
            map.len() < MAXIMA[level] || map.contains_key(&keys[level])
        })
    }

    /// Forgets the keys whose attempts have left the window: at intervals, and more often while there is no room. That
    /// visits all keys.
    fn clean(&mut self, limit: Limit, now: u64) {
        let is_full = self.levels[0].len() >= MAXIMA[0] || self.entries >= ENTRIES_MAX;
        let every = if is_full { CLEAN_FULL_EVERY } else { CLEAN_EVERY };
        if now.saturating_sub(self.cleaned_at) < every {
            return;
        }
        self.cleaned_at = now;
        self.entries = 0;
        for map in &mut self.levels {
            map.retain(|_, window| {
                window.forget(limit.window, now);
                self.entries += window.0.len();
                !window.0.is_empty()
            });
            map.shrink_to_fit();
        }
    }
}

/// The attempts of one key that are not older than the window, the oldest first: their time, and their number.
#[derive(Debug, Default)]
struct Window(VecDeque<(u64, u32)>);

impl Window {
    /// Forgets the attempts that have left the window.
    fn forget(&mut self, window: u64, now: u64) {
        let gone = self.0.partition_point(|(at, _)| at.saturating_add(window) <= now);
        self.0.drain(..gone);
    }

    /// Returns the time until there are fewer than `attempts`; `None` if there are now.
    fn wait(&self, attempts: u32, window: u64, now: u64) -> Option<Duration> {
        let gone = self.0.partition_point(|(at, _)| at.saturating_add(window) <= now);
        let counted = self.0.range(gone..);
        let made: u64 = counted.clone().map(|(_, number)| u64::from(*number)).sum();
        let (oldest, _) = counted.clone().next().filter(|_| made >= u64::from(attempts))?;
        Some(Duration::from_micros(oldest.saturating_add(window).saturating_sub(now)))
    }

    /// Adds an attempt.
    fn add(&mut self, at: u64) {
        match self.0.back_mut() {
            // Times were rounded up, perhaps to another grain.
            Some((newest, number)) if at <= *newest => *number = number.saturating_add(1),
            _ => self.0.push_back((at, 1)),
        }
    }
}

/// Highest limit for which every attempt has an entry of its own, and the most entries of a window.
const EXACT_MAX: u32 = 1000;

/// Entries of a table from which on windows have few entries: 8 MB.
const ENTRIES_MAX: usize = 500_000;

/// Entries of a window in a table with [`ENTRIES_MAX`].
const COARSE_PARTS: u64 = 16;

/// Windows that all users share for which no level has room.
const LAST_USERS: u64 = 256;

const CLEAN_EVERY: u64 = 60_000_000;

const CLEAN_FULL_EVERY: u64 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn attempts(max_requests: u32, seconds: u64) -> RoomAttempts {
        let window = Duration::from_secs(seconds);
        of(&RateLimit { max_requests, max_requests_is_set: true, window })
    }

    fn of(config: &RateLimit) -> RoomAttempts {
        RoomAttempts::new(config, &Arc::new(Attempts::new(0, config.window)))
    }

    fn address(text: &str) -> Subject<'_> {
        Subject::Address(text.parse().unwrap())
    }

    /// Returns the seconds that a refusal names; 0 if there is none.
    fn wait(result: Result<(), Rejection>) -> u64 {
        result.err().map_or(0, |refused| {
            let seconds = refused.retry_after.unwrap().as_micros().div_ceil(1_000_000) as u64;
            let told = format!("Rate limit exceeded. Try again in {} seconds.", seconds.max(1));
            assert_eq!(refused.message, told);
            seconds.max(1)
        })
    }

    #[test]
    fn rooms_have_a_limit_unless_an_operator_switches_it_off() {
        let default = of(&RateLimit::default());
        let at = |second: u64| Micros(100 * SECOND + second * SECOND);
        assert!((0..60).all(|n| default.count(address("192.0.2.1"), at(n / 2)).is_ok()));
        assert_eq!(wait(default.count(address("192.0.2.1"), at(30))), 30);
        let off = attempts(0, 60);
        assert!(!off.is_on() && default.is_on());
        assert!((0..1000).all(|_| off.count(address("192.0.2.1"), at(0)).is_ok()));
        assert!(off.check_address("192.0.2.1".parse().unwrap(), at(0)).is_ok());
    }

    #[test]
    fn a_changed_limit_holds_for_the_next_attempt() {
        let attempts = attempts(3, 60);
        let (user, now) = (address("192.0.2.1"), Micros(100 * SECOND));
        let made = || (0..9).filter(|_| attempts.count(user, now).is_ok()).count();
        assert_eq!(made(), 3);
        let allow = |max_requests, is_set| {
            attempts.allow(&RateLimit {
                max_requests,
                max_requests_is_set: is_set,
                window: Duration::from_secs(60),
            });
        };
        allow(5, true);
        assert_eq!(made(), 2, "earlier attempts count");
        allow(0, true);
        assert!(!attempts.is_on() && attempts.addresses.lock().entries == 0);
        allow(0, false);
        assert!(attempts.is_on(), "the default of rooms");
    }

    #[test]
    fn a_client_that_waits_as_told_is_accepted() {
        let attempts = attempts(3, 60);
        let start = 5 * SECOND + 1;
        for at in [0, 10 * SECOND + 1, 20 * SECOND] {
            assert!(attempts.count(address("192.0.2.1"), Micros(start + at)).is_ok());
        }
        let at = |micros: u64| attempts.count(address("192.0.2.1"), Micros(start + micros));
        // Refused attempts do not count, or a client that tries too early would wait for ever.
        assert_eq!(wait(at(20 * SECOND)), 40);
        assert_eq!(wait(at(59 * SECOND)), 1);
        assert_eq!(wait(at(60 * SECOND - 1)), 1);
        assert!(at(60 * SECOND).is_ok());
        // The window slides: the next attempt of the old ones leaves it ten seconds later.
        assert_eq!(wait(at(60 * SECOND)), 11);
        assert!(at(71 * SECOND).is_ok());
        assert_eq!(wait(at(71 * SECOND)), 9);
    }

    #[test]
    fn users_and_addresses_are_counted_apart() {
        let attempts = attempts(2, 60);
        let [ann, bob] = ["ann", "bob"].map(|user| Id::parse(user).unwrap());
        let now = Micros(SECOND);
        let shared: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..2 {
            assert!(attempts.count(Subject::User(&ann), now).is_ok());
            assert!(attempts.count(Subject::Address(shared), now).is_ok());
        }
        assert!(attempts.count(Subject::User(&ann), now).is_err());
        assert!(attempts.count(Subject::User(&bob), now).is_ok());
        assert_eq!(wait(attempts.check_address(shared, now)), 60);
        assert!(attempts.check_address("192.0.2.2".parse().unwrap(), now).is_ok());
        // A user of IPv6 has a whole /64.
        for n in ["2001:db8::1", "2001:db8::2"] {
            assert!(attempts.count(address(n), now).is_ok());
        }
        assert!(attempts.count(address("2001:db8::3"), now).is_err());
        assert!(attempts.count(address("2001:db8:0:1::1"), now).is_ok());
    }

    /// The window against a list of all accepted attempts.
    #[test]
    fn no_window_has_more_attempts_than_allowed() {
        let attempts = attempts(7, 10);
        let mut accepted: Vec<u64> = Vec::new();
        let mut random = 7_u64;
        let mut now = 50 * SECOND;
        for _ in 0..5000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            now += (random >> 33) % (2 * SECOND);
            let within = accepted.iter().filter(|at| *at + 10 * SECOND > now).count();
            let result = attempts.count(address("192.0.2.1"), Micros(now));
            assert_eq!(result.is_ok(), within < 7, "{now}");
            if result.is_ok() {
                accepted.push(now);
            }
        }
        assert!(accepted.len() > 3000);
    }

    #[test]
    fn high_limits_are_counted_in_parts_of_the_window() {
        let attempts = attempts(100_000, 60);
        for n in 0..100_000 {
            assert!(attempts.count(address("192.0.2.1"), Micros(SECOND + n * 500)).is_ok());
        }
        assert!(attempts.addresses.lock().entries <= EXACT_MAX as usize + 1);
        let full = Micros(51 * SECOND);
        assert_eq!(wait(attempts.count(address("192.0.2.1"), full)), 11);
        assert!(attempts.count(address("192.0.2.1"), Micros(62 * SECOND)).is_ok());
    }

    #[test]
    fn a_flood_of_addresses_is_bounded_and_counted_by_network() {
        let attempts = attempts(60, 60);
        let now = Micros(100 * SECOND);
        assert!((0..60).all(|_| attempts.count(address("203.0.113.9"), now).is_ok()));
        assert_eq!(attempts.shared.coarse.value(), 0);
        for n in 0..700_000_u32 {
            let one = IpAddr::from((0x0a00_0000 + n % 110_000).to_be_bytes());
            let _ = attempts.count(Subject::Address(one), Micros(now.0 + u64::from(n)));
        }
        let later = Micros(now.0 + 2 * SECOND);
        // Each of the addresses without a window of its own, every time.
        let coarse = attempts.shared.coarse.value();
        assert!((60_000..80_000).contains(&coarse), "{coarse}");
        assert_eq!(wait(attempts.count(address("203.0.113.9"), later)), 58);
        assert_eq!(attempts.shared.coarse.value(), coarse, "a known address has its window");
        let table = attempts.addresses.lock();
        let held: usize = table.levels.iter().flat_map(|map| map.values()).map(|w| w.0.len()).sum();
        assert_eq!(held, table.entries);
        assert!(table.entries < ENTRIES_MAX + (MAXIMA[0] + MAXIMA[1]) * 17, "{}", table.entries);
        assert_eq!(table.levels[0].len(), MAXIMA[0]);
        drop(table);
        // An address of another network has the attempts of its network: four times those of an address.
        let passed = (0..500).filter(|_| attempts.count(address("198.51.100.1"), later).is_ok());
        assert_eq!(passed.count(), 240);
        assert!(attempts.check_address("198.51.100.2".parse().unwrap(), later).is_err());
        // When the flood has left the window, addresses have windows of their own again.
        let end = Micros(later.0 + 130 * SECOND);
        let passed = (0..500).filter(|_| attempts.count(address("198.51.100.2"), end).is_ok());
        assert_eq!(passed.count(), 60);
        assert_eq!(attempts.addresses.lock().levels[0].len(), 1);
    }
}
