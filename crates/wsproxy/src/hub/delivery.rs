//! What the bus's reader runs: a round of messages into outboxes, then one write for each of them.

use std::{
    sync::{Arc, atomic::Ordering::Release},
    time::Duration,
};

use hashbrown::HashSet;
use tracing::{debug, info, trace, warn};
use wsproxy_conn::{
    Link,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::Disconnect,
    history::{Envelope, reader::Verdict},
};

use crate::{
    bus::Deliver,
    config::OnBusLoss,
    hub::{
        Form, Histories, Hub, Name, Sink, Track,
        audience::{Audience, LIST_KEPT, Round, trace_written},
        capture::Capture,
        message::{Fanout, Message},
    },
    telemetry::log::MESSAGES,
};

/// Delivers for one bus reader.
pub struct Delivery {
    hub: Arc<Hub>,
    round: Round,
    /// Who gets the last message of the round; empty between messages.
    at_once: Vec<(Arc<Link>, Form)>,
    /// When the first message of the round was read.
    since: Option<Micros>,
    /// Plain messages of the round that are to be taken into histories.
    captures: Vec<Capture>,
}

impl Delivery {
    /// For the reader of the bus that `hub` will be connected with.
    #[must_use]
    pub fn new(hub: Arc<Hub>) -> Self {
        Self {
            hub,
            round: Round::default(),
            at_once: Vec::new(),
            since: None,
            captures: Vec::new(),
        }
    }
}

impl Deliver for Delivery {
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool) {
        let Self { hub, round, at_once, since, captures } = self;
        let since = *since.get_or_insert_with(clock::now);
        let mut shard = hub.shard(channel).lock();
        let Some(state) = shard.get_mut(&Name(channel)) else {
            hub.counters.unwanted.add(1);
            trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), "Nobody here wants a message.");
            return;
        };
        let envelope = Envelope::parse(payload);
        trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), bytes = payload.len(),
            position = envelope.as_ref().map(|envelope| display(envelope.id)),
            subscribers = state.subscribers.len(), "A message came from the bus.");
        if let Some(event_id) = envelope.and_then(|envelope| envelope.event_id) {
            captures.retain(|capture| !capture.is(channel, event_id));
        }
        let mut message = envelope.as_ref().map_or_else(|| Message::plain(payload), Message::from);
        message.is_private = state.track.as_ref().is_some_and(|track| track.is_private);
        let audience = match (&mut state.track, envelope) {
            (Some(track), Some(envelope)) => match track.accept(&envelope, message, since, hub) {
                Ok(audience) => audience,
                Err(verdict) => {
                    trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), ?verdict, "A message waits.");
                    let histories = Arc::clone(&track.histories);
                    drop(shard);
                    if verdict == Verdict::Hole {
                        hub.open_hole(&histories);
                    }
                    return;
                }
            },
            (Some(track), None) if track.histories.capture => {
                if let Some(capture) = Capture::new(channel, track, payload) {
                    captures.push(capture);
                    return;
                }
                hub.counters.uncaptured.add(1);
                Audience::All
            }
            _ => Audience::All,
        };
        let mut fanout = Fanout::new(message);
        let list = last.then_some(&mut *at_once);
        round.deliver_to(&mut state.subscribers, audience, &mut fanout, hub, since, list);
        drop(shard);
        // Nothing can join the last message of a round in one write, so each link is touched only
        // once for it: with thousands, that spares loading all of them into the cache again.
        for (link, form) in at_once.drain(..) {
            if let Some(frame) = fanout.frame(form, &link, hub) {
                fanout.announce(form, &link);
                link.push_and_flush(frame, since);
                trace_written(&link);
            }
        }
        at_once.shrink_to(LIST_KEPT);
    }

    fn flush(&mut self) {
        let now = self.since.take().unwrap_or_else(clock::now);
        self.round.flush(now);
        for capture in self.captures.drain(..) {
            capture.publish(&self.hub);
        }
    }

    fn lost(&mut self, cause: &str) {
        let hub = &self.hub;
        if hub.is_linked() {
            hub.outages.fetch_add(1, Release);
            warn!(error = cause, topics = hub.topics(), "The bus is lost.");
        }
        if let Some(store_ms) = hub.store_clock.now_ms(clock::now()) {
            hub.doubts.lost(store_ms);
        }
        for shard in &hub.shards {
            let mut shard = shard.lock();
            for track in shard.values_mut().filter_map(|state| state.track.as_mut()) {
                track.interrupt();
            }
        }
    }

    fn recovered(&mut self, gap: Duration) {
        if !self.hub.is_linked() {
            self.hub.outages.fetch_add(1, Release);
        }
        self.hub.holes.notify_one();
        let told = self.tell_recovered(gap);
        self.hub.counters.bus_loss_notices.add(told as u64);
        self.flush();
        let gap_ms = gap.as_millis() as u64;
        info!(gap_ms, connections = told, "The bus is back; clients without history were told.");
    }
}

