//! Finds out whether the links of an instance end at one server: a message to the instance's own
//! channel, published over each link, must come back over the subscribing link.
//!
//! No clock decides. The server puts the message into our connection before it answers the publish, so
//! an answer to a question which was asked after that overtakes the message only if it is not there.
//! Since servers with many threads may be less strict, a second such question has the last word.
//!
//! A message that comes back needs no permission but those that the gateway needs anyway, and works
//! through proxies. Comparing the servers' `run_id` would need `INFO`, which many users may not run.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::bus::{
    Keep, Outcome, Publish, Receipt,
    not_done::NotDone,
    redis::outlet::{Birth, Outlet},
};

/// A way out of the instance, each with its [`Outlet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// The publishing link.
    Publish,
    /// The link of the store's commands.
    Command,
    /// A connection that was made for this one message: it ends where the server's name leads now.
    Fresh,
}

impl Route {
    /// All of them, in the order of their numbers.
    pub(super) const ALL: [Self; 3] = [Self::Publish, Self::Command, Self::Fresh];
}

/// The probes that are under way.
pub(super) struct Probes {
    channel: Arc<str>,
    ways: [Way; 3],
}

/// The probe of one way.
struct Way {
    sent: Option<Sent>,
    /// When a probe came back last, or the subscribing connection was made.
    heard: Instant,
}

struct Sent {
    payload: Bytes,
    answer: Arc<Answer>,
    /// The link's connection when it was sent.
    birth: Birth,
    /// A question was asked after the publish had been answered.
    fenced: bool,
    /// How many such questions have been answered.
    fences_passed: u32,
    /// That nobody received it has been seen before.
    unheard: bool,
}

/// What became of the publish: a count of receivers, or one of the constants below.
struct Answer(AtomicI64);

/// To whom a message on the instance's own channel belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Returned {
    /// It came on another channel.
    NotOurs,
    /// It is of another instance with the same name, or of an earlier connection: it says nothing.
    Foreign,
    /// It is a probe, sent over this connection of the link.
    Probe(Route, Birth),
}

impl Probes {
    /// On this channel.
    pub(super) fn new(channel: Arc<str>, now: Instant) -> Self {
        let way = || Way { sent: None, heard: now };
        Self { channel, ways: [way(), way(), way()] }
    }

    /// For another subscribing connection. Where the server's name leads is known as before.
    pub(super) fn renew(&mut self, now: Instant) {
        for route in [Route::Publish, Route::Command] {
            self.ways[route as usize].heard = now;
        }
        self.ways.iter_mut().for_each(|way| way.sent = None);
    }

    /// The instance's own channel.
    pub(super) fn channel(&self) -> &str {
        &self.channel
    }

    /// Sends one, unless one is under way. Only call it while the channel is confirmed.
    pub(super) fn send(&mut self, route: Route, outlet: &Outlet) {
        let way = &mut self.ways[route as usize];
        if way.sent.as_ref().is_some_and(|sent| !matches!(sent.answer(), LOST | DENIED)) {
            return;
        }
        let payload = Bytes::from(format!("{:032x}", rand::random::<u128>()));
        let answer = Arc::new(Answer(AtomicI64::new(OPEN)));
        // Read before the message is handed over: should the link change in between, the proof is void.
        let birth = outlet.born();
        outlet.publish(Publish {
            channel: self.channel.clone(),
            payload: payload.clone(),
            keep: Keep::Nothing,
            receipt: Some(answer.clone()),
        });
        let sent = Sent { payload, answer, birth, fenced: false, fences_passed: 0, unheard: false };
        way.sent = Some(sent);
    }

    /// To whom a message belongs. A probe is not under way any more then.
    pub(super) fn returned(&mut self, channel: &[u8], payload: &[u8], now: Instant) -> Returned {
        if channel != self.channel.as_bytes() {
            return Returned::NotOurs;
        }
        for route in Route::ALL {
            let way = &mut self.ways[route as usize];
            if let Some(sent) = way.sent.take_if(|sent| sent.payload == payload) {
                way.heard = now;
                return Returned::Probe(route, sent.birth);
            }
        }
        Returned::Foreign
    }

    /// A question is asked now, of which [`Self::fence_was_passed`] will tell the answer.
    pub(super) fn fence(&mut self) {
        for sent in self.ways.iter_mut().filter_map(|way| way.sent.as_mut()) {
            sent.fenced = sent.answer() > 0;
        }
    }

    /// The question was answered. Says which probe should have come by now, and forgets it.
    pub(super) fn fence_was_passed(&mut self) -> Option<(Route, Birth)> {
        for sent in self.ways.iter_mut().filter_map(|way| way.sent.as_mut()) {
            sent.fences_passed += u32::from(sent.fenced);
        }
        self.forget(|sent| sent.fences_passed >= FENCES)
    }

    /// A probe that nobody received, though this connection is subscribed: then it is not the same
    /// server. Ask at every tick: at the first, the end of the connection may lie there unread instead.
    pub(super) fn unheard(&mut self) -> Option<(Route, Birth)> {
        self.forget(|sent| {
            let unheard = sent.answer() == 0;
            std::mem::replace(&mut sent.unheard, unheard) && unheard
        })
    }

