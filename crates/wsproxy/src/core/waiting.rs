//! The waiting room: requests that wait a moment for a peer that has just left and probably comes back. Names no endpoint
//! family: a family says which channel announces its peers.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, watch};
use wsproxy_conn::Runtime;
use wsproxy_proto::names::Id;

use crate::{
    bus::publish::BusError,
    core::admission::{Seat, Seats},
    hub::{Hub, inbox::Inbox, sink::Sink, subscription::Subscription},
};

/// The waiting room of an instance, which all families share.
///
/// Invariant: at most [`SEATS`] requests wait, and their bytes are in the process's budget. A further request is not
/// let in, and is answered as if its peer were not expected.
pub struct WaitingRoom {
    hub: Arc<Hub>,
    runtime: Arc<Runtime>,
    seats: Arc<Seats>,
}

/// The peers of a family for which requests wait, and the channel that announces them.
pub struct Peers {
    channel: Arc<str>,
    /// Reads the id of a peer that has connected from an announcement.
    connected: fn(&[u8]) -> Option<Id>,
    /// Guards the peers that are waited for.
    awaited: Mutex<HashMap<Id, Awaited>>,
    /// The subscription to the channel, which exists only while a request waits.
    subscription: AsyncMutex<Weak<Subscription>>,
}

/// A request in the waiting room. Dropping it frees its place.
pub struct Waiting {
    room: Arc<WaitingRoom>,
    peers: Arc<Peers>,
    peer: Id,
    bytes: usize,
    news: watch::Receiver<()>,
    subscription: Option<Arc<Subscription>>,
    _seat: Seat,
}

/// The requests that wait for one peer.
struct Awaited {
    requests: usize,
    news: watch::Sender<()>,
}

/// Reader of a family's announcements. Each subscription has its own, so that the end of one removes no other.
struct Listener(Arc<Peers>);

impl WaitingRoom {
    /// Makes an empty room.
    #[must_use]
    pub fn new(hub: Arc<Hub>, runtime: Arc<Runtime>) -> Arc<Self> {
        Arc::new(Self { hub, runtime, seats: Seats::new(SEATS) })
    }

    /// Lets a request of `bytes` wait for a peer; `None` if there is no seat, or the process's budget is used up.
    #[must_use]
    pub fn enter(self: &Arc<Self>, peers: &Arc<Peers>, peer: &Id, bytes: usize) -> Option<Waiting> {
        let seat = self.seats.take()?;
        self.runtime.budget.change(0, bytes);
        let mut awaited = peers.awaited.lock();
        let known = awaited.entry_ref(peer).or_insert_with(Awaited::new);
        known.requests += 1;
        let waiting = Waiting {
            room: Arc::clone(self),
            peers: Arc::clone(peers),
            peer: peer.clone(),
            bytes,
            news: known.news.subscribe(),
            subscription: None,
            _seat: seat,
        };
        drop(awaited);
        (!self.runtime.budget.is_exceeded()).then_some(waiting)
    }
}

impl Peers {
    /// Makes the peers of a family. `connected` reads the id of a peer that has connected from a message on `channel`.
    #[must_use]
    pub fn new(channel: impl Into<Arc<str>>, connected: fn(&[u8]) -> Option<Id>) -> Arc<Self> {
        let (awaited, subscription) = Default::default();
        Arc::new(Self { channel: channel.into(), connected, awaited, subscription })
    }

    /// Returns the number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.awaited.lock().values().map(|awaited| awaited.requests).sum()
    }
}

impl Waiting {
    /// Waits until announcements arrive. A peer that comes from now on is not missed; one that came before may be.
    ///
    /// # Errors
    /// The bus refuses the subscription.
    pub async fn listen(&mut self) -> Result<(), BusError> {
        let mut shared = self.peers.subscription.lock().await;
        let subscription = match shared.upgrade() {
            Some(subscription) => subscription,
            None => {
                let listener = Arc::new(Listener(Arc::clone(&self.peers)));
                let wanted = [(Arc::clone(&self.peers.channel), Sink::Inbox(listener))];
                let subscription = Arc::new(self.room.hub.subscribe(wanted).await?);
                *shared = Arc::downgrade(&subscription);
                subscription
            }
        };
        drop(shared);
        self.subscription = Some(subscription);
        Ok(())
    }

