//! The task of one connection: the only code that reads its socket or waits for it.

use std::{
    cell::RefCell,
    io::ErrorKind::{Interrupted, WouldBlock},
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
};

use wsproxy_proto::{
    disconnect::Disconnect,
    rate::{Bucket, ByteBucket},
    ws::{
        deflate::{Inflaters, Params},
        frame::Kind,
        receiver::{Event, Input, Receiver},
    },
};

use crate::{
    clock::{self, Micros},
    link::{EventQueue, HandlerEvent, Link, LinkPhase},
    profile::Heartbeat,
    socket::Socket,
};

thread_local! {
    /// Read buffer of this thread, lent to the connection that reads. An idle connection has none.
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
    static INFLATERS: RefCell<Inflaters> = RefCell::new(Inflaters::default());
}

/// Logic of a connection. It never awaits and never sees a socket.
pub trait Handler: Send + Unpin + 'static {
    /// Returns whether a message of this client can be passed on. `Pending` pauses reading from the client.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Returns whether the handler takes no further message until [`Self::poll_ready`] returns `Ready`.
    fn is_full(&self) -> bool {
        false
    }
    /// Handles a complete, valid data message. Text is UTF-8.
    fn on_message(&mut self, kind: Kind, payload: &[u8], link: &Arc<Link>, now: Micros);
    /// Handles an event that another task left with [`Link::notify`].
    fn on_event(&mut self, event: HandlerEvent, link: &Arc<Link>, now: Micros);
    /// Handles that no more than the low-water mark waits for the client, after [`Link::is_writable`] returned
    /// `false`.
    fn on_writable(&mut self, link: &Arc<Link>, now: Micros) {
        let _ = (link, now);
    }
    /// Handles the end of the connection. Called once, last.
    fn on_end(&mut self, end: End, link: &Arc<Link>);
}

/// End of a connection.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// The entry of the table.
    pub why: &'static Disconnect,
    /// Code of the first close frame, even if that could not be written. 1005 where the peer gave none, 1006 where
    /// there was no close frame.
    pub code: u16,
    /// Whether the peer closed first.
    pub by_peer: bool,
}

/// Future that drives one connection from `101` to its end.
///
/// Dropping it drops the connection without a close frame.
#[derive(Debug)]
pub struct Driver<H: Handler> {
    link: Arc<Link>,
    handler: H,
    receiver: Receiver,
    /// Rate limit of the client's messages.
    bucket: Bucket,
    /// Rate limit of the client's bytes.
    bytes: ByteBucket,
    /// KiB thrown away since the connection began to end.
    discarded_kib: u16,
    hearing: Hearing,
    /// End of [`Hearing::CatchingUp`].
    late_until: Micros,
    /// The peer has ended its stream.
    ended_reading: bool,
}

/// Treatment of the bytes that the peer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hearing {
    /// They are read and handled.
    Attentive,
    /// They are read and handled. Some may have come while the peer was not read.
    CatchingUp,
    /// They are not read: the handler takes no more, the peer does not read its answers, or the peer sent too many
    /// bytes.
    Paused,
    /// They are not read, and the link holds bytes of the last read until the handler takes messages again.
    Holding,
    /// They are read and thrown away: the peer broke the protocol or sent its close frame.
    Deaf,
    /// They are read and thrown away, and our half of the stream is shut down.
    Finished,
}

impl<H: Handler> Driver<H> {
    /// Takes over a socket after `101`, at the end that the profile's role names. `leftover` are the bytes that were
    /// read behind the head of the request or answer.
    #[must_use]
    pub fn new(
        link: Arc<Link>,
        socket: Socket,
        deflate: Option<Params>,
        handler: H,
        leftover: &[u8],
    ) -> Self {
        let now = clock::now();
        let receiver = Receiver::new(link.profile().role, link.profile().receive, deflate);
        link.attach(socket, now);
        let mut driver = Self {
            link,
            handler,
            receiver,
            bucket: Bucket::default(),
            bytes: ByteBucket::default(),
            discarded_kib: 0,
            hearing: Hearing::Attentive,
            late_until: Micros(0),
            ended_reading: false,
        };
        if !leftover.is_empty() {
            let received = &driver.link.profile().stats.bytes_received;
            received.fetch_add(leftover.len() as u64, Relaxed);
            driver.receive(&mut leftover.to_vec(), now);
            driver.link.flush(now);
        }
        driver
    }

