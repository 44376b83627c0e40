//! The sockets of a listener: their maximum, and the closing of silent ones in favor of new ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::core::{
    admission::{Seat, Seats, network},
    socket::SharedSocket,
};

/// All sockets of a listener.
///
/// A socket is silent while none of its requests is being answered. Silent sockets never keep others out. When every
/// seat is taken, the oldest silent socket is closed for a new one. When an address exceeds its share of silent
/// sockets, the oldest of that address is closed.
#[derive(Debug)]
pub struct Sockets {
    seats: Arc<Seats>,
    silent_per_address_max: usize,
    silent: Mutex<Silent>,
    /// Sockets whose first request has not been answered.
    newcomers: AtomicUsize,
}

/// The silent sockets. A silence gets its number when it begins, so the lowest number is the oldest.
#[derive(Debug, Default)]
struct Silent {
    by_age: BTreeMap<u64, (Option<IpAddr>, Arc<SharedSocket>)>,
    by_address: HashMap<IpAddr, BTreeSet<u64>>,
    last: u64,
}

/// The silences of one socket. Dropping it ends the present silence.
#[derive(Debug)]
pub struct Silence {
    sockets: Arc<Sockets>,
    /// Address whose share counts the socket; `None` for a trusted proxy, which has no share.
    address: Option<IpAddr>,
    socket: Arc<SharedSocket>,
    /// Number of the present silence; 0 while the socket is not silent.
    number: AtomicU64,
    is_new: AtomicBool,
}

impl Sockets {
    /// Makes `max` seats for sockets.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        let silent_per_address_max = (max / ADDRESS_PART).max(PER_ADDRESS_MIN);
        Arc::new(Self {
            seats: Seats::new(max),
            silent_per_address_max,
            silent: Mutex::default(),
            newcomers: AtomicUsize::new(0),
        })
    }

    /// Returns the number of sockets whose first request has not been answered.
    #[must_use]
    pub fn newcomers(&self) -> usize {
        self.newcomers.load(Relaxed)
    }

    /// Takes a seat for a new socket. Also returns whether a silent socket was closed for it. `None` if every seat is
    /// taken and no socket is silent.
    #[must_use]
    pub fn take(&self) -> Option<(Seat, bool)> {
        if let Some(seat) = self.seats.take() {
            return Some((seat, false));
        }
        // The closed socket's descriptor is free at once. Its seat follows when its task notices.
        self.close_oldest().then(|| (self.seats.take_more(), true))
    }

    /// Closes the oldest silent socket; `false` if there is none.
    pub fn close_oldest(&self) -> bool {
        let oldest = self.silent.lock().remove_oldest();
        oldest.inspect(|socket| drop(socket.take())).is_some()
    }

    /// Returns whether a new socket would be refused.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.seats.is_full() && self.silent.lock().by_age.is_empty()
    }

    /// Adds a new socket, which is silent at first. Also returns whether an older socket of its address was closed for
    /// it. A socket without an address counts in no share.
    #[must_use]
    pub fn watch(
        self: &Arc<Self>,
        address: Option<IpAddr>,
        socket: &Arc<SharedSocket>,
    ) -> (Arc<Silence>, bool) {
        let (sockets, socket) = (Arc::clone(self), Arc::clone(socket));
        let address = address.map(network);
        self.newcomers.fetch_add(1, Relaxed);
        let (number, is_new) = (AtomicU64::new(0), AtomicBool::new(true));
        let silence = Silence { sockets, address, socket, number, is_new };
        let gave_way = silence.begin();
        (Arc::new(silence), gave_way)
    }
}

impl Silence {
    /// Begins a silence: the socket waits for a request. Returns whether an older socket of its address was closed for
    /// it.
    pub fn begin(&self) -> bool {
        let oldest = {
            let mut silent = self.sockets.silent.lock();
            let number = silent.add(self.address, Arc::clone(&self.socket));
            self.number.store(number, Relaxed);
            self.address.and_then(|address| {
                let most = self.sockets.silent_per_address_max;
                silent.remove_oldest_of(address, most)
            })
        };
        oldest.is_some_and(|socket| socket.take().is_some())
    }

