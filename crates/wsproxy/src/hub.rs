//! Local fan-out: who wants which topic, and how a round of messages reaches them.
//!
//! The only door to other connections and to the bus. Knows no endpoint.

use std::{
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
};

use hashbrown::{Equivalent, HashMap};
use parking_lot::Mutex;
use tracing::warn;
use wsproxy_conn::Link;

use crate::{
    bus::{Bus, BusError, Publish},
    config::{DownFrames, OnBusLoss},
    hub::{subscribers::Subscribers, tap::Tap},
    telemetry::counter::Counter,
};

pub mod delivery;
mod subscribers;
pub mod tap;

/// More shards mean that fewer openings wait while a round is delivered.
const SHARDS: usize = 64;

/// Where the messages of a topic go.
#[derive(Debug, Clone)]
pub enum Sink {
    /// To a client, verbatim.
    Client {
        /// Its connection.
        link: Arc<Link>,
        /// As text or binary.
        frames: DownFrames,
        /// What the client is told after a loss of the bus.
        on_loss: OnBusLoss,
    },
    /// To a connection's handler, as an event with this tag.
    Handler {
        /// The connection.
        link: Arc<Link>,
        /// [`wsproxy_conn::Event::tag`].
        tag: u8,
    },
    /// To somebody in this process who is no connection.
    Tap(Arc<Tap>),
}

/// Where a sink delivers to: the address of an object that the sink keeps alive, and one of its inlets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place(usize, u8);

impl Sink {
    /// Two sinks are one where they would deliver to the same place.
    fn place(&self) -> Place {
        match self {
            Self::Client { link, .. } => Place(Arc::as_ptr(link) as usize, u8::MAX),
            Self::Handler { link, tag } => Place(Arc::as_ptr(link) as usize, *tag),
            Self::Tap(tap) => Place(Arc::as_ptr(tap) as usize, u8::MAX),
        }
    }
}

/// The topics of this instance.
///
/// Invariant: a topic is in the map if and only if somebody here wants it, and exactly then the
/// bus is told to subscribe. It is told of a new topic after the topic is in the map, and of an
/// unwanted one under the lock of its shard, so never of both in the wrong order.
pub struct Hub {
    shards: [Mutex<Topics>; SHARDS],
    hasher: foldhash::fast::RandomState,
    bus: OnceLock<Bus>,
    /// What deliveries came to; the metrics read it.
    pub counters: HubCounters,
}

type Topics = HashMap<Topic, Subscribers, foldhash::fast::RandomState>;

/// What the hub counts.
#[derive(Debug, Default)]
pub struct HubCounters {
    /// Messages that came for topics which nobody here wants any more.
    pub unwanted: Counter,
    /// Messages which an endpoint's framing cannot carry.
    pub unframeable: Counter,
    /// Connections that were told of a loss of the bus, or closed for it.
    pub bus_loss_notices: Counter,
}

impl Hub {
    /// A hub without topics. The bus follows with [`Self::connect`], since each needs the other.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: foldhash::fast::RandomState::default(),
            bus: OnceLock::new(),
            counters: HubCounters::default(),
        })
    }

    /// Gives the hub its bus; the first one counts.
    pub fn connect(&self, bus: Bus) {
        if self.bus.set(bus).is_err() {
            warn!("The hub has a bus already.");
        }
    }

    /// Adds sinks to topics and resolves when the bus has confirmed all of them. From then on,
    /// and as long as the returned guard lives, every message reaches them.
    ///
    /// # Errors
    /// The bus refused; nothing is left subscribed then, nor where the future is dropped.
    pub async fn subscribe(
        self: &Arc<Self>,
        wanted: impl IntoIterator<Item = (Arc<str>, Sink)>,
    ) -> Result<Subscription, BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        let mut subscription = Subscription { hub: Arc::clone(self), sinks: Vec::new() };
        for (topic, sink) in wanted {
            subscription.sinks.push((Arc::clone(&topic), sink.place()));
            self.add(topic, sink);
        }
        subscription.sinks.shrink_to_fit();
        let topics = subscription.sinks.iter().map(|(topic, _)| Arc::clone(topic)).collect();
        bus.subscribe(topics).await?;
        Ok(subscription)
    }

    /// Puts a message into the queue of the bus.
    ///
    /// # Errors
    /// The queue is full or closed; the receipt is not called then.
    pub fn publish(&self, publish: Publish) -> Result<(), BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        bus.publish(publish).map_err(|(error, _)| error)
    }

    /// Whether [`Self::publish`] has room; see [`Bus::poll_publishable`].
    pub fn poll_publishable(&self, cx: &mut std::task::Context<'_>) -> std::task::Poll<()> {
        self.bus.get().map_or(std::task::Poll::Ready(()), |bus| bus.poll_publishable(cx))
    }

    /// How many topics somebody here wants.
    #[must_use]
    pub fn topics(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    fn add(&self, topic: Arc<str>, sink: Sink) {
        let mut shard = self.shard(topic.as_bytes()).lock();
        shard.entry(Topic(topic)).or_insert(Subscribers::None).add(sink);
    }

    fn remove(&self, topic: &Arc<str>, place: Place) {
        let mut shard = self.shard(topic.as_bytes()).lock();
        let Some(subscribers) = shard.get_mut(&Name(topic.as_bytes())) else { return };
        let removed = subscribers.remove(place);
        if subscribers.is_empty() {
            shard.remove(&Name(topic.as_bytes()));
            if let Some(bus) = self.bus.get() {
                bus.unsubscribe(vec![Arc::clone(topic)]);
            }
        }
        drop(shard);
        // The sink may be the last owner of a socket, which is closed outside the lock.
        drop(removed);
    }

    fn shard(&self, topic: &[u8]) -> &Mutex<Topics> {
        let hash = std::hash::BuildHasher::hash_one(&self.hasher, Name(topic));
        // The map uses the top and the bottom bits of its own hash; any others will do here.
        &self.shards[(hash >> 20) as usize % SHARDS]
    }
}

/// Sinks that receive their topics' messages; dropping it removes them.
pub struct Subscription {
    hub: Arc<Hub>,
    sinks: Vec<(Arc<str>, Place)>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for (topic, place) in self.sinks.drain(..) {
            self.hub.remove(&topic, place);
        }
    }
}

/// A topic as a key, which bytes from the bus can look up.
#[derive(PartialEq, Eq)]
struct Topic(Arc<str>);

/// The same, borrowed.
struct Name<'a>(&'a [u8]);

impl Hash for Topic {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0.as_bytes());
    }
}

impl Hash for Name<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.0);
    }
}

impl Equivalent<Topic> for Name<'_> {
    fn equivalent(&self, key: &Topic) -> bool {
        key.0.as_bytes() == self.0
    }
}
