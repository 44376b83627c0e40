//! Control frames that wait for the writer: each in a slot, so that nothing grows while the socket takes nothing.
//! Knows no bodies.

use std::{collections::VecDeque, mem};

use crate::tunnel::{
    code::Code,
    frame::{Frame, Health, Pong, Reset, StreamFrame},
    hello::Hello,
};

/// Slots of control frames. A newer PONG, PING, GOAWAY or HEALTH replaces the one that waits.
///
/// Bounds: each stream is in `due` at most once. Refusals: the caller of [`Self::refuse`] bounds them.
#[derive(Debug, Default)]
pub(super) struct Control {
    /// Whole frames.
    hello: Vec<u8>,
    health: Vec<u8>,
    /// Number of the peer's ping, and the time at which it came.
    pong: Option<(u64, u64)>,
    ping: Option<u64>,
    /// Code and time to drain, in milliseconds.
    go_away: Option<(Code, u32)>,
    refusals: VecDeque<(u32, Code)>,
    due: VecDeque<u32>,
}

impl Control {
    pub(super) fn set_hello(&mut self, hello: &Hello<'_>) {
        // A window of 0 is the only invalid part that a configuration could have; the peer then hears of it.
        let valid = Hello { window: hello.window.clamp(1, crate::tunnel::WINDOW_MAX), ..*hello };
        let _ = Frame::Hello(valid).encode(&mut self.hello);
    }

    pub(super) fn set_health(&mut self, health: &Health<'_>) {
        self.health.clear();
        let _ = Frame::Health(*health).encode(&mut self.health);
    }

    pub(super) const fn pong(&mut self, number: u64, now: u64) {
        self.pong = Some((number, now));
    }

    pub(super) const fn ping(&mut self, number: u64) {
        self.ping = Some(number);
    }

    pub(super) const fn go_away(&mut self, code: Code, drain_ms: u32) {
        self.go_away = Some((code, drain_ms));
    }

    /// Refuses a stream that is not in the table. Returns the refusals that wait.
    pub(super) fn refuse(&mut self, stream: u32, code: Code) -> usize {
        self.refusals.push_back((stream, code));
        self.refusals.len()
    }

    /// Notes that a stream has RESET or CREDIT to write.
    pub(super) fn due(&mut self, stream: u32, is_due: &mut bool) {
        if !mem::replace(is_due, true) {
            self.due.push_back(stream);
        }
    }

    pub(super) fn remove(&mut self, stream: u32, is_due: bool) {
        if is_due {
            self.due.retain(|other| *other != stream);
        }
    }

    /// Returns the stream that is first with RESET or CREDIT.
    pub(super) fn first_due(&self) -> Option<u32> {
        self.due.front().copied()
    }

    pub(super) fn end_due(&mut self) {
        self.due.pop_front();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.hello.is_empty()
            && self.health.is_empty()
            && self.pong.is_none()
            && self.ping.is_none()
            && self.go_away.is_none()
            && self.refusals.is_empty()
            && self.due.is_empty()
    }

    /// Appends the frames of the lane, all of them: they are few and small. Returns the GOAWAY that is to be written
    /// behind them.
    pub(super) fn write(&mut self, now: u64, out: &mut Vec<u8>) -> Option<(Code, u32)> {
        out.append(&mut self.hello);
        if let Some((number, at)) = self.pong.take() {
            let waited_us = u32::try_from(now.saturating_sub(at)).unwrap_or(u32::MAX);
            put(Frame::Pong(Pong { number, waited_us }), out);
        }
        if let Some(number) = self.ping.take() {
            put(Frame::Ping(number), out);
        }
        out.append(&mut self.health);
        self.go_away.take()
    }

    /// Appends one refusal. Returns whether there was one.
    pub(super) fn write_refusal(&mut self, out: &mut Vec<u8>) -> bool {
        let Some((stream, code)) = self.refusals.pop_front() else { return false };
        let reset = Reset { not_dispatched: true, ..Reset::new(code) };
        put(Frame::Stream(stream, StreamFrame::Reset(reset)), out);
        true
    }
}

/// Appends a frame whose fields are valid whatever their values.
pub(super) fn put(frame: Frame<'_>, out: &mut Vec<u8>) {
    let written = frame.encode(out);
    debug_assert!(written.is_ok(), "{frame:?}");
}
