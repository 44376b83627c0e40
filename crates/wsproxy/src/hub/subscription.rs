//! The guard of sinks at their topics.

use std::sync::Arc;

use crate::hub::{Hub, sink::SinkId};

/// Guard of sinks that receive their topics' messages. Dropping it removes them.
pub struct Subscription {
    hub: Arc<Hub>,
    sinks: Vec<(Arc<str>, SinkId)>,
}

impl Subscription {
    /// Makes an empty subscription.
    pub(super) const fn new(hub: Arc<Hub>) -> Self {
        Self { hub, sinks: Vec::new() }
    }

    /// Adds a sink, which dropping the guard removes from the topic.
    pub(super) fn push(&mut self, topic: Arc<str>, sink: SinkId) {
        self.sinks.push((topic, sink));
    }

    /// Returns the topics, each with its sink.
    pub(super) fn sinks(&self) -> &[(Arc<str>, SinkId)] {
        &self.sinks
    }

    /// Returns the topics. No sink is added from now on.
    pub(super) fn complete(&mut self) -> Vec<Arc<str>> {
        self.sinks.shrink_to_fit();
        self.sinks.iter().map(|(topic, _)| Arc::clone(topic)).collect()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for (topic, id) in self.sinks.drain(..) {
            self.hub.remove(&topic, id);
        }
    }
}
