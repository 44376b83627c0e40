//! Local fan-out: topics and their sinks, and publishing to the bus. Knows no endpoint.
//!
//! The bus's reader runs `delivery`. `replay` sends a new client the messages that it missed. `healer` reads the
//! messages that the instance missed.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::Notify;
use tracing::{debug, trace, warn};

use crate::{
    bus::{
        Bus,
        publish::{BusError, Publish},
    },
    client::Client,
    hub::{
        counters::HubCounters,
        follower::FollowerQueue,
        pace::Pace,
        sink::{Sink, SinkId},
        store_clock::{Doubts, StoreClock},
        subscription::Subscription,
        topic::Shards,
        track::{Histories, Track},
    },
    telemetry::log::MESSAGES,
};

mod adoption;
mod audience;
pub mod counters;
pub mod delivery;
mod fanout;
pub mod follower;
pub mod form;
pub mod gate;
pub mod healer;
pub mod inbox;
pub mod message;
mod metrics;
pub mod notice;
mod pace;
pub mod replay;
pub mod sink;
mod store_clock;
mod subscribers;
pub mod subscription;
#[cfg(test)]
mod tests;
mod topic;
pub mod track;
pub mod wants_ack;

/// The topics of this instance.
///
/// Invariant: a topic is in the map if and only if it has sinks here, and exactly then the bus is
/// subscribed to it. The bus is told to subscribe after the topic is in the map, and to unsubscribe
/// under the lock of the topic's shard. So the two orders never reach the bus the wrong way round.
pub struct Hub {
    shards: Shards,
    bus: OnceLock<Bus>,
    /// Number of losses and recoveries of the bus; odd while the bus is lost.
    outages: AtomicU64,
    /// Wakes the healer to read logs.
    holes: Notify,
    /// Estimate of the store's clock.
    store_clock: StoreClock,
    doubts: Doubts,
    broken: healer::BrokenHistories,
    /// Pace of the healer's reads.
    heal_pace: Pace,
    /// Counters of deliveries and histories.
    pub counters: HubCounters,
}

