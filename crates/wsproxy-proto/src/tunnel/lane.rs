//! One lane in either role: messages of the peer in, events out, bytes of streams in and out, batches for the socket out.
//! Knows neither sockets nor a clock nor tasks.
//!
//! # Use by tasks
//! A lane is meant to stand in a `Mutex`, beside the wakers of its streams. No method waits or does IO, and each takes at
//! most the time to copy one message, so the lock is held briefly and never across an await:
//! - The task of the socket locks, calls [`Lane::receive`] with each message, unlocks, and reads on. It awaits nothing but
//!   the socket: credit has guaranteed the room, and answers wait in slots until the writer comes.
//! - A consumer (the body of an answer at the gateway, of a request at the agent) locks and calls [`Lane::take`]. On
//!   [`Taken::Pending`] it leaves its waker under the same lock, so no [`Event::Readable`] is lost.
//! - A producer locks and calls [`Lane::put`] with its piece. Where a rest stays, it keeps the rest and leaves its waker;
//!   [`Event::Writable`] wakes it. A body that is dropped early calls [`Lane::stop`] (of a request at the agent) or
//!   [`Lane::reset`] (of an answer at the gateway) from its `Drop`.
//! - After each call, under the same lock, the caller takes all events with [`Lane::poll`], collects the wakers that they
//!   name, and wakes these once the lock is free; with them the writer, if [`Lane::has_output`].
//! - The writer locks, fills its buffer with [`Lane::write_batch`], unlocks, and then writes to the socket.
//!
//! Times are microseconds of one clock that does not go back.

use std::{collections::VecDeque, sync::Arc};

use hashbrown::HashMap;

use crate::tunnel::{
    HEAD_BYTES_MAX, STREAMS_MAX,
    code::Code,
    event::{End, Event},
    frame::{Frame, FrameError, Health},
    hello::Hello,
    memory::Memory,
    schedule::Schedule,
};

mod calls;
mod control;
mod read;
mod stream;
mod write;

use control::Control;
use stream::{Phase, Stream};

pub use calls::{OpenError, SendError, Taken};
pub use write::BATCH_BYTES_MAX;

/// One side of a lane.
///
/// Bounds: [`LaneConfig::streams_max`] streams here, the peer's at a gateway; for each, [`Memory`] bounds the bytes of its
/// bodies, and heads and trailers are at most as large as HELLO allows. Control frames wait in one slot each. Events wait
/// until they are polled, at most a few for each frame and call.
#[derive(Debug)]
pub struct Lane {
    role: Role,
    config: LaneConfig,
    memory: Arc<Memory>,
    peer: Option<PeerLimits>,
    streams: HashMap<u32, Stream>,
    /// Streams whose windows grew, apart from some that ended.
    grown: Vec<u32>,
    /// Highest number that was opened: of a gateway by this side.
    last_opened: u32,
    schedule: Schedule,
    control: Control,
    events: VecDeque<Event>,
    /// Whether this side or the peer sent GOAWAY.
    is_draining: bool,
    /// Last stream of the first GOAWAY that this side wrote.
    went_away: Option<u32>,
    is_over: bool,
    began_at: u64,
    heard_at: u64,
    pinged_at: u64,
}

/// Role of this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Opens streams.
    Gateway,
    /// Answers them.
    Agent,
}

/// Settings of one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneConfig {
    /// Streams that may be open at once; counts at the agent.
    pub streams_max: u32,
    /// Upper bound of the payload of a head or of trailers that this side takes, in bytes.
    pub head_bytes_max: u32,
    /// Interval of pings, in microseconds.
    pub ping: u64,
    /// Time without a byte after which the lane is dead, in microseconds.
    pub silence_max: u64,
    /// Time for the peer's HELLO, in microseconds.
    pub hello_timeout: u64,
    /// Time that open streams get before the lane closes, in milliseconds.
    pub drain_ms: u32,
    /// Id of the gateway's instance; of an agent empty.
    pub instance: String,
    /// Version of the program.
    pub build: String,
    /// Number of the first stream of a gateway: 1 but in tests.
    pub first_stream: u32,
}

impl Default for LaneConfig {
    fn default() -> Self {
        Self {
            streams_max: STREAMS_MAX,
            head_bytes_max: HEAD_BYTES_MAX,
            ping: 10 * SECOND,
            silence_max: 25 * SECOND,
            hello_timeout: 5 * SECOND,
            drain_ms: 20_000,
            instance: String::new(),
            build: String::new(),
            first_stream: 1,
        }
    }
}

/// Limits of the peer's HELLO that this side keeps.
#[derive(Debug, Clone, Copy)]
struct PeerLimits {
    streams_max: u32,
    window: u32,
    head_bytes_max: u32,
}

/// Reason why a lane ends: the peer broke a rule, or is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// A message is invalid by itself.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A frame is valid, but not now, or not of this peer.
    #[error("{0}")]
    Order(&'static str),
    /// The peer sent more than it had credit for, or granted more than there may be.
    #[error("credit was exceeded")]
    FlowControl,
    /// No HELLO came in time.
    #[error("no HELLO came in time")]
    HelloTimeout,
    /// Nothing came for too long.
    #[error("nothing was heard for too long")]
    Silent,
}

impl LaneError {
    /// Returns the code for the close reason, logs and metrics. `None`: the lane is lost, and no rule was broken.
    #[must_use]
    pub const fn code(&self) -> Option<Code> {
        match self {
            Self::Frame(_) | Self::Order(_) | Self::HelloTimeout => Some(Code::Protocol),
            Self::FlowControl => Some(Code::FlowControl),
            Self::Silent => None,
        }
    }
}

