//! How everybody but its own task reaches a connection: queue, flush, notify.

use std::{
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
    ws::frame::{Opcode, server_frame},
};

use crate::{
    clock::{self, Micros},
    outbox::{Outbox, SLICES_MAX},
    profile::Profile,
    runtime::Runtime,
    socket::Socket,
};

mod agenda;
mod ending;
mod silence;

use agenda::Agenda;
use ending::Ending;

/// [`Event::tag`]: the time has come for which the handler asked with [`Link::wake_at`]. Nobody else may use it.
pub const TIMER: u8 = u8::MAX;

/// So many bytes are written although the round is not over, so that rounds of any size fit
/// into any send buffer as long as the client reads.
const EARLY_FLUSH_BYTES: usize = 256 * 1024;

/// Pongs up to this number are kept for one write.
const PONGS_MAX: usize = 64;

/// Something that another task wants a connection's handler to look at.
#[derive(Debug, Clone)]
pub struct Event {
    /// What it is; the endpoint gives the meaning.
    pub tag: u8,
    /// A number that belongs to it.
    pub number: u64,
    /// Bytes that belong to it.
    pub payload: Bytes,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The handshake is not answered yet; frames are kept.
    Corked,
    /// Messages flow.
    Open,
    /// A close frame is queued or written; nothing may be queued behind it.
    Closing,
    /// The socket is of no more use.
    Dead,
}

/// The part of a connection's state that several tasks change.
#[derive(Debug)]
struct State {
    outbox: Outbox,
    rare: Option<Box<Rare>>,
    events: Option<Box<Events>>,
    waker: Option<Waker>,
    /// Bytes that the process's budget knows of.
    accounted: u32,
    messages_sent: u64,
    bytes_sent: u64,
    /// The tick at which the wheel looks next; 0 where it does not.
    scheduled: u32,
    phase: Phase,
    /// The socket took no more; the connection's task will flush.
    blocked: bool,
    /// Frames were queued since the last flush, and somebody is going to flush.
    dirty: bool,
    /// The peer's close frame came.
    peer_closed: bool,
}

/// What most connections do not have, or not yet; on the heap, so that they stay small.
#[derive(Debug, Default)]
struct Rare {
    /// How it ends, once that is known.
    ending: Option<Ending>,
    agenda: Agenda,
    /// Bytes that were read, and that the handler does not take yet.
    held: Vec<u8>,
}

/// What waits for a connection's handler.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub(crate) queue: VecDeque<Event>,
    bytes: usize,
}

/// A connection as seen by the hub, the timers and the API.
#[derive(Debug)]
pub struct Link {
    /// For the wheel, which must not keep a connection alive.
    me: Weak<Self>,
    id: Uuid,
    window_bits: Option<u8>,
    socket: OnceLock<Socket>,
    state: Mutex<State>,
    /// When the last bytes came.
    heard: AtomicU64,
    /// When the last data message came or went.
    active: AtomicU64,
    /// Until the bus takes messages again the client is not read, and so cannot be heard.
    paused: AtomicBool,
    /// Copy of the phase that can be read without the lock.
    closing: AtomicBool,
    profile: Arc<Profile>,
    runtime: Arc<Runtime>,
}

/// What a connection's task must know before a turn.
pub(crate) struct Look {
    pub(crate) phase: Phase,
    pub(crate) blocked: bool,
    pub(crate) drained: bool,
    pub(crate) peer_closed: bool,
    pub(crate) reply_bytes: usize,
    pub(crate) events: Option<Box<Events>>,
}

/// What became of a frame that was to be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queued {
    /// Queued, and whoever queued it must call [`Link::flush`] at the end of the round.
    Flush,
    /// Queued; somebody else flushes.
    Queued,
    /// The connection is ending: dropped.
    Ending,
}

impl Link {
    /// A connection whose handshake is not answered yet. `window_bits`: negotiated for compression.
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

    /// The connection's id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// The window that was negotiated for compressed frames to this client.
    #[must_use]
    pub const fn window_bits(&self) -> Option<u8> {
        self.window_bits
    }

    /// What it shares with the other connections of its endpoint.
    #[must_use]
    pub const fn profile(&self) -> &Arc<Profile> {
        &self.profile
    }