    /// Waits until the peer may have come since the last call.
    pub async fn announced(&mut self) {
        if self.news.changed().await.is_err() {
            // Not reached: the sender lives as long as a request waits.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.room.runtime.budget.change(self.bytes, 0);
        let mut awaited = self.peers.awaited.lock();
        if let Some(known) = awaited.get_mut(&self.peer) {
            known.requests -= 1;
            if known.requests == 0 {
                awaited.remove(&self.peer);
            }
        }
    }
}

impl Awaited {
    fn new() -> Self {
        Self { requests: 0, news: watch::Sender::new(()) }
    }
}

impl Inbox for Listener {
    fn message(&self, payload: &[u8]) {
        let Some(peer) = (self.0.connected)(payload) else { return };
        if let Some(awaited) = self.0.awaited.lock().get(&peer) {
            awaited.news.send_replace(());
        }
    }

    fn lost(&self) {}

    fn recovered(&self) {
        // Any peer may have been announced meanwhile.
        for awaited in self.0.awaited.lock().values() {
            awaited.news.send_replace(());
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.0.channel).finish()
    }
}

/// Upper bound of the requests that wait.
const SEATS: usize = 1024;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use tokio_util::{sync::CancellationToken, task::TaskTracker};
    use wsproxy_conn::clock::Micros;

    use super::*;
    use crate::{
        bus::{
            Bus,
            publish::{Keep, Outcome, Publish, awaited},
        },
        config::{LimitsConfig, RedisConfig},
        hub::delivery::Delivery,
    };

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    fn connected(announcement: &[u8]) -> Option<Id> {
        Id::parse(std::str::from_utf8(announcement).ok()?).ok()
    }

    /// A room with room for `bytes` on the embedded bus.
    fn room(bytes: usize) -> (Arc<WaitingRoom>, Bus) {
        let (hub, tasks, end) = (Hub::new(), TaskTracker::new(), CancellationToken::new());
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let (config, limits) = (RedisConfig::default(), LimitsConfig::default());
        let bus = Bus::embedded(&config, &limits, delivery, &tasks, end);
        hub.connect(bus.clone());
        (WaitingRoom::new(hub, Runtime::new(bytes, Micros(0))), bus)
    }

    async fn announce(bus: &Bus, peer: &'static str) -> Outcome {
        let (receipt, outcome) = awaited();
        let (channel, payload) = ("events".into(), peer.into());
        let sent = Publish { channel, payload, keep: Keep::Nothing, receipt: Some(receipt) };
        assert!(bus.publish(sent).is_ok());
        outcome.await.unwrap()
    }

    async fn is_announced(waiting: &mut Waiting) -> bool {
        timeout(Duration::from_millis(50), waiting.announced()).await.is_ok()
    }

    #[tokio::test]
    async fn a_peer_that_comes_wakes_those_who_wait_for_it() {
        let (room, bus) = room(1000);
        let peers = Peers::new("events", connected);
        assert_eq!(announce(&bus, "a").await, Outcome::Received(0));
        let mut waiting: Vec<_> =
            ["a", "a", "b"].map(|peer| room.enter(&peers, &id(peer), 10).unwrap()).into();
        assert_eq!((peers.waiting(), room.runtime.budget.used()), (3, 30));
        for waiting in &mut waiting {
            waiting.listen().await.unwrap();
        }
        assert_eq!(announce(&bus, "a").await, Outcome::Received(1));
        let mut woken = Vec::new();
        for waiting in &mut waiting {
            woken.push(is_announced(waiting).await);
        }
        assert_eq!(woken, [true, true, false]);
        assert!(!is_announced(&mut waiting[0]).await, "an announcement wakes once");
        // Any peer may have come while the bus was away.
        Listener(Arc::clone(&peers)).recovered();
        assert!(is_announced(&mut waiting[2]).await);
        drop(waiting);
        assert_eq!((peers.waiting(), room.runtime.budget.used()), (0, 0));
        assert_eq!(announce(&bus, "a").await, Outcome::Received(0));
        // The next request makes a subscription of its own.
        let mut again = room.enter(&peers, &id("a"), 10).unwrap();
        again.listen().await.unwrap();
        assert_eq!(announce(&bus, "a").await, Outcome::Received(1));
        assert!(is_announced(&mut again).await);
    }

    #[tokio::test]
    async fn the_room_is_bounded_in_requests_and_bytes() {
        let (room, _bus) = room(100_000);
        let (peers, others) = (Peers::new("events", connected), Peers::new("others", connected));
        let mut waiting: Vec<_> =
            std::iter::from_fn(|| room.enter(&peers, &id("a"), 10)).take(2 * SEATS).collect();
        assert_eq!(waiting.len(), SEATS);
        assert!(room.enter(&others, &id("b"), 10).is_none(), "families share the room");
        waiting.truncate(1);
        assert!(room.enter(&others, &id("b"), 99_991).is_none());
        assert_eq!(room.runtime.budget.used(), 10);
        assert!(room.enter(&others, &id("b"), 99_990).is_some());
        drop(waiting);
        assert_eq!((room.seats.taken(), room.runtime.budget.used()), (0, 0));
    }
}
