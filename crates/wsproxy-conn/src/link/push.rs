//! Frames that other tasks queue for a connection, within its bounds.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    clock::{self, Micros},
    link::{Link, LinkPhase, Queued, State},
    outbox::FRAME_OVERHEAD,
};

impl Link {
    /// Queues a data frame. Its message was read from the bus at `since`, or is of the gateway itself:
    /// [`Micros::UNTIMED`].
    ///
    /// A connection with more than the send buffer allows ends as a slow consumer; the caller never waits.
    pub fn push(&self, frame: Bytes, since: Micros) -> Queued {
        self.push_data(frame, since, false)
    }

    /// Queues a data frame that belongs to the state which a new client needs before all else. Nothing is written until
    /// [`Self::release_state`]. State may be larger than the send buffer: until the client has read it, only the bytes
    /// behind it count against the send buffer. State that takes less than a quarter of it counts, too.
    ///
    /// The caller bounds the bytes of the state, and calls this before other messages are queued.
    pub fn push_state(&self, frame: Bytes) {
        let mut state = self.state.lock();
        let bytes = state.outbox.bytes() + frame.len() + FRAME_OVERHEAD;
        // A few bytes need no excuse, and the heap no entry for them.
        let is_large = bytes > self.profile.send_buffer_bytes / STATE_SHARE;
        if is_large && !state.is_ending() {
            state.rare.get_or_insert_default().excused = bytes;
        }
        state.holds_state = true;
        self.enqueue(&mut state, frame, Micros::UNTIMED, false);
    }

    /// Writes what waits since [`Self::push_state`], with other frames in the place of some of the state's. So the caller
    /// compresses the state while it holds no lock that those who push other messages need.
    pub fn release_state(&self, others: impl IntoIterator<Item = (Bytes, Bytes)>, now: Micros) {
        let mut state = self.state.lock();
        let before = state.outbox.bytes();
        for (frame, other) in others {
            state.outbox.replace(&frame, other);
        }
        let saved = before.saturating_sub(state.outbox.bytes());
        if let Some(rare) = &mut state.rare {
            rare.excused = rare.excused.saturating_sub(saved);
        }
        (state.holds_state, state.dirty) = (false, false);
        if !state.blocked {
            self.write(&mut state, now);
        }
    }

    /// Queues a data frame that can wait for others: the caller flushes within a moment, unless any other frame is
    /// flushed before. Behind a frame that waits, there is nothing to do: it is flushed with that one.
    pub fn push_later(&self, frame: Bytes, since: Micros) -> Queued {
        let mut state = self.state.lock();
        let is_first = state.outbox.is_empty();
        if !self.enqueue(&mut state, frame, since, false) {
            return Queued::Ending;
        }
        if state.blocked || state.dirty || state.phase == LinkPhase::Corked {
            return Queued::Queued;
        }
        // Frames that only wait for a flush must not make the client one that reads slowly.
        if state.outbox.bytes() > self.profile.low_water_bytes {
            self.write(&mut state, clock::now());
        }
        if is_first { Queued::Flush } else { Queued::Queued }
    }

    /// Queues a data frame whose message was read from the bus at `since`, and writes all queued frames.
    pub fn push_and_flush(&self, frame: Bytes, since: Micros) {
        let mut state = self.state.lock();
        if self.enqueue(&mut state, frame, since, false) && !state.blocked {
            state.dirty = false;
            self.write(&mut state, since);
        }
    }

    /// Queues a data frame that answers a message of the client. The driver flushes it.
    pub fn reply(&self, frame: Bytes, now: Micros) {
        let _ = self.push_data(frame, now, true);
    }

    /// Queues a data frame that makes an earlier one with the same `key` needless. Where the earlier frame still waits
    /// behind a socket that takes no more, it is dropped: only the newest is sent, behind everything that was queued
    /// before it. A frame that is partly written is sent whole.
    pub fn push_keyed(&self, key: u64, frame: Bytes, since: Micros) -> Queued {
        let mut state = self.state.lock();
        if !state.is_ending() && state.outbox.take_keyed(key) {
            self.profile.stats.messages_replaced.fetch_add(1, Relaxed);
        }
        if !self.enqueue(&mut state, frame, since, false) {
            return Queued::Ending;
        }
        // Otherwise the frame is on its way: the flush at the end of the round takes it.
        if state.blocked || state.holds_state || state.phase == LinkPhase::Corked {
            state.outbox.name_last(key);
        }
        Self::queued(&mut state)
    }

    fn push_data(&self, frame: Bytes, since: Micros, reply: bool) -> Queued {
        let mut state = self.state.lock();
        if !self.enqueue(&mut state, frame, since, reply) {
            return Queued::Ending;
        }
        Self::queued(&mut state)
    }

    /// Decides who flushes the frame that was queued last.
    fn queued(state: &mut State) -> Queued {
        if state.blocked || state.dirty || state.phase == LinkPhase::Corked {
            return Queued::Queued;
        }
        state.dirty = true;
        Queued::Flush
    }

    /// Queues a frame within the bounds. Returns `false` where the connection is ending, or begins to.
    fn enqueue(&self, state: &mut State, frame: Bytes, since: Micros, reply: bool) -> bool {
        if state.is_ending() {
            self.profile.stats.messages_discarded.fetch_add(1, Relaxed);
            return false;
        }
        let bytes_max = self.profile.send_buffer_bytes;
        state.outbox.push(frame, since, reply);
        if state.outbox.bytes() > EARLY_FLUSH_BYTES.min(bytes_max) && !state.blocked {
            self.write(state, clock::now());
        }
        if state.blocked {
            self.account(state);
        }
        if state.outbox.bytes() > bytes_max + state.excused() {
            self.end(state, &Disconnect::SLOW, None, clock::now());
        }
        !state.is_ending()
    }
}

/// Share of the send buffer, as its divisor, that state takes without an excuse.
const STATE_SHARE: usize = 4;

/// Number of queued bytes that are written before the round is over. So a round of any size fits any send buffer, as
/// long as the client reads.
const EARLY_FLUSH_BYTES: usize = 256 * 1024;
