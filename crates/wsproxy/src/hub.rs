//! Local fan-out: who wants which topic, and how a round of messages reaches them.
//!
//! The only door to other connections and to the bus. Knows no endpoint.

use std::{
    hash::{Hash, Hasher},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Acquire},
    },
};

use hashbrown::{Equivalent, HashMap};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tracing::{trace, warn};
use wsproxy_conn::{
    Link,
    clock::{self, Micros},
};
use wsproxy_proto::{
    history::{Lost, Position, Reader},
    names::Names,
};

use crate::{
    bus::{Bus, BusError, HistoryLimits, Publish},
    config::{DownFrames, OnBusLoss},
    hub::{
        message::Stored,
        replay::{Gate, Replay},
        store_clock::{Doubts, StoreClock},
        subscribers::Subscribers,
        tap::Tap,
    },
    telemetry::{counter::Counter, log::MESSAGES},
};

mod audience;
mod capture;
pub mod delivery;
pub mod gzip;
pub mod healer;
pub mod message;
pub mod notice;
pub mod replay;
mod store_clock;
mod subscribers;
pub mod tap;

/// More shards mean that fewer openings wait while a round is delivered.
const SHARDS: usize = 64;

/// [`wsproxy_conn::Event::tag`]: a message is about to be sent that wants an `ack`. The payload is the id by which
/// the client acknowledges it, of as many bytes as the event's number says, and then the message as it is sent.
pub const WANTS_ACK: u8 = u8::MAX - 1;

/// Where the messages of a topic go.
#[derive(Debug, Clone)]
pub enum Sink {
    /// To a client, verbatim.
    Client {
        /// Its connection.
        link: Arc<Link>,
        /// What its messages look like.
        form: Form,
        /// What the client is told after a loss of the bus.
        on_loss: OnBusLoss,
    },
    /// To a client, as server-sent events.
    EventStream {
        /// What is to be written.
        tap: Arc<Tap>,
        /// What the client is told after a loss of the bus.
        on_loss: OnBusLoss,
    },
    /// To a client that does not know yet what it has missed.
    Gated(Arc<Gate>),
    /// To a connection's handler, as an event with this tag.
    Handler {
        /// The connection.
        link: Arc<Link>,
        /// [`wsproxy_conn::Event::tag`].
        tag: u8,
    },
    /// To the logic of an event stream, as an event with this tag, behind what the stream was sent before.
    StreamHandler {
        /// What is to be written.
        tap: Arc<Tap>,
        /// [`wsproxy_conn::Event::tag`].
        tag: u8,
    },
    /// To somebody in this process who is no connection.
    Tap(Arc<Tap>),
}

/// What a client's messages look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// As text or binary.
    pub frames: DownFrames,
    /// Where their ids are.
    pub ids: Ids,
    /// The connection's handler is told with [`WANTS_ACK`] of those that want an `ack`.
    pub acks: bool,
}

/// Where the id of a message is that belongs to a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// Nowhere: the payload is sent as it is.
    Hidden,
    /// In JSON objects, as their first member `event_id`.
    Json,
    /// In a line before every payload.
    Envelope,
}

/// What the channels of an endpoint have in common whose messages are kept.
#[derive(Debug)]
pub struct Histories {
    /// Bounds of their logs.
    pub limits: HistoryLimits,
    /// Tells which topics are sessions', whose token streams are shown where their history is lost.
    pub names: Names,
    /// Key of the clock that gives the ids, where all logs share one order.
    pub clock: Option<Arc<str>>,
    /// Prefix of topics of one connection each. A client that comes back has another connection, so these are
    /// never resumed.
    pub private: Option<Arc<str>>,
    /// Plain messages with an `event_id` are taken into the history.
    pub capture: bool,
}

/// A topic's log, and how far this instance has read it.
struct Track {
    log: Arc<str>,
    histories: Arc<Histories>,
    reader: Reader<Stored>,
    /// How often something may have been missing.
    turns: u64,
    /// Nobody who comes back has this topic again.
    is_private: bool,
}

impl Track {
    /// Something may be missing behind the reader's position.
    fn interrupt(&mut self) {
        self.turns += 1;
        self.reader.interrupt();
    }
}

/// What the hub knows of a topic.
#[derive(Default)]
struct State {
    subscribers: Subscribers,
    /// Where its messages are kept.
    track: Option<Box<Track>>,
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
            Self::StreamHandler { tap, tag } => Place(Arc::as_ptr(tap) as usize, *tag),
            Self::Gated(gate) => gate.target.place(),
            Self::EventStream { tap, .. } | Self::Tap(tap) => {
                Place(Arc::as_ptr(tap) as usize, u8::MAX)
            }
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
    /// Counts losses of the bus; odd while it is lost.
    outages: AtomicU64,
    /// Told when a log has to be read.
    holes: Notify,
    /// What the store's clock shows.
    store_clock: StoreClock,
    doubts: Doubts,
    broken: healer::Broken,
    /// What deliveries came to; the metrics read it.
    pub counters: HubCounters,
}