    /// Runs one round: events, writing, the end, reading.
    fn round(&mut self, cx: &mut Context<'_>) -> Round {
        let now = clock::now();
        if self.hearing == Hearing::CatchingUp && now >= self.late_until {
            self.hearing = Hearing::Attentive;
        }
        let look = self.link.look(cx.waker());
        if let Some(events) = look.events {
            self.handle(*events, now);
            self.link.flush(now);
        }
        if look.writable {
            self.handler.on_writable(&self.link, now);
            self.link.flush(now);
        }
        let link = Arc::clone(&self.link);
        let Some(socket) = link.socket() else { return Round::Over };
        let mut progress = false;
        if look.blocked && socket.poll_write_ready(cx).is_ready() {
            link.unblock(now);
            progress = true;
        }
        if look.phase == LinkPhase::Dead || (look.drained && look.peer_closed) {
            return Round::Over;
        }
        if look.phase == LinkPhase::Closing && look.drained && self.hearing == Hearing::Deaf {
            // The peer broke the protocol: it gets our close frame, then the end of the stream. If the socket were
            // closed now, the kernel would answer unread bytes with a reset, which can overtake the frame. The peer's
            // own end, or the deadline, ends the connection.
            socket.finish_writing();
            self.hearing = Hearing::Finished;
        }
        let may_read = self.may_read(look.phase, look.reply_bytes, now, cx);
        if may_read && self.hearing == Hearing::Holding {
            self.catch_up(now);
            self.receive(&mut link.take_held(), now);
            self.link.flush(now);
            progress = true;
        } else if may_read && socket.poll_read_ready(cx).is_ready() {
            self.read(socket, now);
            progress = true;
        }
        if progress { Round::Progress } else { Round::Idle }
    }

    /// Returns whether the driver may read the peer (back pressure). Reading pauses while the handler takes no more
    /// messages, while the peer is over its byte rate, and while too many answers wait for the peer. In the last case
    /// the peer itself does not read, so the heartbeat timeout may still end the connection.
    fn may_read(
        &mut self,
        phase: LinkPhase,
        reply_bytes: usize,
        now: Micros,
        cx: &mut Context<'_>,
    ) -> bool {
        if phase != LinkPhase::Open {
            return !self.ended_reading && self.discarded_kib < DISCARDED_KIB_MAX;
        }
        let bus_ready = self.handler.poll_ready(cx).is_ready();
        let wait =
            self.link.profile().byte_rate.load().map_or(0, |rate| self.bytes.wait(rate, now.0));
        if wait > 0 {
            self.link.read_at(now.after(Micros(wait)));
        }
        self.link.set_paused(!bus_ready || wait > 0, now);
        let profile = self.link.profile();
        let may_read = bus_ready && wait == 0 && reply_bytes <= profile.reply_bytes_max;
        match self.hearing {
            Hearing::Attentive | Hearing::CatchingUp if !may_read => {
                let stats = &profile.stats;
                let paused = if wait > 0 { &stats.reads_throttled } else { &stats.reads_paused };
                paused.fetch_add(1, Relaxed);
                if self.hearing == Hearing::Attentive {
                    self.bucket.settle(nanos(now));
                }
                self.hearing = Hearing::Paused;
            }
            Hearing::Paused if may_read => self.catch_up(now),
            _ => {}
        }
        may_read
    }

    /// Treats messages as late for a while, since more of them wait, here or at the peer.
    fn catch_up(&mut self, now: Micros) {
        self.hearing = Hearing::CatchingUp;
        self.late_until = now.after(CATCHING_UP);
    }

    fn handle(&mut self, events: EventQueue, now: Micros) {
        for event in events.queue {
            self.handler.on_event(event, &self.link, now);
        }
    }

    fn read(&mut self, socket: &Socket, now: Micros) {
        let most = if self.receiver.inflates() { READ_COMPRESSED_BYTES } else { READ_BYTES };
        READ_BUFFER.with_borrow_mut(|buffer| match socket.try_read(&mut buffer[..most]) {
            Ok(0) => {
                self.ended_reading = true;
                self.link.peer_left();
            }
            Ok(count) => {
                if self.link.profile().heartbeat == Heartbeat::Frames {
                    self.link.heard_at(now);
                }
                self.link.profile().stats.bytes_received.fetch_add(count as u64, Relaxed);
                // Events that were left before these bytes came go first: the bytes may answer them.
                if let Some(events) = self.link.take_events() {
                    self.handle(*events, now);
                }
                self.receive(&mut buffer[..count], now);
                self.link.flush(now);
                let has_more = count == most || socket.stopped_early();
                if self.hearing == Hearing::CatchingUp && has_more {
                    self.catch_up(now);
                }
            }
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
            Err(_) => self.link.abort(),
        });
    }

