//! A stream of server-sent events with an endpoint's logic on it: the body of an answer.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::trace;
use uuid::Uuid;
use wsproxy_conn::{
    End, Event, Profile,
    clock::{self, Micros},
};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::{BusError, Outcome, Publish, Receipt},
    endpoint::{Actions, Logic},
    gateway::Gateway,
    http::{admission::Place, sse::open::Registered},
    hub::{
        Hub, Subscription,
        gzip::{self, Deflation, Gzip},
        message,
        tap::{Ending, Tap, TapEntry},
    },
    registry::Entry,
    telemetry::{
        log::MESSAGES,
        metrics::{Active, Endpoint},
        time,
    },
};

/// What lasts exactly as long as the stream.
pub struct Held {
    pub(super) _subscription: Option<Subscription>,
    pub(super) _registered: Registered,
    pub(super) _place: Place,
    pub(super) _socket_place: Option<Arc<Place>>,
    pub(super) _entry: Option<Entry>,
    pub(super) _active: Active,
    pub(super) _active_stream: Active,
}

/// The events of one client.
///
/// Whoever drives the HTTP connection asks for the next chunk when it has room, so what waits for a client that
/// does not read waits in the tap, which is bounded. Dropping it is the end of the connection.
pub struct EventStream<L: Logic> {
    gateway: Arc<Gateway>,
    id: Uuid,
    label: Endpoint,
    profile: Arc<Profile>,
    tap: Arc<Tap>,
    gzip: Option<(Deflation, Gzip)>,
    _held: Held,
    logic: L,
    timer: Pin<Box<Sleep>>,
    /// When something was written last.
    written: Instant,
    /// When a message was written last.
    active: Instant,
    /// When the client's credential is no longer good.
    expires: Option<Instant>,
    /// Messages that are written.
    messages: u64,
    bytes: u64,
    /// Messages that are being written.
    writing: Writing,
    phase: Phase,
}

/// Messages of a chunk whose last byte is not handed to the kernel yet.
#[derive(Default, Clone, Copy)]
struct Writing {
    messages: u64,
    /// Those of them that came from the bus.
    timed: u32,
    /// When the oldest of these was read from the bus.
    oldest: Micros,
}

/// Where a stream is in its life.
enum Phase {
    /// Nothing was written.
    New,
    /// Messages flow.
    Open,
    /// The client is told next.
    Closing(Ending),
    /// It was told.
    Over(End),
}

impl<L: Logic> EventStream<L> {
    /// A stream that is about to be written.
    pub fn open(
        gateway: &Arc<Gateway>,
        (id, label): (Uuid, Endpoint),
        profile: &Arc<Profile>,
        tap: Arc<Tap>,
        held: Held,
        logic: L,
    ) -> Self {
        let now = Instant::now();
        let mut stream = Self {
            gateway: Arc::clone(gateway),
            id,
            label,
            profile: Arc::clone(profile),
            gzip: tap.gzip().map(|how| (how, Gzip::default())),
            tap,
            _held: held,
            logic,
            timer: Box::pin(sleep_until(now + gateway.config.sse.keep_alive)),
            written: now,
            active: now,
            expires: None,
            messages: 0,
            bytes: 0,
            writing: Writing::default(),
            phase: Phase::New,
        };
        stream.with_logic(|logic, deeds| logic.on_open(deeds));
        stream
    }

