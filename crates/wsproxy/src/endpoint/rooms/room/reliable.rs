//! Reliable messages to members that acknowledge them.

use bytes::Bytes;
use wsproxy_conn::{clock::Micros, link::Queued};
use wsproxy_proto::{disconnect::Disconnect, rooms::check::Acked};

use crate::{
    client::event::Event,
    core::acks::Due,
    endpoint::rooms::{
        GivenUp, Rooms,
        fanout::Form,
        member::Membership,
        reliable::{Added, Reliable},
        room::{MemberHere, Room},
    },
};

impl MemberHere {
    /// Makes the frame of a reliable message, which waits for an `ack` from now on.
    pub(super) fn reliable_frame(
        &mut self,
        form: Form,
        envelope: &[u8],
        rooms: &Rooms,
        now: Micros,
    ) -> Option<Bytes> {
        let reliable = self.reliable.as_mut()?;
        let numbered = reliable.number(envelope);
        let frame = form.frame(numbered, &self.link)?;
        let was_idle = reliable.next().is_none();
        rooms.counters.reliable.add(1);
        let given_up =
            match reliable.add(frame.clone(), now, rooms.config.overflow, &rooms.patience) {
                Added::Waits(given_up) => given_up as u64,
                Added::Once => 1,
                Added::Overflow => {
                    self.link.finish(&Disconnect::SLOW, now);
                    1
                }
            };
        rooms.tell_given_up(&self.client, GivenUp::Overflow, given_up);
        if was_idle {
            // The logic of the member watches the time.
            self.link.notify(Event::Inbox.into());
        }
        Some(frame)
    }
}

impl Room {
    /// Ends the wait for messages that a member has acknowledged.
    pub(in crate::endpoint::rooms) fn acked(&self, membership: &Membership, acked: &Acked<'_>) {
        let mut state = self.state.lock();
        let Some(member) = state.member_mut(membership.connection.number) else { return };
        let count = member.reliable.as_mut().map_or(0, |reliable| reliable.acked(acked));
        membership.rooms.counters.acks.add(count as u64);
    }

    /// Sends a member's unacknowledged messages again whose time has come.
    pub(in crate::endpoint::rooms) fn resend(&self, membership: &Membership, now: Micros) {
        let (rooms, patience) = (&membership.rooms, &membership.rooms.patience);
        let mut state = self.state.lock();
        let Some(member) = state.member_mut(membership.connection.number) else { return };
        let Some(reliable) = &mut member.reliable else { return };
        if member.link.queued_bytes() > 0 {
            // The member has not read the first copies yet: more copies would only fill its queue.
            reliable.postpone(now, patience);
        }
        let mut is_dirty = false;
        while let Some(due) = reliable.due(now, patience) {
            match due {
                Due::Resend(frame) => {
                    rooms.counters.resent.add(1);
                    is_dirty |= member.link.push(frame, Micros::UNTIMED) == Queued::Flush;
                }
                Due::GiveUp(_) => {
                    rooms.tell_given_up(&membership.client, GivenUp::Tries, 1);
                }
            }
        }
        if is_dirty {
            let link = member.link.clone();
            state.dirty.push(link);
        }
        self.release(state, now);
    }

    /// Returns the time at which [`Self::resend`] has something to do.
    pub(in crate::endpoint::rooms) fn next_resend(&self, number: u64) -> Micros {
        let state = self.state.lock();
        let member = state.members.iter().find(|member| member.number == number);
        let next = member.and_then(|member| member.reliable.as_ref()?.next());
        next.unwrap_or(Micros::NEVER)
    }
}

/// Makes the messages of a member that says that it acknowledges.
pub(super) fn of_features(acks: bool) -> Option<Box<Reliable>> {
    acks.then(Box::default)
}
