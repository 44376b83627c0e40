//! Task of a lane: the only code that reads its socket, writes it, or ends the lane. Knows no streams.

use std::{
    cell::RefCell,
    io::{
        self,
        ErrorKind::{Interrupted, WouldBlock},
    },
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    task::yield_now,
    time::{Interval, MissedTickBehavior, interval},
};
use wsproxy_proto::{
    tunnel::{self, lane},
    ws::{
        deflate::Inflaters,
        frame::{Kind, Opcode, Role, close_payload},
        receiver::{Event, Input, Limits, Receiver},
    },
};

use super::{LaneEnd, LaneSettings, batch::Batch, shared::Shared};
use crate::{
    clock::{self, Micros},
    socket::Socket,
};

thread_local! {
    /// Read buffer of this thread, lent to the lane that reads. An idle lane has none.
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
    static INFLATERS: RefCell<Inflaters> = RefCell::new(Inflaters::default());
}

/// Future that drives one lane from the end of its WebSocket handshake to its own end, which it returns.
///
/// Reading awaits nothing but the socket. Dropping the driver drops the connection without a close frame.
#[derive(Debug)]
pub struct LaneDriver {
    shared: Arc<Shared>,
    socket: Socket,
    receiver: Receiver,
    batch: Batch,
    /// Payload of the newest WebSocket ping that is not answered.
    pong: Option<Box<[u8]>>,
    /// Time since which the socket takes nothing of a batch.
    stalled_since: Option<Micros>,
    /// Whether the peer has ended its stream.
    has_left: bool,
    gathering: Gathering,
    phase: Phase,
    ticks: Interval,
    ticked_at: Micros,
    /// Time of the last bytes of the peer.
    heard_at: Micros,
    silence_max: Micros,
    write_timeout: Micros,
    close_timeout: Micros,
}

/// Wait for the frames of other tasks, so that one write takes them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gathering {
    /// There was nothing to write.
    No,
    /// Something is to be written once the tasks that are ready have run.
    Waits,
    /// They have run.
    Done,
}

/// Part of its life in which a lane is.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Open,
    /// The lane has ended, and its connection is being closed.
    Closing(Closing),
}

/// Connection that is being closed.
#[derive(Debug, Clone, Copy)]
struct Closing {
    end: LaneEnd,
    /// Time at which the connection is given up.
    until: Micros,
    /// Close frame that waits for the socket.
    frame: Option<(u16, &'static str)>,
    /// Whether there is no reason to write or to wait any more.
    is_over: bool,
}

impl LaneDriver {
    pub(super) fn new(
        shared: Arc<Shared>,
        socket: Socket,
        leftover: &[u8],
        role: lane::Role,
        settings: &LaneSettings,
    ) -> io::Result<Self> {
        // The kernel's own bound comes behind that of the lane.
        socket.prepare(settings.write_timeout.saturating_mul(2))?;
        socket.set_unsent_max(UNSENT_BYTES_MAX)?;
        let role = match role {
            lane::Role::Gateway => Role::Server,
            lane::Role::Agent => Role::Client,
        };
        let limits =
            Limits { message_bytes_max: tunnel::MESSAGE_BYTES_MAX, fragments_max: FRAGMENTS_MAX };
        let mut ticks = interval(tick(settings));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = clock::now();
        let mut driver = Self {
            shared,
            socket,
            receiver: Receiver::new(role, limits, None),
            batch: Batch::new(role),
            pong: None,
            stalled_since: None,
            has_left: false,
            gathering: Gathering::No,
            phase: Phase::Open,
            ticks,
            ticked_at: now,
            heard_at: now,
            silence_max: Micros(settings.protocol.silence_max),
            write_timeout: settings.write_timeout.into(),
            close_timeout: settings.close_timeout.into(),
        };
        if !leftover.is_empty() {
            driver.receive(&mut leftover.to_vec(), now);
        }
        Ok(driver)
    }

    /// Decides the end of the lane. Only the first end counts.
    fn end(&mut self, end: LaneEnd, now: Micros) {
        if matches!(self.phase, Phase::Open) {
            let frame = end.close_frame();
            let until = now.after(self.close_timeout);
            self.phase = Phase::Closing(Closing { end, until, frame, is_over: frame.is_none() });
            self.shared.end(end);
        }
    }

    /// Runs one round. Returns whether another one may find more to do.
    fn round(&mut self, cx: &mut Context<'_>) -> bool {
        let now = clock::now();
        // The socket comes before the time: after a pause of the process, the peer's bytes wait in it.
        let has_read = self.read(now, cx);
        let has_written = self.write(now, cx);
        let has_ticked = self.ticks.poll_tick(cx).is_ready();
        if has_ticked {
            self.tick(now);
        }
        has_read || has_written || has_ticked
    }