    /// Lets the logic look at something, and does what it states.
    fn with_logic(&mut self, look: impl FnOnce(&mut L, &mut Deeds<'_>)) {
        let (hub, tap) = (&*self.gateway.hub, &*self.tap);
        let mut deeds = Deeds { hub, tap, close: None, expires: None };
        look(&mut self.logic, &mut deeds);
        if let Some(expires) = deeds.expires {
            self.expires = expires;
            if let Some(at) = expires.filter(|at| *at < self.timer.deadline()) {
                self.timer.as_mut().reset(at);
            }
        }
        if let Some(close) = deeds.close
            && !matches!(self.phase, Phase::Over(_))
        {
            self.phase = Phase::Closing(close);
        }
    }

    fn close(&mut self, ending: impl Into<Ending>) {
        self.phase = Phase::Closing(ending.into());
    }

    /// Adds what the gateway itself writes.
    fn write(&mut self, text: &str, chunk: &mut Chunk) {
        let bytes = Bytes::copy_from_slice(text.as_bytes());
        chunk.push(match &mut self.gzip {
            Some((how, gzip)) => gzip.append(gzip::part(&bytes, *how)),
            None => bytes,
        });
    }

    fn begin(&mut self, chunk: &mut Chunk) {
        self.phase = Phase::Open;
        if self.gzip.is_some() {
            chunk.push(Bytes::from_static(&Gzip::HEAD));
        }
        let retry = self.gateway.config.sse.retry.as_millis();
        self.write(&format!("retry: {retry}\n\n"), chunk);
    }

    fn take(&mut self, entry: TapEntry, chunk: &mut Chunk) {
        match entry {
            TapEntry::Message(bytes, since) => {
                chunk.push(match &mut self.gzip {
                    Some((_, gzip)) => gzip.append(bytes),
                    None => bytes,
                });
                self.writing.add(since);
                trace!(target: MESSAGES, connection_id = %self.id, "A message is written to an event stream.");
            }
            TapEntry::Position(position) => {
                self.write(&message::event_position(position), chunk);
            }
            TapEntry::Event(tag, payload) => {
                let event = Event { tag, number: 0, payload };
                self.with_logic(|logic, deeds| logic.on_event(event, deeds));
            }
            // Clients are told in their own words.
            TapEntry::Gap(_) => {}
            TapEntry::End(ending) => self.close(ending),
        }
    }

    /// Counts what was handed over last: the next chunk is asked for when the kernel has taken all of it.
    fn settle(&mut self) {
        let Writing { messages, timed, oldest } = std::mem::take(&mut self.writing);
        if messages == 0 {
            return;
        }
        self.active = Instant::now();
        self.messages += messages;
        let stats = &self.profile.stats;
        stats.messages_sent.fetch_add(messages, Relaxed);
        if timed > 0 {
            stats.latency.record(clock::now().since(oldest), timed);
        }
    }

    /// Whatever is there, as far as it fits into a chunk.
    fn take_ready(&mut self, chunk: &mut Chunk, cx: &mut Context<'_>) {
        while matches!(self.phase, Phase::Open) && chunk.len() < CHUNK_BYTES {
            match self.tap.poll_entry(cx) {
                Poll::Ready(Some(entry)) => self.take(entry, chunk),
                Poll::Ready(None) => self.close(&Disconnect::INTERNAL),
                Poll::Pending => break,
            }
        }
    }

    /// Ready when the silence has to be broken, or was too long.
    fn poll_timer(&mut self, chunk: &mut Chunk, cx: &mut Context<'_>) -> Poll<()> {
        let idle = self.gateway.config.heartbeat.idle_timeout;
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let alive = self.written + self.gateway.config.sse.keep_alive;
            let idle = (!idle.is_zero()).then(|| self.active + idle);
            let ends = [idle, self.expires].into_iter().flatten().min();
            if self.has_expired(now) {
                return Poll::Ready(());
            }
            if idle.is_some_and(|idle| now >= idle) {
                self.close(&Disconnect::IDLE);
                return Poll::Ready(());
            }
            if now >= alive {
                self.write(":\n\n", chunk);
                let next = now + self.gateway.config.sse.keep_alive;
                self.timer.as_mut().reset(ends.map_or(next, |end| end.min(next)));
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(ends.map_or(alive, |end| end.min(alive)));
        }
    }

    fn has_expired(&mut self, now: Instant) -> bool {
        let has_expired = self.expires.is_some_and(|expires| now >= expires);
        if has_expired && matches!(self.phase, Phase::Open) {
            self.close(&Disconnect::EXPIRED);
        }
        has_expired
    }

    /// The client is told why, and the stream ends as its format wants.
    fn tell_close(&mut self, close: &Ending, chunk: &mut Chunk) {
        let data = serde_json::json!({ "code": close.code, "reason": close.reason });
        self.write(&format!("event: close\ndata: {data}\n\n"), chunk);
        if let Some((_, gzip)) = &self.gzip {
            chunk.push(Bytes::from(gzip.end()));
        }
        self.phase = Phase::Over(End { why: close.why, code: close.code, by_peer: false });
    }
}

impl<L: Logic> Body for EventStream<L> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        this.settle();
        let mut chunk = Chunk::default();
        match &this.phase {
            Phase::Over(_) => return Poll::Ready(None),
            Phase::New => this.begin(&mut chunk),
            // An end that the logic stated while it opened waits for what was queued before.
            Phase::Open | Phase::Closing(_) => {}
        }
        this.take_ready(&mut chunk, cx);
        this.has_expired(Instant::now());
        if chunk.is_empty() && matches!(this.phase, Phase::Open) {
            ready!(this.poll_timer(&mut chunk, cx));
        }
        if matches!(this.phase, Phase::Closing(_))
            && let Phase::Closing(close) = std::mem::replace(&mut this.phase, Phase::Open)
        {
            this.tell_close(&close, &mut chunk);
        }
        this.written = Instant::now();
        let bytes = chunk.into_bytes();
        this.bytes += bytes.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

impl<L: Logic> Drop for EventStream<L> {
    fn drop(&mut self) {
        let gone = |why: &'static Disconnect, code| End { why, code, by_peer: false };
        let end = match &self.phase {
            Phase::Over(end) => *end,
            Phase::Closing(close) => gone(close.why, close.code),
            Phase::New | Phase::Open => gone(&Disconnect::GONE, Disconnect::GONE.code),
        };
        let discarded = self.tap.discarded() + self.writing.messages;
        self.profile.stats.messages_discarded.fetch_add(discarded, Relaxed);
        self.gateway.metrics.ended(self.label, end.why.label);
        let sent = (self.messages, self.bytes);
        self.with_logic(|logic, deeds| logic.on_end(end, sent, deeds));
    }
}

impl Writing {
    /// One more message, read from the bus at `since`.
    fn add(&mut self, since: Micros) {
        self.messages += 1;
        if since != Micros::UNTIMED {
            if self.timed == 0 {
                self.oldest = since;
            }
            self.timed += 1;
        }
    }
}

/// What is written at once: one event as it is, or several behind each other.
#[derive(Default)]
struct Chunk {
    first: Option<Bytes>,
    bytes: BytesMut,
}

impl Chunk {
    fn push(&mut self, bytes: Bytes) {
        match self.first.take() {
            None if self.bytes.is_empty() => self.first = Some(bytes),
            None => self.bytes.extend_from_slice(&bytes),
            Some(first) => {
                self.bytes.extend_from_slice(&first);
                self.bytes.extend_from_slice(&bytes);
            }
        }
    }

