//! Proves that the connections of an instance end at one server: a message to the instance's own channel, published
//! over each connection, must come back over the subscribing connection.
//!
//! No clock decides. The server writes the message to the subscribing connection before it answers the publish. So a
//! question that is asked there after this answer is answered behind the message. Only two such answers without the
//! message count, since servers with many threads may be less strict.
//!
//! In a Cluster the nodes pass messages on to each other without an order to rely on, so that there a probe counts as
//! missed once it has been answered and has not come for a long time.
//!
//! The probe needs only permissions that the gateway needs anyway, and works through proxies. Comparing the servers'
//! `run_id` would need `INFO`, which many users may not run.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    bus::publish::{Keep, Outcome, Publish, Receipt},
    redis::outlet::{Birth, Outlet},
    store::not_done::NotDone,
};

/// A connection over which probes are sent, each with its [`Outlet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// The publishing connection.
    Publish,
    /// The connection of the store's commands.
    Command,
    /// A connection made for one probe: it ends at the server to which the name leads now.
    Fresh,
    /// The publishing connection to the node of a Cluster with this number.
    Node(usize),
}

/// The probes that are under way.
pub(super) struct Probes {
    channel: Arc<str>,
    ways: Vec<Way>,
}

/// The probe of one route.
struct Way {
    route: Route,
    sent: Option<Sent>,
    /// Time when a probe came back last, or when the subscribing connection was made.
    last_heard: Instant,
}

struct Sent {
    payload: Bytes,
    answer: Arc<Answer>,
    /// Number of the connection over which the probe was sent.
    birth: Birth,
    at: Instant,
    /// Set while a question is open that was asked after the answer to the publish.
    fenced: bool,
    /// Number of such questions that have been answered.
    fences_passed: u32,
    /// Set if an earlier probe had no receiver either.
    no_receiver: bool,
}

/// Outcome of the publish: a count of receivers, or one of the constants below.
struct Answer(AtomicI64);

/// The sender of a message on the instance's own channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Returned {
    /// The message came on another channel.
    NotOurs,
    /// Another instance with the same name, or an earlier connection: proves nothing.
    Foreign,
    /// A probe, sent over this connection of the route.
    Probe(Route, Birth),
}

impl Probes {
    /// Creates probes on the instance's own channel.
    pub(super) fn new(channel: Arc<str>, now: Instant) -> Self {
        // The name led here when the instance began.
        let fresh = Way { route: Route::Fresh, sent: None, last_heard: now };
        Self { channel, ways: vec![fresh] }
    }

    /// Begins anew for another subscribing connection. The proof of [`Route::Fresh`] stays.
    pub(super) fn renew(&mut self, now: Instant) {
        // A node that is away now must not count.
        self.ways.retain(|way| !matches!(way.route, Route::Node(_)));
        for way in &mut self.ways {
            way.sent = None;
            if way.route != Route::Fresh {
                way.last_heard = now;
            }
        }
    }

    /// Returns the instance's own channel.
    pub(super) fn channel(&self) -> &str {
        &self.channel
    }

    /// Sends a probe, unless one is under way. Call it only while the channel is confirmed.
    pub(super) fn send(&mut self, route: Route, outlet: &Outlet, now: Instant) {
        let place = self.ways.iter().position(|way| way.route == route).unwrap_or_else(|| {
            self.ways.push(Way { route, sent: None, last_heard: now });
            self.ways.len() - 1
        });
        let way = &mut self.ways[place];
        if way.sent.as_ref().is_some_and(|sent| !matches!(sent.answer(), LOST | DENIED)) {
            return;
        }
        let payload = Bytes::from(format!("{:032x}", rand::random::<u128>()));
        let answer = Arc::new(Answer(AtomicI64::new(OPEN)));
        // Read before the message is handed over: if the connection changes in between, the proof is void.
        let birth = outlet.born();
        outlet.publish(Publish {
            channel: self.channel.clone(),
            payload: payload.clone(),
            keep: Keep::Nothing,
            receipt: Some(answer.clone()),
        });
        way.sent = Some(Sent {
            payload,
            answer,
            birth,
            at: now,
            fenced: false,
            fences_passed: 0,
            no_receiver: false,
        });
    }

