//! The task of one connection: the only code that reads its socket, and that waits for it.

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
        frame::{Kind, Role},
        receiver::{Event as WsEvent, Input, Receiver},
    },
};

use crate::{
    clock::{self, Micros},
    link::{Event, Events, Link, Phase},
    profile::Heartbeat,
    socket::Socket,
};

/// Bytes taken from a socket at once.
const READ_BYTES: usize = 64 * 1024;

/// The same where messages may be compressed: each byte can become a thousand, all of which must be
/// handled before the connection can be made to wait.
const READ_COMPRESSED_BYTES: usize = 16 * 1024;

/// Most bytes that one read can come to, inflated: deflate makes at most 1,032 of one.
pub const TAKEN_BYTES_MAX: usize = READ_COMPRESSED_BYTES * 1033;

/// KiB that are still read, and thrown away, once the connection is ending. The peer may have sent so much before
/// it could see the close frame.
const DISCARDED_KIB_MAX: u16 = 4096;

/// Messages after which the handler is shown its events, though more was read.
const MESSAGES_MAX: usize = 256;

/// Rounds after which a busy connection lets others run.
const ROUNDS_MAX: usize = 8;

thread_local! {
    /// Lent to whichever connection reads on this thread: idle ones have no buffer.
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
    static INFLATERS: RefCell<Inflaters> = RefCell::new(Inflaters::default());
}

/// The logic of a connection. It never awaits, and it never sees a socket.
pub trait Handler: Send + Unpin + 'static {
    /// Whether what this client sends can be passed on; `Pending` pauses reading from it.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Whether it must be asked with [`Self::poll_ready`] before it gets a further message.
    fn is_full(&self) -> bool {
        false
    }
    /// A complete, valid data message. Text is UTF-8.
    fn on_message(&mut self, kind: Kind, payload: &[u8], link: &Arc<Link>, now: Micros);
    /// Something that another task left with [`Link::notify`].
    fn on_event(&mut self, event: Event, link: &Arc<Link>, now: Micros);
    /// The connection is over; called once, last.
    fn on_end(&mut self, end: End, link: &Arc<Link>);
}

/// How a connection ended.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// The entry of the table.
    pub why: &'static Disconnect,
    /// The code of the first close frame, even if it waited in vain to be written; 1005 where the
    /// peer gave none, 1006 where there was no close frame.
    pub code: u16,
    /// Whether the peer closed first.
    pub by_peer: bool,
}

/// The future that drives one connection from `101` to its end.
///
/// Dropping it drops the connection without a close frame.
#[derive(Debug)]
pub struct Driver<H: Handler> {
    link: Arc<Link>,
    handler: H,
    receiver: Receiver,
    /// Messages of this client.
    bucket: Bucket,
    /// Bytes of this client.
    bytes: ByteBucket,
    /// KiB thrown away since the connection began to end.
    discarded_kib: u16,
    hearing: Hearing,
    /// Nothing more comes from the peer at all.
    ended_reading: bool,
}

/// What becomes of what the peer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hearing {
    /// It is read and handled.
    Attentive,
    /// The same; some of it may have come while the peer was not read.
    CatchingUp,
    /// It is not read: the bus takes no more, the peer does not read either, or it has sent too many bytes.
    Paused,
    /// The same; and the link holds bytes that were read before, until the handler takes messages again.
    Holding,
    /// It is read and thrown away, since the peer has broken the protocol or has said its last.
    Deaf,
    /// The same, and the kernel knows that nothing more comes from us.
    Finished,
}

