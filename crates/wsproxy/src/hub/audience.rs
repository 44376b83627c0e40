//! Who of a topic's sinks gets a message, and how it gets there.

use std::sync::Arc;

use bytes::Bytes;
use tracing::trace;
use wsproxy_conn::{Event, Link, clock::Micros, link::Queued};
use wsproxy_proto::history::{Lost, Position};

use crate::{
    hub::{
        Hub, Sink, State,
        message::{Fanout, Message},
        notice,
        subscribers::Subscribers,
    },
    store::StreamState,
    telemetry::log::MESSAGES,
};

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// Everybody.
    All,
    /// Clients that came while it was on its way; everybody else has it.
    Gated,
}

/// Writes a round of messages into outboxes, and remembers whose must be flushed.
#[derive(Default)]
pub(super) struct Round {
    dirty: Vec<Arc<Link>>,
}

impl Round {
    /// Delivers to all sinks of a topic. Frames wait in outboxes until [`Self::flush`].
    pub(super) fn deliver(
        &mut self,
        state: &mut State,
        audience: Audience,
        fanout: &mut Fanout<'_>,
        hub: &Hub,
        since: Micros,
    ) {
        self.deliver_to(&mut state.subscribers, audience, fanout, hub, since, None);
    }

    /// The same, where connections get the message by `at_once` if that is given.
    pub(super) fn deliver_to(
        &mut self,
        subscribers: &mut Subscribers,
        audience: Audience,
        fanout: &mut Fanout<'_>,
        hub: &Hub,
        since: Micros,
        mut at_once: Option<&mut Vec<(Arc<Link>, super::Form)>>,
    ) {
        for sink in subscribers.iter_mut() {
            if let Sink::Gated(gate) = sink {
                if audience == Audience::Gated && gate.fence.lock().is_open() {
                    continue;
                }
                let frame = fanout.encode(&gate.target, hub);
                let id = fanout.message.id;
                let ids = id.map(|id| (id, fanout.message.prev));
                if let Some(frame) = frame {
                    let mut held = false;
                    let hold = || {
                        held = true;
                        (frame.clone(), frame.len())
                    };
                    let is_let_through = gate.fence.lock().offer(ids, hold);
                    if is_let_through || held {
                        fanout.announce_to(&gate.target);
                    }
                    if is_let_through {
                        self.send(&gate.target, frame, since);
                    }
                }
                if id.is_some_and(|id| gate.fence.lock().is_passed(id)) {
                    *sink = gate.target.clone();
                }
                continue;
            }
            if audience == Audience::Gated {
                continue;
            }
            match sink {
                Sink::Client { link, form, .. } => match &mut at_once {
                    Some(at_once) => at_once.push((Arc::clone(link), *form)),
                    None => {
                        if let Some(frame) = fanout.frame(*form, link, hub) {
                            fanout.announce(*form, link);
                            self.push(link, frame, since);
                        }
                    }
                },
                Sink::EventStream { tap, .. } => {
                    let tap = Arc::clone(tap);
                    if let Some(event) = fanout.encode(sink, hub) {
                        tap.push(event, since);
                    }
                }
                Sink::Handler { link, tag } => {
                    let payload = Bytes::copy_from_slice(fanout.message.payload);
                    link.notify(Event { tag: *tag, number: 0, payload });
                }
                Sink::StreamHandler { tap, tag } => {
                    tap.notify(*tag, Bytes::copy_from_slice(fanout.message.payload));
                }
                Sink::Tap(tap) => tap.push(Bytes::copy_from_slice(fanout.message.payload), since),
                Sink::Gated(_) => {}
            }
        }
    }

    /// Gives a client what it had missed, or is told before anything else.
    pub(super) fn send_missed(&mut self, client: &Sink, bytes: Bytes) {
        match client {
            Sink::EventStream { tap, .. } => tap.push_missed(bytes),
            _ => self.send(client, bytes, Micros::UNTIMED),
        }
    }

    /// Tells all clients of a topic that its history cannot be continued; everybody is at `position` then.
    /// Answers how many were told; those behind a fence are told when they come through.
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
                sink => (sink, true),
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

    /// Gives a client what was encoded for it.
    pub(super) fn send(&mut self, client: &Sink, bytes: Bytes, since: Micros) {
        match client {
            Sink::Client { link, .. } => self.push(link, bytes, since),
            Sink::EventStream { tap, .. } => tap.push(bytes, since),
            Sink::Gated(_) | Sink::Handler { .. } | Sink::StreamHandler { .. } | Sink::Tap(_) => {}
        }
    }

    /// Queues a frame, and remembers whom to flush.
    pub(super) fn push(&mut self, link: &Arc<Link>, frame: Bytes, since: Micros) {
        trace!(target: MESSAGES, connection_id = %link.id(), bytes = frame.len(), "A message is queued for a client.");
        if link.push(frame, since) == Queued::Flush {
            self.dirty.push(Arc::clone(link));
        }
    }

    /// Writes what was queued.
    pub(super) fn flush(&mut self, now: Micros) {
        for link in self.dirty.drain(..) {
            link.flush(now);
            trace_written(&link);
        }
        self.dirty.shrink_to(LIST_KEPT);
    }
}

/// What was queued for a client is written, as far as its socket takes it.
pub(super) fn trace_written(link: &Link) {
    trace!(target: MESSAGES, connection_id = %link.id(), waiting_bytes = link.queued_bytes(), "Messages were written to a client.");
}

/// So many places of a list stay for the next round; what a larger fan-out took is given back.
pub(super) const LIST_KEPT: usize = 16 * 1024;
