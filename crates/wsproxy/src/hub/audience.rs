//! Delivery of a message to the sinks of its topic, through their outboxes.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use tracing::trace;
use wsproxy_conn::{
    Link,
    clock::{self, Micros},
    link::Queued,
};
use wsproxy_proto::history::{Lost, Position};

use crate::{
    client::{Client, event::Event},
    hub::{
        Hub, fanout::Fanout, follower::Followed, form::Form, gate::Gate, inbox::Inbox,
        message::Message, notice, sink::Sink, subscribers::Subscribers, topic::Topic,
    },
    store::token_streams::StreamState,
    telemetry::log::MESSAGES,
};

/// The sinks that get a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// All sinks.
    All,
    /// Gated clients, which connected while the message was on its way. All other sinks have it.
    Gated,
}

/// The time at which WebSockets get a message.
pub(super) enum Write<'a> {
    /// It is queued, and written by [`DeliveryRound::flush`].
    AtFlush,
    /// The caller queues and writes it for the links that are put into this list.
    AtOnce(&'a mut Vec<(Arc<Link>, Form)>),
    /// It is queued, and written by [`DeliveryRound::flush_slice`], or with a later message to the same client if
    /// that comes first. So each client gets its messages in their order.
    InSlices,
}

/// Writes a round of messages into outboxes, and remembers the links to flush.
#[derive(Default)]
pub(super) struct DeliveryRound {
    dirty: Vec<Arc<Link>>,
    /// Links that wait for [`Self::flush_slice`]. Of a burst each is there once, so that it is written in one step.
    later: VecDeque<Arc<Link>>,
    /// Readers in this process that got messages in this round, each once for a run of messages.
    inboxes: Vec<Arc<dyn Inbox>>,
}

impl DeliveryRound {
    /// Delivers to all sinks of a topic. Frames wait in outboxes until [`Self::flush`].
    pub(super) fn deliver(
        &mut self,
        topic: &mut Topic,
        audience: Audience,
        fanout: &mut Fanout<'_>,
        hub: &Hub,
        since: Micros,
    ) {
        self.deliver_to(&mut topic.subscribers, audience, fanout, hub, since, Write::AtFlush);
    }

    /// As [`Self::deliver`], with the time at which WebSockets get the message.
    pub(super) fn deliver_to(
        &mut self,
        subscribers: &mut Subscribers,
        audience: Audience,
        fanout: &mut Fanout<'_>,
        hub: &Hub,
        since: Micros,
        mut when: Write<'_>,
    ) {
        let origin = fanout.message.origin;
        // Nearly every message is for all sinks, so that the loop tests nothing else.
        let is_for_some = audience == Audience::Gated || origin.is_some();
        for sink in subscribers.iter_mut() {
            if let Sink::Gated(gate) = sink {
                let is_origin = origin.is_some_and(|origin| gate.target.is_of(origin));
                if self.offer(gate, audience, is_origin, fanout, hub, since) {
                    *sink = gate.target.clone();
                }
                continue;
            }
            if is_for_some
                && (audience == Audience::Gated || origin.is_some_and(|origin| sink.is_of(origin)))
            {
                continue;
            }
            match sink {
                Sink::Client { client: Client::WebSocket(link), form, .. } => {
                    if let Write::AtOnce(list) = &mut when {
                        list.push((Arc::clone(link), *form));
                    } else if let Some(frame) = fanout.frame(*form, link, hub) {
                        fanout.announce(*form, link);
                        match when {
                            Write::InSlices => self.push_later(link, frame, since),
                            _ => self.push(link, frame, since),
                        }
                    }
                }
                Sink::Client { client: Client::EventStream(outbox), .. } => {
                    if let Some(event) = fanout.event(outbox.gzip(), hub) {
                        outbox.push(event, since);
                    }
                }
                Sink::Handler { client, tag } => {
                    let payload = Bytes::copy_from_slice(fanout.message.payload);
                    client.notify(Event::Message { tag: *tag, payload });
                }
                Sink::Follower(queue) => {
                    let payload = Bytes::copy_from_slice(fanout.message.payload);
                    queue.push(Followed::Message(payload));
                }
                Sink::Inbox(inbox) => {
                    inbox.message(fanout.message.payload);
                    if self.inboxes.last().is_none_or(|last| !Arc::ptr_eq(last, inbox)) {
                        self.inboxes.push(Arc::clone(inbox));
                    }
                }
                Sink::Gated(_) => {}
            }
        }
    }

    /// Offers a message to a gated client. The client gets it if its fence lets the position pass; otherwise the
    /// message waits behind the fence. Returns whether the gate can be removed from this topic.
    fn offer(
        &mut self,
        gate: &Gate,
        audience: Audience,
        is_origin: bool,
        fanout: &mut Fanout<'_>,
        hub: &Hub,
        since: Micros,
    ) -> bool {
        // Keep the lock for the whole offer: the client's other topics, in other shards, share the fence.
        let mut fence = gate.fence.lock();
        if audience == Audience::Gated && fence.is_open() {
            // The client is at the instance's position or further, so it has the message.
            return false;
        }
        let Message { id, prev, .. } = fanout.message;
        if !is_origin && let Some(frame) = fanout.encode(&gate.target, hub) {
            let mut is_held = false;
            let is_let_through = fence.offer(id.map(|id| (id, prev)), || {
                is_held = true;
                (frame.clone(), frame.len())
            });
            // Announce the `ack` before the message is sent. The replay sends messages that wait, but no longer knows
            // that they want an `ack`.
            if is_let_through || is_held {
                fanout.announce_to(&gate.target);
            }
            if is_let_through {
                self.send(&gate.target, frame, since);
            }
        }
        id.is_some_and(|id| fence.is_passed(id))
    }

