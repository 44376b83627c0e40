//! The body of an event stream: takes messages from the client's outbox, and executes the logic's actions.

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
use wsproxy_conn::{
    End, Profile,
    clock::{self, Micros},
};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Kind};

use crate::{
    bus::publish::{BusError, Publish},
    client::{
        Client,
        event_stream_outbox::{EventStreamEnding, EventStreamEntry, EventStreamOutbox},
        gzip::{self, Deflation, Gzip},
        open_streams::Registered,
    },
    core::Core,
    http::handshake::{Accepted, ConnectionGuards},
    hub::form::sse,
    logic::{Actions, Logic, Serve},
    telemetry::{family::Family, log::MESSAGES, metrics::Active, time},
};

/// The event stream of one client.
///
/// The task that writes the answer asks for the next chunk when the socket has room. So messages for a slow client wait
/// in the outbox, which is bounded. Dropping the stream ends the connection.
pub(super) struct EventStream<L: Logic> {
    core: Arc<Core>,
    family: Family,
    profile: Arc<Profile>,
    outbox: Arc<EventStreamOutbox>,
    gzip: Option<(Deflation, Gzip)>,
    _held: ConnectionGuards,
    _registered: Registered,
    _active: [Active; 2],
    logic: L,
    server: L::Server,
    timer: Pin<Box<Sleep>>,
    /// Time of the last write.
    written: Instant,
    /// Time of the last written message.
    active: Instant,
    /// Time at which the client's credential expires.
    expires: Option<Instant>,
    /// Messages that the kernel has taken.
    messages: u64,
    bytes: u64,
    /// Messages of the last chunk.
    writing: Writing,
    phase: Phase,
}

/// Messages of a chunk that the kernel has not taken as a whole.
#[derive(Default, Clone, Copy)]
struct Writing {
    messages: u64,
    /// Number of those that came from the bus.
    timed: u32,
    /// Time at which the oldest of these was read from the bus.
    oldest: Micros,
}

/// Phases of a stream's life.
enum Phase {
    /// Nothing was written yet.
    New,
    /// Messages flow.
    Open,
    /// The `close` event is written next.
    Closing(EventStreamEnding),
    /// The `close` event was written.
    Over(End),
}

impl<L: Logic> EventStream<L> {
    /// Makes the stream of an accepted client, and opens its logic.
    pub(super) fn open(
        core: &Arc<Core>,
        outbox: Arc<EventStreamOutbox>,
        profile: &Arc<Profile>,
        registered: Registered,
        accepted: Accepted<L>,
    ) -> Self {
        // Only WebSockets resume with a first message.
        let Accepted { family, held, pending: _, logic, server } = accepted;
        let now = Instant::now();
        let mut stream = Self {
            core: Arc::clone(core),
            family,
            profile: Arc::clone(profile),
            gzip: outbox.gzip().map(|how| (how, Gzip::default())),
            outbox,
            _held: held,
            _registered: registered,
            _active: [core.metrics.opened(family), core.metrics.opened_stream(family)],
            logic,
            server,
            timer: Box::pin(sleep_until(now + core.config.sse.keep_alive)),
            written: now,
            active: now,
            expires: None,
            messages: 0,
            bytes: 0,
            writing: Writing::default(),
            phase: Phase::New,
        };
        stream.with_logic(|logic, actions| logic.on_open(actions));
        stream
    }

    /// Runs the logic, and executes the actions that change the stream itself.
    fn with_logic(&mut self, look: impl FnOnce(&mut L, &mut dyn Actions<L::Request>)) {
        let Self { core, outbox, logic, server, .. } = self;
        let mut actions = StreamActions { core, outbox, server, close: None, expires: None };
        look(logic, &mut actions);
        let StreamActions { close, expires, .. } = actions;
        if let Some(expires) = expires {
            self.expires = expires;
            if let Some(at) = expires.filter(|at| *at < self.timer.deadline()) {
                self.timer.as_mut().reset(at);
            }
        }
        if let Some(close) = close
            && !matches!(self.phase, Phase::Over(_))
        {
            self.phase = Phase::Closing(close);
        }
    }

    fn close(&mut self, ending: impl Into<EventStreamEnding>) {
        self.phase = Phase::Closing(ending.into());
    }

    /// Adds bytes that the gateway itself writes.
    fn write(&mut self, bytes: impl Into<Bytes>, chunk: &mut Chunk) {
        let bytes = bytes.into();
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
        // No blank line follows: some clients would take the block for an event without data.
        let retry = spread(self.core.config.sse.retry).as_millis();
        self.write(format!("retry: {retry}\n"), chunk);
    }

    fn take(&mut self, entry: EventStreamEntry, chunk: &mut Chunk) {
        match entry {
            EventStreamEntry::Message(bytes, since) => {
                chunk.push(match &mut self.gzip {
                    Some((_, gzip)) => gzip.append(bytes),
                    None => bytes,
                });
                self.writing.add(since);
                trace!(target: MESSAGES, connection_id = %self.outbox.id(), "A message is written to an event stream.");
            }
            EventStreamEntry::Position(position) => {
                self.write(sse::event_position(position), chunk)
            }
            EventStreamEntry::Event(event) => {
                self.with_logic(|logic, actions| logic.on_event(event, actions));
            }
            EventStreamEntry::End(ending) => self.close(ending),
        }
    }

