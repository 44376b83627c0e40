//! Limit of failed credentials of one address for one user. Knows no credential.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::names::Id;

/// Failed credentials by address and user.
///
/// Invariant: at most [`ENTRIES_MAX`] pairs are known. Beyond that all pairs whose time is over are forgotten, and then
/// all others too: the limit of attempts per address still holds.
#[derive(Debug, Default)]
pub(super) struct Failures {
    hasher: RandomState,
    /// Guards the table only.
    table: Mutex<HashMap<u64, Entry>>,
}

#[derive(Debug)]
struct Entry {
    /// Time of the first failure.
    since: Micros,
    count: u32,
}

impl Failures {
    /// Returns the time after which the pair may try again; `None` if it may now.
    pub(super) fn wait(&self, pair: (IpAddr, &Id), now: Micros) -> Option<Duration> {
        let table = self.table.lock();
        let entry = table.get(&self.hasher.hash_one(pair))?;
        let end = entry.since.after(WINDOW);
        (entry.count >= FAILURES_MAX && now < end).then(|| end.since(now).into())
    }

    /// Counts a failure.
    pub(super) fn add(&self, pair: (IpAddr, &Id), now: Micros) {
        let hash = self.hasher.hash_one(pair);
        let mut table = self.table.lock();
        if table.len() >= ENTRIES_MAX && !table.contains_key(&hash) {
            table.retain(|_, entry| now < entry.since.after(WINDOW));
            if table.len() >= ENTRIES_MAX {
                table.clear();
            }
        }
        let entry = table.entry(hash).or_insert(Entry { since: now, count: 0 });
        if now >= entry.since.after(WINDOW) {
            *entry = Entry { since: now, count: 0 };
        }
        entry.count += 1;
    }
}

/// Failures of one address for one user within [`WINDOW`] after which further attempts are refused.
const FAILURES_MAX: u32 = 30;

const WINDOW: Micros = Micros(60_000_000);

const ENTRIES_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thirty_first_failure_of_a_minute_waits() {
        let failures = Failures::default();
        let (address, user, other) =
            (IpAddr::from([10, 0, 0, 1]), Id::parse("u-1").unwrap(), Id::parse("u-2").unwrap());
        for second in 0..30 {
            assert_eq!(failures.wait((address, &user), Micros(second * 1_000_000)), None);
            failures.add((address, &user), Micros(second * 1_000_000));
        }
        let now = Micros(30_000_000);
        assert_eq!(failures.wait((address, &user), now), Some(Duration::from_secs(30)));
        assert_eq!(failures.wait((address, &other), now), None);
        assert_eq!(failures.wait((IpAddr::from([10, 0, 0, 2]), &user), now), None);
        assert_eq!(failures.wait((address, &user), WINDOW), None);
        failures.add((address, &user), WINDOW);
        assert_eq!(failures.wait((address, &user), WINDOW), None);
    }

    #[test]
    fn the_table_of_failures_is_bounded() {
        let failures = Failures::default();
        let user = Id::parse("u-1").unwrap();
        for number in 0..100_000_u32 {
            failures.add((IpAddr::from(number.to_be_bytes()), &user), Micros(1));
        }
        assert!(failures.table.lock().len() <= ENTRIES_MAX);
    }
}