impl Delivery {
    /// Tells every client once of whose topics some have no history.
    fn tell_recovered(&mut self, gap: Duration) -> usize {
        let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
        let notice = format!(r#"{{"type":"bus_recovered","gap_ms":{gap_ms}}}"#);
        let now = clock::now();
        let mut told = HashSet::new();
        let Self { hub, round, .. } = self;
        let mut fanout = Fanout::new(Message::plain(notice.as_bytes()));
        for shard in &hub.shards {
            let shard = shard.lock();
            let plain = shard.values().filter(|state| state.track.is_none());
            for sink in plain.flat_map(|state| state.subscribers.iter()) {
                let on_loss = match sink {
                    Sink::Client { on_loss, .. } | Sink::EventStream { on_loss, .. } => on_loss,
                    Sink::Handler { .. } | Sink::StreamHandler { .. } | Sink::Gated(_) => continue,
                    Sink::Tap(tap) => {
                        tap.interrupt(gap);
                        continue;
                    }
                };
                if !told.insert(sink.place()) {
                    continue;
                }
                match (on_loss, sink) {
                    (OnBusLoss::Close, Sink::Client { link, .. }) => {
                        link.finish(&Disconnect::BUS_LOST, now);
                    }
                    (OnBusLoss::Close, Sink::EventStream { tap, .. }) => {
                        tap.end(&Disconnect::BUS_LOST)
                    }
                    _ => {
                        if let Some(bytes) = fanout.encode(sink, hub) {
                            round.send(sink, bytes, Micros::UNTIMED);
                        }
                    }
                }
            }
        }
        told.len()
    }
}

impl Track {
    /// Whom a message of the history is for.
    ///
    /// # Errors
    /// It has to wait, or is behind a hole.
    fn accept(
        &mut self,
        envelope: &Envelope<'_>,
        message: Message<'_>,
        now: Micros,
        hub: &Hub,
    ) -> Result<Audience, Verdict> {
        let Envelope { id, prev, .. } = *envelope;
        match self.reader.accept(id, prev, hub.store_clock.latest_ms(now), || message.store()) {
            Verdict::Deliver => Ok(Audience::All),
            Verdict::Duplicate => {
                hub.counters.duplicates.add(1);
                Ok(Audience::Gated)
            }
            Verdict::Held => Err(Verdict::Held),
            Verdict::Hole => {
                self.turns += 1;
                debug!(log = &*self.log, id = %envelope.id, prev = %envelope.prev, "A message does not follow the one before it.");
                Err(Verdict::Hole)
            }
        }
    }
}

impl Hub {
    /// A log has a hole; where several have one order, all of them are read and go on together.
    pub(super) fn open_hole(&self, histories: &Arc<Histories>) {
        if histories.clock.is_some() {
            for shard in &self.shards {
                let mut shard = shard.lock();
                let tracks = shard.values_mut().filter_map(|state| state.track.as_mut());
                tracks
                    .filter(|track| Arc::ptr_eq(&track.histories, histories))
                    .for_each(|track| track.interrupt());
            }
        }
        self.holes.notify_one();
    }
}

impl<'a> From<&Envelope<'a>> for Message<'a> {
    fn from(envelope: &Envelope<'a>) -> Self {
        let carries_id = envelope.event_id.is_some();
        let Envelope { id, prev, payload, .. } = *envelope;
        Self { id: Some(id), prev, carries_id, is_private: false, payload }
    }
}
