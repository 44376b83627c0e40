//! An endpoint's logic on its connection: what it states becomes deeds here.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::oneshot;
use wsproxy_conn::{
    End, Event, Handler, Link, Outgoing,
    clock::{self, Micros},
    link::TIMER,
};
use wsproxy_proto::{disconnect::Disconnect, history::After, ws::frame::Kind};

use crate::{
    bus::{BusError, Outcome, Publish, Receipt},
    endpoint::{Actions, Logic},
    gateway::Gateway,
    http::{events, upgrade::Held},
    registry::Entry,
    telemetry::{metrics::Endpoint, time},
};

/// The handler that every endpoint's connections have; only the logic differs.
pub struct Peer<L: Logic> {
    gateway: Arc<Gateway>,
    /// The endpoint's name in metrics.
    label: Endpoint,
    /// Subscriptions, the place among the allowed connections, the gauge.
    _held: Held,
    marks: Marks,
    share: Share,
    /// Told by the client's first message what it wants to resume from.
    awaits: Option<oneshot::Sender<Option<After>>>,
    logic: L,
}

/// What distinguishes a connection from others of its endpoint.
#[derive(Default)]
pub struct Marks {
    /// Every message begins with a line for the id, even one that has none.
    pub envelope: bool,
    /// Its place in the registry.
    pub registered: Option<Arc<Entry>>,
}

/// The first message of a client that said it would resume with it.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum First {
    Resume { last_event_id: String },
}

impl<L: Logic> Peer<L> {
    /// Puts a logic on a connection that is about to be driven.
    pub fn open(
        gateway: &Arc<Gateway>,
        label: Endpoint,
        link: &Arc<Link>,
        held: Held,
        awaits: Option<oneshot::Sender<Option<After>>>,
        marks: Marks,
        mut logic: L,
    ) -> Self {
        let (mut share, now) = (Share::default(), clock::now());
        logic.on_open(&mut Deeds { gateway, link, marks: &marks, share: &mut share, now });
        Self { gateway: Arc::clone(gateway), label, _held: held, marks, share, awaits, logic }
    }

    /// The logic, and what it can do.
    fn parts<'a>(&'a mut self, link: &'a Arc<Link>, now: Micros) -> (&'a mut L, Deeds<'a>) {
        let Self { gateway, marks, share, logic, .. } = self;
        (logic, Deeds { gateway, link, marks, share, now })
    }
}

impl<L: Logic> Handler for Peer<L> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.share.is_used_up() {
            // The event that ends this wakes the task.
            return Poll::Pending;
        }
        self.gateway.hub.poll_publishable(cx)
    }

    fn is_full(&self) -> bool {
        self.share.is_used_up()
    }

    fn on_message(&mut self, kind: Kind, payload: &[u8], link: &Arc<Link>, now: Micros) {
        if let Some(awaits) = self.awaits.take() {
            let first = serde_json::from_slice(payload).ok();
            let after = first.map(|First::Resume { last_event_id }| After::parse(&last_event_id));
            match after {
                Some(Ok(after)) => {
                    // Nobody listens any more where the time for it is over.
                    let _ = awaits.send(after);
                    return;
                }
                Some(Err(error)) => {
                    // It begins with what is live, and knows why.
                    let message = format!("last_event_id {error}.");
                    let body = serde_json::json!({ "type": "error", "code": "bad_event_id", "message": message });
                    let (_, mut deeds) = self.parts(link, now);
                    return deeds.reply(Kind::Text, body.to_string().as_bytes());
                }
                None => {}
            }
        }
        let (logic, mut deeds) = self.parts(link, now);
        logic.on_message(kind, payload, &mut deeds);
    }

    fn on_event(&mut self, event: Event, link: &Arc<Link>, now: Micros) {
        if event.tag == SHARE_FREE {
            self.share = Share::default();
            return;
        }
        let (logic, mut deeds) = self.parts(link, now);
        logic.on_event(event, &mut deeds);
    }

    fn on_end(&mut self, end: End, link: &Arc<Link>) {
        self.gateway.metrics.ended(self.label, end.why.label);
        let (logic, mut deeds) = self.parts(link, clock::now());
        logic.on_end(end, link.sent(), &mut deeds);
    }
}

/// [`Event::tag`]: the bus has answered all that filled the connection's share of the publish queue.
const SHARE_FREE: u8 = TIMER - 2;

/// A connection may fill one part of so many of the publish queue before the bus has answered: a client that
/// sends more is read more slowly, and others find the queue all but empty.
const SHARES: usize = 64;

