//! The handler of WebSockets: passes messages and events to the family's logic, and executes the logic's actions.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::oneshot;
use wsproxy_conn::{
    End, Handler, Link, Outgoing,
    clock::{self, Micros},
};
use wsproxy_proto::{disconnect::Disconnect, history::After, ws::frame::Kind};

use crate::{
    bus::publish::{BusError, Counts, Outcome, Publish, Receipt},
    client::{Client, event::Event},
    core::Core,
    http::handshake::{Accepted, ConnectionGuards, resume},
    logic::{Actions, Logic, Serve},
    telemetry::{family::Family, metrics::Active, time},
};

/// Handler of the WebSockets of all families, which differ in their logic.
pub(super) struct Connection<L: Logic> {
    core: Arc<Core>,
    family: Family,
    _held: ConnectionGuards,
    _active: Active,
    options: ConnectionOptions,
    share: Share,
    /// Waits for the position in the client's first message.
    awaits: Option<oneshot::Sender<Option<After>>>,
    logic: L,
    server: L::Server,
}

/// Options of the handshake that change the messages to the client.
#[derive(Clone, Copy)]
struct ConnectionOptions {
    /// Each message begins with a line for its id, which is empty for a message without one.
    envelope: bool,
}

/// First message of a client whose handshake said `resume=frame`.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum First {
    Resume { last_event_id: String },
}

impl<L: Logic> Connection<L> {
    /// Makes the handler of an accepted client, and opens its logic.
    pub(super) fn open(
        core: &Arc<Core>,
        link: &Arc<Link>,
        envelope: bool,
        accepted: Accepted<L>,
    ) -> Self {
        let Accepted { family, held, pending, logic, server } = accepted;
        let mut connection = Self {
            core: Arc::clone(core),
            family,
            _held: held,
            _active: core.metrics.opened(family),
            options: ConnectionOptions { envelope },
            share: Share::default(),
            awaits: pending.map(|replay| resume::in_frame(core, replay, link)),
            logic,
            server,
        };
        let (logic, mut actions) = connection.parts(link, clock::now());
        logic.on_open(&mut actions);
        connection
    }

    /// Splits the handler into the logic and its actions.
    fn parts<'a>(
        &'a mut self,
        link: &'a Arc<Link>,
        now: Micros,
    ) -> (&'a mut L, ConnectionActions<'a, L::Server>) {
        let Self { core, options, share, logic, server, .. } = self;
        (logic, ConnectionActions { core, link, options: *options, share, server, now })
    }
}

impl<L: Logic> Handler for Connection<L> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.share.is_used_up() {
            // `ShareFree` wakes the task.
            return Poll::Pending;
        }
        self.core.hub.poll_publishable(cx)
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
                    // An error means that the time for the position is over: the replay went on without it.
                    let _ = awaits.send(after);
                    return;
                }
                Some(Err(error)) => {
                    // The client gets live messages only, and the error tells why.
                    let message = format!("last_event_id {error}.");
                    let body = serde_json::json!({ "type": "error", "code": "bad_event_id", "message": message });
                    let (_, mut actions) = self.parts(link, now);
                    return Actions::<L::Request>::reply(
                        &mut actions,
                        Kind::Text,
                        body.to_string().as_bytes(),
                    );
                }
                None => {}
            }
        }
        let (logic, mut actions) = self.parts(link, now);
        logic.on_message(kind, payload, &mut actions);
    }

    fn on_event(&mut self, event: wsproxy_conn::HandlerEvent, link: &Arc<Link>, now: Micros) {
        let event = Event::from(event);
        if matches!(event, Event::ShareFree) {
            self.share = Share::default();
            return;
        }
        let (logic, mut actions) = self.parts(link, now);
        logic.on_event(event, &mut actions);
    }

    fn on_writable(&mut self, link: &Arc<Link>, now: Micros) {
        let (logic, mut actions) = self.parts(link, now);
        logic.on_event(Event::Writable, &mut actions);
    }

    fn on_end(&mut self, end: End, link: &Arc<Link>) {
        self.core.metrics.ended(self.family, end.why.label);
        self.core.recent.ended(self.family, link.id(), self.logic.who(), end, link.sent().0);
        let (logic, mut actions) = self.parts(link, clock::now());
        logic.on_end(end, link.sent(), &mut actions);
    }
}

/// Bytes that a connection has put into the publish queue.
///
/// Answers of the bus are not counted one by one. The message that uses up the share carries a receipt. When the bus
/// has answered that message, it has answered all earlier ones too.
#[derive(Debug, Default)]
struct Share {
    /// Bytes since the share was free; [`USED_UP`] while the last message is not answered.
    bytes: u32,
}

