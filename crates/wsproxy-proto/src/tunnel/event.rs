//! Consequences of a lane's calls and of its peer's frames; knows no frames.

use bytes::Bytes;

use crate::tunnel::{
    code::Code,
    frame::{GoAway, Head, Open, Reset, Source},
    headers::SharedHeaders,
    hello::Hello,
};

/// News of a lane, for the tasks that its streams belong to.
///
/// Each stream that `open` returned or that is [`Self::Opened`] has exactly one [`Self::Ended`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The peer's HELLO came: a gateway may open streams.
    Ready(Peer),
    /// The gateway opened a stream.
    Opened(u32, Request),
    /// The agent sent a head: first perhaps one with status 100, then the final one.
    Answered(u32, Answer),
    /// The consumer of the stream, who found nothing, can take bytes or the end.
    Readable(u32),
    /// The producer of the stream, who kept a rest, can put bytes.
    Writable(u32),
    /// The peer takes no more of the producer's bytes: what waited is dropped.
    Stopped(u32),
    /// The stream ended. Unless the end is [`End::Complete`], neither bytes nor an end of the body come from it.
    Ended(u32, End),
    /// The peer answered a ping.
    RoundTrip {
        /// Time on the way there and back, in microseconds, without the time in the peer's writer.
        us: u64,
    },
    /// State of the agent.
    Health(AgentHealth),
    /// The peer takes or opens no further streams.
    GoAway(GoAway),
}

/// Peer of a lane, as its HELLO says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Numbers of its HELLO; its texts are empty here.
    pub hello: Hello<'static>,
    /// Id of the gateway's instance.
    pub instance: Box<str>,
    /// Version of the program.
    pub build: Box<str>,
}

impl Peer {
    pub(crate) fn new(hello: &Hello<'_>) -> Self {
        Self {
            hello: Hello { instance: "", build: "", ..*hello },
            instance: hello.instance.into(),
            build: hello.build.into(),
        }
    }
}

/// Request of a stream. Its parts share one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags on the wire")]
pub struct Request {
    /// Whether there is no body.
    pub end: bool,
    /// Whether the answer may be a head with status 101.
    pub upgrade: bool,
    /// Whether the stream may last long.
    pub long: bool,
    /// Whether the client waits for a head with status 100.
    pub expect: bool,
    /// Whether the request was sent before, on another lane.
    pub retried: bool,
    /// Time left for the head, in milliseconds; 0: no limit.
    pub head_ms: u32,
    /// Method.
    pub method: Bytes,
    /// Path with its query.
    pub path: Bytes,
    /// Headers.
    pub headers: SharedHeaders,
}

impl Request {
    pub(crate) fn new(open: &Open<'_>) -> Self {
        let (method, path) = (open.method.len(), open.method.len() + open.path.len());
        let all = [open.method, open.path, open.headers.as_bytes()].concat();
        let all = Bytes::from(all);
        Self {
            end: open.end,
            upgrade: open.upgrade,
            long: open.long,
            expect: open.expect,
            retried: open.retried,
            head_ms: open.head_ms,
            method: all.slice(..method),
            path: all.slice(method..path),
            headers: SharedHeaders::of_valid(all.slice(path..)),
        }
    }
}

/// Head of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether there is no body.
    pub end: bool,
    /// Status.
    pub status: u16,
    /// Origin of the answer.
    pub source: Source,
    /// Headers.
    pub headers: SharedHeaders,
}

impl Answer {
    pub(crate) fn new(head: &Head<'_>) -> Self {
        Self {
            end: head.end,
            status: head.status,
            source: head.source,
            headers: SharedHeaders::new(head.headers),
        }
    }
}

/// End of a stream, as this side learnt it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Both directions came to their ends. Bytes that wait for the consumer are still there.
    Complete,
    /// The peer reset the stream.
    Reset(ResetByPeer),
    /// This side reset the stream.
    ResetHere(Code),
    /// The agent goes away, and never dispatched the stream.
    GoneAway(Code),
    /// The lane ended.
    LaneLost {
        /// Whether the request was never written, so that it reached no upstream.
        not_dispatched: bool,
    },
}

impl End {
    /// Returns whether the request reached no upstream and never will: any method may be sent again.
    #[must_use]
    pub const fn is_not_dispatched(&self) -> bool {
        match self {
            Self::Reset(reset) => reset.not_dispatched,
            Self::GoneAway(_) => true,
            Self::LaneLost { not_dispatched } => *not_dispatched,
            Self::Complete | Self::ResetHere(_) => false,
        }
    }
}

/// RESET that the peer sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResetByPeer {
    /// Reason.
    pub code: Code,
    /// Whether the request reached no upstream and never will.
    pub not_dispatched: bool,
    /// Whether the peer had sent a final head.
    pub head_sent: bool,
    /// Time after which another try makes sense, in milliseconds; 0: not said.
    pub retry_after_ms: u32,
    /// Text for logs.
    pub message: Box<str>,
}

impl ResetByPeer {
    pub(crate) fn new(reset: &Reset<'_>) -> Self {
        Self {
            code: reset.code,
            not_dispatched: reset.not_dispatched,
            head_sent: reset.head_sent,
            retry_after_ms: reset.retry_after_ms,
            message: reset.message.into(),
        }
    }
}

/// HEALTH that an agent sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentHealth {
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
    /// Text for people.
    pub text: Box<str>,
}
