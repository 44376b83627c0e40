//! Adoption of plain messages into the histories of their channels, if the operator switched it on.
//!
//! Every instance that reads such a message publishes it again with history. The log accepts one of these publishes, by
//! the message's own event id.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use bytes::Bytes;
use serde::Deserialize;
use tracing::debug;
use wsproxy_proto::history::check_event_id;

use crate::{
    bus::publish::{History, Keep, Outcome, Publish, Receipt},
    hub::{Hub, track::Track},
};

/// A plain message that waits to be published again with history.
///
/// It waits for the end of its round. If this instance reads late, another instance may have published the message with
/// history already, and that publish is in the same round.
pub(super) struct Adoption {
    channel: Arc<str>,
    payload: Bytes,
    history: History,
}

impl Adoption {
    /// Makes an adoption; `None` if the message has no event id, by which the log could recognize it.
    pub(super) fn new(channel: &[u8], track: &Track, payload: &[u8]) -> Option<Self> {
        let Identified { event_id } = serde_json::from_slice(payload).ok()?;
        check_event_id(&event_id).ok()?;
        let channel: Arc<str> = std::str::from_utf8(channel).ok()?.into();
        let histories = &track.histories;
        let history = History {
            log: track.log(&channel),
            clock: histories.clock.clone(),
            event_id: Some(event_id),
            dedup: None,
            unique: true,
            limits: histories.limits,
        };
        Some(Self { channel, payload: Bytes::copy_from_slice(payload), history })
    }

    /// Returns whether this is the channel's message with this event id.
    pub(super) fn is(&self, channel: &[u8], event_id: &str) -> bool {
        self.channel.as_bytes() == channel && self.history.event_id.as_deref() == Some(event_id)
    }

    /// Publishes the message with history.
    pub(super) fn publish(self, hub: &Arc<Hub>) {
        let Self { channel, payload, history } = self;
        let attempt =
            Attempt { hub: Arc::downgrade(hub), channel, payload, history, tries: 1.into() };
        Arc::new(attempt).publish(hub);
    }
}

/// An adoption that was published. It may be tried again, since the log recognizes the event id.
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
            receipt: Some(Arc::new(Adopted(Arc::clone(&self)))),
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

struct Adopted(Arc<Attempt>);

impl Receipt for Adopted {
    fn published(&self, outcome: Outcome) {
        let Some(hub) = self.0.hub.upgrade() else { return };
        match outcome {
            Outcome::Stored { duplicate: false, .. } => hub.counters.captured.add(1),
            Outcome::Stored { .. } => {}
            // Queued publishes wait for the next connection to Redis, but one in flight may be lost with the old one.
            _ if self.0.tries.fetch_add(1, Relaxed) < TRIES => Arc::clone(&self.0).publish(&hub),
            _ => self.0.give_up(&hub),
        }
    }
}

/// Members of a message with an event id of its own.
#[derive(Deserialize)]
struct Identified {
    event_id: Box<str>,
}

/// Upper bound of the tries of an adoption.
const TRIES: u32 = 3;
