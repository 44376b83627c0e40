//! What a connection has to do at a certain time: expire, wake its handler. Knows no reason for either.

use bytes::Bytes;
use wsproxy_proto::disconnect::Disconnect;

use crate::{
    clock::Micros,
    link::{Event, Link, Phase, State, TIMER},
    wheel,
};

/// Times of which the wheel has to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agenda {
    /// When the connection ends, and as what.
    expiry: (Micros, &'static Disconnect),
    /// When the handler wants to be woken.
    wake_at: Micros,
    /// When the client may be read again.
    read_at: Micros,
}

impl Default for Agenda {
    fn default() -> Self {
        let expiry = (Micros::NEVER, &Disconnect::EXPIRED);
        Self { expiry, wake_at: Micros::NEVER, read_at: Micros::NEVER }
    }
}

impl Agenda {
    /// What comes first.
    pub(super) fn next(&self) -> Micros {
        self.wake_at.min(self.read_at).min(self.expiry.0)
    }
}

impl Link {
    /// Ends the connection soon after `at` (`None`: never), whatever was told before; what waits for the client
    /// is dropped then.
    pub fn expire_at(&self, at: Option<Micros>, why: &'static Disconnect) {
        self.plan(|agenda| agenda.expiry = (at.unwrap_or(Micros::NEVER), why));
    }

    /// Gives the handler an event with the tag [`TIMER`] soon after `at`, once. Whoever asks again before that
    /// is woken at the new time only.
    pub fn wake_at(&self, at: Micros) {
        self.plan(|agenda| agenda.wake_at = at);
    }

    /// Gives the task a turn soon after `at`, since it does not read its socket until then.
    pub(crate) fn read_at(&self, at: Micros) {
        self.plan(|agenda| agenda.read_at = at);
    }

    fn plan(&self, change: impl FnOnce(&mut Agenda)) {
        let mut state = self.state.lock();
        if state.is_ending() {
            return;
        }
        let agenda = &mut state.rare.get_or_insert_default().agenda;
        change(agenda);
        let next = agenda.next();
        // Where the wheel looks earlier it finds out by itself; before the handshake is answered it does not look.
        if state.phase == Phase::Open && wheel::tick_after(next) < state.scheduled {
            self.schedule(&mut state, next);
        }
    }

    pub(super) fn check_agenda(&self, state: &mut State, now: Micros) {
        let Some(rare) = &mut state.rare else { return };
        let Agenda { expiry: (expires, why), wake_at, read_at } = rare.agenda;
        if now >= read_at {
            rare.agenda.read_at = Micros::NEVER;
        }
        if now >= wake_at {
            rare.agenda.wake_at = Micros::NEVER;
        }
        if now >= expires {
            self.end(state, why, None, now);
        } else if now >= wake_at {
            self.leave(state, Event { tag: TIMER, number: 0, payload: Bytes::new() });
        } else if now >= read_at {
            state.wake();
        }
    }
}
