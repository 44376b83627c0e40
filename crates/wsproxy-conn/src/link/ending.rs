//! Endings of a connection: at once, after the queued frames, by the peer, or without a close frame.

use std::sync::atomic::Ordering::Relaxed;

use wsproxy_proto::{
    disconnect::Disconnect,
    ws::frame::{Opcode, close_payload},
};

use crate::{
    clock::Micros,
    driver::End,
    link::{Link, LinkPhase, Rare, State},
};

/// Ending that has begun.
#[derive(Debug)]
pub(super) struct Ending {
    why: &'static Disconnect,
    /// Code of the first close frame in either direction.
    code: u16,
    by_peer: bool,
    /// Messages may wait ahead of our close frame.
    finishing: bool,
    /// Time at which the close handshake must be over.
    pub(super) by: Micros,
}

impl Link {
    /// Ends the connection at once: drops the queued frames and sends the close frame.
    ///
    /// Cuts [`Self::finish`] short. Changes nothing where any other ending has begun.
    pub fn disconnect(&self, why: &'static Disconnect, now: Micros) {
        self.end(&mut self.state.lock(), why, None, now);
    }

    /// As [`Self::disconnect`], with the code and reason of a worker.
    pub fn disconnect_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        self.end(&mut self.state.lock(), why, Some((code, reason)), now);
    }

    /// Ends the connection after the queued frames: the close frame is sent behind them.
    pub fn finish(&self, why: &'static Disconnect, now: Micros) {
        self.finish_with(why, why.code, why.reason, now);
    }

    /// As [`Self::finish`], with the code and reason of a worker.
    pub fn finish_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        let mut state = self.state.lock();
        if state.is_ending() {
            return;
        }
        self.start_closing(&mut state, why, code, now);
        if let Some(ending) = ending_of(&mut state.rare) {
            ending.finishing = true;
        }
        let frame = self.encode(Opcode::Close, close_payload(code, reason).as_ref());
        state.outbox.push(frame, Micros::NEVER, false);
        self.write(&mut state, now);
    }

    /// Ends the connection without a close frame: the socket failed, the peer left, or the time for the close
    /// handshake is over.
    pub fn abort(&self) {
        self.die(&mut self.state.lock());
    }

    /// Answers the peer's close frame with its own code, and drops the queued frames. Where our own close frame waits
    /// behind messages, these are written first.
    pub(crate) fn peer_closed(&self, code: Option<u16>, now: Micros) {
        let mut state = self.state.lock();
        state.peer_closed = true;
        if state.is_ending() {
            return;
        }
        // A close frame without a code is answered with 1000, which says more than an empty answer.
        let answer = code.unwrap_or(Disconnect::NORMAL.code);
        self.end(&mut state, &Disconnect::NORMAL, Some((answer, "")), now);
        if let Some(ending) = ending_of(&mut state.rare) {
            (ending.code, ending.by_peer) = (code.unwrap_or(1005), true);
        }
    }

    /// Handles the end of the peer's stream. The peer may still read our close frame.
    pub(crate) fn peer_left(&self) {
        let mut state = self.state.lock();
        if state.phase == LinkPhase::Closing {
            state.peer_closed = true;
        } else {
            self.die(&mut state);
        }
    }

    /// Ends the connection for the task, which is done: no frame can be queued any more, and the wheel forgets the
    /// connection.
    pub(crate) fn over(&self) -> End {
        let mut state = self.state.lock();
        self.die(&mut state);
        (state.waker, state.events) = (None, None);
        self.unschedule(&mut state);
        state.ending().map_or(
            End { why: &Disconnect::GONE, code: 1006, by_peer: false },
            |ending| End { why: ending.why, code: ending.code, by_peer: ending.by_peer },
        )
    }

    pub(super) fn end(
        &self,
        state: &mut State,
        why: &'static Disconnect,
        told: Option<(u16, &str)>,
        now: Micros,
    ) {
        let (code, reason) = told.unwrap_or((why.code, why.reason));
        match (state.phase, ending_of(&mut state.rare)) {
            (LinkPhase::Corked | LinkPhase::Open, _) => self.start_closing(state, why, code, now),
            // The close frame of `finish` is the last in the queue. As long as any frame is untouched the close frame
            // is, and can be replaced. The time for the close handshake stays the same.
            (LinkPhase::Closing, Some(ending))
                if ending.finishing && state.outbox.untouched_bytes() > 0 =>
            {
                (ending.why, ending.code, ending.finishing) = (why, code, false);
            }
            _ => return,
        }
        let lost = state.outbox.discard() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        let payload = close_payload(code, reason);
        state.outbox.push_control(self.encode(Opcode::Close, payload.as_ref()));
        self.write(state, now);
        self.account(state);
    }

    fn start_closing(&self, state: &mut State, why: &'static Disconnect, code: u16, now: Micros) {
        state.phase = LinkPhase::Closing;
        self.closing.store(true, Relaxed);
        let by = now.after(self.profile.close_timeout);
        let ending = Ending { why, code, by_peer: false, finishing: false, by };
        state.rare.get_or_insert_default().ending = Some(ending);
        self.schedule(state, by);
        state.wake();
    }

    pub(super) fn die(&self, state: &mut State) {
        if state.phase == LinkPhase::Dead {
            return;
        }
        state.phase = LinkPhase::Dead;
        self.closing.store(true, Relaxed);
        let lost = state.outbox.clear() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        self.account(state);
        state.wake();
    }
}

/// Returns the ending. Borrows no more of the state than the box.
fn ending_of(rare: &mut Option<Box<Rare>>) -> Option<&mut Ending> {
    rare.as_mut()?.ending.as_mut()
}