    /// Bytes that wait for this client.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.state.lock().outbox.bytes()
    }

    /// Those of them that the process's budget knows of, and that a disconnect would free.
    pub(crate) fn waiting_bytes(&self) -> usize {
        let state = self.state.lock();
        if state.accounted > 0 { state.outbox.untouched_bytes() } else { 0 }
    }

    /// When the last bytes came from the client.
    #[must_use]
    pub fn heard(&self) -> Micros {
        Micros(self.heard.load(Relaxed))
    }

    /// Data messages and bytes that were handed to the kernel.
    #[must_use]
    pub fn sent(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.messages_sent, state.bytes_sent)
    }

    /// Queues a data frame which was read from the bus at `since`; [`Micros::UNTIMED`]: it was not.
    ///
    /// More than the send buffer ends the connection as a slow consumer; nobody waits for it.
    pub fn push(&self, frame: Bytes, since: Micros) -> Queued {
        self.push_data(frame, since, false)
    }

    /// Queues a data frame which was read from the bus at `since`, and writes what is queued.
    pub fn push_and_flush(&self, frame: Bytes, since: Micros) {
        let mut state = self.state.lock();
        if self.enqueue(&mut state, frame, since, false) && !state.blocked {
            state.dirty = false;
            self.write(&mut state, since);
        }
    }

    /// Queues a data frame that answers the client's own message; the driver flushes it.
    pub fn reply(&self, frame: Bytes, now: Micros) {
        let _ = self.push_data(frame, now, true);
    }

    fn push_data(&self, frame: Bytes, since: Micros, reply: bool) -> Queued {
        let mut state = self.state.lock();
        if !self.enqueue(&mut state, frame, since, reply) {
            return Queued::Ending;
        }
        if state.blocked || state.dirty || state.phase == Phase::Corked {
            return Queued::Queued;
        }
        state.dirty = true;
        Queued::Flush
    }

    /// Queues a frame within the bounds; `false` where the connection is ending, or does now.
    fn enqueue(&self, state: &mut State, frame: Bytes, since: Micros, reply: bool) -> bool {
        if state.is_ending() {
            self.profile.stats.messages_discarded.fetch_add(1, Relaxed);
            return false;
        }
        let bytes_max = self.profile.send_buffer_bytes;
        state.outbox.push(frame, since, reply);
        if state.outbox.bytes() > EARLY_FLUSH_BYTES.min(bytes_max) && !state.blocked {
            self.write(state, clock::now());
        }
        if state.blocked {
            self.account(state);
        }
        if state.outbox.bytes() > bytes_max {
            self.end(state, &Disconnect::SLOW, None, clock::now());
        }
        !state.is_ending()
    }

    /// Writes what is queued, as much as the socket takes, without waiting.
    pub fn flush(&self, now: Micros) {
        let mut state = self.state.lock();
        state.dirty = false;
        if !state.blocked {
            self.write(&mut state, now);
        }
    }

    /// Gives the connection's handler something to look at. A handler that does not keep up
    /// with what is addressed to it ends its connection.
    pub fn notify(&self, event: Event) {
        self.leave(&mut self.state.lock(), event);
    }

    fn leave(&self, state: &mut State, event: Event) {
        if state.phase == Phase::Dead {
            return;
        }
        let events = state.events.get_or_insert_default();
        events.bytes += event.payload.len();
        let profile = &self.profile;
        if events.queue.len() >= profile.events_max || events.bytes > profile.event_bytes_max {
            state.events = None;
            self.end(state, &Disconnect::SLOW, None, clock::now());
            return;
        }
        events.queue.push_back(event);
        state.wake();
    }

    /// Gives the connection its socket, now that the handshake is answered.
    pub(crate) fn attach(&self, socket: Socket, now: Micros) {
        // A link belongs to one handshake, which has one socket.
        let _ = self.socket.set(socket);
        let mut state = self.state.lock();
        if state.phase == Phase::Corked {
            state.phase = Phase::Open;
        }
        self.heard.store(now.0, Relaxed);
        self.active.store(now.0, Relaxed);
        self.write(&mut state, now);
        if state.phase == Phase::Open {
            let next = self.next_deadline(&state, now);
            self.schedule(&mut state, next);
        }
    }

    pub(crate) fn socket(&self) -> Option<&Socket> {
        self.socket.get()
    }

    /// Whether an ending has begun.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing.load(Relaxed)
    }

    /// What the task must know before a turn; takes the events, and remembers whom to wake.
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
            events: state.events.take(),
        }
    }

    pub(crate) fn take_events(&self) -> Option<Box<Events>> {
        self.state.lock().events.take()
    }

    /// Keeps what was read until [`Self::take_held`]; never more than one read.
    pub(crate) fn hold(&self, bytes: &[u8]) {
        self.state.lock().rare.get_or_insert_default().held = bytes.to_vec();
    }

    pub(crate) fn take_held(&self) -> Vec<u8> {
        let mut state = self.state.lock();
        state.rare.as_mut().map(|rare| std::mem::take(&mut rare.held)).unwrap_or_default()
    }

    /// The socket takes bytes again.
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
        if state.phase != Phase::Open {
            return;
        }
        let pong = server_frame(Opcode::Pong, payload, false);
        // Reading pauses now, but what was read with this ping may hold thousands more.
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

    /// Until `false` is told the client is not read for a reason that is not its own.
    pub(crate) fn set_paused(&self, paused: bool, now: Micros) {
        if self.paused.load(Relaxed) != paused {
            if !paused {
                // What it sent meanwhile is unread, not unsent: its silence begins now.
                self.heard_at(now);
                self.active_at(now);
            }
            self.paused.store(paused, Relaxed);
        }
    }

    /// Writes until nothing is left or the socket takes no more; the latter wakes the task,
    /// which alone can wait for a socket.
    fn write(&self, state: &mut State, now: Micros) {
        let Some(socket) = self.socket.get() else { return };
        let mut blocked = false;
        while !state.outbox.is_empty() && !blocked {
            let result = match state.outbox.only() {
                // Cheaper in the kernel than a vector of one.
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
            // It has to wait for the socket; or somebody else has written what it waited for,
            // and it may go on reading.
            state.wake();
        }
        if state.blocked || state.accounted > 0 {
            self.account(state);
        }
    }

    fn wrote(&self, state: &mut State, count: usize, now: Micros) {
        let written = state.outbox.advance(count);
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
        let bytes = state.outbox.bytes();
        if bytes != state.accounted as usize {
            self.runtime.budget.change(state.accounted as usize, bytes);
            state.accounted = bytes as u32;
        }
    }
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
            phase: Phase::Corked,
            blocked: false,
            dirty: false,
            peer_closed: false,
        }
    }

    fn ending(&self) -> Option<&Ending> {
        self.rare.as_ref()?.ending.as_ref()
    }

    fn agenda(&self) -> Agenda {
        self.rare.as_ref().map_or_else(Agenda::default, |rare| rare.agenda)
    }

    const fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Closing | Phase::Dead)
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}
