//! Frames of the peer, one after the other: judged, and turned into events. Knows no socket.

use super::{
    Lane, LaneError, PeerLimits,
    stream::{Phase, Stream},
};
use crate::tunnel::{
    code::Code,
    direction::{Accepted, OutOfOrder},
    event::{AgentHealth, Answer, End, Event, Peer, Request, ResetByPeer},
    frame::{Data, DataFlag, Frame, Frames, GoAway, Head, Health, Open, Reset, StreamFrame},
    headers::{Headers, SharedHeaders},
    hello::Hello,
    receiving::CreditBroken,
    sending::CreditOverflow,
};

impl From<OutOfOrder> for LaneError {
    fn from(_: OutOfOrder) -> Self {
        Self::Order("a frame is out of the order of its stream")
    }
}

impl From<CreditBroken> for LaneError {
    fn from(_: CreditBroken) -> Self {
        Self::FlowControl
    }
}

impl From<CreditOverflow> for LaneError {
    fn from(_: CreditOverflow) -> Self {
        Self::FlowControl
    }
}

impl Lane {
    /// Takes a binary message of the peer. Whatever it holds is taken at once; nothing waits for the writer.
    ///
    /// # Errors
    /// [`LaneError`]: the lane is over, as after [`Self::lost`]. The caller closes the connection with close code 1002.
    pub fn receive(&mut self, now: u64, message: &[u8]) -> Result<(), LaneError> {
        if self.is_over {
            return Ok(());
        }
        self.heard(now);
        let read = self.read(now, message);
        if read.is_err() {
            self.lost();
        }
        read
    }

    fn read(&mut self, now: u64, message: &[u8]) -> Result<(), LaneError> {
        for frame in Frames::new(message)? {
            let frame = frame?;
            let is_hello = matches!(frame, Frame::Hello(_));
            if is_hello == self.peer.is_some() {
                return Err(LaneError::Order("HELLO is the first frame, and comes once"));
            }
            match frame {
                Frame::Hello(hello) => self.on_hello(&hello)?,
                Frame::Ping(number) => self.control.pong(number, now),
                Frame::Pong(pong) => {
                    let waited = u64::from(pong.waited_us);
                    // The number of a ping is its time. A pong to no ping has a time of any kind.
                    if pong.number == self.pinged_at {
                        let us = now.saturating_sub(pong.number).saturating_sub(waited);
                        self.events.push_back(Event::RoundTrip { us });
                    }
                }
                Frame::GoAway(go_away) => self.on_go_away(go_away),
                Frame::Health(health) => self.on_health(&health)?,
                Frame::Stream(number, StreamFrame::Open(open)) => {
                    self.on_open(now, number, &open)?
                }
                Frame::Stream(number, frame) => self.on_stream(number, frame)?,
            }
        }
        Ok(())
    }

    fn on_hello(&mut self, hello: &Hello<'_>) -> Result<(), LaneError> {
        if hello.agreed_version(&Hello::default()).is_none() {
            return Err(LaneError::Order("no version is common"));
        }
        self.peer = Some(PeerLimits {
            streams_max: hello.streams_max,
            window: hello.window,
            head_bytes_max: hello.head_bytes_max,
        });
        self.events.push_back(Event::Ready(Peer::new(hello)));
        Ok(())
    }

    fn on_go_away(&mut self, go_away: GoAway) {
        if self.is_of_gateway() {
            self.is_draining = true;
            self.end_above(go_away.last_stream, go_away.code);
        }
        self.events.push_back(Event::GoAway(go_away));
    }

    fn on_health(&mut self, health: &Health<'_>) -> Result<(), LaneError> {
        if !self.is_of_gateway() {
            return Err(LaneError::Order("HEALTH of a gateway"));
        }
        self.events.push_back(Event::Health(AgentHealth {
            upstream_ok: health.upstream_ok,
            upstream_round_trip_us: health.upstream_round_trip_us,
            streams: health.streams,
            memory_bytes: health.memory_bytes,
            disk_free_bytes: health.disk_free_bytes,
            text: health.text.into(),
        }));
        Ok(())
    }

