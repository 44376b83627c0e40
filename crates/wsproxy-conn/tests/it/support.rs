//! A connection whose other end, time and bus the test controls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::{JoinHandle, yield_now},
};
use uuid::Uuid;
use wsproxy_conn::{
    Driver, End, Handler, HandlerEvent, Heartbeat, Link, Profile, Runtime, Stats,
    clock::{self, Micros},
};
use wsproxy_proto::ws::{
    frame::{Kind, Opcode, Role, client_frame, decode_header, server_frame},
    receiver::Limits,
};

/// Settings like those of the gateway.
pub(crate) fn profile() -> Profile {
    Profile {
        role: Role::Server,
        receive: Limits { message_bytes_max: 1 << 20, fragments_max: 100 },
        send_buffer_bytes: 10 << 20,
        low_water_bytes: 64 * 1024,
        reply_bytes_max: 64 * 1024,
        events_max: 1024,
        event_bytes_max: 1 << 20,
        rate: None.into(),
        byte_rate: None.into(),
        message_bytes: 0,
        heartbeat: Heartbeat::Frames,
        heartbeat_interval: Micros(30 * SECOND),
        heartbeat_timeout: Micros(90 * SECOND),
        idle_timeout: Micros::NEVER,
        close_timeout: Micros(5 * SECOND),
        compress_from_bytes: usize::MAX,
        compress_level: 1,
        stats: Stats::default(),
    }
}

/// Process: its timers, its budget, and the time to which the test has advanced it.
pub(crate) struct Process {
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) now: Micros,
}

impl Process {
    pub(crate) fn new() -> Self {
        Self::with_budget(1 << 30)
    }

    pub(crate) fn with_budget(bytes: usize) -> Self {
        let now = clock::now();
        Self { runtime: Runtime::new(bytes, now), now }
    }

    /// Lets time pass, tick by tick.
    pub(crate) fn pass(&mut self, millis: u64) {
        let end = self.now.after(Micros(millis * 1000));
        while self.now < end {
            self.now = end.min(self.now.after(Micros(100_000)));
            self.runtime.tick(self.now);
        }
    }

    pub(crate) fn pass_seconds(&mut self, seconds: u64) {
        self.pass(seconds * 1000);
    }
}

/// Record of a handler, and its behaviour.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) messages: Mutex<Vec<(Kind, Vec<u8>)>>,
    pub(crate) events: AtomicUsize,
    /// Number of times that it was woken.
    pub(crate) timers: AtomicUsize,
    /// Number of times that it was told that it may push more.
    pub(crate) writable: AtomicUsize,
    pub(crate) end: Mutex<Option<End>>,
    pub(crate) echoes: AtomicBool,
    /// Number of events that every message causes.
    pub(crate) events_each: AtomicUsize,
    /// Number of messages after which the handler is full; 0: never.
    pub(crate) full_each: AtomicUsize,
    bus_is_full: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Seen {
    pub(crate) fn set_bus_full(&self, full: bool) {
        self.bus_is_full.store(full, SeqCst);
        if let Some(waker) = self.waker.lock().take() {
            waker.wake();
        }
    }

    pub(crate) fn end(&self) -> Option<(&'static str, u16, bool)> {
        self.end.lock().map(|end| (end.why.label, end.code, end.by_peer))
    }
}

pub(crate) struct Recorder(pub(crate) Arc<Seen>);

impl Handler for Recorder {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        *self.0.waker.lock() = Some(cx.waker().clone());
        if self.0.bus_is_full.load(SeqCst) { Poll::Pending } else { Poll::Ready(()) }
    }

    fn is_full(&self) -> bool {
        self.0.bus_is_full.load(SeqCst)
    }

    fn on_message(&mut self, kind: Kind, payload: &[u8], link: &Arc<Link>, now: Micros) {
        if self.0.echoes.load(SeqCst) {
            link.reply(server_frame(kind.into(), payload, false), now);
        } else {
            let mut messages = self.0.messages.lock();
            messages.push((kind, payload.to_vec()));
            if messages.len().checked_rem(self.0.full_each.load(SeqCst)) == Some(0) {
                self.0.bus_is_full.store(true, SeqCst);
            }
        }
        for _ in 0..self.0.events_each.load(SeqCst) {
            link.notify(HandlerEvent::Fact(0));
        }
    }

    fn on_event(&mut self, event: HandlerEvent, _link: &Arc<Link>, _now: Micros) {
        let seen =
            if matches!(event, HandlerEvent::Timer) { &self.0.timers } else { &self.0.events };
        seen.fetch_add(1, SeqCst);
    }

    fn on_writable(&mut self, link: &Arc<Link>, _now: Micros) {
        assert!(link.queued_bytes() <= link.profile().low_water_bytes);
        self.0.writable.fetch_add(1, SeqCst);
    }

    fn on_end(&mut self, end: End, _link: &Arc<Link>) {
        assert!(self.0.end.lock().replace(end).is_none(), "ended twice");
    }
}