impl Share {
    const fn is_used_up(&self) -> bool {
        self.bytes == USED_UP
    }

    /// Counts a message. Returns whether it uses up a share of `most` bytes.
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
    fn counts(&self) -> Counts {
        self.receipt.as_ref().map_or(Counts::Nothing, |receipt| receipt.counts())
    }

    fn published(&self, outcome: Outcome) {
        if let Some(receipt) = &self.receipt {
            receipt.published(outcome);
        }
        self.link.notify(Event::ShareFree.into());
    }
}

/// Actions of a WebSocket's logic.
struct ConnectionActions<'a, S> {
    core: &'a Arc<Core>,
    link: &'a Arc<Link>,
    options: ConnectionOptions,
    share: &'a mut Share,
    server: &'a S,
    now: Micros,
}

impl<S> ConnectionActions<'_, S> {
    /// Frames a message of the gateway, which has no id.
    fn frame(&self, kind: Kind, payload: &[u8]) -> Bytes {
        if self.options.envelope {
            return self.frame_of(kind, &[b"\n", payload].concat());
        }
        self.frame_of(kind, payload)
    }

    fn frame_of(&self, kind: Kind, message: &[u8]) -> Bytes {
        Outgoing::new(kind, message).frame(self.link.window_bits(), self.link.profile())
    }

    /// Queues a frame. The driver flushes after every turn of the logic.
    fn push(&self, frame: Bytes) {
        self.link.push(frame, Micros::UNTIMED);
    }
}

impl<R, S: Serve<R>> Actions<R> for ConnectionActions<'_, S> {
    fn now(&self) -> Micros {
        self.now
    }

    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        self.link.reply(self.frame(kind, payload), self.now);
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.push(self.frame(kind, payload));
    }

    fn send_verbatim(&mut self, kind: Kind, message: &[u8]) {
        self.push(self.frame_of(kind, message));
    }

    fn is_backed_up(&self) -> bool {
        self.link.queued_bytes() > 0
    }

    fn publish(&mut self, mut publish: Publish) -> Result<(), BusError> {
        let most = self.core.config.redis.publish_queue_bytes / SHARES;
        let is_last = self.share.count(publish.queued_bytes(), most);
        if is_last {
            let (link, receipt) = (Arc::clone(self.link), publish.receipt.take());
            publish.receipt = Some(Arc::new(LastOfShare { link, receipt }));
        }
        self.core.hub.publish(publish)?;
        if is_last {
            self.share.bytes = USED_UP;
        }
        Ok(())
    }

    fn publish_upstream(&mut self, mut publish: Publish) -> Result<(), BusError> {
        publish.receipt = Some(Arc::clone(self.link) as Arc<dyn Receipt>);
        Actions::<R>::publish(self, publish)
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

    fn request(&mut self, request: R) {
        let client = Client::WebSocket(Arc::clone(self.link));
        self.server.serve(request, &client, self.core);
    }
}

/// Number of shares in the publish queue. A connection may fill one share before the bus has answered. A client that
/// sends more is read more slowly, so that others find room.
const SHARES: usize = 64;

/// Marks a share as used up; larger than any share.
const USED_UP: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::recent::Who;
    use std::convert::Infallible;

    /// A logic that does nothing.
    struct Still;

    impl Logic for Still {
        type Request = Infallible;
        type Server = ();

        fn on_open(&mut self, _: &mut dyn Actions<Infallible>) {}
        fn on_message(&mut self, _: Kind, _: &[u8], _: &mut dyn Actions<Infallible>) {}
        fn on_event(&mut self, _: Event, _: &mut dyn Actions<Infallible>) {}
        fn who(&self) -> Who<'_> {
            Who::default()
        }
        fn on_end(&mut self, _: End, _: (u64, u64), _: &mut dyn Actions<Infallible>) {}
    }

    #[test]
    fn a_connection_costs_little_beside_its_logic() {
        let size = size_of::<Connection<Still>>() - size_of::<Still>();
        assert!(size <= 104, "{size} bytes");
    }

    #[test]
    fn the_message_that_uses_up_a_share_is_found_once() {
        let mut share = Share::default();
        assert!((0..9).all(|_| !share.count(100, 1000)));
        assert!(share.count(100, 1000));
        share.bytes = USED_UP;
        assert!(share.is_used_up() && !share.count(100, 1000) && share.is_used_up());
        // A message larger than a share uses it up alone, and its size never reads as `USED_UP`.
        assert!(Share::default().count(usize::MAX, 1000));
        let mut share = Share::default();
        assert!(!share.count(u32::MAX as usize, usize::MAX) && !share.is_used_up());
    }
}
