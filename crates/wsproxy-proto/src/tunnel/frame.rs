//! Frames of the tunnel, each by itself: borrowed from a message, and written into one. Knows no stream's state.

use crate::tunnel::{
    DATA_BYTES_MAX, WINDOW_MAX, code::Code, fields, headers::Headers, hello::Hello,
};

mod decode;
mod encode;

pub use decode::{FrameError, Frames};
pub use encode::EncodeError;

pub(crate) use encode::data_header;

/// One frame (§2): of the lane, or of a stream with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// HELLO: the first frame of its sender.
    Hello(Hello<'a>),
    /// PING with a number that comes back in PONG.
    Ping(u64),
    /// Answer to PING.
    Pong(Pong),
    /// GOAWAY: no further streams.
    GoAway(GoAway),
    /// HEALTH of an agent.
    Health(Health<'a>),
    /// Frame of the stream with this number, 1 to [`STREAM_MAX`](crate::tunnel::STREAM_MAX).
    Stream(u32, StreamFrame<'a>),
}

/// Frame of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamFrame<'a> {
    /// OPEN: a request.
    Open(Open<'a>),
    /// HEAD of an answer.
    Head(Head<'a>),
    /// DATA of a body, or of an upgraded connection.
    Data(Data<'a>),
    /// TRAILERS, which end their sender's direction.
    Trailers(Headers<'a>),
    /// CREDIT: bytes that the receiver of the frame may send, in addition to its earlier credit;
    /// 1 to 2^31 - 1.
    Credit(u32),
    /// RESET of both directions, or with STOP of one.
    Reset(Reset<'a>),
}

/// OPEN: a request without its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open<'a> {
    /// Whether no body follows (flag END).
    pub end: bool,
    /// Whether the answer may be a head with status 101.
    pub upgrade: bool,
    /// Whether the stream may last long: no deadline of its body.
    pub long: bool,
    /// Whether the client waits for a head with status 100.
    pub expect: bool,
    /// Whether the request was sent before, on another lane.
    pub retried: bool,
    /// Time left for the head, in milliseconds; 0: no limit.
    pub head_ms: u32,
    /// Method: a token of HTTP, at most 255 bytes.
    pub method: &'a [u8],
    /// Path with its query, as the client wrote it; begins with `/`, has no blanks and no control bytes.
    pub path: &'a [u8],
    /// Headers of the request.
    pub headers: Headers<'a>,
}

impl<'a> Open<'a> {
    /// Returns a request whose body follows, without options, headers or a limit of time.
    #[must_use]
    pub const fn new(method: &'a [u8], path: &'a [u8]) -> Self {
        Self {
            end: false,
            upgrade: false,
            long: false,
            expect: false,
            retried: false,
            head_ms: 0,
            method,
            path,
            headers: Headers::EMPTY,
        }
    }

    /// Bytes of the payload.
    pub(crate) const fn payload_bytes(&self) -> usize {
        OPEN_FIXED_BYTES + self.method.len() + self.path.len() + self.headers.as_bytes().len()
    }

    fn is_valid(&self) -> bool {
        let (method, path) = (self.method, self.path);
        let is_method =
            (1..=255).contains(&method.len()) && method.iter().all(|byte| fields::is_token(*byte));
        let is_plain = path.iter().all(|byte| *byte > b' ' && *byte != 0x7f);
        is_method && path.starts_with(b"/") && is_plain
    }
}

/// HEAD: the status and the headers of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head<'a> {
    /// Whether no body follows (flag END).
    pub end: bool,
    /// Status: 100, 101, or 200 to 999.
    pub status: u16,
    /// Origin of the answer.
    pub source: Source,
    /// Headers of the answer.
    pub headers: Headers<'a>,
}

impl Head<'_> {
    /// Bytes of the payload.
    pub(crate) const fn payload_bytes(&self) -> usize {
        HEAD_FIXED_BYTES + self.headers.as_bytes().len()
    }

    /// A head with status 100 has another one behind it, and so no end.
    const fn is_valid(&self) -> bool {
        match self.status {
            100 => !self.end,
            101 | 200..=999 => true,
            _ => false,
        }
    }
}

/// Origin of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The agent's upstream.
    Upstream,
    /// The agent itself.
    Agent,
}

/// DATA: bytes of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data<'a> {
    /// At most [`DATA_BYTES_MAX`] bytes; none only with END or BLOCKED.
    pub bytes: &'a [u8],
    /// Flag that is set, of which there is at most one.
    pub flag: DataFlag,
}

impl Data<'_> {
    fn is_valid(&self) -> bool {
        self.bytes.len() <= DATA_BYTES_MAX
            && (!self.bytes.is_empty() || self.flag != DataFlag::None)
    }
}

