//! Takes plain messages into the histories of their channels, where that is switched on.
//!
//! Every instance that reads such a message publishes it again with history; the log lets one of them win, by the
//! message's own event id.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use bytes::Bytes;
use serde::Deserialize;
use tracing::debug;
use wsproxy_proto::history::check_event_id;

use crate::{
    bus::{History, Keep, Outcome, Publish, Receipt},
    hub::{Hub, Track},
};

/// A message that is to be taken into the history of its channel.
///
/// It waits for the end of its round: what an instance reads late, another one has captured already, and its
/// capture stands in the same round.
pub(super) struct Capture {
    channel: Arc<str>,
    payload: Bytes,
    history: History,
}

impl Capture {
    /// `None` where the message has no event id of its own, by which it would be known.
    pub(super) fn new(channel: &[u8], track: &Track, payload: &[u8]) -> Option<Self> {
        let Identified { event_id } = serde_json::from_slice(payload).ok()?;
        check_event_id(&event_id).ok()?;
        let channel = std::str::from_utf8(channel).ok()?.into();
        let Track { log, histories, .. } = track;
        let history = History {
            log: Arc::clone(log),
            clock: histories.clock.clone(),
            event_id: Some(event_id),
            dedup: None,
            unique: true,
            limits: histories.limits,
        };
        Some(Self { channel, payload: Bytes::copy_from_slice(payload), history })
    }

    /// Whether it is the message with this event id of this channel.
    pub(super) fn is(&self, channel: &[u8], event_id: &str) -> bool {
        self.channel.as_bytes() == channel && self.history.event_id.as_deref() == Some(event_id)
    }

    /// Publishes it with history.
    pub(super) fn publish(self, hub: &Arc<Hub>) {
        let Self { channel, payload, history } = self;
        let attempt =
            Attempt { hub: Arc::downgrade(hub), channel, payload, history, tries: 1.into() };
        Arc::new(attempt).publish(hub);
    }
}

/// A capture on its way. The log knows the event id, so it may be tried again.
struct Attempt {
    hub: Weak<Hub>,
    channel: Arc<str>,
    payload: Bytes,
    history: History,
    tries: AtomicU32,
}

impl Attempt {
    fn publish(self: Arc<Self>, hub: &Hub) {
        let published = hub.publish(Publish {
            channel: Arc::clone(&self.channel),
            payload: self.payload.clone(),
            keep: Keep::History(Box::new(self.history.clone())),
            receipt: Some(Arc::new(Captured(Arc::clone(&self)))),
        });
        if published.is_err() {
            self.give_up(hub);
        }
    }

    fn give_up(&self, hub: &Hub) {
        hub.counters.uncaptured.add(1);
        debug!(channel = &*self.channel, "A plain message could not be taken into the history.");
    }
}

struct Captured(Arc<Attempt>);

impl Receipt for Captured {
    fn published(&self, outcome: Outcome) {
        let Some(hub) = self.0.hub.upgrade() else { return };
        match outcome {
            Outcome::Stored { duplicate: false, .. } => hub.counters.captured.add(1),
            Outcome::Stored { .. } => {}
            // What is queued waits for the next link; what was on its way may have been lost with this one.
            _ if self.0.tries.fetch_add(1, Relaxed) < TRIES => Arc::clone(&self.0).publish(&hub),
            _ => self.0.give_up(&hub),
        }
    }
}

/// A message with an id of its own.
#[derive(Deserialize)]
struct Identified {
    event_id: Box<str>,
}

/// So often a capture is tried.
const TRIES: u32 = 3;