    fn tick(&mut self, now: Micros) {
        self.allow_for_pause(now);
        let ticked = self.shared.call(|state| state.core.tick(now.0));
        if let Err(error) = ticked {
            self.end(error.into(), now);
        }
        if self.stalled_since.is_some_and(|since| now.since(since) >= self.write_timeout) {
            self.end(LaneEnd::Stalled, now);
        }
        let drain = self.shared.call(|state| state.drain);
        if let Some(drain) = drain.filter(|drain| now >= drain.until) {
            self.end(LaneEnd::Drained(drain.code), now);
        }
        if let Phase::Closing(closing) = &mut self.phase {
            closing.is_over |= now >= closing.until;
        }
    }

    /// Gives the peer some time after a pause of this process, in which the peer may have paused too: both can run on a
    /// machine that slept.
    fn allow_for_pause(&mut self, now: Micros) {
        let pause = now.since(self.ticked_at);
        self.ticked_at = now;
        if pause <= (self.ticks.period() * 3).into() {
            return;
        }
        let Micros(silence_max) = self.silence_max;
        let allowed = (now.0 + silence_max / 5).saturating_sub(silence_max);
        // A process that pauses again and again still finds a dead peer.
        let allowed = allowed.min(self.heard_at.0 + silence_max);
        if allowed > self.heard_at.0 {
            self.shared.call(|state| state.core.heard(allowed));
        }
    }

    /// Reads once. Returns whether there may be more.
    fn read(&mut self, now: Micros, cx: &mut Context<'_>) -> bool {
        if self.has_left || self.socket.poll_read_ready(cx).is_pending() {
            return false;
        }
        READ_BUFFER.with_borrow_mut(|buffer| match self.socket.try_read(buffer) {
            Ok(0) => self.on_left(LaneEnd::Left, now),
            Ok(count) => self.receive(&mut buffer[..count], now),
            Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
            Err(error) => self.on_failed(error.kind(), now),
        });
        true
    }

    fn receive(&mut self, bytes: &mut [u8], now: Micros) {
        self.shared.bytes_received.fetch_add(bytes.len() as u64, Relaxed);
        self.heard_at = now;
        let mut is_heard = false;
        INFLATERS.with_borrow_mut(|inflaters| {
            let mut input = Input::new(bytes);
            loop {
                let is_open = matches!(self.phase, Phase::Open);
                match self.receiver.next(&mut input, inflaters) {
                    Ok(None) => break,
                    Ok(Some(Event::Message(Kind::Binary, message))) if is_open => {
                        is_heard = true;
                        let received = self.shared.call(|state| state.core.receive(now.0, message));
                        if let Err(error) = received {
                            self.end(error.into(), now);
                        }
                    }
                    Ok(Some(Event::Message(Kind::Text, _))) => self.end(LaneEnd::Text, now),
                    Ok(Some(Event::Ping(payload))) => self.pong = Some(payload.into()),
                    Ok(Some(Event::Message(..) | Event::Pong(_))) => {}
                    Ok(Some(Event::Close(close))) => {
                        let code = close.map_or(NO_CODE, |(code, _)| code);
                        self.on_close(code, now);
                    }
                    Err(_) => self.end(LaneEnd::WebSocket, now),
                }
            }
        });
        if !is_heard {
            self.shared.call(|state| state.core.heard(now.0));
        }
    }

    /// Handles the peer's close frame: the lane ends, or the connection may be closed.
    fn on_close(&mut self, code: u16, now: Micros) {
        self.end(self.after_go_away().unwrap_or(LaneEnd::Closed(code)), now);
        self.has_left = true;
    }

    /// Handles a failure of the socket.
    fn on_failed(&mut self, kind: io::ErrorKind, now: Micros) {
        self.on_left(LaneEnd::Failed(kind), now);
    }

    /// Handles the end of the peer's stream.
    fn on_left(&mut self, end: LaneEnd, now: Micros) {
        self.end(self.after_go_away().unwrap_or(end), now);
        self.has_left = true;
        if let Phase::Closing(closing) = &mut self.phase {
            closing.is_over = true;
        }
    }

    /// Returns the end of a lane that the peer closes after its GOAWAY.
    fn after_go_away(&self) -> Option<LaneEnd> {
        self.shared.status().go_away.map(|go_away| LaneEnd::GoneAway(go_away.code))
    }

