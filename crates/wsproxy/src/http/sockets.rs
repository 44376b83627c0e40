//! The sockets of a listener: how many there may be, and which of them give way since they ask for nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::http::{
    admission::{Place, Places, network},
    line::Line,
};

/// All sockets of a listener.
///
/// A socket is silent while no request of it is being answered. Silent sockets never keep others out: where every
/// place is taken, the oldest silent one is closed for the next to come, and where one address has more silent
/// ones than its share, its own oldest is.
#[derive(Debug)]
pub struct Sockets {
    places: Arc<Places>,
    silent_per_address_max: usize,
    silent: Mutex<Silent>,
}

/// Those that are silent. Numbers rise with the time at which a silence began.
#[derive(Debug, Default)]
struct Silent {
    by_age: BTreeMap<u64, (Option<IpAddr>, Arc<Line>)>,
    by_address: HashMap<IpAddr, BTreeSet<u64>>,
    last: u64,
}

/// The silences of one socket, which dropping this ends.
#[derive(Debug)]
pub struct Silence {
    sockets: Arc<Sockets>,
    /// Whose share it counts in; `None`: nobody's, as for our own proxies.
    address: Option<IpAddr>,
    line: Arc<Line>,
    /// The number of the present silence; 0 where there is none.
    number: AtomicU64,
}

impl Sockets {
    /// So many.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        let silent_per_address_max = (max / ADDRESS_PART).max(PER_ADDRESS_MIN);
        Arc::new(Self {
            places: Places::new(max),
            silent_per_address_max,
            silent: Mutex::default(),
        })
    }

    /// A place for a socket that was accepted, and whether another one gave way for it. `None` where all others
    /// have requests that are being answered, or connections.
    #[must_use]
    pub fn take(&self) -> Option<(Place, bool)> {
        if let Some(place) = self.places.take() {
            return Some((place, false));
        }
        // Its descriptor is free then, and its place as soon as its task notices.
        self.close_oldest().then(|| (self.places.take_more(), true))
    }

    /// Closes the oldest silent socket; `false` where there is none.
    pub fn close_oldest(&self) -> bool {
        let oldest = self.silent.lock().remove_oldest();
        oldest.inspect(|line| drop(line.take())).is_some()
    }

    /// Whether nobody else can be taken.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.places.is_full() && self.silent.lock().by_age.is_empty()
    }

    /// A socket that was accepted and is silent; whether another one of its address gave way for it. Sockets
    /// without an address have no share.
    #[must_use]
    pub fn watch(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        line: &Arc<Line>,
    ) -> (Arc<Silence>, bool) {
        let (sockets, line) = (Arc::clone(self), Arc::clone(line));
        let address = address.map(network);
        let silence = Silence { sockets, address, line, number: AtomicU64::new(0) };
        let gave_way = silence.begin();
        (Arc::new(silence), gave_way)
    }
}

impl Silence {
    /// The socket waits for a request; whether another one of its address gave way for it.
    pub fn begin(&self) -> bool {
        let oldest = {
            let mut silent = self.sockets.silent.lock();
            let number = silent.add(self.address, Arc::clone(&self.line));
            self.number.store(number, Relaxed);
            self.address.and_then(|address| {
                let most = self.sockets.silent_per_address_max;
                silent.remove_oldest_of(address, most)
            })
        };
        oldest.is_some_and(|line| line.take().is_some())
    }

    /// A request has come; `false` where the socket has given way already.
    pub fn end(&self) -> bool {
        let number = self.number.swap(0, Relaxed);
        number > 0 && self.sockets.silent.lock().remove(number).is_some()
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        self.end();
    }
}

impl Silent {
    fn add(&mut self, address: Option<IpAddr>, line: Arc<Line>) -> u64 {
        self.last += 1;
        self.by_age.insert(self.last, (address, line));
        if let Some(address) = address {
            self.by_address.entry(address).or_default().insert(self.last);
        }
        self.last
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Line>> {
        let (address, line) = self.by_age.remove(&number)?;
        if let Some(address) = address
            && let Some(numbers) = self.by_address.get_mut(&address)
        {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_address.remove(&address);
            }
        }
        Some(line)
    }

    fn remove_oldest(&mut self) -> Option<Arc<Line>> {
        let oldest = *self.by_age.first_key_value()?.0;
        self.remove(oldest)
    }

    /// Where an address has more than `most`.
    fn remove_oldest_of(&mut self, address: IpAddr, most: usize) -> Option<Arc<Line>> {
        let numbers = self.by_address.get(&address).filter(|numbers| numbers.len() > most)?;
        let oldest = *numbers.first()?;
        self.remove(oldest)
    }
}

/// One address may have this part of all sockets silent.
const ADDRESS_PART: usize = 4;

/// And so many in any case.
const PER_ADDRESS_MIN: usize = 64;

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    async fn line() -> Arc<Line> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Line::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap())
    }

    #[tokio::test]
    async fn the_oldest_silent_socket_gives_way_to_a_new_one() {
        let sockets = Sockets::new(2);
        let (lines, address) = ([line().await, line().await], "192.0.2.1".parse().ok());
        let first = (sockets.take().unwrap(), sockets.watch(address, &lines[0]).0);
        let second = (sockets.take().unwrap(), sockets.watch(address, &lines[1]).0);
        assert!(first.1.end());
        let (_third, gave_way) = sockets.take().unwrap();
        assert!(gave_way && lines[1].take().is_none(), "the one that asked stays");
        assert!(!second.1.end(), "it learns that it was closed");
        assert!(sockets.is_full() && sockets.take().is_none());
        first.1.begin();
        assert!(!sockets.is_full());
        drop(first);
        assert!(sockets.silent.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn an_address_beyond_its_share_closes_its_own_oldest() {
        let sockets = Sockets::new(1000);
        let of = |text: &str| Some(text.parse().unwrap());
        let (mine, other) = (line().await, line().await);
        let oldest = sockets.watch(of("2001:db8::1"), &mine).0;
        let stranger = sockets.watch(of("2001:db8:1::1"), &other).0;
        let mut silences = Vec::new();
        for n in 1..=250 {
            let (silence, gave_way) = sockets.watch(of(&format!("2001:db8::{n:x}")), &line().await);
            assert_eq!(gave_way, n == 250, "{n}");
            silences.push(silence);
        }
        assert!(!oldest.end() && mine.take().is_none());
        assert!(stranger.end());
        // Proxies of our own have no share.
        for _ in 0..300 {
            let (silence, gave_way) = sockets.watch(None, &other);
            assert!(!gave_way);
            silences.push(silence);
        }
    }
}