    /// Ends the silence: a request has come. `false` if the socket was closed in favor of another one.
    pub fn end(&self) -> bool {
        let number = self.number.swap(0, Relaxed);
        number > 0 && self.sockets.silent.lock().remove(number).is_some()
    }
}

impl Silence {
    /// Notes that a request was answered: the socket is no newcomer any more.
    pub fn answered(&self) {
        if self.is_new.swap(false, Relaxed) {
            self.sockets.newcomers.fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        self.answered();
        self.end();
    }
}

impl Silent {
    fn add(&mut self, address: Option<IpAddr>, socket: Arc<SharedSocket>) -> u64 {
        self.last += 1;
        self.by_age.insert(self.last, (address, socket));
        if let Some(address) = address {
            self.by_address.entry(address).or_default().insert(self.last);
        }
        self.last
    }

    fn remove(&mut self, number: u64) -> Option<Arc<SharedSocket>> {
        let (address, socket) = self.by_age.remove(&number)?;
        if let Some(address) = address
            && let Some(numbers) = self.by_address.get_mut(&address)
        {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_address.remove(&address);
            }
        }
        Some(socket)
    }

    fn remove_oldest(&mut self) -> Option<Arc<SharedSocket>> {
        let oldest = *self.by_age.first_key_value()?.0;
        self.remove(oldest)
    }

    /// Removes the oldest socket of an address that has more than `most`.
    fn remove_oldest_of(&mut self, address: IpAddr, most: usize) -> Option<Arc<SharedSocket>> {
        let numbers = self.by_address.get(&address).filter(|numbers| numbers.len() > most)?;
        let oldest = *numbers.first()?;
        self.remove(oldest)
    }
}

/// Divisor of all sockets that gives the share of silent ones for one address.
const ADDRESS_PART: usize = 4;

/// Lower bound of that share.
const PER_ADDRESS_MIN: usize = 64;

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    async fn socket() -> Arc<SharedSocket> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        SharedSocket::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap())
    }

    #[tokio::test]
    async fn the_oldest_silent_socket_gives_way_to_a_new_one() {
        let sockets = Sockets::new(2);
        let (pair, address) = ([socket().await, socket().await], "192.0.2.1".parse().ok());
        let first = (sockets.take().unwrap(), sockets.watch(address, &pair[0]).0);
        let second = (sockets.take().unwrap(), sockets.watch(address, &pair[1]).0);
        assert!(first.1.end());
        let (_third, gave_way) = sockets.take().unwrap();
        assert!(gave_way && pair[1].take().is_none(), "the one that asked stays");
        assert!(!second.1.end(), "it learns that it was closed");
        assert!(sockets.is_full() && sockets.take().is_none());
        first.1.begin();
        assert!(!sockets.is_full());
        drop(first);
        assert!(sockets.silent.lock().by_address.is_empty());
    }

    #[tokio::test]
    async fn sockets_are_new_until_their_first_answer() {
        let sockets = Sockets::new(2);
        let [first, second] = [socket().await, socket().await];
        let silences = [&first, &second].map(|socket| sockets.watch(None, socket).0);
        assert_eq!(sockets.newcomers(), 2);
        silences[0].answered();
        silences[0].answered();
        silences[0].begin();
        assert_eq!(sockets.newcomers(), 1);
        drop(silences);
        assert_eq!(sockets.newcomers(), 0);
    }

    #[tokio::test]
    async fn an_address_beyond_its_share_closes_its_own_oldest() {
        let sockets = Sockets::new(1000);
        let of = |text: &str| Some(text.parse().unwrap());
        let (mine, other) = (socket().await, socket().await);
        let oldest = sockets.watch(of("2001:db8::1"), &mine).0;
        let stranger = sockets.watch(of("2001:db8:1::1"), &other).0;
        let mut silences = Vec::new();
        for n in 1..=250 {
            let (silence, gave_way) =
                sockets.watch(of(&format!("2001:db8::{n:x}")), &socket().await);
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
