//! The embedded bus: one queue, one reader, one process; knows nothing of Redis.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use hashbrown::HashSet;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::{history::Position, names::Names};

use crate::{
    bus::{
        BusCounters, BusError, Deliver, History, Keep, Outcome, Publish, Status,
        queue::{Back, Queue},
    },
    config,
    store::{
        StoreError, StreamCommand,
        memory::{Appended, MemoryStore},
    },
};

/// Channels and messages inside this process. Clones share one bus.
#[derive(Clone)]
pub struct MemoryBus(Arc<Shared>);

/// What the one reader does, in order.
pub(crate) enum Work {
    /// Delivers a message.
    Publish(Publish),
    /// Changes a token stream and delivers what that leads to.
    Stream(StreamCommand, oneshot::Sender<StreamResult>),
}

/// The answer to a [`StreamCommand`].
pub(crate) type StreamResult = Result<(u64, Position), StoreError>;

struct Shared {
    queue: Arc<Queue<Work>>,
    subscribed: Mutex<HashSet<Arc<str>>>,
    store: MemoryStore,
    counters: BusCounters,
}

impl MemoryBus {
    pub(super) fn new(
        config: &config::Redis,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let queue = Arc::new(Queue::new(config.publish_queue_bytes));
        let shared = Arc::new(Shared {
            store: MemoryStore::new(Arc::clone(&queue), Names::new(&config.channel_prefix)),
            queue,
            subscribed: Mutex::default(),
            counters: BusCounters::default(),
        });
        tasks.spawn(shared.clone().read(deliver, shutdown));
        Self(shared)
    }

    pub(super) fn store(&self) -> MemoryStore {
        self.0.store.clone()
    }

    pub(super) fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        self.0.subscribed.lock().extend(channels);
        Ok(())
    }

    pub(super) fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        let mut subscribed = self.0.subscribed.lock();
        for channel in channels {
            subscribed.remove(&channel);
        }
    }

    #[expect(clippy::result_large_err, reason = "the message goes back without an allocation")]
    pub(super) fn publish(&self, publish: Publish) -> Result<(), (BusError, Publish)> {
        let bytes = publish.queued_bytes();
        let Err((back, work)) = self.0.queue.push(Work::Publish(publish), bytes) else {
            return Ok(());
        };
        let error = match back {
            Back::Full => {
                self.0.counters.publish_full.add(1);
                BusError::Full
            }
            Back::Closed => BusError::Closed,
        };
        match work {
            Work::Publish(publish) => Err((error, publish)),
            Work::Stream(..) => unreachable!("a queue gives back what was pushed"),
        }
    }

    pub(super) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.queue.poll_open(cx)
    }

    pub(super) fn status(&self) -> Status {
        Status {
            connected: true,
            subscribed: true,
            channels: self.0.subscribed.lock().len(),
            queued_bytes: self.0.queue.bytes(),
            last_error: None,
        }
    }

    pub(super) fn counters(&self) -> &BusCounters {
        &self.0.counters
    }
}

impl Shared {
    /// The one reader: what is queued is one round, as it would be on a socket.
    async fn read(self: Arc<Self>, mut deliver: Box<dyn Deliver>, shutdown: CancellationToken) {
        let mut round = Vec::new();
        loop {
            self.queue.take(ROUND_BYTES, ROUND_MESSAGES, &mut round);
            if round.is_empty() {
                if shutdown.is_cancelled() {
                    // Whoever pushed before this is served by one more look.
                    self.queue.close();
                    if self.queue.is_empty() {
                        return;
                    }
                    continue;
                }
                tokio::select! {
                    () = self.queue.filled() => {}
                    () = shutdown.cancelled() => {}
                }
                continue;
            }
            let mut left = round.len();
            for work in round.drain(..) {
                left -= 1;
                match work {
                    Work::Publish(publish) => {
                        let outcome = self.deliver(&publish, left == 0, &mut *deliver);
                        if let Some(receipt) = publish.receipt {
                            receipt.published(outcome);
                        }
                    }
                    Work::Stream(command, caller) => {
                        let result = self.store.change_stream(&command);
                        let answer = result.map(|(answer, message)| {
                            if let Some((channel, message)) = message {
                                self.hand(&channel, &message, left == 0, &mut *deliver);
                            }
                            answer
                        });
                        // Nobody is there any more where the caller's deadline has passed.
                        let _ = caller.send(answer);
                    }
                }
            }
            deliver.flush();
            tokio::task::yield_now().await;
        }
    }

    fn deliver(&self, publish: &Publish, last: bool, deliver: &mut dyn Deliver) -> Outcome {
        if let Keep::History(history) = &publish.keep {
            return self.store_and_deliver(publish, history, last, deliver);
        }
        if self.hand(&publish.channel, &publish.payload, last, deliver) {
            self.counters.published.add(1);
            return Outcome::Received(1);
        }
        let Keep::Unheard { log, entries_max, ttl } = &publish.keep else {
            self.counters.published.add(1);
            return Outcome::Received(0);
        };
        match self.store.append(log, publish.payload.clone(), *entries_max, *ttl) {
            Ok(()) => {
                self.counters.published.add(1);
                self.counters.publish_kept.add(1);
                Outcome::Kept
            }
            Err(error) => {
                self.counters.publish_lost.add(1);
                tracing::debug!(%error, "A message that nobody received could not be kept.");
                Outcome::Lost
            }
        }
    }
}

impl Shared {
    /// Gives a message to the hub if it wants the channel.
    fn hand(&self, channel: &str, message: &[u8], last: bool, deliver: &mut dyn Deliver) -> bool {
        let heard = self.subscribed.lock().contains(channel);
        if heard {
            self.counters.messages_in.add(1);
            deliver.message(channel.as_bytes(), message, last);
        }
        heard
    }

    fn store_and_deliver(
        &self,
        publish: &Publish,
        history: &History,
        last: bool,
        deliver: &mut dyn Deliver,
    ) -> Outcome {
        let stored = self.store.append_history(history, &publish.payload);
        let (receivers, id, duplicate) = match stored {
            Ok(Appended::Duplicate(id)) => (0, id, true),
            Ok(Appended::New { id, message }) => {
                let heard = self.hand(&publish.channel, &message, last, deliver);
                (u64::from(heard), id, false)
            }
            Err(error) => {
                self.counters.publish_lost.add(1);
                tracing::debug!(%error, "A message could not be kept in its history.");
                return Outcome::Lost;
            }
        };
        self.counters.published.add(1);
        self.counters.publish_stored.add(1);
        Outcome::Stored { receivers, id, duplicate }
    }
}

/// A round ends at so many bytes, so that outboxes are written before they pile up.
const ROUND_BYTES: usize = 1024 * 1024;

/// A round ends at so many messages.
const ROUND_MESSAGES: usize = 1000;