type Topics = HashMap<Topic, State, foldhash::fast::RandomState>;

/// What the hub counts.
#[derive(Debug, Default)]
pub struct HubCounters {
    /// Messages that came for topics which nobody here wants any more.
    pub unwanted: Counter,
    /// Messages which an endpoint's framing cannot carry.
    pub unframeable: Counter,
    /// Connections that were told of a loss of the bus, or closed for it.
    pub bus_loss_notices: Counter,
    /// Clients that resumed and got everything they had missed.
    pub resumed: Counter,
    /// Messages that these had missed.
    pub replayed: Counter,
    /// Clients that were told of a lost history, by [`Lost`].
    pub history_lost: [Counter; Lost::ALL.len()],
    /// Messages of a history that came again and were not delivered again.
    pub duplicates: Counter,
    /// Logs that were read again since something was missing, and messages found there.
    pub healed: Counter,
    /// Messages found there.
    pub healed_messages: Counter,
    /// Plain messages that were taken into a history.
    pub captured: Counter,
    /// Plain messages of topics with a history that could not be.
    pub uncaptured: Counter,
}

impl Hub {
    /// A hub without topics. The bus follows with [`Self::connect`], since each needs the other.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: foldhash::fast::RandomState::default(),
            bus: OnceLock::new(),
            outages: AtomicU64::new(0),
            holes: Notify::new(),
            store_clock: StoreClock::default(),
            doubts: Doubts::default(),
            broken: healer::Broken::default(),
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
        self.subscribe_beside(None, wanted).await
    }

    /// The same beside what was reserved.
    ///
    /// # Errors
    /// As [`Self::subscribe`].
    pub async fn subscribe_beside(
        self: &Arc<Self>,
        reserved: Option<Subscription>,
        wanted: impl IntoIterator<Item = (Arc<str>, Sink)>,
    ) -> Result<Subscription, BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        let mut subscription = reserved.unwrap_or_else(|| self.nothing());
        for (topic, sink) in wanted {
            subscription.sinks.push((Arc::clone(&topic), sink.place()));
            self.add(topic, sink, None);
        }
        subscription.sinks.shrink_to_fit();
        let topics = subscription.sinks.iter().map(|(topic, _)| Arc::clone(topic)).collect();
        bus.subscribe(topics).await?;
        Ok(subscription)
    }

    /// Adds a sink to a topic, unless it would be more than `sinks_max` of them. The bus learns of it where
    /// [`Self::subscribe_beside`] or [`Self::hold`] is given what is returned here.
    #[must_use]
    pub fn reserve(
        self: &Arc<Self>,
        topic: Arc<str>,
        sink: Sink,
        sinks_max: usize,
    ) -> Option<Subscription> {
        let mut subscription = self.nothing();
        subscription.sinks.push((Arc::clone(&topic), sink.place()));
        let sinks = self.add(topic, sink, None);
        (sinks <= sinks_max).then_some(subscription)
    }

    fn nothing(self: &Arc<Self>) -> Subscription {
        Subscription { hub: Arc::clone(self), sinks: Vec::new() }
    }

    /// Adds a client to topics with histories beside what was reserved, and resolves when the bus has
    /// confirmed all of them. Messages for the client wait until the returned replay has run.
    ///
    /// # Errors
    /// As [`Self::subscribe`].
    pub async fn hold(
        self: &Arc<Self>,
        client: Sink,
        topics: Vec<Arc<str>>,
        histories: Arc<Histories>,
        reserved: Option<Subscription>,
    ) -> Result<(Subscription, Replay), BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        let mut subscription = reserved.unwrap_or_else(|| self.nothing());
        let gate = Gate::new(client);
        for topic in &topics {
            let sink = Sink::Gated(Arc::clone(&gate));
            subscription.sinks.push((Arc::clone(topic), sink.place()));
            self.add(Arc::clone(topic), sink, Some(&histories));
        }
        subscription.sinks.shrink_to_fit();
        let all = subscription.sinks.iter().map(|(topic, _)| Arc::clone(topic)).collect();
        bus.subscribe(all).await?;
        Ok((subscription, Replay::new(Arc::clone(self), gate, topics, histories)))
    }

    /// Tells a client without history what there is to tell.
    pub fn greet(&self, client: &Sink, hello: Option<String>, lost: Option<Lost>) {
        let mut round = audience::Round::default();
        let lost = lost.inspect(|lost| self.counters.history_lost[*lost as usize].add(1));
        let lost = lost.map(|lost| notice::history_lost(lost, Position::START));
        for notice in [hello, lost].into_iter().flatten() {
            let mut fanout = message::Fanout::new(message::Message::plain(notice.as_bytes()));
            if let Some(bytes) = fanout.encode(client, self) {
                round.send(client, bytes, Micros::UNTIMED);
            }
        }
        round.flush(clock::now());
    }

    /// Puts a message into the queue of the bus.
    ///
    /// # Errors
    /// The queue is full or closed; the receipt is not called then.
    pub fn publish(&self, publish: Publish) -> Result<(), BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        trace!(target: MESSAGES, channel = &*publish.channel, bytes = publish.payload.len(),
            "A message is put into the queue of the bus.");
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

    /// Returns how many sinks the topic has now.
    fn add(&self, topic: Arc<str>, sink: Sink, histories: Option<&Arc<Histories>>) -> usize {
        let mut shard = self.shard(topic.as_bytes()).lock();
        let track = histories.map(|histories| Track {
            log: histories.names.log(&topic).into(),
            histories: Arc::clone(histories),
            reader: Reader::default(),
            turns: 0,
            is_private: histories.private.as_ref().is_some_and(|begin| topic.starts_with(&**begin)),
        });
        let state = shard.entry(Topic(topic)).or_default();
        state.subscribers.add(sink);
        if state.track.is_none() {
            state.track = track.map(Box::new);
        }
        state.subscribers.len()
    }

    fn remove(&self, topic: &Arc<str>, place: Place) {
        let mut shard = self.shard(topic.as_bytes()).lock();
        let Some(state) = shard.get_mut(&Name(topic.as_bytes())) else { return };
        let removed = state.subscribers.remove(place);
        if state.subscribers.is_empty() {
            shard.remove(&Name(topic.as_bytes()));
            if let Some(bus) = self.bus.get() {
                bus.unsubscribe(vec![Arc::clone(topic)]);
            }
        }
        drop(shard);
        // The sink may be the last owner of a socket, which is closed outside the lock.
        drop(removed);
    }

    /// Locks the shards of some topics.
    fn lock_for(&self, topics: &[Arc<str>]) -> ShardLocks<'_> {
        let mut numbers: Vec<_> =
            topics.iter().map(|topic| self.shard_number(topic.as_bytes())).collect();
        // One order for everybody, so that nobody waits for somebody who waits for him.
        numbers.sort_unstable();
        numbers.dedup();
        let lock = |number: usize| (number, self.shards[number].lock());
        ShardLocks { hub: self, shards: numbers.into_iter().map(lock).collect() }
    }

    fn lock_all(&self) -> Vec<MutexGuard<'_, Topics>> {
        self.shards.iter().map(|shard| shard.lock()).collect()
    }

    /// How often the bus was lost and found; odd while it is lost.
    fn outage(&self) -> u64 {
        self.outages.load(Acquire)
    }

    fn links_lost(&self) -> u64 {
        self.bus.get().map_or(0, |bus| bus.counters().links_lost.value())
    }

    fn is_linked(&self) -> bool {
        self.outage().is_multiple_of(2)
    }

    fn count(&self, outcome: replay::Outcome) {
        match outcome {
            replay::Outcome::Fresh => {}
            replay::Outcome::Resumed(count) => {
                self.counters.resumed.add(1);
                self.counters.replayed.add(count as u64);
            }
            replay::Outcome::Lost(lost) => self.counters.history_lost[lost as usize].add(1),
        }
    }

    fn shard(&self, topic: &[u8]) -> &Mutex<Topics> {
        &self.shards[self.shard_number(topic)]
    }

    fn shard_number(&self, topic: &[u8]) -> usize {
        let hash = std::hash::BuildHasher::hash_one(&self.hasher, Name(topic));
        // The map uses the top and the bottom bits of its own hash; any others will do here.
        (hash >> 20) as usize % SHARDS
    }
}

/// Some shards, locked.
struct ShardLocks<'a> {
    hub: &'a Hub,
    shards: Vec<(usize, MutexGuard<'a, Topics>)>,
}

impl ShardLocks<'_> {
    /// From now on the client behind this gate gets the topic's messages directly.
    fn ungate(&mut self, topic: &str, gate: &Arc<Gate>) {
        let number = self.hub.shard_number(topic.as_bytes());
        let Some((_, shard)) = self.shards.iter_mut().find(|(other, _)| *other == number) else {
            return;
        };
        let Some(state) = shard.get_mut(&Name(topic.as_bytes())) else { return };
        for sink in state.subscribers.iter_mut() {
            if matches!(sink, Sink::Gated(other) if Arc::ptr_eq(other, gate)) {
                *sink = gate.target.clone();
            }
        }
    }

    fn track(&mut self, topic: &str) -> Option<&mut Track> {
        let number = self.hub.shard_number(topic.as_bytes());
        let (_, shard) = self.shards.iter_mut().find(|(other, _)| *other == number)?;
        shard.get_mut(&Name(topic.as_bytes()))?.track.as_deref_mut()
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
