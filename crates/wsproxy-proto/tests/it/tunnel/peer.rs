//! A lane whose peer is written by hand, frame by frame.

use std::sync::Arc;

use wsproxy_proto::tunnel::{
    event::Event,
    frame::{Data, DataFlag, Frame, Frames, Head, Source, StreamFrame},
    headers::Headers,
    hello::Hello,
    lane::{Lane, LaneConfig, LaneError, Role},
    memory::{Memory, MemoryLimits},
};

pub(crate) struct Tested {
    pub(crate) lane: Lane,
    pub(crate) now: u64,
}

impl Tested {
    pub(crate) fn new(role: Role) -> Self {
        Self::with(role, LaneConfig::default(), MemoryLimits::default())
    }

    /// Returns a lane that has had the peer's HELLO, and has written its own.
    pub(crate) fn with(role: Role, config: LaneConfig, limits: MemoryLimits) -> Self {
        let mut tested = Self { lane: Lane::new(role, config, Memory::new(limits), 0), now: 0 };
        assert_eq!(tested.say(Frame::Hello(Hello::default())), Ok(()));
        assert!(matches!(tested.events()[..], [Event::Ready(_)]));
        assert!(matches!(tested.heard()[..], [Said::Other(_)]));
        tested
    }

    pub(crate) fn say(&mut self, frame: Frame<'_>) -> Result<(), LaneError> {
        let mut message = Vec::new();
        frame.encode(&mut message).unwrap();
        self.lane.receive(self.now, &message)
    }

    pub(crate) fn say_of(&mut self, stream: u32, frame: StreamFrame<'_>) -> Result<(), LaneError> {
        self.say(Frame::Stream(stream, frame))
    }

    pub(crate) fn data(
        &mut self,
        stream: u32,
        bytes: &[u8],
        flag: DataFlag,
    ) -> Result<(), LaneError> {
        self.say_of(stream, StreamFrame::Data(Data { bytes, flag }))
    }

    pub(crate) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.lane.poll()).collect()
    }

    /// Returns the frames of the next batch.
    pub(crate) fn heard(&mut self) -> Vec<Said> {
        let mut message = Vec::new();
        if !self.lane.write_batch(self.now, &mut message) {
            return Vec::new();
        }
        let frames: Result<Vec<_>, _> = Frames::new(&message).unwrap().collect();
        frames.unwrap().iter().map(Said::new).collect()
    }
}

/// Frame that the lane wrote, as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Open(u32),
    Head(u32, u16),
    Data(u32, usize, DataFlag),
    Trailers(u32),
    Credit(u32, u32),
    /// Label of the code, whether the stream was not dispatched, whether the head was sent, whether it is STOP.
    Reset(u32, &'static str, bool, bool, bool),
    /// Frame of the lane.
    Other(String),
}

impl Said {
    fn new(frame: &Frame<'_>) -> Self {
        let Frame::Stream(stream, frame) = *frame else { return Self::Other(format!("{frame:?}")) };
        match frame {
            StreamFrame::Open(_) => Self::Open(stream),
            StreamFrame::Head(head) => Self::Head(stream, head.status),
            StreamFrame::Data(data) => Self::Data(stream, data.bytes.len(), data.flag),
            StreamFrame::Trailers(_) => Self::Trailers(stream),
            StreamFrame::Credit(bytes) => Self::Credit(stream, bytes),
            StreamFrame::Reset(reset) => {
                let code = reset.code.label();
                Self::Reset(stream, code, reset.not_dispatched, reset.head_sent, reset.stop)
            }
        }
    }
}

pub(crate) fn head(status: u16, end: bool) -> Head<'static> {
    Head { end, status, source: Source::Upstream, headers: Headers::default() }
}

pub(crate) fn memory(bytes_max: u64) -> Arc<Memory> {
    Memory::new(MemoryLimits { bytes_max, ..MemoryLimits::default() })
}
