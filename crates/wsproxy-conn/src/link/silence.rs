//! When a connection is looked at, and what its silence means: pings, dead peers, idle ones.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    clock::Micros,
    link::{Link, Phase, State},
};

/// A whole ping frame, without a payload.
const PING: Bytes = Bytes::from_static(&[0x89, 0]);

impl Link {
    /// Called by the wheel, which has just forgotten the connection. `tick` is when it was due.
    pub(crate) fn on_tick(&self, tick: u32, now: Micros, grace_until: Micros) {
        let mut state = self.state.lock();
        if state.scheduled > tick {
            return; // it was moved before we came to it
        }
        state.scheduled = 0;
        match (state.phase, &state.ending) {
            (Phase::Closing, Some(ending)) if now < ending.by => {
                let by = ending.by;
                self.schedule(&mut state, by);
            }
            (Phase::Closing, _) => self.die(&mut state),
            (Phase::Dead, _) => {}
            (Phase::Corked | Phase::Open, _) => {
                let may_end = now >= grace_until && !self.paused.load(Relaxed);
                self.check_silence(&mut state, now, may_end);
                if state.phase == Phase::Open {
                    let mut next = self.next_deadline(now);
                    if now < grace_until {
                        next = next.min(grace_until);
                    }
                    self.schedule(&mut state, next);
                }
            }
        }
    }

    /// `may_end`: the silence is the client's own, not that of a process that does not listen.
    fn check_silence(&self, state: &mut State, now: Micros, may_end: bool) {
        let silence = now.since(self.heard());
        let idle = now.since(Micros(self.active.load(Relaxed)));
        if may_end && silence >= self.profile.heartbeat_timeout {
            self.end(state, &Disconnect::HEARTBEAT, None, now);
        } else if may_end && idle >= self.profile.idle_timeout {
            self.end(state, &Disconnect::IDLE, None, now);
        } else if silence >= self.profile.heartbeat_interval && state.outbox.control_frames() == 0 {
            state.outbox.push_control(PING);
            self.write(state, now);
        }
    }

    /// When the next ping, the end of the peer's silence or of its idleness is due.
    pub(super) fn next_deadline(&self, now: Micros) -> Micros {
        let (heard, interval) = (self.heard(), self.profile.heartbeat_interval);
        let pings = now.since(heard).0.checked_div(interval.0).unwrap_or(0) + 1;
        let ping = heard.after(Micros(interval.0.saturating_mul(pings)));
        let silence = heard.after(self.profile.heartbeat_timeout);
        let idle = Micros(self.active.load(Relaxed)).after(self.profile.idle_timeout);
        // What is over already had no consequence: not to be looked at again every tick.
        let ends = [silence, idle].into_iter().filter(|end| *end > now);
        ends.fold(ping, Micros::min).max(now)
    }

    pub(super) fn schedule(&self, state: &mut State, at: Micros) {
        self.unschedule(state);
        state.scheduled = self.runtime.wheel.insert(self.me.clone(), at);
    }

    pub(super) fn unschedule(&self, state: &mut State) {
        if state.scheduled > 0 {
            self.runtime.wheel.remove(&self.me, state.scheduled);
            state.scheduled = 0;
        }
    }
}
