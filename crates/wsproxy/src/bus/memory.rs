//! The embedded bus: one queue, one reader, one process; knows nothing of Redis.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use hashbrown::HashSet;
use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    bus::{
        BusCounters, BusError, Deliver, Keep, Outcome, Publish, Status,
        queue::{Back, Queue},
    },
    config,
    store::memory::MemoryStore,
};

/// Channels and messages inside this process. Clones share one bus.
#[derive(Clone)]
pub struct MemoryBus(Arc<Shared>);

struct Shared {
    queue: Queue<Publish>,
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
        let shared = Arc::new(Shared {
            queue: Queue::new(config.publish_queue_bytes),
            subscribed: Mutex::default(),
            store: MemoryStore::default(),
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
        self.0.queue.push(publish, bytes).map_err(|(back, publish)| match back {
            Back::Full => {
                self.0.counters.publish_full.add(1);
                (BusError::Full, publish)
            }
            Back::Closed => (BusError::Closed, publish),
        })
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
            for publish in round.drain(..) {
                left -= 1;
                let outcome = self.deliver(&publish, left == 0, &mut *deliver);
                if let Some(receipt) = publish.receipt {
                    receipt.published(outcome);
                }
            }
            deliver.flush();
            tokio::task::yield_now().await;
        }
    }

    fn deliver(&self, publish: &Publish, last: bool, deliver: &mut dyn Deliver) -> Outcome {
        let heard = self.subscribed.lock().contains(&publish.channel);
        if heard {
            self.counters.messages_in.add(1);
            self.counters.published.add(1);
            deliver.message(publish.channel.as_bytes(), &publish.payload, last);
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

/// A round ends at so many bytes, so that outboxes are written before they pile up.
const ROUND_BYTES: usize = 1024 * 1024;

/// A round ends at so many messages.
const ROUND_MESSAGES: usize = 1000;
