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
};
use wsproxy_proto::{disconnect::Disconnect, history::After, ws::frame::Kind};

use crate::{
    bus::{BusError, Publish, Receipt},
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
        logic.on_open(&mut Deeds { gateway, link, marks: &marks, now: clock::now() });
        Self { gateway: Arc::clone(gateway), label, _held: held, marks, awaits, logic }
    }

    /// The logic, and what it can do.
    fn parts<'a>(&'a mut self, link: &'a Arc<Link>, now: Micros) -> (&'a mut L, Deeds<'a>) {
        let Self { gateway, marks, logic, .. } = self;
        (logic, Deeds { gateway, link, marks, now })
    }
}

impl<L: Logic> Handler for Peer<L> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.gateway.hub.poll_publishable(cx)
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
        let (logic, mut deeds) = self.parts(link, now);
        logic.on_event(event, &mut deeds);
    }

    fn on_end(&mut self, end: End, link: &Arc<Link>) {
        self.gateway.metrics.ended(self.label, end.why.label);
        let (logic, mut deeds) = self.parts(link, clock::now());
        logic.on_end(end, link.sent(), &mut deeds);
    }
}

struct Deeds<'a> {
    gateway: &'a Arc<Gateway>,
    link: &'a Arc<Link>,
    marks: &'a Marks,
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
        self.link.push(frame, self.now);
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

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        self.gateway.hub.publish(publish)
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
