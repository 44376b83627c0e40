//! Deadlines of a connection: its expiry, and wake-ups of its handler and its task. Knows no reason for any.

use wsproxy_proto::disconnect::Disconnect;

use crate::{
    clock::Micros,
    link::{HandlerEvent, Link, LinkPhase, State},
    wheel,
};

/// Deadlines that the wheel has to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    /// Time at which the connection ends, and the entry of the table with which it does.
    expiry: (Micros, &'static Disconnect),
    /// Time at which the handler is woken.
    wake_at: Micros,
    /// Time at which the client may be read again.
    read_at: Micros,
}

impl Default for Deadlines {
    fn default() -> Self {
        let expiry = (Micros::NEVER, &Disconnect::EXPIRED);
        Self { expiry, wake_at: Micros::NEVER, read_at: Micros::NEVER }
    }
}

impl Deadlines {
    /// Returns the first deadline.
    pub(super) fn next(&self) -> Micros {
        self.wake_at.min(self.read_at).min(self.expiry.0)
    }
}

impl Link {
    /// Ends the connection soon after `at` (`None`: never), and drops its queued frames then. Replaces an earlier
    /// time.
    pub fn expire_at(&self, at: Option<Micros>, why: &'static Disconnect) {
        self.set_deadline(|deadlines| deadlines.expiry = (at.unwrap_or(Micros::NEVER), why));
    }

    /// Gives the handler a [`HandlerEvent::Timer`] soon after `at`, once. A second call before that replaces
    /// the time.
    pub fn wake_at(&self, at: Micros) {
        self.set_deadline(|deadlines| deadlines.wake_at = at);
    }

    /// Wakes the task soon after `at`: it does not read its socket until then.
    pub(crate) fn read_at(&self, at: Micros) {
        self.set_deadline(|deadlines| deadlines.read_at = at);
    }

    fn set_deadline(&self, change: impl FnOnce(&mut Deadlines)) {
        let mut state = self.state.lock();
        if state.is_ending() {
            return;
        }
        let deadlines = &mut state.rare.get_or_insert_default().deadlines;
        change(deadlines);
        let next = deadlines.next();
        // No need to reschedule if the wheel looks earlier anyway. Before `attach` the link is not on the wheel.
        if state.phase == LinkPhase::Open && wheel::tick_after(next) < state.scheduled {
            self.schedule(&mut state, next);
        }
    }

    pub(super) fn check_deadlines(&self, state: &mut State, now: Micros) {
        let Some(rare) = &mut state.rare else { return };
        let Deadlines { expiry: (expires, why), wake_at, read_at } = rare.deadlines;
        if now >= read_at {
            rare.deadlines.read_at = Micros::NEVER;
        }
        if now >= wake_at {
            rare.deadlines.wake_at = Micros::NEVER;
        }
        if now >= expires {
            self.end(state, why, None, now);
        } else if now >= wake_at {
            self.leave(state, HandlerEvent::Timer);
        } else if now >= read_at {
            state.wake();
        }
    }
}