    /// Returns the sender of a message. Ends the probe that has come back.
    pub(super) fn returned(&mut self, channel: &[u8], payload: &[u8], now: Instant) -> Returned {
        if channel != self.channel.as_bytes() {
            return Returned::NotOurs;
        }
        for way in &mut self.ways {
            if let Some(sent) = way.sent.take_if(|sent| sent.payload == payload) {
                way.last_heard = now;
                return Returned::Probe(way.route, sent.birth);
            }
        }
        Returned::Foreign
    }

    /// Notes that a question is asked now; [`Self::fence_was_passed`] notes its answer.
    pub(super) fn fence(&mut self) {
        for sent in self.ways.iter_mut().filter_map(|way| way.sent.as_mut()) {
            sent.fenced = sent.answer() > 0;
        }
    }

    /// Notes the answer to the question. Returns the probe that should have come by now, and forgets it.
    pub(super) fn fence_was_passed(&mut self) -> Option<(Route, Birth)> {
        for sent in self.ways.iter_mut().filter_map(|way| way.sent.as_mut()) {
            sent.fences_passed += u32::from(sent.fenced);
        }
        self.forget(|route, sent| !route.is_of_a_cluster() && sent.fences_passed >= FENCES)
    }

    /// Returns a probe that reached no subscriber although we are subscribed: the connections are on different servers.
    /// Counts at the second tick only, since the end of the connection may be unread at the first.
    pub(super) fn no_receiver(&mut self) -> Option<(Route, Birth)> {
        self.forget(|route, sent| {
            let no_receiver = sent.answer() == 0 && !route.is_of_a_cluster();
            std::mem::replace(&mut sent.no_receiver, no_receiver) && no_receiver
        })
    }

    /// Returns a probe that a node of a Cluster has published and that did not come within `limit`.
    pub(super) fn overdue(&mut self, limit: Duration, now: Instant) -> Option<(Route, Birth)> {
        self.forget(|route, sent| {
            route.is_of_a_cluster() && sent.answer() >= 0 && now.duration_since(sent.at) > limit
        })
    }

    /// Returns whether the server refuses publishes on the instance's own channel, so that nothing can be proven.
    pub(super) fn are_denied(&self) -> bool {
        let mut sent = self.ways.iter().filter_map(|way| way.sent.as_ref());
        sent.any(|sent| sent.answer() == DENIED)
    }

    /// Returns the time until which all connections and the server's name certainly led to one server.
    pub(super) fn known_until(&self) -> Option<Instant> {
        self.ways.iter().map(|way| way.last_heard).min()
    }

    /// Forgets all but the masters of a Cluster, where a name means nothing.
    pub(super) fn keep_nodes(&mut self, mut is_master: impl FnMut(usize) -> bool) {
        self.ways.retain(|way| matches!(way.route, Route::Node(number) if is_master(number)));
    }

    /// Returns whether other connections than those of `routes` were heard since a time.
    pub(super) fn are_others_heard(&self, routes: [Route; 2], since: Instant) -> bool {
        self.ways.iter().any(|way| !routes.contains(&way.route) && way.last_heard > since)
    }

    fn forget(
        &mut self,
        mut which: impl FnMut(Route, &mut Sent) -> bool,
    ) -> Option<(Route, Birth)> {
        let mut found = None;
        for way in &mut self.ways {
            if let Some(sent) = way.sent.take_if(|sent| which(way.route, sent)) {
                found = Some((way.route, sent.birth));
            }
        }
        found
    }
}