    fn receive(&mut self, bytes: &mut [u8], now: Micros) {
        let count = bytes.len();
        INFLATERS.with_borrow_mut(|inflaters| {
            let mut input = Input::new(bytes);
            let (mut messages, mut taken) = (0_usize, 0_usize);
            while !self.is_deaf() {
                if self.handler.is_full() && !input.is_empty() && !self.link.is_closing() {
                    self.link.hold(input.rest());
                    self.link.profile().stats.reads_paused.fetch_add(1, Relaxed);
                    self.hearing = Hearing::Holding;
                    break;
                }
                if messages >= MESSAGES_MAX {
                    // The events that these messages caused must not pile up behind them.
                    messages = 0;
                    let events = self.link.take_events();
                    events.into_iter().for_each(|events| self.handle(*events, now));
                }
                match self.receiver.next(&mut input, inflaters) {
                    Ok(None) => break,
                    // After our own close frame only the peer's close frame matters.
                    Ok(Some(Event::Message(kind, payload))) if !self.link.is_closing() => {
                        messages += 1;
                        taken += 1;
                        let profile = self.link.profile();
                        profile.stats.messages_received.fetch_add(1, Relaxed);
                        let is_late = self.hearing == Hearing::CatchingUp;
                        let (bucket, at) = (&mut self.bucket, nanos(now));
                        if profile.rate.load().is_some_and(|rate| match is_late {
                            true => bucket.take_late(rate, at).is_err(),
                            false => bucket.take(rate, at).is_err(),
                        }) {
                            self.link.disconnect(&Disconnect::RATE, now);
                            continue;
                        }
                        self.link.active_at(now);
                        if self.link.profile().heartbeat == Heartbeat::Messages {
                            self.link.heard_at(now);
                        }
                        self.handler.on_message(kind, payload, &self.link, now);
                    }
                    Ok(Some(Event::Ping(payload))) => self.link.pong(payload, now),
                    Ok(Some(Event::Message(..) | Event::Pong(_))) => {}
                    Ok(Some(Event::Close(close))) => {
                        // Answers to earlier messages of the same read still go out.
                        self.link.flush(now);
                        self.link.peer_closed(close.map(|(code, _)| code), now);
                        self.hearing = Hearing::Deaf;
                    }
                    Err(violation) => {
                        self.link.flush(now);
                        self.link.disconnect(violation.entry(), now);
                        self.hearing = Hearing::Deaf;
                    }
                }
            }
            let held = if self.hearing == Hearing::Holding { input.rest().len() } else { 0 };
            let of_messages = taken * self.link.profile().message_bytes;
            self.account(count - held + input.inflated() + of_messages, now);
        });
    }

    /// Accounts for bytes that came, or that were inflated from them.
    fn account(&mut self, bytes: usize, now: Micros) {
        if self.link.is_closing() {
            let kib = u16::try_from(bytes.div_ceil(1024)).unwrap_or(u16::MAX);
            self.discarded_kib = self.discarded_kib.saturating_add(kib);
            if self.discarded_kib >= DISCARDED_KIB_MAX {
                // The peer gets no further reading; it has until the deadline to read our close frame.
                self.hearing = self.hearing.max(Hearing::Deaf);
            }
        } else if let Some(rate) = self.link.profile().byte_rate.load() {
            self.bytes.take(rate, bytes, now.0);
        }
    }

    fn is_deaf(&self) -> bool {
        self.hearing >= Hearing::Deaf
    }
}

const fn nanos(now: Micros) -> u64 {
    now.0.saturating_mul(1000)
}

impl<H: Handler> Drop for Driver<H> {
    fn drop(&mut self) {
        // Marks the link dead, since other tasks may still hold an `Arc<Link>`.
        self.link.over();
        // Ends the stream now: the socket itself is closed only when the last `Arc<Link>` is dropped.
        if let Some(socket) = self.link.socket() {
            socket.shut_down();
        }
    }
}

/// Result of a round.
enum Round {
    /// Another round may find more to do.
    Progress,
    /// Nothing is left to do until something wakes the task.
    Idle,
    /// The connection is over.
    Over,
}

impl<H: Handler> Future for Driver<H> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..ROUNDS_MAX {
            match self.round(cx) {
                Round::Progress => {}
                Round::Idle => return Poll::Pending,
                Round::Over => {
                    let end = self.link.over();
                    let link = Arc::clone(&self.link);
                    self.handler.on_end(end, &link);
                    return Poll::Ready(());
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Time after a pause in which messages count as late: the peer may have sent some of them during the pause, and they
/// wait in the kernels of both sides.
const CATCHING_UP: Micros = Micros(1_000_000);
/// Upper bound of one read.
const READ_BYTES: usize = 64 * 1024;

/// Upper bound of one read where messages may be compressed. One byte can inflate to a thousand, and all of them are
/// handled before reading can pause.
const READ_COMPRESSED_BYTES: usize = 16 * 1024;

/// Upper bound of one read after inflating: deflate makes at most 1,032 bytes of one.
pub const TAKEN_BYTES_MAX: usize = READ_COMPRESSED_BYTES * 1033;

/// Upper bound of the KiB that an ending connection reads and discards. The peer may have sent them before it saw the
/// close frame.
const DISCARDED_KIB_MAX: u16 = 4096;

/// Number of messages after which the handler gets its events, although more messages of the same read follow.
const MESSAGES_MAX: usize = 256;

/// Number of rounds after which a busy connection lets other tasks run.
const ROUNDS_MAX: usize = 8;
