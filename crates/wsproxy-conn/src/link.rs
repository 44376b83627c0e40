//! Handle to a connection for all other tasks: push, flush, notify, end.

use std::{
    any::Any,
    collections::VecDeque,
    io::{self, IoSlice},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::Waker,
};

use bytes::Bytes;
use parking_lot::Mutex;
use uuid::Uuid;
use wsproxy_proto::{
    disconnect::Disconnect,
    ws::frame::{Kind, Opcode, Role, client_frame, server_frame},
};

use crate::{
    clock::{self, Micros},
    outbox::{Outbox, SLICES_MAX},
    profile::Profile,
    runtime::Runtime,
    socket::Socket,
};

mod deadlines;
mod ending;
mod liveness;
mod push;

use deadlines::Deadlines;
use ending::Ending;

/// Something that another task wants a connection's handler to look at. Tags and values have the meaning that the
/// handler gives them.
#[derive(Debug)]
pub enum HandlerEvent {
    /// The time has come for which the handler asked with [`Link::wake_at`].
    Timer,
    /// A fact without further bytes.
    Fact(u8),
    /// Bytes in two parts, of which the first may be empty.
    Bytes {
        /// The kind of bytes.
        tag: u8,
        /// The first part.
        head: Bytes,
        /// The second part.
        body: Bytes,
    },
    /// A value of a type that its sender and the handler know.
    Value(Box<dyn Any + Send>),
}

impl HandlerEvent {
    /// Bytes that count against [`Profile::event_bytes_max`].
    const fn bytes(&self) -> usize {
        match self {
            Self::Bytes { head, body, .. } => head.len() + body.len(),
            Self::Timer | Self::Fact(_) | Self::Value(_) => 0,
        }
    }
}

/// Phase in the life of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LinkPhase {
    /// The handshake is not answered yet. Frames are queued and not written.
    Corked,
    /// Messages flow.
    Open,
    /// A close frame is queued or written. No frame may follow it.
    Closing,
    /// The socket is not used any more.
    Dead,
}

/// State of a connection that several tasks change.
#[derive(Debug)]
struct State {
    outbox: Outbox,
    rare: Option<Box<Rare>>,
    events: Option<Box<EventQueue>>,
    waker: Option<Waker>,
    /// Bytes that are counted in the process's budget.
    accounted: u32,
    messages_sent: u64,
    bytes_sent: u64,
    /// Tick at which the wheel looks at the connection next; 0 where it does not.
    scheduled: u32,
    phase: LinkPhase,
    /// The socket took no more; the connection's task will flush.
    blocked: bool,
    /// Frames were queued since the last flush, and the task that queued the first of them is going to flush.
    dirty: bool,
    /// Frames of the state are queued that may still be replaced: nothing is written.
    holds_state: bool,
    /// The peer's close frame came.
    peer_closed: bool,
    /// The handler waits until no more than the low-water mark is queued.
    wants_writable: bool,
    /// The driver is to tell the handler that the connection is writable.
    writable: bool,
}

/// State that most connections do not have, or not yet. It is on the heap, so that the others stay small.
#[derive(Debug, Default)]
struct Rare {
    /// Ending of the connection, once one has begun.
    ending: Option<Ending>,
    deadlines: Deadlines,
    /// Waiting bytes for which the send buffer is made larger; see [`Link::push_state`].
    excused: usize,
    /// Bytes that were read and that the handler does not take yet.
    held: Vec<u8>,
}

/// Events that wait for a connection's handler.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    pub(crate) queue: VecDeque<HandlerEvent>,
    bytes: usize,
}

/// Handle to a WebSocket connection, for the hub, the timers and the API.
#[derive(Debug)]
pub struct Link {
    /// Reference for the wheel, which must not keep a connection alive.
    me: Weak<Self>,
    id: Uuid,
    window_bits: Option<u8>,
    socket: OnceLock<Socket>,
    state: Mutex<State>,
    /// Time at which the last bytes came.
    heard: AtomicU64,
    /// Time at which the last data message came or was sent.
    active: AtomicU64,
    /// Set while this process leaves the client unread for a reason of its own. The client's silence does not count
    /// then.
    paused: AtomicBool,
    /// Whether an ending has begun. A copy of the phase that needs no lock.
    closing: AtomicBool,
    profile: Arc<Profile>,
    runtime: Arc<Runtime>,
}

