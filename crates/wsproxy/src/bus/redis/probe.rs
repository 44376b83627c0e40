//! Finds out whether what is published arrives: a message to the instance's own channel must come back.
//!
//! No clock decides. The server puts the message into our connection before it answers the publish, so
//! an answer to any question which was asked after that overtakes the message only if it is not there.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use bytes::Bytes;

use crate::bus::{Outcome, Publish, Receipt, Unheard, redis::pipeline::Pipeline};

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
}

/// What became of the publish: a count of receivers, or one of the constants below.
struct Answer(AtomicI64);

/// What the publish's answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// Nothing that is wrong.
    Nothing,
    /// Nobody received it, though this connection is subscribed: it is not the same server.
    Unheard,
}

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
            unheard: Unheard::Gone,
            receipt: Some(answer.clone()),
        });
        self.sent = Some(Sent { payload, answer, fenced: false });
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

    /// A question is asked now, of which [`Self::fence_passed`] will tell the answer.
    pub(super) fn fence(&mut self) {
        if let Some(sent) = &mut self.sent {
            sent.fenced = sent.answer.0.load(Ordering::Acquire) > 0;
        }
    }

    /// The question was answered. Says whether the probe should have come before.
    pub(super) fn fence_passed(&self) -> bool {
        self.sent.as_ref().is_some_and(|sent| sent.fenced)
    }

    /// What is known without a question.
    pub(super) fn finding(&self) -> Finding {
        match &self.sent {
            Some(sent) if sent.answer.0.load(Ordering::Acquire) == 0 => Finding::Unheard,
            _ => Finding::Nothing,
        }
    }
}

impl Receipt for Answer {
    fn published(&self, outcome: Outcome) {
        let answer = match outcome {
            Outcome::Received(count) => i64::try_from(count).unwrap_or(i64::MAX),
            Outcome::Kept | Outcome::Lost => LOST,
        };
        self.0.store(answer, Ordering::Release);
    }
}

/// Not answered yet.
const OPEN: i64 = -1;

/// Refused or on its way when the link was lost: says nothing, another one is sent.
const LOST: i64 = -2;