    /// Writes until the socket takes no more, or nothing waits. Returns whether the socket may take more at once.
    fn write(&mut self, now: Micros, cx: &mut Context<'_>) -> bool {
        if self.gathers(cx) {
            return false;
        }
        for _ in 0..BATCHES_MAX {
            if self.is_over() || (self.batch.is_empty() && !self.fill(now, cx)) {
                self.batch.rest_idle();
                self.gathering = Gathering::No;
                return false;
            }
            match self.socket.try_write(self.batch.rest()) {
                Ok(0) => self.on_failed(io::ErrorKind::WriteZero, now),
                Ok(count) => {
                    self.stalled_since = None;
                    self.batch.advance(count);
                    self.shared.bytes_sent.fetch_add(count as u64, Relaxed);
                }
                Err(error) if error.kind() == Interrupted => {}
                Err(error) if error.kind() == WouldBlock => {
                    self.stalled_since.get_or_insert(now);
                    match self.socket.poll_write_ready(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => {
                            self.on_failed(error.kind(), now);
                        }
                        Poll::Pending => return false,
                    }
                }
                Err(error) => self.on_failed(error.kind(), now),
            }
        }
        true
    }

    /// Returns whether the first frames of a batch wait for those of other tasks. The runtime wakes the lane's task when
    /// no other task is ready.
    fn gathers(&mut self, cx: &mut Context<'_>) -> bool {
        let is_open = matches!(self.phase, Phase::Open);
        if is_open && self.gathering == Gathering::No && self.shared.has_output_of_several() {
            self.gathering = Gathering::Waits;
            // Its first poll leaves the waker with the runtime.
            let _ = pin!(yield_now()).poll(cx);
        }
        self.gathering == Gathering::Waits
    }

    /// Makes the next frame. Returns whether there is one; else the task is woken when there is.
    fn fill(&mut self, now: Micros, cx: &mut Context<'_>) -> bool {
        if let Phase::Closing(closing) = &mut self.phase {
            if let Some((code, reason)) = closing.frame.take() {
                let payload = close_payload(code, reason);
                self.batch.fill_control(Opcode::Close, payload.as_ref());
                return true;
            }
            // The peer's end of the stream follows its close frame. An unread byte would turn into a reset, which can
            // overtake our close frame.
            closing.is_over |= self.socket.poll_finish_writing(cx).is_ready() && self.has_left;
            return false;
        }
        if let Some(payload) = self.pong.take() {
            self.batch.fill_control(Opcode::Pong, &payload);
            return true;
        }
        let Self { shared, batch, .. } = self;
        let mut drained = None;
        let is_filled = batch.fill(Opcode::Binary, |out| {
            shared.call(|state| {
                let is_something = state.core.write_batch(now.0, out);
                if !is_something {
                    drained = state.drain.filter(|_| state.core.streams() == 0);
                    state.park(cx);
                }
                is_something
            })
        });
        if let Some(drain) = drained {
            self.end(LaneEnd::Drained(drain.code), now);
            return self.fill(now, cx);
        }
        is_filled
    }

    const fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Closing(Closing { is_over: true, .. }))
    }
}

impl Future for LaneDriver {
    type Output = LaneEnd;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<LaneEnd> {
        if self.gathering == Gathering::Waits {
            self.gathering = Gathering::Done;
        }
        for _ in 0..ROUNDS_MAX {
            let has_more = self.round(cx);
            match self.phase {
                Phase::Closing(Closing { end, is_over: true, .. }) => return Poll::Ready(end),
                _ if !has_more => return Poll::Pending,
                _ => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for LaneDriver {
    fn drop(&mut self) {
        self.end(LaneEnd::Dropped, clock::now());
    }
}

/// Returns the interval at which the lane looks at its times: about a second, less where these are short.
fn tick(settings: &LaneSettings) -> Duration {
    let protocol = &settings.protocol;
    let shortest = protocol.ping.min(protocol.silence_max).min(protocol.hello_timeout);
    let shortest = Duration::from_micros(shortest).min(settings.write_timeout);
    (shortest.min(settings.close_timeout) / 4).clamp(TICK_MIN, TICK_MAX)
}

/// Close code for a close frame without one (RFC 6455, section 7.1.5).
const NO_CODE: u16 = 1005;

/// Upper bound of one read. It holds some messages, so that few of them come in two parts, which costs a copy.
const READ_BYTES: usize = 256 << 10;

/// Upper bound of the bytes that wait in the kernel for their first transmission.
const UNSENT_BYTES_MAX: u32 = 64 << 10;

/// Upper bound of the WebSocket frames of one message.
const FRAGMENTS_MAX: u32 = 256;

/// Number of batches that are written between two reads.
const BATCHES_MAX: usize = 4;

/// Number of rounds after which a busy lane lets other tasks run.
const ROUNDS_MAX: usize = 8;

const TICK_MIN: Duration = Duration::from_millis(5);
const TICK_MAX: Duration = Duration::from_secs(1);
