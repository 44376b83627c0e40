//! Liveness of a connection: pings, dead peers, idle peers, and the time at which to look again.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Role};

use crate::{
    clock::Micros,
    link::{Link, LinkPhase, State},
    profile::Heartbeat,
};

impl Link {
    /// Handles a tick of the wheel. The wheel has removed the connection from its slot; `tick` is the slot's tick.
    pub(crate) fn on_tick(&self, tick: u32, now: Micros, grace_until: Micros) {
        let mut state = self.state.lock();
        if state.scheduled > tick {
            return; // The connection was moved to a later tick meanwhile.
        }
        state.scheduled = 0;
        match (state.phase, state.ending()) {
            (LinkPhase::Closing, Some(ending)) if now < ending.by => {
                let by = ending.by;
                self.schedule(&mut state, by);
            }
            (LinkPhase::Closing, _) => self.die(&mut state),
            (LinkPhase::Dead, _) => {}
            (LinkPhase::Corked | LinkPhase::Open, _) => {
                let may_end = now >= grace_until && !self.paused.load(Relaxed);
                self.check_deadlines(&mut state, now);
                if !state.is_ending() {
                    self.check_liveness(&mut state, now, may_end);
                }
                if state.phase == LinkPhase::Open {
                    let mut next = self.next_deadline(&state, now);
                    if now < grace_until {
                        next = next.min(grace_until);
                    }
                    self.schedule(&mut state, next);
                }
            }
        }
    }

    /// Pings the client now, whenever it was heard last: [`Self::heard`] tells of the answer.
    pub fn probe(&self, now: Micros) {
        let mut state = self.state.lock();
        if state.phase == LinkPhase::Open && state.outbox.control_frames() == 0 {
            state.outbox.push_control(self.ping());
            if !state.blocked {
                self.write(&mut state, now);
            }
        }
    }

    /// Returns a ping frame without a payload. A client's mask is zero: there are no bytes to mask.
    fn ping(&self) -> Bytes {
        Bytes::from_static(match self.profile.role {
            Role::Server => &[0x89, 0],
            Role::Client => &[0x89, 0x80, 0, 0, 0, 0],
        })
    }

    /// Pings a silent client. Ends the connection after a timeout if `may_end`, which is not set while this process
    /// leaves the client unread.
    fn check_liveness(&self, state: &mut State, now: Micros, may_end: bool) {
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
            state.outbox.push_control(self.ping());
            self.write(state, now);
        }
    }

    /// Returns the time of the next ping, timeout or deadline.
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
        // A timeout that is over had no consequence, and must not be looked at again with every tick.
        let ends = [silence, idle].into_iter().filter(|end| *end > now);
        ends.fold(ping.min(state.deadlines().next()), Micros::min).max(now)
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