    /// Counts the messages of the last chunk. The next chunk is asked for when the kernel has taken all of it.
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

    /// Takes entries from the outbox until it is empty or the chunk is full.
    fn take_ready(&mut self, chunk: &mut Chunk, cx: &mut Context<'_>) {
        while matches!(self.phase, Phase::Open) && chunk.len() < CHUNK_BYTES {
            match self.outbox.poll_next(cx) {
                Poll::Ready(Some(entry)) => self.take(entry, chunk),
                Poll::Ready(None) => self.close(&Disconnect::INTERNAL),
                Poll::Pending => break,
            }
        }
    }

    /// Writes a comment after `keep_alive`, or closes an idle or expired stream. Ready when one of these has happened.
    fn poll_timer(&mut self, chunk: &mut Chunk, cx: &mut Context<'_>) -> Poll<()> {
        let idle = self.core.config.heartbeat.idle_timeout;
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let alive = self.written + self.core.config.sse.keep_alive;
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
                self.write(sse::COMMENT, chunk);
                let next = now + self.core.config.sse.keep_alive;
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

    /// Writes the `close` event and, with compression, the end of the gzip format.
    fn tell_close(&mut self, close: &EventStreamEnding, chunk: &mut Chunk) {
        let data = serde_json::json!({ "code": close.code, "reason": close.reason });
        self.write(format!("event: close\ndata: {data}\n\n"), chunk);
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
            // The logic may have ended the stream while it opened: then only `close` is written.
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
            // A socket that takes nothing takes no `close` event either: then the gateway has ended the stream all the same.
            Phase::New | Phase::Open => match self.outbox.ending() {
                Some(close) => gone(close.why, close.code),
                None => gone(&Disconnect::GONE, Disconnect::GONE.code),
            },
        };
        let discarded = self.outbox.discarded() + self.writing.messages;
        self.profile.stats.messages_discarded.fetch_add(discarded, Relaxed);
        self.core.metrics.ended(self.family, end.why.label);
        let (id, who) = (self.outbox.id(), self.logic.who());
        self.core.recent.ended(self.family, id, who, end, self.messages);
        let sent = (self.messages, self.bytes);
        self.with_logic(|logic, actions| logic.on_end(end, sent, actions));
    }
}

impl Writing {
    /// Counts a message that was read from the bus at `since`.
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

/// Bytes of one write. A single event is not copied; several are joined.
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

/// Actions of an event stream's logic.
struct StreamActions<'a, S> {
    core: &'a Arc<Core>,
    outbox: &'a Arc<EventStreamOutbox>,
    server: &'a S,
    close: Option<EventStreamEnding>,
    /// New time at which the stream expires, if the logic set one.
    expires: Option<Option<Instant>>,
}

impl<R, S: Serve<R>> Actions<R> for StreamActions<'_, S> {
    fn now(&self) -> Micros {
        clock::now()
    }

    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        self.send(kind, payload);
    }

    fn send(&mut self, _kind: Kind, payload: &[u8]) {
        let event = sse::event(None, payload);
        let event = match self.outbox.gzip() {
            None => event,
            Some(how) => gzip::part(&event, how),
        };
        self.outbox.push(event, Micros::UNTIMED);
    }

    fn send_verbatim(&mut self, kind: Kind, message: &[u8]) {
        self.send(kind, message);
    }

    fn is_backed_up(&self) -> bool {
        self.outbox.waiting_bytes() > 0
    }

    /// Does nothing: timers repeat messages until the client answers, and a client with an event stream cannot answer.
    fn wake_at(&mut self, _at: Micros) {}

    fn expire_at(&mut self, at: Option<u64>) {
        let left = |at| Duration::from_secs(at).saturating_sub(time::since_epoch());
        self.expires = Some(at.and_then(|at| Instant::now().checked_add(left(at))));
    }

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        self.core.hub.publish(publish)
    }

    /// Publishes without a receipt: the client sent no message whose outcome it would want to know.
    fn publish_upstream(&mut self, publish: Publish) -> Result<(), BusError> {
        self.core.hub.publish(publish)
    }

    fn request(&mut self, request: R) {
        let client = Client::EventStream(Arc::clone(self.outbox));
        self.server.serve(request, &client, self.core);
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.finish(why, why.code, why.reason);
    }

    fn finish(&mut self, why: &'static Disconnect, code: u16, reason: &str) {
        self.close = Some(EventStreamEnding { why, code, reason: reason.into() });
    }
}

/// Returns a random time around the configured one. An `EventSource` waits exactly as long as it is told, so all
/// clients of a lost instance would reconnect at the same moment.
fn spread(retry: Duration) -> Duration {
    retry.mul_f64(rand::random_range(0.5..1.5))
}

/// Size at which a chunk is full. Further messages wait in the outbox, which is bounded.
const CHUNK_BYTES: usize = 32 * 1024;