/// Driven connection and its other end.
pub(crate) struct Connection {
    pub(crate) link: Arc<Link>,
    pub(crate) seen: Arc<Seen>,
    pub(crate) peer: UnixStream,
    pub(crate) task: JoinHandle<()>,
}

impl Connection {
    pub(crate) fn new(process: &Process, profile: Profile) -> Self {
        Self::shared(process, &Arc::new(profile))
    }

    pub(crate) fn shared(process: &Process, profile: &Arc<Profile>) -> Self {
        let now = clock::now();
        let (profile, runtime) = (Arc::clone(profile), Arc::clone(&process.runtime));
        Self::over(Link::new(Uuid::new_v4(), None, profile, runtime, now), &[])
    }

    /// Drives `link` behind a socket with small buffers.
    pub(crate) fn over(link: Arc<Link>, leftover: &[u8]) -> Self {
        let (socket, peer) = UnixStream::pair().unwrap();
        for stream in [&socket, &peer] {
            socket2::SockRef::from(stream).set_send_buffer_size(16 * 1024).unwrap();
        }
        let seen = Arc::<Seen>::default();
        let driver = Driver::new(
            Arc::clone(&link),
            socket.into(),
            None,
            Recorder(Arc::clone(&seen)),
            leftover,
        );
        Self { link, seen, peer, task: tokio::spawn(driver) }
    }

    pub(crate) async fn says(&mut self, opcode: Opcode, payload: &[u8]) {
        self.peer.write_all(&client_frame(opcode, payload, false, [1, 2, 3, 4])).await.unwrap();
    }

    /// Reads the next `count` frames.
    pub(crate) async fn hears(&mut self, count: usize) -> Vec<(Opcode, Vec<u8>)> {
        let mut bytes = Vec::new();
        loop {
            let (frames, rest) = frames(&bytes);
            assert!(frames.len() < count || rest == 0, "more than {count} frames came");
            if frames.len() == count {
                return frames;
            }
            let read = tokio::time::timeout(PATIENCE, self.peer.read_buf(&mut bytes)).await;
            let read = read.expect("nothing came").unwrap();
            assert!(read > 0, "the stream ended after {} frames of {count}", frames.len());
        }
    }

    /// Reads all frames up to the end of the stream.
    pub(crate) async fn hears_all(&mut self) -> Vec<(Opcode, Vec<u8>)> {
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(PATIENCE, self.peer.read_to_end(&mut bytes)).await;
        read.expect("the stream does not end").unwrap();
        let (frames, rest) = frames(&bytes);
        assert_eq!(rest, 0, "the stream ended within a frame");
        frames
    }

    /// Returns whether nothing can be read now.
    pub(crate) fn hears_nothing(&self) -> bool {
        let mut byte = [0];
        matches!(self.peer.try_read(&mut byte), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Queues messages until the socket takes no more and `bytes` wait. Returns their number.
    pub(crate) fn clog(&self, bytes: usize) -> u64 {
        let mut count = 0;
        while self.link.queued_bytes() < bytes {
            self.link.push(text(&"x".repeat(1000)), clock::now());
            self.link.flush(clock::now());
            count += 1;
        }
        count
    }

    /// Waits for the end of the connection.
    pub(crate) async fn ends(&mut self) -> (&'static str, u16, bool) {
        let ended = tokio::time::timeout(PATIENCE, &mut self.task).await;
        ended.expect("the connection does not end").unwrap();
        self.seen.end().unwrap()
    }
}

/// Lets the tasks run until a condition holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        yield_now().await;
    }
}

/// Lets all tasks do what they can do now. Only for tests of what must not happen.
pub(crate) async fn settle() {
    for _ in 0..300 {
        yield_now().await;
    }
}

pub(crate) fn text(payload: &str) -> Bytes {
    server_frame(Opcode::Text, payload.as_bytes(), false)
}

/// Returns the code of a close frame.
pub(crate) fn close_code(frame: &(Opcode, Vec<u8>)) -> u16 {
    assert_eq!(frame.0, Opcode::Close);
    u16::from_be_bytes([frame.1[0], frame.1[1]])
}

/// Returns the whole frames, and the number of bytes behind them.
pub(crate) fn frames(mut bytes: &[u8]) -> (Vec<(Opcode, Vec<u8>)>, usize) {
    let mut frames = Vec::new();
    while let Some((header, length)) = decode_header(bytes).unwrap() {
        let end = length + header.payload_len as usize;
        if bytes.len() < end {
            break;
        }
        frames.push((header.opcode, bytes[length..end].to_vec()));
        bytes = &bytes[end..];
    }
    (frames, bytes.len())
}

pub(crate) const SECOND: u64 = 1_000_000;

/// Upper bound of every wait, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
