//! The embedded bus: one queue, one reader, one process; knows nothing of Redis.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use hashbrown::HashSet;
use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::{history::Envelope, names::Names};

use crate::{
    bus::{
        deliver::Deliver,
        publish::{BusError, History, Keep, Outcome, Publish},
        status::{BusCounters, Status},
    },
    config,
    embedded::{
        request::EmbeddedRequest,
        store::{EmbeddedStore, StoreLimits},
    },
    queue::{Back, Queue},
    store::{
        command::StoreError,
        not_done::NotDone,
        token_streams::{StreamCommand, StreamError, StreamHead},
    },
};

/// Channels and messages inside this process. Clones share one bus.
#[derive(Clone)]
pub struct EmbeddedBus(Arc<Shared>);

struct Shared {
    queue: Arc<Queue<EmbeddedRequest>>,
    subscribed: Mutex<HashSet<Arc<str>>>,
    store: EmbeddedStore,
    counters: BusCounters,
}

impl EmbeddedBus {
    pub(crate) fn new(
        config: &config::RedisConfig,
        limits: StoreLimits,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let queue = Arc::new(Queue::new(config.publish_queue_bytes));
        let shared = Arc::new(Shared {
            store: EmbeddedStore::new(Names::new(&config.channel_prefix), queue.clone(), limits),
            queue,
            subscribed: Mutex::default(),
            counters: BusCounters::default(),
        });
        tasks.spawn(shared.clone().read(deliver, shutdown));
        Self(shared)
    }

    pub(crate) fn store(&self) -> EmbeddedStore {
        self.0.store.clone()
    }

    pub(crate) fn subscribe(&self, channels: Vec<Arc<str>>) -> Result<(), BusError> {
        self.0.subscribed.lock().extend(channels);
        Ok(())
    }

    pub(crate) fn unsubscribe(&self, channels: Vec<Arc<str>>) {
        let mut subscribed = self.0.subscribed.lock();
        for channel in channels {
            subscribed.remove(&channel);
        }
    }

    pub(crate) fn publish(&self, publish: Publish) -> Result<(), (Back, Publish)> {
        let bytes = publish.queued_bytes();
        self.0.queue.push(publish, bytes)
    }

    pub(crate) fn poll_publishable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.queue.poll_open(cx)
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            connected: true,
            subscribed: true,
            channels: self.0.subscribed.lock().len(),
            queued_bytes: self.0.queue.bytes(),
            refusal: self.0.store.is_full().then_some(NotDone::Memory),
            away: None,
            last_error: None,
        }
    }

    pub(crate) fn counters(&self) -> &BusCounters {
        &self.0.counters
    }
}

impl Shared {
    /// Serves requests, in rounds of all that are queued, as reads from a socket would give them.
    async fn read(self: Arc<Self>, mut deliver: Box<dyn Deliver>, shutdown: CancellationToken) {
        let mut round = Vec::new();
        let mut is_behind = false;
        loop {
            self.queue.take(ROUND_BYTES, ROUND_MESSAGES, &mut round);
            if round.is_empty() {
                if is_behind {
                    is_behind = deliver.proceed();
                    tokio::task::yield_now().await;
                    continue;
                }
                if shutdown.is_cancelled() {
                    // Requests that were pushed before this are still served.
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
            for request in round.drain(..) {
                left -= 1;
                match request {
                    EmbeddedRequest::Publish(publish) => {
                        let outcome = self.deliver(&publish, left == 0, &mut *deliver);
                        if let Some(receipt) = publish.receipt {
                            receipt.published(outcome);
                        }
                    }
                    // A caller that gave up must not have its command done.
                    EmbeddedRequest::Stream(_, caller) if caller.is_closed() => {}
                    EmbeddedRequest::Stream(command, caller) => {
                        drop(caller.send(self.change(&command, &mut *deliver)));
                    }
                }
            }
            deliver.flush();
            is_behind = deliver.proceed();
            tokio::task::yield_now().await;
        }
    }

    fn change(
        &self,
        command: &StreamCommand,
        deliver: &mut dyn Deliver,
    ) -> Result<StreamHead, StreamError> {
        let changed = self.store.change(command)?;
        let channel = self.store.names().session_down(&command.session);
        for message in &changed.messages {
            self.hand_over(&channel, message, false, deliver);
        }
        Ok(changed.head)
    }

    fn deliver(&self, publish: &Publish, last: bool, deliver: &mut dyn Deliver) -> Outcome {
        if let Keep::History(history) = &publish.keep {
            return self.append(publish, history, last, deliver);
        }
        if self.hand_over(&publish.channel, &publish.payload, last, deliver) {
            self.counters.published.add(1);
            return Outcome::Received(1);
        }
        let Keep::IfNoReceiver { log, entries_max, bytes_max, ttl } = &publish.keep else {
            self.counters.published.add(1);
            return Outcome::Received(0);
        };
        let bounds = (*entries_max, *bytes_max);
        match self.store.append(log, publish.payload.clone(), bounds, *ttl) {
            Ok(()) => {
                self.counters.published.add(1);
                self.counters.publish_kept.add(1);
                Outcome::Kept
            }
            Err(error) => {
                tracing::debug!(%error, "A message without a receiver could not be kept.");
                self.refused(&error)
            }
        }
    }

    fn append(
        &self,
        publish: &Publish,
        history: &History,
        last: bool,
        deliver: &mut dyn Deliver,
    ) -> Outcome {
        let appended = self.store.append_history(history, publish.payload.clone());
        let appended = match appended {
            Ok(appended) => appended,
            Err(error) => {
                tracing::debug!(%error, "A message could not be kept in its history.");
                return self.refused(&error);
            }
        };
        self.counters.published.add(1);
        self.counters.publish_stored.add(1);
        let id = appended.id;
        let Some(prev) = appended.prev else {
            return Outcome::Stored { receivers: 0, id, duplicate: true };
        };
        let event_id = history.event_id.as_deref();
        let message = Envelope { id, prev, event_id, payload: &publish.payload }.encode();
        let heard = self.hand_over(&publish.channel, &message, last, deliver);
        Outcome::Stored { receivers: heard.into(), id, duplicate: false }
    }

    fn refused(&self, error: &StoreError) -> Outcome {
        let refusal = match error {
            StoreError::Full => NotDone::Memory,
            StoreError::NotDone { refusal, .. } => *refusal,
            StoreError::Refused(_) | StoreError::Lost(_) | StoreError::Closed => NotDone::Other,
        };
        self.counters.publish_refused[refusal as usize].add(1);
        Outcome::Refused(refusal)
    }

    /// Delivers a message; returns whether its channel has a subscriber.
    fn hand_over(
        &self,
        channel: &str,
        payload: &[u8],
        last: bool,
        deliver: &mut dyn Deliver,
    ) -> bool {
        let heard = self.subscribed.lock().contains(channel);
        if heard {
            self.counters.messages_in.add(1);
            deliver.message(channel.as_bytes(), payload, last);
        }
        heard
    }
}

/// Upper bound of a round in bytes, so that outboxes are written before they pile up.
const ROUND_BYTES: usize = 1024 * 1024;

/// Upper bound of a round in messages.
const ROUND_MESSAGES: usize = 1000;
