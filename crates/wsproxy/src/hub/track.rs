//! Tracks: the state of a topic's history on this instance.

use std::sync::Arc;

use wsproxy_proto::{
    history::{Envelope, HistoryLimits, Reader, reader::Verdict},
    names::Names,
};

use crate::hub::{
    audience::Audience,
    message::{Message, Stored},
};

/// Properties that the histories of a family share.
#[derive(Debug)]
pub struct Histories {
    /// Limits of the logs.
    pub limits: HistoryLimits,
    /// Names of logs, and of sessions' topics: if such a history is lost, clients get the session's token streams.
    pub names: Names,
    /// Key of the clock that gives the ids of logs which share one order.
    pub clock: Option<Arc<str>>,
    /// Prefix of per-connection topics. A reconnecting client has a new connection id, so it can never resume these.
    pub unresumable_prefix: Option<Arc<str>>,
    /// Plain messages with an `event_id` are adopted into the history.
    pub adopt_plain: bool,
}

/// The history of a topic: this instance's reader of the topic's log.
///
/// There is one for every user and every connection of an event client, so that it holds nothing that can be made again.
pub(super) struct Track {
    pub(super) histories: Arc<Histories>,
    pub(super) reader: Reader<Stored>,
    /// Incremented whenever a message may have been missed. If the number changes while a replay reads the log, the
    /// replay reads it again.
    pub(super) turns: u32,
    /// The topic belongs to one connection; see [`Histories::unresumable_prefix`].
    pub(super) is_unresumable: bool,
}

impl Track {
    /// Makes the track of a topic whose log was not read yet.
    pub(super) fn new(topic: &str, histories: Arc<Histories>) -> Self {
        let prefix = histories.unresumable_prefix.as_ref();
        let is_unresumable = prefix.is_some_and(|prefix| topic.starts_with(&**prefix));
        Self { histories, reader: Reader::default(), turns: 0, is_unresumable }
    }

    /// Returns the key of the log of the track's topic.
    pub(super) fn log(&self, topic: &str) -> Arc<str> {
        self.histories.names.log(topic).into()
    }

    /// Notes that messages may be missing behind the reader's position.
    pub(super) fn interrupt(&mut self) {
        self.turns = self.turns.wrapping_add(1);
        self.reader.interrupt();
    }

    /// Judges a message that came over the bus while the store's clock showed `latest_ms` at most.
    ///
    /// # Errors
    /// [`Verdict::Held`]: the message waits. [`Verdict::Hole`]: the log has to be read, and the message with it.
    pub(super) fn accept(
        &mut self,
        envelope: &Envelope<'_>,
        message: Message<'_>,
        latest_ms: u64,
    ) -> Result<Audience, Verdict> {
        let Envelope { id, prev, .. } = *envelope;
        match self.reader.accept(id, prev, latest_ms, || message.store()) {
            Verdict::Deliver => Ok(Audience::All),
            Verdict::Duplicate => Ok(Audience::Gated),
            Verdict::Held => Err(Verdict::Held),
            Verdict::Hole => {
                self.turns = self.turns.wrapping_add(1);
                Err(Verdict::Hole)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_track_takes_little_memory() {
        // One for the user and one for the connection of every event client. The allocator rounds up to 160 bytes.
        assert!(size_of::<Track>() <= 160, "{} bytes", size_of::<Track>());
    }
}
