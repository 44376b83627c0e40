//! What the bus's reader runs: a round of messages into outboxes, then one write for each of them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hashbrown::HashSet;
use tracing::{debug, info, warn};
use wsproxy_conn::{
    Event, Link, Outgoing,
    clock::{self, Micros},
    link::Queued,
};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::Deliver,
    config::{DownFrames, OnBusLoss},
    hub::{Hub, Name, Sink},
};

/// Delivers for one bus reader.
pub struct Delivery {
    hub: Arc<Hub>,
    /// Whose outbox has to be flushed at the end of the round.
    dirty: Vec<Arc<Link>>,
    /// Who gets the last message of the round; empty between messages.
    at_once: Vec<(Arc<Link>, DownFrames)>,
    /// When the first message of the round was read.
    round: Option<Micros>,
}

impl Delivery {
    /// For the reader of the bus that `hub` will be connected with.
    #[must_use]
    pub const fn new(hub: Arc<Hub>) -> Self {
        Self { hub, dirty: Vec::new(), at_once: Vec::new(), round: None }
    }
}

impl Deliver for Delivery {
    fn message(&mut self, channel: &[u8], payload: &[u8], last: bool) {
        let Self { hub, dirty, at_once, round } = self;
        let since = *round.get_or_insert_with(clock::now);
        let shard = hub.shard(channel).lock();
        let Some(subscribers) = shard.get(&Name(channel)) else {
            hub.counters.unwanted.add(1);
            return;
        };
        let mut message = Fanout::new(payload);
        for sink in subscribers.iter() {
            match sink {
                Sink::Client { link, frames, .. } if last => {
                    at_once.push((Arc::clone(link), *frames));
                }
                Sink::Client { link, frames, .. } => {
                    if let Some(frame) = message.frame(*frames, link, hub) {
                        push(link, frame, since, dirty);
                    }
                }
                Sink::Handler { link, tag } => {
                    let payload = Bytes::copy_from_slice(payload);
                    link.notify(Event { tag: *tag, number: 0, payload });
                }
                Sink::Tap(tap) => tap.push(payload),
            }
        }
        drop(shard);
        // Nothing can join the last message of a round in one write, so each link is touched only
        // once for it: with thousands, that spares loading all of them into the cache again.
        for (link, frames) in at_once.drain(..) {
            if let Some(frame) = message.frame(frames, &link, hub) {
                link.push_and_flush(frame, since);
            }
        }
        at_once.shrink_to(LIST_KEPT);
    }

    fn flush(&mut self) {
        let now = self.round.take().unwrap_or_else(clock::now);
        for link in self.dirty.drain(..) {
            link.flush(now);
        }
        self.dirty.shrink_to(LIST_KEPT);
    }

    fn lost(&mut self, cause: &str) {
        warn!(error = cause, topics = self.hub.topics(), "The bus is lost.");
    }

    fn recovered(&mut self, gap: Duration) {
        let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
        let notice = format!(r#"{{"type":"bus_recovered","gap_ms":{gap_ms}}}"#);
        let now = clock::now();
        let mut told = HashSet::new();
        let Self { hub, dirty, .. } = self;
        for shard in &hub.shards {
            let mut outgoing = Outgoing::new(Kind::Text, notice.as_bytes());
            for sink in shard.lock().values().flat_map(|subscribers| subscribers.iter()) {
                let (link, on_loss) = match sink {
                    Sink::Client { link, on_loss, .. } => (link, on_loss),
                    Sink::Handler { .. } => continue,
                    Sink::Tap(tap) => {
                        tap.interrupt(gap);
                        continue;
                    }
                };
                if !told.insert(link.id()) {
                    continue;
                }
                match on_loss {
                    OnBusLoss::Close => link.finish(&Disconnect::BUS_LOST, now),
                    OnBusLoss::Notice => {
                        let frame = outgoing.frame(link.window_bits(), link.profile());
                        push(link, frame, now, dirty);
                    }
                }
            }
        }
        hub.counters.bus_loss_notices.add(told.len() as u64);
        self.flush();
        info!(
            gap_ms,
            connections = told.len(),
            "The bus is back; clients without history were told."
        );
    }
}

/// Queues a frame, and remembers whom to flush.
fn push(link: &Arc<Link>, frame: Bytes, since: Micros, dirty: &mut Vec<Arc<Link>>) {
    if link.push(frame, since) == Queued::Flush {
        dirty.push(Arc::clone(link));
    }
}

/// So many places of a list stay for the next round; what a larger fan-out took is given back.
const LIST_KEPT: usize = 16 * 1024;

/// One message on its way to all sinks of its topic, encoded at most once for each kind of frame.
struct Fanout<'a> {
    payload: &'a [u8],
    is_text: Option<bool>,
    text: Outgoing<'a>,
    binary: Outgoing<'a>,
}

impl<'a> Fanout<'a> {
    const fn new(payload: &'a [u8]) -> Self {
        let text = Outgoing::new(Kind::Text, payload);
        Self { payload, is_text: None, text, binary: Outgoing::new(Kind::Binary, payload) }
    }

    /// `None` where the payload cannot be framed as wanted, which is counted.
    fn frame(&mut self, frames: DownFrames, link: &Link, hub: &Hub) -> Option<Bytes> {
        let payload = self.payload;
        let mut is_text =
            || *self.is_text.get_or_insert_with(|| std::str::from_utf8(payload).is_ok());
        let outgoing = match frames {
            DownFrames::Binary => &mut self.binary,
            DownFrames::Auto if is_text() => &mut self.text,
            DownFrames::Auto => &mut self.binary,
            DownFrames::Text if is_text() => &mut self.text,
            DownFrames::Text => {
                hub.counters.unframeable.add(1);
                debug!(connection_id = %link.id(), bytes = payload.len(),
                    "A message is not UTF-8, and this endpoint sends text only.");
                return None;
            }
        };
        Some(outgoing.frame(link.window_bits(), link.profile()))
    }
}
