//! How a connection ends: at once, after what waits, by the peer, or without a word.

use std::sync::atomic::Ordering::Relaxed;

use wsproxy_proto::{
    disconnect::Disconnect,
    ws::frame::{Opcode, close_payload, server_frame},
};

use crate::{
    clock::Micros,
    driver::End,
    link::{Link, Phase, Rare, State},
};

/// How a connection ends, as far as it is known.
#[derive(Debug)]
pub(super) struct Ending {
    why: &'static Disconnect,
    /// The code that goes over the wire, in whichever direction comes first.
    code: u16,
    by_peer: bool,
    /// Messages may still wait ahead of our close frame.
    finishing: bool,
    /// When the close handshake must be over.
    pub(super) by: Micros,
}

impl Link {
    /// Ends the connection: what waits for it is dropped, the close frame goes out at once.
    ///
    /// This also cuts [`Self::finish`] short; any other ending that has begun stays what it is.
    pub fn disconnect(&self, why: &'static Disconnect, now: Micros) {
        self.end(&mut self.state.lock(), why, None, now);
    }

    /// The same with a code and a reason of the backend's own.
    pub fn disconnect_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        self.end(&mut self.state.lock(), why, Some((code, reason)), now);
    }

    /// Ends the connection after all that waits for it has been written.
    pub fn finish(&self, why: &'static Disconnect, now: Micros) {
        self.finish_with(why, why.code, why.reason, now);
    }

    /// The same with a code and a reason of the backend's own.
    pub fn finish_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        let mut state = self.state.lock();
        if state.is_ending() {
            return;
        }
        self.start_closing(&mut state, why, code, now);
        if let Some(ending) = ending_of(&mut state.rare) {
            ending.finishing = true;
        }
        let frame = server_frame(Opcode::Close, close_payload(code, reason).as_ref(), false);
        state.outbox.push(frame, Micros::NEVER, false);
        self.write(&mut state, now);
    }

    /// Ends the connection without a word: the socket failed, the peer left, or time is over.
    pub fn abort(&self) {
        self.die(&mut self.state.lock());
    }

    /// The peer's close frame came: it is answered with its own code, and what waits is dropped.
    /// Where our own close frame waits behind messages, they are written first.
    pub(crate) fn peer_closed(&self, code: Option<u16>, now: Micros) {
        let mut state = self.state.lock();
        state.peer_closed = true;
        if state.is_ending() {
            return;
        }
        // A close frame without a code is answered with 1000: an empty answer would say less.
        let answer = code.unwrap_or(Disconnect::NORMAL.code);
        self.end(&mut state, &Disconnect::NORMAL, Some((answer, "")), now);
        if let Some(ending) = ending_of(&mut state.rare) {
            (ending.code, ending.by_peer) = (code.unwrap_or(1005), true);
        }
    }

    /// Nothing more comes from the peer. It may still read what we have to say at the end.
    pub(crate) fn peer_left(&self) {
        let mut state = self.state.lock();
        if state.phase == Phase::Closing {
            state.peer_closed = true;
        } else {
            self.die(&mut state);
        }
    }

    /// The task is done: nothing can be queued from now on, and the wheel forgets the connection.
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
            (Phase::Corked | Phase::Open, _) => self.start_closing(state, why, code, now),
            // The close frame of `finish` is the last that waits: as long as anything is
            // untouched it is, and can be replaced. The time for it stays the same.
            (Phase::Closing, Some(ending))
                if ending.finishing && state.outbox.untouched_bytes() > 0 =>
            {
                (ending.why, ending.code, ending.finishing) = (why, code, false);
            }
            _ => return,
        }
        let lost = state.outbox.discard() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        let payload = close_payload(code, reason);
        state.outbox.push_control(server_frame(Opcode::Close, payload.as_ref(), false));
        self.write(state, now);
        self.account(state);
    }

    fn start_closing(&self, state: &mut State, why: &'static Disconnect, code: u16, now: Micros) {
        state.phase = Phase::Closing;
        self.closing.store(true, Relaxed);
        let by = now.after(self.profile.close_timeout);
        let ending = Ending { why, code, by_peer: false, finishing: false, by };
        state.rare.get_or_insert_default().ending = Some(ending);
        self.schedule(state, by);
        state.wake();
    }

    pub(super) fn die(&self, state: &mut State) {
        if state.phase == Phase::Dead {
            return;
        }
        state.phase = Phase::Dead;
        self.closing.store(true, Relaxed);
        let lost = state.outbox.clear() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        self.account(state);
        state.wake();
    }
}

/// Borrows no more of the state than the box.
fn ending_of(rare: &mut Option<Box<Rare>>) -> Option<&mut Ending> {
    rare.as_mut()?.ending.as_mut()
}
