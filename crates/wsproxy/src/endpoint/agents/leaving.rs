//! The commands that come for a connection which has ended, until a marker says that they are for another one. Knows no
//! socket.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Notify;
use wsproxy_proto::{
    agents::{
        command::{self, Command},
        outcome::Failure,
    },
    names::Id,
};

use crate::endpoint::agents::{
    Agents, aside,
    turn::{Kept, Turn, Verdict},
};

/// The rest of a connection's turn on the commands channel. It answers calls with `agent_offline`: they were never sent.
pub(super) struct Leaving {
    agents: Arc<Agents>,
    user: Id,
    turn: Turn,
    over: Arc<Notify>,
}

impl Leaving {
    /// Makes the rest of a turn. `over` is notified when a marker ends it.
    pub(super) fn new(agents: Arc<Agents>, user: Id, mut turn: Turn, over: Arc<Notify>) -> Self {
        // Kept commands of a turn that another holder has ended belong to this connection: it was replaced while it was
        // opening.
        let is_replaced = turn.is_over() && !turn.is_vacant();
        let kept = if is_replaced { turn.take_kept() } else { Kept::default() };
        let leaving = Self { agents, user, turn, over };
        leaving.refuse_all(kept);
        leaving.tell_over();
        leaving
    }

    /// Takes a message of the channel.
    pub(super) fn message(&mut self, payload: Bytes) {
        let is_small = !aside::is_large(payload.len());
        let verdict = match is_small.then(|| command::parse(&payload)) {
            Some(Ok(Command::Owner(marker))) => self.turn.marker(marker),
            Some(Ok(Command::Cancel { .. } | Command::Other)) => return,
            Some(Ok(Command::Call(_)) | Err(_)) | None => self.turn.command(&payload),
        };
        match verdict {
            Verdict::Mine => self.refuse(payload),
            Verdict::Wait => {}
            Verdict::Full => self.agents.counters.dropped.add(1),
            Verdict::Settled | Verdict::Replaced | Verdict::Released => {
                let kept = self.turn.take_kept();
                self.refuse_all(kept);
                self.tell_over();
            }
        }
    }

    /// Takes the answer to the release: `true` if this connection held the place. Then the commands that were kept since
    /// the bus was lost are its own. Else the marker of the newer holder may still come, which tells whose they are.
    pub(super) fn released(&mut self, was_holder: bool) {
        if self.turn.is_doubting() && was_holder {
            let kept = self.turn.take_kept();
            self.refuse_all(kept);
        }
    }

    /// Takes the calls that came behind the marker of the release. Another holder may have them or not.
    pub(super) fn take_unowned(&mut self) -> Kept {
        if !self.turn.is_over() {
            self.turn.drop_doubted();
        }
        self.turn.take_kept()
    }

    fn tell_over(&self) {
        if self.turn.is_over() {
            self.over.notify_one();
        }
    }

    fn refuse_all(&self, kept: Kept) {
        for (_, payload) in kept {
            self.refuse(payload);
        }
    }

    fn refuse(&self, payload: Bytes) {
        self.agents.refuse_command(&self.user, payload, Failure::AgentOffline);
    }
}