impl Lane {
    /// Returns a lane whose handshake ended at `now`. Its HELLO waits for the writer.
    #[must_use]
    pub fn new(role: Role, config: LaneConfig, memory: Arc<Memory>, now: u64) -> Self {
        let hello = Hello {
            instance: &config.instance,
            streams_max: config.streams_max,
            window: memory.limits().window,
            head_bytes_max: config.head_bytes_max,
            ping_ms: u32::try_from(config.ping / 1000).unwrap_or(u32::MAX),
            drain_ms: config.drain_ms,
            build: &config.build,
            ..Hello::default()
        };
        let mut control = Control::default();
        control.set_hello(&hello);
        Self {
            role,
            last_opened: if role == Role::Gateway {
                config.first_stream.saturating_sub(1)
            } else {
                0
            },
            config,
            memory,
            peer: None,
            streams: HashMap::new(),
            grown: Vec::new(),
            schedule: Schedule::default(),
            control,
            events: VecDeque::new(),
            is_draining: false,
            went_away: None,
            is_over: false,
            began_at: now,
            heard_at: now,
            pinged_at: now,
        }
    }

    /// Returns the next event. The caller takes all of them after each call that changes the lane.
    pub fn poll(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Notes that bytes came, whether or not they complete a message.
    pub fn heard(&mut self, now: u64) {
        self.heard_at = now;
    }

    /// Does all that is due at `now`; to be called about every second. Queues a ping, and takes growth back from streams
    /// whose consumers take nothing.
    ///
    /// # Errors
    /// [`LaneError::HelloTimeout`], [`LaneError::Silent`]: the lane is over, as after [`Self::lost`].
    pub fn tick(&mut self, now: u64) -> Result<(), LaneError> {
        if self.is_over {
            return Ok(());
        }
        let is_late = self.peer.is_none() && now >= self.began_at + self.config.hello_timeout;
        if is_late || now >= self.heard_at + self.config.silence_max {
            self.lost();
            return Err(if is_late { LaneError::HelloTimeout } else { LaneError::Silent });
        }
        if now >= self.pinged_at + self.config.ping {
            self.pinged_at = now;
            self.control.ping(now);
        }
        let Self { grown, streams, .. } = self;
        grown.retain(|number| streams.get_mut(number).is_some_and(|stream| stream.tick(now)));
        Ok(())
    }

    /// Queues GOAWAY: this side takes or opens no further streams. Open streams go on, and the peer is told that they get
    /// `drain_ms` milliseconds.
    pub fn go_away(&mut self, code: Code, drain_ms: u32) {
        self.is_draining = true;
        self.control.go_away(code, drain_ms);
    }

    /// Queues HEALTH of an agent. It replaces one that waits still.
    pub fn set_health(&mut self, health: &Health<'_>) {
        if self.role == Role::Agent {
            self.control.set_health(health);
        }
    }

    /// Ends the lane, whose connection is gone: open streams end. Bytes of streams that are complete can still be taken.
    pub fn lost(&mut self) {
        self.is_over = true;
        self.schedule.clear();
        self.control = Control::default();
        let Self { streams, events, .. } = self;
        let mut ended: Vec<_> = streams
            .extract_if(|_, stream| !stream.is_left_after_lane())
            .filter(|(_, stream)| stream.phase == Phase::Open)
            .map(|(number, stream)| (number, !stream.is_opened))
            .collect();
        ended.sort_unstable();
        events.extend(ended.into_iter().map(|(number, not_dispatched)| {
            Event::Ended(number, End::LaneLost { not_dispatched })
        }));
    }

    /// Returns whether the lane has ended.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Returns the streams that the lane knows: open ones, and ended ones whose last bytes or frames wait still.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Returns the memory of all that waits in the lane: received bytes, bytes to send, heads and trailers.
    #[must_use]
    pub fn buffered_bytes(&self) -> usize {
        self.streams.values().map(Stream::heap_bytes).sum()
    }

    /// Returns the stream with waiting bytes that is longest without progress, and the time of its last progress. A
    /// process without memory for a new stream may reset it, as [`Code::SlowReader`]. Looks at every stream.
    #[must_use]
    pub fn slowest(&self) -> Option<(u32, u64)> {
        let open = self.streams.iter().filter(|(_, stream)| stream.is_stuck());
        open.map(|(number, stream)| (*number, stream.progress_at()))
            .min_by_key(|(number, at)| (*at, *number))
    }

    /// Ends a stream of which both directions have ended, and forgets it once no byte or frame of it waits.
    fn settle(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.phase == Phase::Open && stream.is_complete() {
            stream.phase = Phase::Closed;
            self.events.push_back(Event::Ended(number, End::Complete));
        }
        if stream.is_forgettable() {
            self.forget(number);
        }
    }

    fn forget(&mut self, number: u32) {
        if let Some(stream) = self.streams.remove(&number) {
            self.schedule.remove(number, stream.list);
            self.control.remove(number, stream.is_due);
        }
    }

    /// Resets a stream whose frames the peer has to expect: it ends here at once, and RESET waits for the writer.
    fn reset_here(&mut self, number: u32, frame: Frame<'_>, code: Code) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        match stream.phase {
            Phase::Open => {
                self.events.push_back(Event::Ended(number, End::ResetHere(code)));
                if stream.is_opened {
                    stream.begin_reset(&frame);
                    self.control.due(number, &mut stream.is_due);
                } else {
                    self.forget(number);
                }
            }
            Phase::Closed => {
                stream.abandon();
                self.settle(number);
            }
            Phase::Resetting => {}
        }
    }

    fn is_of_gateway(&self) -> bool {
        self.role == Role::Gateway
    }
}

/// One second, in microseconds.
const SECOND: u64 = 1_000_000;