/// Flag of DATA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFlag {
    /// The sender may send more.
    None,
    /// The sender's direction ends here.
    End,
    /// The sender has more, and no credit left for it.
    Blocked,
}

/// RESET: the end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset<'a> {
    /// Reason.
    pub code: Code,
    /// Whether the request reached no upstream and never will.
    pub not_dispatched: bool,
    /// Whether the sender had sent a final head.
    pub head_sent: bool,
    /// Whether only the direction towards the sender ends: the sender takes no more of the body.
    pub stop: bool,
    /// Time after which another try makes sense, in milliseconds; 0: not said.
    pub retry_after_ms: u32,
    /// Text for logs, at most [`MESSAGE_BYTES_MAX`] bytes; a longer one is cut when it is written.
    pub message: &'a str,
}

impl Reset<'_> {
    /// Returns a reset of both directions with nothing but its reason.
    #[must_use]
    pub const fn new(code: Code) -> Self {
        Self {
            code,
            not_dispatched: false,
            head_sent: false,
            stop: false,
            retry_after_ms: 0,
            message: "",
        }
    }
}

/// PONG: the answer to PING.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pong {
    /// Number of the ping.
    pub number: u64,
    /// Time for which the answer waited for the writer, in microseconds.
    pub waited_us: u32,
}

/// GOAWAY: the sender takes or opens no further streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoAway {
    /// Highest stream number that the sender has accepted; of an agent, streams above it were not dispatched.
    pub last_stream: u32,
    /// Reason.
    pub code: Code,
    /// Time that open streams are given, in milliseconds.
    pub drain_ms: u32,
}

/// HEALTH: the state of an agent and of its upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health<'a> {
    /// Whether the upstream is healthy.
    pub upstream_ok: bool,
    /// Duration of the last probe of the upstream, in microseconds.
    pub upstream_round_trip_us: u32,
    /// Streams in flight.
    pub streams: u32,
    /// Memory of the agent's process, in bytes.
    pub memory_bytes: u64,
    /// Free space of the agent's disk, in bytes.
    pub disk_free_bytes: u64,
    /// Text for people, at most [`HEALTH_TEXT_BYTES_MAX`] bytes; a longer one is cut when it is written.
    pub text: &'a str,
}

/// Returns whether CREDIT may add so many bytes.
fn is_credit(bytes: u32) -> bool {
    (1..=WINDOW_MAX).contains(&bytes)
}

/// Numbers of the frames' types.
pub(crate) mod kind {
    pub(crate) const HELLO: u8 = 1;
    pub(crate) const OPEN: u8 = 2;
    pub(crate) const HEAD: u8 = 3;
    pub(crate) const DATA: u8 = 4;
    pub(crate) const TRAILERS: u8 = 5;
    pub(crate) const CREDIT: u8 = 6;
    pub(crate) const RESET: u8 = 7;
    pub(crate) const PING: u8 = 9;
    pub(crate) const PONG: u8 = 10;
    pub(crate) const GOAWAY: u8 = 11;
    pub(crate) const HEALTH: u8 = 12;
}

/// Size of a header, in bytes (§2).
pub const HEADER_BYTES: usize = 8;

/// Upper bound of a payload, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = u16::MAX as usize;

/// Upper bound of the text of RESET, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 512;

/// Upper bound of the text of HEALTH, in bytes.
pub const HEALTH_TEXT_BYTES_MAX: usize = 128;

const END: u8 = 1;
const BLOCKED: u8 = 2;

const OPEN_UPGRADE: u8 = 1;
const OPEN_LONG: u8 = 2;
const OPEN_EXPECT: u8 = 4;
const OPEN_RETRIED: u8 = 8;

const RESET_NOT_DISPATCHED: u8 = 1;
const RESET_HEAD_SENT: u8 = 2;
const RESET_STOP: u8 = 4;

/// Bytes of OPEN's payload beside the method, the path and the headers.
const OPEN_FIXED_BYTES: usize = 10;

/// Bytes of HEAD's payload beside the headers.
const HEAD_FIXED_BYTES: usize = 3;