/// How much a connection has put into the publish queue.
///
/// Nothing is counted per answer: the message that uses the share up carries a receipt which tells when the bus has
/// answered it, and with it everything before it.
#[derive(Debug, Default)]
struct Share {
    /// Bytes since the last such message; [`USED_UP`] while that is not answered.
    bytes: u32,
}

/// More than any share has.
const USED_UP: u32 = u32::MAX;

impl Share {
    const fn is_used_up(&self) -> bool {
        self.bytes == USED_UP
    }

    /// Counts a message; whether it is the one that uses up a share of `most` bytes.
    fn count(&mut self, bytes: usize, most: usize) -> bool {
        if self.is_used_up() {
            return false;
        }
        let sum = (self.bytes as usize).saturating_add(bytes);
        self.bytes = u32::try_from(sum).unwrap_or(USED_UP).min(USED_UP - 1);
        sum >= most
    }
}

/// The receipt of a message that used up a share.
struct LastOfShare {
    link: Arc<Link>,
    receipt: Option<Arc<dyn Receipt>>,
}

impl Receipt for LastOfShare {
    fn published(&self, outcome: Outcome) {
        if let Some(receipt) = &self.receipt {
            receipt.published(outcome);
        }
        self.link.notify(Event { tag: SHARE_FREE, number: 0, payload: Bytes::new() });
    }
}

struct Deeds<'a> {
    gateway: &'a Arc<Gateway>,
    link: &'a Arc<Link>,
    marks: &'a Marks,
    share: &'a mut Share,
    now: Micros,
}

impl Deeds<'_> {
    /// A message of the gateway's own, which has no id.
    fn frame(&self, kind: Kind, payload: &[u8]) -> Bytes {
        if self.marks.envelope {
            return self.frame_of(kind, &[b"\n", payload].concat());
        }
        self.frame_of(kind, payload)
    }

    fn frame_of(&self, kind: Kind, message: &[u8]) -> Bytes {
        Outgoing::new(kind, message).frame(self.link.window_bits(), self.link.profile())
    }

    /// The driver flushes after every turn of the logic.
    fn push(&self, frame: Bytes) {
        self.link.push(frame, Micros::UNTIMED);
    }
}

impl Actions for Deeds<'_> {
    fn now(&self) -> Micros {
        self.now
    }

    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        self.link.reply(self.frame(kind, payload), self.now);
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.push(self.frame(kind, payload));
    }

    fn resend(&mut self, kind: Kind, message: &[u8]) {
        self.push(self.frame_of(kind, message));
    }

    fn is_backed_up(&self) -> bool {
        self.link.queued_bytes() > 0
    }

    fn publish(&mut self, mut publish: Publish) -> Result<(), BusError> {
        let most = self.gateway.config.redis.publish_queue_bytes / SHARES;
        let is_last = self.share.count(publish.queued_bytes(), most);
        if is_last {
            let (link, receipt) = (Arc::clone(self.link), publish.receipt.take());
            publish.receipt = Some(Arc::new(LastOfShare { link, receipt }));
        }
        self.gateway.hub.publish(publish)?;
        if is_last {
            self.share.bytes = USED_UP;
        }
        Ok(())
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.link.disconnect(why, self.now);
    }

    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str) {
        self.link.finish_with(why, code, reason, self.now);
    }

    fn wake_at(&mut self, at: Micros) {
        self.link.wake_at(at);
    }

    fn expire_at(&mut self, at: Option<u64>) {
        let left = |at: u64| Duration::from_secs(at).saturating_sub(time::since_epoch());
        let at = at.map(|at| self.now.after(left(at).into()));
        self.link.expire_at(at, &Disconnect::EXPIRED);
    }

    fn verify(&mut self, token: &str) {
        let registered = self.marks.registered.as_ref();
        events::look_at(self.gateway, self.link, registered, token.into());
    }

    fn receipt(&self) -> Arc<dyn Receipt> {
        Arc::clone(self.link) as Arc<dyn Receipt>
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::echo::Echo;

    #[test]
    fn a_connection_costs_little_beside_its_logic() {
        let size = size_of::<Peer<Echo>>() - size_of::<Echo>();
        assert!(size <= 104, "{size} bytes");
    }

    #[test]
    fn the_message_that_uses_up_a_share_is_found_once() {
        let mut share = Share::default();
        assert!((0..9).all(|_| !share.count(100, 1000)));
        assert!(share.count(100, 1000));
        share.bytes = USED_UP;
        assert!(share.is_used_up() && !share.count(100, 1000) && share.is_used_up());
        // A message that is larger than a share uses it up alone, and counts as no more than that.
        assert!(Share::default().count(usize::MAX, 1000));
        let mut share = Share::default();
        assert!(!share.count(u32::MAX as usize, usize::MAX) && !share.is_used_up());
    }
}