    fn len(&self) -> usize {
        self.first.as_ref().map_or(0, Bytes::len) + self.bytes.len()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn into_bytes(self) -> Bytes {
        self.first.unwrap_or_else(|| self.bytes.freeze())
    }
}

struct Deeds<'a> {
    hub: &'a Hub,
    tap: &'a Tap,
    close: Option<Ending>,
    /// A new time at which the stream expires.
    expires: Option<Option<Instant>>,
}

impl Actions for Deeds<'_> {
    fn now(&self) -> Micros {
        clock::now()
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        self.reply(kind, payload);
    }

    fn resend(&mut self, kind: Kind, message: &[u8]) {
        self.reply(kind, message);
    }

    fn is_backed_up(&self) -> bool {
        self.tap.waiting_bytes() > 0
    }

    /// Nobody can answer here, so nothing is asked, and nothing has to be sent again.
    fn wake_at(&mut self, _at: Micros) {}

    fn expire_at(&mut self, at: Option<u64>) {
        let left = |at| Duration::from_secs(at).saturating_sub(time::since_epoch());
        self.expires = Some(at.and_then(|at| Instant::now().checked_add(left(at))));
    }

    /// A client that sends nothing brings no token.
    fn verify(&mut self, _token: &str) {}

    fn reply(&mut self, _kind: Kind, payload: &[u8]) {
        let event = message::event(None, payload);
        let event = match self.tap.gzip() {
            None => event,
            Some(how) => gzip::part(&event, how),
        };
        self.tap.push(event, Micros::UNTIMED);
    }

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        self.hub.publish(publish)
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.finish(why, why.code, why.reason);
    }

    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str) {
        self.close = Some(Ending { why, code, reason: reason.into() });
    }

    fn receipt(&self) -> Arc<dyn Receipt> {
        Arc::new(Unheard)
    }
}

/// A client that sends nothing need not know what became of it.
struct Unheard;

impl Receipt for Unheard {
    fn published(&self, _outcome: Outcome) {}
}

/// More than this is not written at once: it waits where it is bounded, rather than with the HTTP connection.
const CHUNK_BYTES: usize = 32 * 1024;