impl<H: Handler> Driver<H> {
    /// Takes over a socket after `101`. `leftover`: bytes that were read behind the request head.
    #[must_use]
    pub fn new(
        link: Arc<Link>,
        socket: Socket,
        deflate: Option<Params>,
        handler: H,
        leftover: &[u8],
    ) -> Self {
        let now = clock::now();
        let receiver = Receiver::new(Role::Server, link.profile().receive, deflate);
        link.attach(socket, now);
        let mut driver = Self {
            link,
            handler,
            receiver,
            bucket: Bucket::default(),
            bytes: ByteBucket::default(),
            discarded_kib: 0,
            hearing: Hearing::Attentive,
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

    /// One turn of the loop: events, writing, the end, reading.
    fn round(&mut self, cx: &mut Context<'_>) -> Round {
        let now = clock::now();
        let look = self.link.look(cx.waker());
        if let Some(events) = look.events {
            self.handle(*events, now);
            self.link.flush(now);
        }
        let link = Arc::clone(&self.link);
        let Some(socket) = link.socket() else { return Round::Over };
        let mut progress = false;
        if look.blocked && socket.poll_write_ready(cx).is_ready() {
            link.unblock(now);
            progress = true;
        }
        if look.phase == Phase::Dead || (look.drained && look.peer_closed) {
            return Round::Over;
        }
        if look.phase == Phase::Closing && look.drained && self.hearing == Hearing::Deaf {
            // The peer broke the protocol: it gets our close frame, then the end of the stream.
            // Closing the socket now would make the kernel answer unread bytes with a reset,
            // which can overtake the frame. The peer's own end, or the deadline, ends the rest.
            socket.finish_writing();
            self.hearing = Hearing::Finished;
        }
        let may_read = self.may_read(look.phase, look.reply_bytes, now, cx);
        if may_read && self.hearing == Hearing::Holding {
            self.hearing = Hearing::CatchingUp;
            self.receive(&mut link.take_held(), now);
            self.link.flush(now);
            progress = true;
        } else if may_read && socket.poll_read_ready(cx).is_ready() {
            self.read(socket, now);
            progress = true;
        } else if may_read && self.hearing == Hearing::CatchingUp {
            self.hearing = Hearing::Attentive;
        }
        if progress { Round::Progress } else { Round::Idle }
    }

    /// Back pressure: a client is not read while the bus takes nothing more or more bytes came than the client may
    /// send, nor while it leaves unread what its own messages caused. In the last case, if it lasts, the client
    /// counts as dead: only there its silence is its own.
    fn may_read(
        &mut self,
        phase: Phase,
        reply_bytes: usize,
        now: Micros,
        cx: &mut Context<'_>,
    ) -> bool {
        if phase != Phase::Open {
            return !self.ended_reading && self.discarded_kib < DISCARDED_KIB_MAX;
        }
        let bus_ready = self.handler.poll_ready(cx).is_ready();
        let wait = self.link.profile().byte_rate.map_or(0, |rate| self.bytes.wait(rate, now.0));
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
            Hearing::Paused if may_read => self.hearing = Hearing::CatchingUp,
            _ => {}
        }
        may_read
    }

    fn handle(&mut self, events: Events, now: Micros) {
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
                // What was left before these bytes came is seen before them: they may answer it.
                if let Some(events) = self.link.take_events() {
                    self.handle(*events, now);
                }
                self.receive(&mut buffer[..count], now);
                self.link.flush(now);
                if count < most && self.hearing == Hearing::CatchingUp {
                    self.hearing = Hearing::Attentive;
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
            let mut messages = 0_usize;
            while !self.is_deaf() {
                if self.handler.is_full() && !input.is_empty() && !self.link.is_closing() {
                    self.link.hold(input.rest());
                    self.link.profile().stats.reads_paused.fetch_add(1, Relaxed);
                    self.hearing = Hearing::Holding;
                    break;
                }
                if messages >= MESSAGES_MAX {
                    // What they led to must not pile up behind them.
                    messages = 0;
                    let events = self.link.take_events();
                    events.into_iter().for_each(|events| self.handle(*events, now));
                }
                match self.receiver.next(&mut input, inflaters) {
                    Ok(None) => break,
                    // After our own close frame only the peer's is of interest.
                    Ok(Some(WsEvent::Message(kind, payload))) if !self.link.is_closing() => {
                        messages += 1;
                        let profile = self.link.profile();
                        profile.stats.messages_received.fetch_add(1, Relaxed);
                        let is_late = self.hearing == Hearing::CatchingUp;
                        let (bucket, at) = (&mut self.bucket, nanos(now));
                        if profile.rate.is_some_and(|rate| match is_late {
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
                    Ok(Some(WsEvent::Ping(payload))) => self.link.pong(payload, now),
                    Ok(Some(WsEvent::Message(..) | WsEvent::Pong(_))) => {}
                    Ok(Some(WsEvent::Close(close))) => {
                        // What answers earlier messages of the same read still goes out.
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
            self.account(count - held + input.inflated(), now);
        });
    }

    /// Bytes came, or were made of what came.
    fn account(&mut self, bytes: usize, now: Micros) {
        if self.link.is_closing() {
            let kib = u16::try_from(bytes.div_ceil(1024)).unwrap_or(u16::MAX);
            self.discarded_kib = self.discarded_kib.saturating_add(kib);
            if self.discarded_kib >= DISCARDED_KIB_MAX {
                // The peer learns that nobody listens; it has until the deadline to read our close frame.
                self.hearing = self.hearing.max(Hearing::Deaf);
            }
        } else if let Some(rate) = self.link.profile().byte_rate {
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
        // Whoever else has the link must not take a connection without a task for a living one.
        self.link.over();
        // Nor must the peer wait for it to let go of the link, and with it of the socket.
        if let Some(socket) = self.link.socket() {
            socket.shut_down();
        }
    }
}

/// What a turn of the loop led to.
enum Round {
    /// Another turn may find more.
    Progress,
    /// Everybody who could wake the task knows it.
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