    /// Whether the server does not let the instance publish on its own channel, so that nothing can be
    /// proven.
    pub(super) fn are_denied(&self) -> bool {
        let mut sent = self.ways.iter().filter_map(|way| way.sent.as_ref());
        sent.any(|sent| sent.answer() == DENIED)
    }

    /// Since when it is not known that the links end at one server, and where the server's name leads.
    pub(super) fn known_until(&self) -> Option<Instant> {
        self.ways.iter().map(|way| way.heard).min()
    }

    fn forget(&mut self, mut which: impl FnMut(&mut Sent) -> bool) -> Option<(Route, Birth)> {
        let mut found = None;
        for route in Route::ALL {
            if let Some(sent) = self.ways[route as usize].sent.take_if(&mut which) {
                found = Some((route, sent.birth));
            }
        }
        found
    }
}

impl Sent {
    fn answer(&self) -> i64 {
        self.answer.0.load(Ordering::Acquire)
    }
}

impl Receipt for Answer {
    fn published(&self, outcome: Outcome) {
        let answer = match outcome {
            Outcome::Received(count) => i64::try_from(count).unwrap_or(i64::MAX),
            Outcome::Refused(NotDone::Permission) => DENIED,
            Outcome::Kept | Outcome::Stored { .. } | Outcome::Refused(_) | Outcome::Lost => LOST,
        };
        self.0.store(answer, Ordering::Release);
    }
}

/// Not answered yet.
const OPEN: i64 = -1;

/// Refused or on its way when the link was lost: says nothing, another one is sent.
const LOST: i64 = -2;

/// The user may not publish on the channel; it is tried again.
const DENIED: i64 = -3;

/// So many questions must overtake a probe until it counts as missed.
const FENCES: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// Probes of which one was sent over the publishing link, and the message that carries it.
    fn sent() -> (Probes, Publish) {
        let (mut probes, outlet) = (Probes::new("own".into(), Instant::now()), Outlet::default());
        outlet.connected(7);
        probes.send(Route::Publish, &outlet);
        let publish = outlet.take().unwrap();
        probes.send(Route::Publish, &outlet);
        assert!(outlet.take().is_none(), "one at a time");
        (probes, publish)
    }

    fn answer(publish: &Publish, outcome: Outcome) {
        publish.receipt.as_ref().unwrap().published(outcome);
    }

    #[test]
    fn a_probe_that_comes_back_proves_its_link_and_is_hidden_from_the_hub() {
        let (mut probes, publish) = sent();
        let now = Instant::now();
        assert_eq!(probes.returned(b"other", &publish.payload, now), Returned::NotOurs);
        assert_eq!(probes.returned(b"own", b"of a namesake", now), Returned::Foreign);
        answer(&publish, Outcome::Received(1));
        let returned = probes.returned(b"own", &publish.payload, now);
        assert_eq!(returned, Returned::Probe(Route::Publish, 7));
        for _ in 0..3 {
            probes.fence();
            assert_eq!((probes.fence_was_passed(), probes.unheard()), (None, None));
        }
    }

    #[test]
    fn a_probe_that_was_received_but_did_not_come_is_missed_after_two_questions() {
        let (mut probes, publish) = sent();
        probes.fence();
        answer(&publish, Outcome::Received(1));
        assert_eq!(probes.fence_was_passed(), None, "the question was asked too early to tell");
        probes.fence();
        assert_eq!(probes.fence_was_passed(), None);
        probes.fence();
        assert_eq!(probes.fence_was_passed(), Some((Route::Publish, 7)));
    }

    #[test]
    fn a_probe_that_nobody_received_is_told_at_the_second_look() {
        let (mut probes, publish) = sent();
        assert_eq!(probes.unheard(), None);
        answer(&publish, Outcome::Received(0));
        assert_eq!(probes.unheard(), None);
        assert_eq!(probes.unheard(), Some((Route::Publish, 7)));
    }

    #[test]
    fn a_probe_that_was_lost_on_its_way_says_nothing_and_is_sent_again() {
        for outcome in [Outcome::Lost, Outcome::Refused(NotDone::Permission)] {
            let (mut probes, publish) = sent();
            answer(&publish, outcome);
            assert_eq!(probes.are_denied(), outcome != Outcome::Lost);
            probes.fence();
            assert_eq!(probes.fence_was_passed(), None);
            assert_eq!((probes.unheard(), probes.unheard()), (None, None));
            let outlet = Outlet::default();
            probes.send(Route::Publish, &outlet);
            assert!(outlet.take().is_some());
        }
    }

    #[test]
    fn each_link_has_a_probe_of_its_own() {
        let (mut probes, first) = sent();
        let outlet = Outlet::default();
        outlet.connected(9);
        probes.send(Route::Command, &outlet);
        let second = outlet.take().unwrap();
        answer(&first, Outcome::Received(0));
        answer(&second, Outcome::Received(1));
        let returned = probes.returned(b"own", &second.payload, Instant::now());
        assert_eq!(returned, Returned::Probe(Route::Command, 9));
        assert_eq!(probes.unheard(), None);
        assert_eq!(probes.unheard(), Some((Route::Publish, 7)));
    }
}
