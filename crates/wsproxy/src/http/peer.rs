//! An endpoint's logic on its connection: what it states becomes deeds here.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

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
    http::upgrade::Held,
    hub::Hub,
    telemetry::metrics::Endpoint,
};

/// The handler that every endpoint's connections have; only the logic differs.
pub struct Peer<L: Logic> {
    gateway: Arc<Gateway>,
    /// The endpoint's name in metrics.
    label: Endpoint,
    /// Subscriptions, the place among the allowed connections, the gauge.
    _held: Held,
    /// Told by the client's first message what it wants to resume from.
    awaits: Option<oneshot::Sender<Option<After>>>,
    logic: L,
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
        mut logic: L,
    ) -> Self {
        logic.on_open(&mut Deeds { hub: &gateway.hub, link, now: clock::now() });
        Self { gateway: Arc::clone(gateway), label, _held: held, awaits, logic }
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
            if let Some(Ok(after)) = after {
                // Nobody listens any more where the time for it is over.
                let _ = awaits.send(after);
                return;
            }
        }
        self.logic.on_message(kind, payload, &mut Deeds { hub: &self.gateway.hub, link, now });
    }

    fn on_event(&mut self, event: Event, link: &Arc<Link>, now: Micros) {
        self.logic.on_event(event, &mut Deeds { hub: &self.gateway.hub, link, now });
    }

    fn on_end(&mut self, end: End, link: &Arc<Link>) {
        let now = clock::now();
        self.gateway.metrics.ended(self.label, end.why.label);
        self.logic.on_end(end, link.sent(), &mut Deeds { hub: &self.gateway.hub, link, now });
    }
}

struct Deeds<'a> {
    hub: &'a Hub,
    link: &'a Arc<Link>,
    now: Micros,
}

impl Actions for Deeds<'_> {
    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        let frame =
            Outgoing::new(kind, payload).frame(self.link.window_bits(), self.link.profile());
        self.link.reply(frame, self.now);
    }

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        self.hub.publish(publish)
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.link.disconnect(why, self.now);
    }

    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str) {
        self.link.finish_with(why, code, reason, self.now);
    }

    fn receipt(&self) -> Arc<dyn Receipt> {
        Arc::clone(self.link) as Arc<dyn Receipt>
    }
}