    /// Sends a client a message that it had missed, or a notice before these.
    pub(super) fn send_missed(&mut self, client: &Sink, bytes: Bytes) {
        match client {
            Sink::Client { client: Client::EventStream(outbox), .. } => outbox.push_missed(bytes),
            _ => self.send(client, bytes, Micros::UNTIMED),
        }
    }

    /// Tells all clients of a topic that its history cannot be continued. They are at `position` then. Clients behind a
    /// closed fence are told when it opens. Returns the number of clients that were told.
    pub(super) fn lose<'a>(
        &mut self,
        subscribers: impl Iterator<Item = &'a Sink>,
        (lost, position): (Lost, Position),
        streams: &[StreamState],
        hub: &Hub,
    ) -> u64 {
        let mut notices = vec![notice::history_lost(lost, position)];
        notices.extend(streams.iter().map(notice::stream_snapshot));
        let message =
            |payload| Message { id: Some(position), carries_id: true, ..Message::plain(payload) };
        let mut fanouts: Vec<_> =
            notices.iter().map(|notice| Fanout::new(message(notice.as_bytes()))).collect();
        let mut told = 0;
        for sink in subscribers {
            let (target, is_due) = match sink {
                Sink::Gated(gate) => (&gate.target, gate.fence.lock().lose(lost, position)),
                sink => (sink, sink.has_history()),
            };
            if !is_due {
                continue;
            }
            for fanout in &mut fanouts {
                if let Some(bytes) = fanout.encode(target, hub) {
                    self.send(target, bytes, Micros::UNTIMED);
                }
            }
            told += 1;
        }
        told
    }

    /// Sends a client bytes that were encoded for it.
    pub(super) fn send(&mut self, client: &Sink, bytes: Bytes, since: Micros) {
        match client {
            Sink::Client { client: Client::WebSocket(link), .. } => self.push(link, bytes, since),
            Sink::Client { client: Client::EventStream(outbox), .. } => outbox.push(bytes, since),
            Sink::Gated(_) | Sink::Handler { .. } | Sink::Follower(_) | Sink::Inbox(_) => {}
        }
    }

    /// Queues a frame, and remembers the link to flush.
    pub(super) fn push(&mut self, link: &Arc<Link>, frame: Bytes, since: Micros) {
        trace!(target: MESSAGES, connection_id = %link.id(), bytes = frame.len(), "A message is queued for a client.");
        if link.push(frame, since) == Queued::Flush {
            self.dirty.push(Arc::clone(link));
        }
    }

    /// As [`Self::push`], for a link that waits for its slice.
    fn push_later(&mut self, link: &Arc<Link>, frame: Bytes, since: Micros) {
        trace!(target: MESSAGES, connection_id = %link.id(), bytes = frame.len(), "A message to many is queued for a client.");
        if link.push_later(frame, since) == Queued::Flush {
            self.later.push_back(Arc::clone(link));
        }
    }

    /// Flushes links that wait for their slice while too many do: messages to many come faster than they are written.
    pub(super) fn make_room(&mut self) {
        while self.later.len() > LATER_MAX {
            self.flush_slice();
        }
    }

    /// Flushes the next links that wait for their slice. Returns whether others wait still.
    pub(super) fn flush_slice(&mut self) -> bool {
        if self.later.is_empty() {
            return false;
        }
        let now = clock::now();
        for link in self.later.drain(..SLICE.min(self.later.len())) {
            link.flush(now);
            trace_written(&link);
        }
        if self.later.is_empty() {
            self.later.shrink_to(LIST_KEPT);
        }
        !self.later.is_empty()
    }

    /// Flushes all links with queued frames, but those that wait for their slice.
    pub(super) fn flush(&mut self, now: Micros) {
        for link in self.dirty.drain(..) {
            link.flush(now);
            trace_written(&link);
        }
        self.dirty.shrink_to(LIST_KEPT);
        for inbox in self.inboxes.drain(..) {
            inbox.flush(now);
        }
        self.inboxes.shrink_to(LIST_KEPT);
    }
}

/// Traces that a client's queued messages were written, as far as its socket takes them.
pub(super) fn trace_written(link: &Link) {
    trace!(target: MESSAGES, connection_id = %link.id(), waiting_bytes = link.queued_bytes(), "Messages were written to a client.");
}

/// Clients of one topic that are written to before other messages are looked at: some five milliseconds.
pub(super) const SLICE: usize = 1000;

/// Links that may wait for their slice when a further message to many comes.
const LATER_MAX: usize = 100 * SLICE;

/// Upper bound of the capacity that a list keeps for the next round.
pub(super) const LIST_KEPT: usize = 16 * 1024;