impl Hub {
    /// Makes a hub without topics. [`Self::connect`] adds the bus, since hub and bus need each other.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            shards: Shards::default(),
            bus: OnceLock::new(),
            outages: AtomicU64::new(0),
            holes: Notify::new(),
            store_clock: StoreClock::default(),
            doubts: Doubts::default(),
            broken: healer::BrokenHistories::default(),
            heal_pace: Pace::new(healer::READS_PER_SECOND, healer::READS_PER_SECOND / 10),
            counters: HubCounters::default(),
        })
    }

    /// Gives the hub its bus. A second call has no effect.
    pub fn connect(&self, bus: Bus) {
        if self.bus.set(bus).is_err() {
            warn!("The hub has a bus already.");
        }
    }

    /// Adds sinks to topics and waits until the bus has confirmed all topics. From then on every
    /// message reaches the sinks, as long as the returned guard lives.
    ///
    /// # Errors
    /// The bus refuses. Then nothing stays subscribed, as when the future is dropped.
    pub async fn subscribe(
        self: &Arc<Self>,
        wanted: impl IntoIterator<Item = (Arc<str>, Sink)>,
    ) -> Result<Subscription, BusError> {
        self.subscribe_beside(None, wanted).await
    }

    /// As [`Self::subscribe`], in addition to a reserved subscription.
    ///
    /// # Errors
    /// As [`Self::subscribe`].
    pub async fn subscribe_beside(
        self: &Arc<Self>,
        reserved: Option<Subscription>,
        wanted: impl IntoIterator<Item = (Arc<str>, Sink)>,
    ) -> Result<Subscription, BusError> {
        let mut subscription = reserved.unwrap_or_else(|| Subscription::new(Arc::clone(self)));
        for (topic, sink) in wanted {
            self.add(topic, sink, None, &mut subscription);
        }
        self.confirm(&mut subscription).await?;
        Ok(subscription)
    }

    /// Asks the bus for no further messages of a subscription's topics, and resolves when the bus has sent the last one.
    /// Until then its sinks still take messages, while their senders hear of no receiver that is about to leave. Topics
    /// that have other sinks stay as they are. The subscription is to be dropped next. `fence` is a topic on which nothing
    /// is published.
    pub async fn stop(self: &Arc<Self>, subscription: &Subscription, fence: Arc<str>) {
        let Some(bus) = self.bus.get() else { return };
        for (topic, sink) in subscription.sinks() {
            let mut shard = self.shards.lock(topic.as_bytes());
            let Some(state) = shard.get_mut(topic.as_bytes()) else { continue };
            let mut sinks = state.subscribers.iter();
            if sinks.all(|other| other.id() == *sink) {
                // A sink that comes meanwhile subscribes again, behind this.
                bus.unsubscribe(vec![Arc::clone(topic)]);
            }
        }
        // The bus answers in order: behind this subscription no message of the topics can come.
        let queue = FollowerQueue::new(0);
        if let Err(error) = self.subscribe([(fence, Sink::Follower(queue))]).await {
            debug!(%error, "The end of a subscription is not confirmed.");
        }
    }

    /// Adds a sink to a topic; `None` if the topic would have more than `sinks_max` sinks. The bus subscribes when the
    /// returned guard is passed to [`Self::subscribe_beside`] or [`replay::subscribe_behind_fence`].
    #[must_use]
    pub fn reserve(
        self: &Arc<Self>,
        topic: Arc<str>,
        sink: Sink,
        sinks_max: usize,
    ) -> Option<Subscription> {
        let mut subscription = Subscription::new(Arc::clone(self));
        let sinks = self.add(topic, sink, None, &mut subscription);
        (sinks <= sinks_max).then_some(subscription)
    }

    /// Puts a message into the queue of the bus.
    ///
    /// # Errors
    /// The queue is full or closed. Then the receipt is not called.
    pub fn publish(&self, publish: Publish) -> Result<(), BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        trace!(target: MESSAGES, channel = &*publish.channel, bytes = publish.payload.len(),
            "A message is put into the queue of the bus.");
        bus.publish(publish).map_err(|(error, _)| error)
    }

    /// Ready when [`Self::publish`] has room; see [`Bus::poll_publishable`].
    pub fn poll_publishable(&self, cx: &mut std::task::Context<'_>) -> std::task::Poll<()> {
        self.bus.get().map_or(std::task::Poll::Ready(()), |bus| bus.poll_publishable(cx))
    }

    /// Returns the clients here whose logic is subscribed to a topic.
    #[must_use]
    pub fn clients_of(&self, topic: &str) -> Vec<Client> {
        let shard = self.shards.lock(topic.as_bytes());
        let sinks = shard.get(topic.as_bytes()).map(|topic| topic.subscribers.iter());
        let clients = sinks.into_iter().flatten().filter_map(|sink| match sink {
            Sink::Handler { client, .. } => Some(client.clone()),
            _ => None,
        });
        clients.collect()
    }

    /// Returns the number of topics.
    #[must_use]
    pub fn topics(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Adds a sink, which `subscription` removes. Returns the number of the topic's sinks.
    fn add(
        &self,
        topic: Arc<str>,
        sink: Sink,
        histories: Option<&Arc<Histories>>,
        subscription: &mut Subscription,
    ) -> usize {
        subscription.push(Arc::clone(&topic), sink.id());
        let track = histories.map(|histories| Track::new(&topic, Arc::clone(histories)));
        let mut shard = self.shards.lock(topic.as_bytes());
        let state = shard.get_or_insert(topic);
        state.subscribers.add(sink);
        if state.track.is_none() {
            state.track = track.map(Box::new);
        }
        state.subscribers.len()
    }

    /// Waits until the bus has confirmed all topics of a subscription.
    async fn confirm(&self, subscription: &mut Subscription) -> Result<(), BusError> {
        let bus = self.bus.get().ok_or(BusError::Closed)?;
        bus.subscribe(subscription.complete()).await
    }

    fn remove(&self, topic: &Arc<str>, sink: SinkId) {
        let mut shard = self.shards.lock(topic.as_bytes());
        let Some(state) = shard.get_mut(topic.as_bytes()) else { return };
        let removed = state.subscribers.remove(sink);
        if state.subscribers.is_empty() {
            shard.remove(topic.as_bytes());
            if let Some(bus) = self.bus.get() {
                bus.unsubscribe(vec![Arc::clone(topic)]);
            }
        }
        drop(shard);
        // Drop the sink outside the lock: it may be the last owner of a socket.
        drop(removed);
    }

    /// Wakes the healer for a hole in a log. If several logs share one order, all of them are interrupted and read
    /// again together.
    fn open_hole(&self, histories: &Arc<Histories>) {
        if histories.clock.is_some() {
            for shard in self.shards.iter() {
                let mut shard = shard.lock();
                let tracks = shard.tracks_mut().map(|(_, track)| track);
                tracks
                    .filter(|track| Arc::ptr_eq(&track.histories, histories))
                    .for_each(Track::interrupt);
            }
        }
        self.holes.notify_one();
    }

    /// Returns the number of losses and recoveries of the bus; odd while the bus is lost.
    fn outage(&self) -> u64 {
        self.outages.load(Ordering::Acquire)
    }

    fn is_linked(&self) -> bool {
        self.outage().is_multiple_of(2)
    }

    fn links_lost(&self) -> u64 {
        self.bus.get().map_or(0, |bus| bus.counters().links_lost.value())
    }
}
