//! Finds out whether what is published arrives: a message to the instance's own channel must come back.
//!
//! No clock decides. The server puts the message into our connection before it answers the publish, so
//! an answer to a question which was asked after that overtakes the message only if it is not there.
//! Since servers with many threads may be less strict, a second such question has the last word.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use bytes::Bytes;

use crate::bus::{Keep, Outcome, Publish, Receipt, redis::pipeline::Pipeline};

/// The probe of one connection.
pub(super) struct Probe {
    channel: Arc<str>,
    sent: Option<Sent>,
}

struct Sent {
    payload: Bytes,
    answer: Arc<Answer>,
    /// A question was asked after the publish had been answered.
    fenced: bool,
    /// How many such questions have been answered.
    fences_passed: u32,
    /// That nobody received it has been seen before.
    unheard: bool,
}

/// What became of the publish: a count of receivers, or one of the constants below.
struct Answer(AtomicI64);

impl Probe {
    /// On this channel.
    pub(super) fn new(channel: Arc<str>) -> Self {
        Self { channel, sent: None }
    }

    /// The instance's own channel.
    pub(super) fn channel(&self) -> &str {
        &self.channel
    }

    /// Sends one, unless one is under way. Only call it while the channel is confirmed.
    pub(super) fn send(&mut self, publishes: &Pipeline) {
        if self.sent.as_ref().is_some_and(|sent| sent.answer.0.load(Ordering::Acquire) != LOST) {
            return;
        }
        let payload = Bytes::from(format!("{:032x}", rand::random::<u128>()));
        let answer = Arc::new(Answer(AtomicI64::new(OPEN)));
        publishes.publish_urgently(Publish {
            channel: self.channel.clone(),
            payload: payload.clone(),
            keep: Keep::Nothing,
            receipt: Some(answer.clone()),
        });
        self.sent = Some(Sent { payload, answer, fenced: false, fences_passed: 0, unheard: false });
    }

    /// Whether this message belongs to the probe, and not to anybody else.
    pub(super) fn returned(&mut self, channel: &[u8], payload: &[u8]) -> bool {
        if channel != self.channel.as_bytes() {
            return false;
        }
        // One of another instance with the same name, or of an earlier connection, says nothing.
        if self.sent.as_ref().is_some_and(|sent| sent.payload == payload) {
            self.sent = None;
        }
        true
    }

    /// A question is asked now, of which [`Self::fence_was_passed`] will tell the answer.
    pub(super) fn fence(&mut self) {
        if let Some(sent) = &mut self.sent {
            sent.fenced = sent.answer.0.load(Ordering::Acquire) > 0;
        }
    }

    /// The question was answered. Says whether the probe should have come by now.
    pub(super) fn fence_was_passed(&mut self) -> bool {
        let Some(sent) = self.sent.as_mut().filter(|sent| sent.fenced) else { return false };
        sent.fences_passed += 1;
        sent.fences_passed >= FENCES
    }

    /// Whether nobody received it, though this connection is subscribed: then it is not the same server.
    /// Ask at every tick: at the first, the end of the connection may lie there unread instead.
    pub(super) fn is_unheard(&mut self) -> bool {
        let Some(sent) = &mut self.sent else { return false };
        let unheard = sent.answer.0.load(Ordering::Acquire) == 0;
        std::mem::replace(&mut sent.unheard, unheard) && unheard
    }
}

impl Receipt for Answer {
    fn published(&self, outcome: Outcome) {
        let answer = match outcome {
            Outcome::Received(count) => i64::try_from(count).unwrap_or(i64::MAX),
            Outcome::Kept | Outcome::Stored { .. } | Outcome::Lost => LOST,
        };
        self.0.store(answer, Ordering::Release);
    }
}

/// Not answered yet.
const OPEN: i64 = -1;

/// Refused or on its way when the link was lost: says nothing, another one is sent.
const LOST: i64 = -2;

/// So many questions must overtake a probe until it counts as missed.
const FENCES: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// A probe that was sent, and the message that carries it.
    fn sent() -> (Probe, Publish) {
        let (mut probe, pipeline) = (Probe::new("own".into()), Pipeline::new(1));
        probe.send(&pipeline);
        let publish = pipeline.take_urgent().unwrap();
        probe.send(&pipeline);
        assert!(pipeline.take_urgent().is_none(), "one at a time");
        (probe, publish)
    }

    fn answer(publish: &Publish, outcome: Outcome) {
        publish.receipt.as_ref().unwrap().published(outcome);
    }

    #[test]
    fn a_probe_that_comes_back_is_forgotten_and_hidden_from_the_hub() {
        let (mut probe, publish) = sent();
        assert!(!probe.returned(b"other", &publish.payload));
        assert!(probe.returned(b"own", b"of a namesake"));
        answer(&publish, Outcome::Received(1));
        assert!(probe.returned(b"own", &publish.payload));
        for _ in 0..3 {
            probe.fence();
            assert!(!probe.fence_was_passed() && !probe.is_unheard());
        }
    }

    #[test]
    fn a_probe_that_was_received_but_did_not_come_is_missed_after_two_questions() {
        let (mut probe, publish) = sent();
        probe.fence();
        answer(&publish, Outcome::Received(1));
        assert!(!probe.fence_was_passed(), "the question was asked too early to tell");
        probe.fence();
        assert!(!probe.fence_was_passed());
        probe.fence();
        assert!(probe.fence_was_passed());
    }

    #[test]
    fn a_probe_that_nobody_received_is_told_at_the_second_look() {
        let (mut probe, publish) = sent();
        assert!(!probe.is_unheard());
        answer(&publish, Outcome::Received(0));
        assert!(!probe.is_unheard());
        assert!(probe.is_unheard());
    }

    #[test]
    fn a_probe_that_was_lost_on_its_way_says_nothing_and_is_sent_again() {
        let (mut probe, publish) = sent();
        answer(&publish, Outcome::Lost);
        probe.fence();
        assert!(!probe.fence_was_passed() && !probe.is_unheard() && !probe.is_unheard());
        let pipeline = Pipeline::new(1);
        probe.send(&pipeline);
        assert!(pipeline.take_urgent().is_some());
    }
}
