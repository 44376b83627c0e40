//! When a connection is looked at, and what its silence means: pings, dead peers, idle ones.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    clock::Micros,
    link::{Link, Phase, State},
    profile::Heartbeat,
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
        match (state.phase, state.ending()) {
            (Phase::Closing, Some(ending)) if now < ending.by => {
                let by = ending.by;
                self.schedule(&mut state, by);
            }
            (Phase::Closing, _) => self.die(&mut state),
            (Phase::Dead, _) => {}
            (Phase::Corked | Phase::Open, _) => {
                let may_end = now >= grace_until && !self.paused.load(Relaxed);
                self.check_agenda(&mut state, now);
                if !state.is_ending() {
                    self.check_silence(&mut state, now, may_end);
                }
                if state.phase == Phase::Open {
                    let mut next = self.next_deadline(&state, now);
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
        let pings = self.profile.heartbeat == Heartbeat::Frames;
        let silence = now.since(self.heard());
        let idle = now.since(Micros(self.active.load(Relaxed)));
        if may_end && silence >= self.profile.heartbeat_timeout {
            self.end(state, &Disconnect::HEARTBEAT, None, now);
        } else if may_end && idle >= self.profile.idle_timeout {
            self.end(state, &Disconnect::IDLE, None, now);
        } else if pings
            && silence >= self.profile.heartbeat_interval
            && state.outbox.control_frames() == 0
        {
            state.outbox.push_control(PING);
            self.write(state, now);
        }
    }

    /// When the next ping, the end of the peer's silence or of its idleness, or anything on the agenda is due.
    pub(super) fn next_deadline(&self, state: &State, now: Micros) -> Micros {
        let heard = self.heard();
        let ping = match self.profile.heartbeat {
            Heartbeat::Messages => Micros::NEVER,
            Heartbeat::Frames => {
                let interval = self.profile.heartbeat_interval.0;
                let pings = now.since(heard).0.checked_div(interval).unwrap_or(0) + 1;
                heard.after(Micros(interval.saturating_mul(pings)))
            }
        };
        let silence = heard.after(self.profile.heartbeat_timeout);
        let idle = Micros(self.active.load(Relaxed)).after(self.profile.idle_timeout);
        // What is over already had no consequence: not to be looked at again every tick.
        let ends = [silence, idle].into_iter().filter(|end| *end > now);
        ends.fold(ping.min(state.agenda().next()), Micros::min).max(now)
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