impl Route {
    fn is_of_a_cluster(self) -> bool {
        matches!(self, Self::Node(_))
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

/// The publish is not answered yet.
const OPEN: i64 = -1;

/// The publish was refused, or lost with its connection: proves nothing, another probe is sent.
const LOST: i64 = -2;

/// The user may not publish on the channel; another probe is sent.
const DENIED: i64 = -3;

/// Answered questions after which a probe counts as missed.
const FENCES: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a probe over the publishing connection; returns the probes and the message.
    fn sent() -> (Probes, Publish) {
        let (mut probes, outlet) = (Probes::new("own".into(), Instant::now()), Outlet::default());
        outlet.connected(7);
        probes.send(Route::Publish, &outlet, Instant::now());
        let publish = outlet.take().unwrap();
        probes.send(Route::Publish, &outlet, Instant::now());
        assert!(outlet.take().is_none(), "one at a time");
        (probes, publish)
    }

    fn answer(publish: &Publish, outcome: Outcome) {
        publish.receipt.as_ref().unwrap().published(outcome);
    }

    #[test]
    fn a_returned_probe_proves_its_connection() {
        let (mut probes, publish) = sent();
        let now = Instant::now();
        assert_eq!(probes.returned(b"other", &publish.payload, now), Returned::NotOurs);
        assert_eq!(probes.returned(b"own", b"of a namesake", now), Returned::Foreign);
        answer(&publish, Outcome::Received(1));
        let returned = probes.returned(b"own", &publish.payload, now);
        assert_eq!(returned, Returned::Probe(Route::Publish, 7));
        for _ in 0..3 {
            probes.fence();
            assert_eq!((probes.fence_was_passed(), probes.no_receiver()), (None, None));
        }
    }

    #[test]
    fn a_received_probe_is_missed_after_two_questions() {
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
    fn a_probe_without_receiver_is_reported_at_the_second_look() {
        let (mut probes, publish) = sent();
        assert_eq!(probes.no_receiver(), None);
        answer(&publish, Outcome::Received(0));
        assert_eq!(probes.no_receiver(), None);
        assert_eq!(probes.no_receiver(), Some((Route::Publish, 7)));
    }

    #[test]
    fn a_lost_probe_is_sent_again() {
        for outcome in [Outcome::Lost, Outcome::Refused(NotDone::Permission)] {
            let (mut probes, publish) = sent();
            answer(&publish, outcome);
            assert_eq!(probes.are_denied(), outcome != Outcome::Lost);
            probes.fence();
            assert_eq!(probes.fence_was_passed(), None);
            assert_eq!((probes.no_receiver(), probes.no_receiver()), (None, None));
            let outlet = Outlet::default();
            probes.send(Route::Publish, &outlet, Instant::now());
            assert!(outlet.take().is_some());
        }
    }

    #[test]
    fn the_servers_name_is_known_since_the_start() {
        let start = Instant::now();
        let (mut probes, outlet) = (Probes::new("own".into(), start), Outlet::default());
        let late = start + Duration::from_secs(5);
        probes.renew(late);
        probes.send(Route::Publish, &outlet, late);
        assert_eq!(probes.known_until(), Some(start));
        probes.send(Route::Node(1), &outlet, late);
        probes.keep_nodes(|number| number == 1);
        assert_eq!(probes.known_until(), Some(late));
        probes.keep_nodes(|_| false);
        assert_eq!(probes.known_until(), None);
    }

    #[test]
    fn a_node_of_a_cluster_has_time_to_pass_the_probe_on() {
        let (mut probes, outlet) = (Probes::new("own".into(), Instant::now()), Outlet::default());
        outlet.connected(7);
        let (start, limit) = (Instant::now(), Duration::from_secs(1));
        probes.send(Route::Node(3), &outlet, start);
        assert!(!probes.are_others_heard([Route::Node(3); 2], start));
        let late = start + limit * 2;
        assert_eq!(probes.overdue(limit, late), None, "the publish has no answer yet");
        answer(&outlet.take().unwrap(), Outcome::Received(0));
        assert_eq!((probes.no_receiver(), probes.no_receiver()), (None, None));
        assert_eq!(probes.overdue(limit, start + limit), None);
        assert_eq!(probes.overdue(limit, late), Some((Route::Node(3), 7)));
        assert_eq!(probes.overdue(limit, late), None);
    }

    #[test]
    fn each_connection_has_a_probe_of_its_own() {
        let (mut probes, first) = sent();
        let outlet = Outlet::default();
        outlet.connected(9);
        probes.send(Route::Command, &outlet, Instant::now());
        let second = outlet.take().unwrap();
        answer(&first, Outcome::Received(0));
        answer(&second, Outcome::Received(1));
        let returned = probes.returned(b"own", &second.payload, Instant::now());
        assert_eq!(returned, Returned::Probe(Route::Command, 9));
        assert_eq!(probes.no_receiver(), None);
        assert_eq!(probes.no_receiver(), Some((Route::Publish, 7)));
    }
}