    fn on_open(&mut self, now: u64, number: u32, open: &Open<'_>) -> Result<(), LaneError> {
        if self.is_of_gateway() || number.is_multiple_of(2) || number <= self.last_opened {
            return Err(LaneError::Order("OPEN of an agent, or of a number that does not rise"));
        }
        self.last_opened = number;
        if self.went_away.is_some() {
            // The gateway knows from GOAWAY that the stream was not dispatched.
            return Ok(());
        }
        let Some(peer) = self.peer else { return Ok(()) };
        let refusal = if open.payload_bytes() > self.config.head_bytes_max as usize {
            Code::HeadTooLarge
        } else if self.streams.len() >= self.config.streams_max as usize {
            Code::Refused
        } else if let Some(share) = self.memory.place() {
            self.streams.insert(number, Stream::of_agent(now, open, peer.window, share));
            self.events.push_back(Event::Opened(number, Request::new(open)));
            return Ok(());
        } else {
            Code::Overloaded
        };
        if self.control.refuse(number, refusal) > self.config.streams_max.max(1) as usize {
            return Err(LaneError::Order("more streams were opened than may be"));
        }
        Ok(())
    }

    fn on_stream(&mut self, number: u32, frame: StreamFrame<'_>) -> Result<(), LaneError> {
        let Some(stream) = self.streams.get_mut(&number) else {
            let was_opened = !number.is_multiple_of(2) && number <= self.last_opened;
            let never = LaneError::Order("a frame of a stream that was never opened");
            return was_opened.then_some(()).ok_or(never);
        };
        if !stream.is_opened {
            return Err(LaneError::Order("a frame of a stream that was never opened"));
        }
        if stream.phase != Phase::Open {
            // The frame crossed the end. After RESET of both sides there is nothing to say.
            let is_reset = matches!(frame, StreamFrame::Reset(Reset { stop: false, .. }));
            if is_reset && stream.phase == Phase::Resetting {
                self.forget(number);
            }
            return Ok(());
        }
        match frame {
            StreamFrame::Open(_) => {}
            StreamFrame::Head(head) => self.on_head(number, &head)?,
            StreamFrame::Data(data) => self.on_data(number, data)?,
            StreamFrame::Trailers(trailers) => self.on_trailers(number, trailers)?,
            StreamFrame::Credit(bytes) => {
                if !stream.sending.is_over() && stream.sending.credit(bytes)? {
                    self.events.push_back(Event::Writable(number));
                }
            }
            StreamFrame::Reset(reset) => self.on_reset(number, &reset),
        }
        self.settle(number);
        Ok(())
    }

    fn on_head(&mut self, number: u32, head: &Head<'_>) -> Result<(), LaneError> {
        if !self.is_of_gateway() {
            return Err(LaneError::Order("HEAD of a gateway"));
        }
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        if stream.incoming.head(head.status, head.end, stream.is_upgrade)? == Accepted::Dropped {
            return Ok(());
        }
        if head.payload_bytes() > self.config.head_bytes_max as usize {
            self.reset(number, &Reset::new(Code::HeadTooLarge));
            return Ok(());
        }
        if head.end {
            // There is nothing to take.
            stream.abandon();
        }
        self.events.push_back(Event::Answered(number, Answer::new(head)));
        Ok(())
    }

    fn on_data(&mut self, number: u32, data: Data<'_>) -> Result<(), LaneError> {
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        let (end, is_blocked) = (data.flag == DataFlag::End, data.flag == DataFlag::Blocked);
        if stream.incoming.data(end)? == Accepted::Dropped {
            return Ok(());
        }
        stream.receiving.receive(data.bytes, is_blocked, &stream.share)?;
        if end {
            stream.end_incoming();
        }
        if (end || !data.bytes.is_empty()) && stream.wakes_consumer() {
            self.events.push_back(Event::Readable(number));
        } else if stream.is_consumer_waiting() {
            self.grow(number);
        }
        Ok(())
    }

    fn on_trailers(&mut self, number: u32, trailers: Headers<'_>) -> Result<(), LaneError> {
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        if stream.incoming.trailers()? == Accepted::Dropped {
            return Ok(());
        }
        if trailers.as_bytes().len() > self.config.head_bytes_max as usize {
            self.reset(number, &Reset::new(Code::HeadTooLarge));
            return Ok(());
        }
        stream.trailers = Some(SharedHeaders::new(trailers).into_bytes());
        stream.end_incoming();
        if stream.wakes_consumer() {
            self.events.push_back(Event::Readable(number));
        }
        Ok(())
    }

    fn on_reset(&mut self, number: u32, reset: &Reset<'_>) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if !reset.stop {
            self.events.push_back(Event::Ended(number, End::Reset(ResetByPeer::new(reset))));
            self.forget(number);
        } else if !stream.sending.is_over() {
            stream.outgoing.stop();
            stream.sending.close();
            stream.head = Vec::new();
            self.events.push_back(Event::Stopped(number));
        }
    }
}
