//! Delivery for the bus's reader: a round of messages goes into outboxes, then each outbox is flushed once.

use std::{
    sync::{Arc, atomic::Ordering::Release},
    time::Duration,
};

use hashbrown::HashSet;
use tracing::{info, trace, warn};
use wsproxy_conn::{
    Link,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::Disconnect,
    history::{Envelope, reader::Verdict},
};

use crate::{
    bus::deliver::{Deliver, Missed},
    config::OnBusLoss,
    hub::{
        Hub,
        adoption::Adoption,
        audience::{Audience, DeliveryRound, LIST_KEPT, SLICE, Write, trace_written},
        fanout::Fanout,
        follower::Followed,
        form::Form,
        message::Message,
        sink::Sink,
    },
    telemetry::log::MESSAGES,
};

/// Delivers the messages of one bus reader.
pub struct Delivery {
    hub: Arc<Hub>,
    round: DeliveryRound,
    /// WebSockets that get the last message of the round; empty between messages.
    at_once: Vec<(Arc<Link>, Form)>,
    /// Time at which the first message of the round was read.
    since: Option<Micros>,
    /// Plain messages of the round that wait for adoption.
    adoptions: Vec<Adoption>,
}

impl Delivery {
    /// Makes the delivery for the reader of the hub's bus.
    #[must_use]
    pub fn new(hub: Arc<Hub>) -> Self {
        Self {
            hub,
            round: DeliveryRound::default(),
            at_once: Vec::new(),
            since: None,
            adoptions: Vec::new(),
        }
    }
}

impl Deliver for Delivery {
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool) {
        let Self { hub, round, at_once, since, adoptions } = self;
        let since = *since.get_or_insert_with(clock::now);
        round.make_room();
        let mut shard = hub.shards.lock(channel);
        let Some(state) = shard.get_mut(channel) else {
            hub.counters.unwanted.add(1);
            trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), "Nobody here wants a message.");
            return;
        };
        let envelope = Envelope::parse(payload);
        trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), bytes = payload.len(),
            position = envelope.as_ref().map(|envelope| display(envelope.id)),
            subscribers = state.subscribers.len(), "A message came from the bus.");
        if let Some(event_id) = envelope.and_then(|envelope| envelope.event_id) {
            adoptions.retain(|adoption| !adoption.is(channel, event_id));
        }
        let mut message = envelope.as_ref().map_or_else(|| Message::plain(payload), Message::from);
        message.is_unresumable = state.track.as_ref().is_some_and(|track| track.is_unresumable);
        let audience = match (&mut state.track, envelope) {
            (Some(track), Some(envelope)) => {
                match track.accept(&envelope, message, hub.store_clock.latest_ms(since)) {
                    Ok(audience) => {
                        hub.counters.duplicates.add(u64::from(audience == Audience::Gated));
                        audience
                    }
                    Err(verdict) => {
                        trace!(target: MESSAGES, channel = %String::from_utf8_lossy(channel), ?verdict, "A message waits.");
                        let histories = Arc::clone(&track.histories);
                        drop(shard);
                        if verdict == Verdict::Hole {
                            hub.open_hole(&histories);
                        }
                        return;
                    }
                }
            }
            (Some(track), None) if track.histories.adopt_plain => {
                if let Some(adoption) = Adoption::new(channel, track, payload) {
                    adoptions.push(adoption);
                    return;
                }
                hub.counters.uncaptured.add(1);
                Audience::All
            }
            _ => Audience::All,
        };
        let mut fanout = Fanout::new(message);
        let when = match last {
            _ if state.subscribers.len() > SLICE => Write::InSlices,
            true => Write::AtOnce(at_once),
            false => Write::AtFlush,
        };
        round.deliver_to(&mut state.subscribers, audience, &mut fanout, hub, since, when);
        drop(shard);
        // No other message can share a write with the last one of a round. So it is queued and flushed in
        // one step: with thousands of links, each is loaded into the CPU's cache only once.
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
        for adoption in self.adoptions.drain(..) {
            adoption.publish(&self.hub);
        }
    }

    fn proceed(&mut self) -> bool {
        self.round.flush_slice()
    }

    fn lost(&mut self, cause: &str, missed: &Missed) {
        let hub = &self.hub;
        if hub.is_linked() {
            hub.outages.fetch_add(1, Release);
            warn!(error = cause, topics = hub.topics(), "The bus is lost.");
        }
        if let Some(store_ms) = hub.store_clock.now_ms(clock::now()) {
            hub.doubts.lost(store_ms);
        }
        for shard in hub.shards.iter() {
            let mut shard = shard.lock();
            let tracks = shard.tracks_mut().map(|(_, track)| track);
            tracks.filter(|track| missed.has(&track.log)).for_each(|track| track.interrupt());
            for sink in shard.values().flat_map(|state| state.subscribers.iter()) {
                if let Sink::Inbox(inbox) = sink {
                    inbox.lost();
                }
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
    /// Tells every client of a topic without history, once per client. Returns their number.
    fn tell_recovered(&mut self, gap: Duration) -> usize {
        let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
        let notice = format!(r#"{{"type":"bus_recovered","gap_ms":{gap_ms}}}"#);
        let now = clock::now();
        let mut told = HashSet::new();
        let Self { hub, round, .. } = self;
        let mut fanout = Fanout::new(Message::plain(notice.as_bytes()));
        for shard in hub.shards.iter() {
            let shard = shard.lock();
            let plain = shard.values().filter(|state| state.track.is_none());
            for sink in plain.flat_map(|state| state.subscribers.iter()) {
                let (client, on_loss) = match sink {
                    Sink::Client { client, on_loss, .. } => (client, on_loss),
                    Sink::Handler { .. } | Sink::Gated(_) => continue,
                    Sink::Follower(queue) => {
                        queue.push(Followed::Gap(gap));
                        continue;
                    }
                    Sink::Inbox(inbox) => {
                        inbox.recovered();
                        continue;
                    }
                };
                if !told.insert(sink.id()) {
                    continue;
                }
                if *on_loss == OnBusLoss::Close {
                    client.finish(&Disconnect::BUS_LOST, now);
                } else if let Some(bytes) = fanout.encode(sink, hub) {
                    round.send(sink, bytes, Micros::UNTIMED);
                }
            }
        }
        told.len()
    }
}
