//! How everybody but its own task reaches a connection: queue, flush, disconnect, look at the time.

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
    ws::frame::{Opcode, close_payload, server_frame},
};

use crate::{
    clock::{self, Micros},
    driver::End,
    outbox::{Outbox, SLICES_MAX},
    profile::Profile,
    runtime::Runtime,
    socket::Socket,
};

/// So many bytes are written although the round is not over, so that rounds of any size fit
/// into any send buffer as long as the client reads.
const EARLY_FLUSH_BYTES: usize = 256 * 1024;

/// Most events that may wait for a connection's task.
const EVENTS_MAX: usize = 1024;

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
    phase: Phase,
    /// The socket took no more; the connection's task will flush.
    blocked: bool,
    /// Frames were queued since the last flush, and somebody is going to flush.
    dirty: bool,
    /// Why it ends, once that is known.
    ending: Option<&'static Disconnect>,
    /// The code that went over the wire, in whichever direction came first.
    close_code: u16,
    /// The peer's close frame came.
    peer_closed: bool,
    /// When the close handshake must be over.
    close_by: Micros,
    events: Option<Box<VecDeque<Event>>>,
    waker: Option<Waker>,
    /// Bytes that the process's budget knows of.
    accounted: usize,
    messages_sent: u64,
    bytes_sent: u64,
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
    /// The tick at which the wheel looks next.
    scheduled: AtomicU64,
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
    pub(crate) events: Option<Box<VecDeque<Event>>>,
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
            scheduled: AtomicU64::new(0),
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

    /// Queues a data frame which was read from the bus at `since`.
    ///
    /// More than the send buffer ends the connection as a slow consumer; nobody waits for it.
    pub fn push(&self, frame: Bytes, since: Micros) -> Queued {
        self.push_data(frame, since, false)
    }

    /// Queues a data frame that answers the client's own message; the driver flushes it.
    pub fn reply(&self, frame: Bytes, now: Micros) {
        let _ = self.push_data(frame, now, true);
    }

    fn push_data(&self, frame: Bytes, since: Micros, reply: bool) -> Queued {
        let mut state = self.state.lock();
        if matches!(state.phase, Phase::Closing | Phase::Dead) {
            return Queued::Ending;
        }
        state.outbox.push(frame, since, reply);
        if state.outbox.bytes() > EARLY_FLUSH_BYTES && !state.blocked {
            self.write(&mut state, clock::now());
        }
        if state.blocked {
            self.account(&mut state);
        }
        if state.outbox.bytes() > self.profile.send_buffer_bytes {
            self.end(&mut state, &Disconnect::SLOW, None, clock::now());
            return Queued::Ending;
        }
        if state.blocked || state.dirty || state.phase == Phase::Corked {
            return Queued::Queued;
        }
        state.dirty = true;
        Queued::Flush
    }

    /// Writes what is queued, as much as the socket takes, without waiting.
    pub fn flush(&self, now: Micros) {
        let mut state = self.state.lock();
        state.dirty = false;
        if !state.blocked {
            self.write(&mut state, now);
        }
    }

    /// Ends the connection: what waits for it is dropped, the close frame goes out at once.
    pub fn disconnect(&self, why: &'static Disconnect, now: Micros) {
        self.end(&mut self.state.lock(), why, None, now);
    }

    /// The same with a code and a reason of the backend's own.
    pub fn disconnect_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        self.end(&mut self.state.lock(), why, Some((code, reason)), now);
    }

    /// Ends the connection after all that waits for it has been written.
    pub fn finish(&self, why: &'static Disconnect, now: Micros) {
        self.finish_with(why, why.code, why.reason, now);
    }

    /// The same with a code and a reason of the backend's own.
    pub fn finish_with(&self, why: &'static Disconnect, code: u16, reason: &str, now: Micros) {
        let mut state = self.state.lock();
        if self.start_closing(&mut state, why, code, now) {
            let frame = server_frame(Opcode::Close, close_payload(code, reason).as_ref(), false);
            state.outbox.push(frame, Micros::NEVER, false);
            self.write(&mut state, now);
        }
    }

    /// Gives the connection's handler something to look at. A handler that does not keep up
    /// with what is addressed to it ends its connection.
    pub fn notify(&self, event: Event) {
        let mut state = self.state.lock();
        if state.phase == Phase::Dead {
            return;
        }
        let events = state.events.get_or_insert_default();
        if events.len() >= EVENTS_MAX {
            self.end(&mut state, &Disconnect::SLOW, None, clock::now());
            return;
        }
        events.push_back(event);
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
        drop(state);
        self.schedule(self.next_deadline(now));
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

    /// The socket takes bytes again.
    pub(crate) fn unblock(&self, now: Micros) {
        let mut state = self.state.lock();
        state.blocked = false;
        self.write(&mut state, now);
    }

    /// The task is done: nothing can be queued from now on.
    pub(crate) fn over(&self) -> End {
        let mut state = self.state.lock();
        self.die(&mut state);
        End {
            why: state.ending.unwrap_or(&Disconnect::GONE),
            code: state.close_code,
            by_peer: state.peer_closed,
        }
    }

    pub(crate) fn pong(&self, payload: &[u8]) {
        let mut state = self.state.lock();
        if state.phase == Phase::Open {
            state.outbox.push_control(server_frame(Opcode::Pong, payload, false));
        }
    }

    /// The peer's close frame came: it is answered with its own code, and what waits is dropped.
    pub(crate) fn peer_closed(&self, code: Option<u16>, now: Micros) {
        let mut state = self.state.lock();
        state.peer_closed = true;
        if matches!(state.phase, Phase::Closing | Phase::Dead) {
            return;
        }
        // A close frame without a code is answered with 1000: an empty answer would say less.
        let answer = code.unwrap_or(Disconnect::NORMAL.code);
        self.end(&mut state, &Disconnect::NORMAL, Some((answer, "")), now);
        state.close_code = code.unwrap_or(1005);
    }

    /// Ends the connection without a word: the socket failed, the peer left, or time is over.
    pub fn abort(&self) {
        let mut state = self.state.lock();
        self.die(&mut state);
    }

    pub(crate) fn heard_at(&self, now: Micros) {
        self.heard.store(now.0, Relaxed);
    }

    pub(crate) fn active_at(&self, now: Micros) {
        self.active.store(now.0, Relaxed);
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        if self.paused.swap(paused, Relaxed) != paused && paused {
            self.profile.stats.reads_paused.fetch_add(1, Relaxed);
        }
    }

    /// Called by the wheel. `tick` is the one under which the link was inserted.
    pub(crate) fn on_tick(&self, tick: u64, now: Micros, grace_until: Micros) {
        if self.scheduled.load(Relaxed) != tick {
            return; // it was pulled forward since
        }
        let mut state = self.state.lock();
        match state.phase {
            Phase::Dead => return,
            Phase::Closing if now >= state.close_by => return self.die(&mut state),
            Phase::Closing => return self.schedule(state.close_by),
            Phase::Corked | Phase::Open => self.check_silence(&mut state, now, grace_until),
        }
        if state.phase == Phase::Open || state.phase == Phase::Corked {
            self.schedule(self.next_deadline(now).max(grace_until));
        }
    }

    fn check_silence(&self, state: &mut State, now: Micros, grace_until: Micros) {
        let paused = self.paused.load(Relaxed);
        let silence = now.since(self.heard());
        let idle = now.since(Micros(self.active.load(Relaxed)));
        if silence >= self.profile.heartbeat_timeout && !paused && now >= grace_until {
            self.end(state, &Disconnect::HEARTBEAT, None, now);
        } else if idle >= self.profile.idle_timeout {
            self.end(state, &Disconnect::IDLE, None, now);
        } else if silence >= self.profile.heartbeat_interval && !state.outbox.has_control() {
            state.outbox.push_control(server_frame(Opcode::Ping, &[], false));
            self.write(state, now);
        }
    }

    /// When the next ping, the end of the peer's silence or of its idleness is due.
    fn next_deadline(&self, now: Micros) -> Micros {
        let (heard, interval) = (self.heard(), self.profile.heartbeat_interval);
        let pings = now.since(heard).0.checked_div(interval.0).unwrap_or(0) + 1;
        let ping = heard.after(Micros(interval.0.saturating_mul(pings)));
        let silence = heard.after(self.profile.heartbeat_timeout);
        let idle = Micros(self.active.load(Relaxed)).after(self.profile.idle_timeout);
        ping.min(silence).min(idle).max(now)
    }

    fn schedule(&self, at: Micros) {
        let tick = self.runtime.wheel.insert(self.me.clone(), at);
        self.scheduled.store(tick, Relaxed);
    }

    fn end(
        &self,
        state: &mut State,
        why: &'static Disconnect,
        told: Option<(u16, &str)>,
        now: Micros,
    ) {
        let (code, reason) = told.unwrap_or((why.code, why.reason));
        if !self.start_closing(state, why, code, now) {
            return;
        }
        let lost = state.outbox.discard() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        let payload = close_payload(code, reason);
        state.outbox.push_control(server_frame(Opcode::Close, payload.as_ref(), false));
        self.write(state, now);
        self.account(state);
    }

    /// Whether this is the first ending.
    fn start_closing(
        &self,
        state: &mut State,
        why: &'static Disconnect,
        code: u16,
        now: Micros,
    ) -> bool {
        if matches!(state.phase, Phase::Closing | Phase::Dead) {
            return false;
        }
        state.phase = Phase::Closing;
        self.closing.store(true, Relaxed);
        state.ending = Some(why);
        state.close_code = code;
        state.close_by = now.after(self.profile.close_timeout);
        self.schedule(state.close_by);
        state.wake();
        true
    }

    fn die(&self, state: &mut State) {
        state.phase = Phase::Dead;
        self.closing.store(true, Relaxed);
        if state.ending.is_none() {
            state.ending = Some(&Disconnect::GONE);
            state.close_code = Disconnect::GONE.code;
        }
        let lost = state.outbox.discard() as u64;
        self.profile.stats.messages_discarded.fetch_add(lost, Relaxed);
        state.outbox = Outbox::default();
        self.account(state);
        state.wake();
    }

    /// Writes until nothing is left or the socket takes no more; the latter wakes the task,
    /// which alone can wait for a socket.
    fn write(&self, state: &mut State, now: Micros) {
        let Some(socket) = self.socket.get() else { return };
        let mut sent_messages = false;
        while !state.outbox.is_empty() && state.phase != Phase::Dead {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let filled = state.outbox.fill(&mut slices);
            match socket.try_write_vectored(&slices[..filled]) {
                Ok(count) => {
                    sent_messages |= self.wrote(state, count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !state.blocked {
                        state.blocked = true;
                        self.profile.stats.blocked.fetch_add(1, Relaxed);
                        state.wake();
                    }
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.die(state),
            }
        }
        if state.outbox.is_empty() {
            state.blocked = false;
        }
        if sent_messages && self.profile.idle_timeout != Micros::NEVER {
            self.active_at(now);
        }
        if state.blocked || state.accounted > 0 {
            self.account(state);
        }
    }

    /// Whether the last byte of a data message was among what was written.
    fn wrote(&self, state: &mut State, count: usize) -> bool {
        let written = state.outbox.advance(count);
        let stats = &self.profile.stats;
        stats.bytes_sent.fetch_add(written.bytes as u64, Relaxed);
        state.bytes_sent += written.bytes as u64;
        if written.messages > 0 {
            stats.messages_sent.fetch_add(u64::from(written.messages), Relaxed);
            state.messages_sent += u64::from(written.messages);
            stats.latency.record(clock::now().since(written.oldest), written.messages);
        }
        written.messages > 0
    }

    fn account(&self, state: &mut State) {
        let bytes = state.outbox.bytes();
        if bytes != state.accounted {
            self.runtime.budget.change(state.accounted, bytes);
            state.accounted = bytes;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.runtime.budget.change(self.state.get_mut().accounted, 0);
    }
}

impl State {
    const fn new() -> Self {
        Self {
            outbox: Outbox::EMPTY,
            phase: Phase::Corked,
            blocked: false,
            dirty: false,
            ending: None,
            close_code: 0,
            peer_closed: false,
            close_by: Micros::NEVER,
            events: None,
            waker: None,
            accounted: 0,
            messages_sent: 0,
            bytes_sent: 0,
        }
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}