/// State of a connection that its task needs in a round.
pub(crate) struct Look {
    pub(crate) phase: LinkPhase,
    pub(crate) blocked: bool,
    pub(crate) drained: bool,
    pub(crate) peer_closed: bool,
    pub(crate) reply_bytes: usize,
    pub(crate) writable: bool,
    pub(crate) events: Option<Box<EventQueue>>,
}

/// Result of [`Link::push`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// The frame is queued, and the caller must call [`Link::flush`] at the end of its round.
    Flush,
    /// The frame is queued, and another task flushes.
    Queued,
    /// The frame is dropped, since the connection is ending.
    Ending,
}

impl Link {
    /// Creates the handle of a connection whose handshake is not answered yet. `window_bits` was negotiated for
    /// compressed frames to the client.
    #[must_use]
    pub fn new(
        id: Uuid,
        window_bits: Option<u8>,
        profile: Arc<Profile>,
        runtime: Arc<Runtime>,
        now: Micros,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            id,
            window_bits,
            socket: OnceLock::new(),
            state: Mutex::new(State::new()),
            heard: AtomicU64::new(now.0),
            active: AtomicU64::new(now.0),
            paused: false.into(),
            closing: false.into(),
            profile,
            runtime,
        })
    }

    /// Returns the connection's id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// Returns the window that was negotiated for compressed frames to the client.
    #[must_use]
    pub const fn window_bits(&self) -> Option<u8> {
        self.window_bits
    }

    /// Returns the state that the connection shares with the others of its endpoint.
    #[must_use]
    pub const fn profile(&self) -> &Arc<Profile> {
        &self.profile
    }

    /// Returns the number of bytes that wait for the client.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.state.lock().outbox.bytes()
    }

    /// Returns the number of bytes in the process's budget that a disconnect would free.
    pub(crate) fn waiting_bytes(&self) -> usize {
        let state = self.state.lock();
        if state.accounted > 0 { state.outbox.untouched_bytes() } else { 0 }
    }

    /// Returns the number of bytes in the process's budget that an end without a close frame would free.
    pub(crate) fn accounted_bytes(&self) -> usize {
        self.state.lock().accounted as usize
    }

    /// Returns the time at which the last bytes came from the client.
    #[must_use]
    pub fn heard(&self) -> Micros {
        Micros(self.heard.load(Relaxed))
    }

    /// Returns the number of data messages and of bytes that the kernel has taken.
    #[must_use]
    pub fn sent(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.messages_sent, state.bytes_sent)
    }

    /// Returns whether at most the low-water mark waits for the client. Where more waits, the handler's
    /// [`on_writable`](crate::Handler::on_writable) is called once, as soon as that is no longer so.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        let mut state = self.state.lock();
        state.wants_writable = state.outbox.bytes() > self.profile.low_water_bytes;
        !state.wants_writable
    }

    /// Encodes a message for this connection alone. The frame is masked where ours is the client's end.
    #[must_use]
    pub fn frame(&self, kind: Kind, payload: &[u8]) -> Bytes {
        self.encode(kind.into(), payload)
    }

    fn encode(&self, opcode: Opcode, payload: &[u8]) -> Bytes {
        match self.profile.role {
            Role::Server => server_frame(opcode, payload, false),
            Role::Client => client_frame(opcode, payload, false, masking_key()),
        }
    }

    /// Writes as much of the queue as the socket takes, without waiting.
    pub fn flush(&self, now: Micros) {
        let mut state = self.state.lock();
        state.dirty = false;
        if !state.blocked {
            self.write(&mut state, now);
        }
    }

    /// Leaves an event for the connection's handler. Where too many events wait, the connection ends as a slow
    /// consumer.
    pub fn notify(&self, event: HandlerEvent) {
        self.leave(&mut self.state.lock(), event);
    }

    fn leave(&self, state: &mut State, event: HandlerEvent) {
        if state.phase == LinkPhase::Dead {
            return;
        }
        let events = state.events.get_or_insert_default();
        events.bytes += event.bytes();
        let profile = &self.profile;
        if events.queue.len() >= profile.events_max || events.bytes > profile.event_bytes_max {
            state.events = None;
            self.end(state, &Disconnect::SLOW, None, clock::now());
            return;
        }
        events.queue.push_back(event);
        state.wake();
    }

    /// Gives the connection its socket after the handshake.
    pub(crate) fn attach(&self, socket: Socket, now: Micros) {
        // A link belongs to one handshake, which has one socket.
        let _ = self.socket.set(socket);
        let mut state = self.state.lock();
        if state.phase == LinkPhase::Corked {
            state.phase = LinkPhase::Open;
        }
        self.heard.store(now.0, Relaxed);
        self.active.store(now.0, Relaxed);
        self.write(&mut state, now);
        if state.phase == LinkPhase::Open {
            let next = self.next_deadline(&state, now);
            self.schedule(&mut state, next);
        }
    }

    pub(crate) fn socket(&self) -> Option<&Socket> {
        self.socket.get()
    }

    /// Returns whether an ending has begun.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// Returns the state that the task needs in a round, with the events, and stores the task's waker.
    pub(crate) fn look(&self, waker: &Waker) -> Look {
        let mut state = self.state.lock();
        if state.waker.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            state.waker = Some(waker.clone());
        }
        Look {
            phase: state.phase,
            blocked: state.blocked,
            drained: state.outbox.is_empty(),
            peer_closed: state.peer_closed,
            reply_bytes: state.outbox.reply_bytes(),
            writable: std::mem::take(&mut state.writable),
            events: state.events.take(),
        }
    }

    pub(crate) fn take_events(&self) -> Option<Box<EventQueue>> {
        self.state.lock().events.take()
    }

    /// Keeps bytes of one read until [`Self::take_held`].
    pub(crate) fn hold(&self, bytes: &[u8]) {
        self.state.lock().rare.get_or_insert_default().held = bytes.to_vec();
    }

    pub(crate) fn take_held(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.rare.as_mut().map(|rare| std::mem::take(&mut rare.held)).unwrap_or_default()
    }

    /// Writes the queue: the socket takes bytes again.
    pub(crate) fn unblock(&self, now: Micros) {
        let mut state = self.state.lock();
        state.blocked = false;
        self.write(&mut state, now);
    }

    pub(crate) fn pong(&self, payload: &[u8], now: Micros) {
        let mut state = self.state.lock();
        if state.outbox.control_frames() >= PONGS_MAX && !state.blocked {
            self.write(&mut state, now);
        }
        if state.phase != LinkPhase::Open {
            return;
        }
        let pong = self.encode(Opcode::Pong, payload);
        // Reading pauses now, but the same read may hold thousands of further pings.
        let is_full = state.blocked && state.outbox.reply_bytes() > self.profile.reply_bytes_max;
        let pong = if is_full { state.outbox.replace_pong(pong) } else { Err(pong) };
        if let Err(pong) = pong {
            state.outbox.push_control(pong);
        }
    }

    pub(crate) fn heard_at(&self, now: Micros) {
        self.heard.store(now.0, Relaxed);
    }

    pub(crate) fn active_at(&self, now: Micros) {
        self.active.store(now.0, Relaxed);
    }

    /// Notes whether this process leaves the client unread for a reason of its own.
    pub(crate) fn set_paused(&self, paused: bool, now: Micros) {
        if self.paused.load(Relaxed) != paused {
            if !paused {
                // The client may have sent messages meanwhile that are not read yet: its silence begins now.
                self.heard_at(now);
                self.active_at(now);
            }
            self.paused.store(paused, Relaxed);
        }
    }

    /// Writes until the queue is empty or the socket takes no more. In the second case it wakes the task, which alone
    /// can wait for the socket.
    fn write(&self, state: &mut State, now: Micros) {
        let Some(socket) = self.socket.get().filter(|_| !state.holds_state) else { return };
        let mut blocked = false;
        while !state.outbox.is_empty() && !blocked {
            let result = match state.outbox.only() {
                // One slice is cheaper in the kernel than a vector of one slice.
                Some(frame) => socket.try_write(frame),
                None => {
                    let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                    let filled = state.outbox.fill(&mut slices);
                    socket.try_write_vectored(&slices[..filled])
                }
            };
            match result {
                Ok(0) => self.die(state),
                Ok(count) => self.wrote(state, count, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.die(state),
            }
        }
        if blocked != state.blocked {
            state.blocked = blocked;
            self.profile.stats.blocked.fetch_add(blocked.into(), Relaxed);
            // The task has to wait for the socket; or another task has written the queue, and the task may read
            // again.
            state.wake();
        }
        if state.blocked || state.accounted > 0 {
            self.account(state);
        }
        if state.wants_writable
            && state.outbox.bytes() <= self.profile.low_water_bytes
            && !state.is_ending()
        {
            (state.wants_writable, state.writable) = (false, true);
            state.wake();
        }
    }

    fn wrote(&self, state: &mut State, count: usize, now: Micros) {
        let before = state.outbox.bytes();
        let written = state.outbox.advance(count);
        if let Some(rare) = &mut state.rare {
            rare.excused = rare.excused.saturating_sub(before - state.outbox.bytes());
        }
        let stats = &self.profile.stats;
        stats.bytes_sent.fetch_add(written.bytes as u64, Relaxed);
        state.bytes_sent += written.bytes as u64;
        if written.messages > 0 {
            stats.messages_sent.fetch_add(u64::from(written.messages), Relaxed);
            state.messages_sent += u64::from(written.messages);
            self.active_at(now);
        }
        if written.timed > 0 {
            stats.latency.record(clock::now().since(written.oldest), written.timed);
        }
    }

    fn account(&self, state: &mut State) {
        let mut bytes = state.outbox.bytes();
        if state.phase != LinkPhase::Dead {
            bytes += self.socket.get().map_or(0, Socket::held_bytes);
        }
        if bytes != state.accounted as usize {
            self.runtime.budget.change(state.accounted as usize, bytes);
            state.accounted = bytes as u32;
        }
    }
}

/// Random bytes that a peer cannot foresee (RFC 6455, section 10.3).
fn masking_key() -> [u8; 4] {
    let [a, b, c, d, ..] = Uuid::new_v4().into_bytes();
    [a, b, c, d]
}

impl Drop for Link {
    fn drop(&mut self) {
        self.runtime.budget.change(self.state.get_mut().accounted as usize, 0);
    }
}

impl State {
    const fn new() -> Self {
        Self {
            outbox: Outbox::EMPTY,
            rare: None,
            events: None,
            waker: None,
            accounted: 0,
            messages_sent: 0,
            bytes_sent: 0,
            scheduled: 0,
            phase: LinkPhase::Corked,
            blocked: false,
            dirty: false,
            holds_state: false,
            peer_closed: false,
            wants_writable: false,
            writable: false,
        }
    }

    fn ending(&self) -> Option<&Ending> {
        self.rare.as_ref()?.ending.as_ref()
    }

    fn deadlines(&self) -> Deadlines {
        self.rare.as_ref().map_or_else(Deadlines::default, |rare| rare.deadlines)
    }

    fn excused(&self) -> usize {
        self.rare.as_ref().map_or(0, |rare| rare.excused)
    }

    const fn is_ending(&self) -> bool {
        matches!(self.phase, LinkPhase::Closing | LinkPhase::Dead)
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

/// Upper bound of the pongs that are kept for one write.
const PONGS_MAX: usize = 64;
