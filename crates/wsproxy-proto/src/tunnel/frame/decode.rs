//! One message into the frames that it holds, without an allocation; knows no order of frames.

use super::{
    BLOCKED, Data, DataFlag, END, Frame, GoAway, HEALTH_TEXT_BYTES_MAX, Head, Health,
    MESSAGE_BYTES_MAX, OPEN_EXPECT, OPEN_LONG, OPEN_RETRIED, OPEN_UPGRADE, Open, Pong,
    RESET_HEAD_SENT, RESET_NOT_DISPATCHED, RESET_STOP, Reset, Source, StreamFrame, is_credit, kind,
};
use crate::tunnel::{self, STREAM_MAX, code::Code, fields::Fields, headers::Headers, hello::Hello};

/// The frames of one binary message, in their order. Frames of types 64 to 127, none of which is known, are skipped.
///
/// After an error there are no further frames: the lane ends.
#[derive(Debug, Clone)]
pub struct Frames<'a> {
    rest: Fields<'a>,
}

impl<'a> Frames<'a> {
    /// Returns the frames of a message.
    ///
    /// # Errors
    /// [`FrameError::Message`].
    pub const fn new(message: &'a [u8]) -> Result<Self, FrameError> {
        if message.is_empty() || message.len() > tunnel::MESSAGE_BYTES_MAX {
            return Err(FrameError::Message);
        }
        Ok(Self { rest: Fields(message) })
    }

    fn read(&mut self) -> Result<Option<Frame<'a>>, FrameError> {
        while !self.rest.0.is_empty() {
            let header = self.header().ok_or(FrameError::Partial)?;
            let payload = self.rest.bytes(header.length.into()).ok_or(FrameError::Partial)?;
            if !(UNKNOWN_SKIPPED.contains(&header.kind)) {
                return frame(&header, payload).map(Some);
            }
        }
        Ok(None)
    }

    fn header(&mut self) -> Option<Header> {
        let rest = &mut self.rest;
        let (stream, kind) = (rest.u32()?, rest.u8()?);
        Some(Header { stream, kind, flags: rest.u8()?, length: rest.u16()? })
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read().transpose();
        if matches!(read, Some(Err(_))) {
            self.rest = Fields(&[]);
        }
        read
    }
}

/// Reason why a message holds no valid frames. Each ends the lane with [`Code::Protocol`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message is empty, or larger than [`MESSAGE_BYTES_MAX`](tunnel::MESSAGE_BYTES_MAX).
    #[error("a message is empty or too large")]
    Message,
    /// The message ends in the middle of a frame.
    #[error("a frame is cut")]
    Partial,
    /// The type is unknown, and none that may be skipped.
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    /// A frame of the lane has a stream's number, or a stream's frame no valid one.
    #[error("wrong stream number of frame type {0}")]
    StreamNumber(u8),
    /// Flags are set that this type does not have, or that exclude each other.
    #[error("bad flags of frame type {0}")]
    Flags(u8),
    /// The payload has another size than its fields, or a field has no valid value.
    #[error("bad payload of frame type {0}")]
    Payload(u8),
}

#[derive(Debug, Clone, Copy)]
struct Header {
    stream: u32,
    kind: u8,
    flags: u8,
    length: u16,
}

fn frame<'a>(header: &Header, payload: &'a [u8]) -> Result<Frame<'a>, FrameError> {
    let Header { stream, kind, flags, .. } = *header;
    let (is_of_lane, allowed) = match kind {
        kind::HELLO | kind::PING | kind::PONG | kind::GOAWAY | kind::HEALTH => (true, 0),
        kind::OPEN | kind::HEAD => (false, END),
        kind::DATA => (false, END | BLOCKED),
        kind::TRAILERS | kind::CREDIT | kind::RESET => (false, 0),
        _ => return Err(FrameError::UnknownType(kind)),
    };
    if is_of_lane != (stream == 0) || stream > STREAM_MAX {
        return Err(FrameError::StreamNumber(kind));
    }
    if flags & !allowed != 0 || flags == END | BLOCKED {
        return Err(FrameError::Flags(kind));
    }
    let end = flags & END != 0;
    let fields = Fields(payload);
    let of_stream = |frame| Frame::Stream(stream, frame);
    let frame = match kind {
        kind::HELLO => Hello::parse(payload).map(Frame::Hello),
        kind::PING => fields.last(Fields::u64).map(Frame::Ping),
        kind::PONG => fields.last(pong).map(Frame::Pong),
        kind::GOAWAY => fields.last(go_away).map(Frame::GoAway),
        kind::HEALTH => fields.last(health).map(Frame::Health),
        kind::OPEN => fields.last(|fields| open(fields, end)).map(StreamFrame::Open).map(of_stream),
        kind::HEAD => fields.last(|fields| head(fields, end)).map(StreamFrame::Head).map(of_stream),
        kind::DATA => data(payload, flags).map(StreamFrame::Data).map(of_stream),
        kind::TRAILERS => Headers::parse(payload).map(StreamFrame::Trailers).map(of_stream),
        kind::CREDIT => credit(fields).map(StreamFrame::Credit).map(of_stream),
        _ => fields.last(reset).map(StreamFrame::Reset).map(of_stream),
    };
    frame.ok_or(FrameError::Payload(kind))
}

fn pong(fields: &mut Fields<'_>) -> Option<Pong> {
    Some(Pong { number: fields.u64()?, waited_us: fields.u32()? })
}

fn go_away(fields: &mut Fields<'_>) -> Option<GoAway> {
    let (last_stream, code) = (fields.u32()?, fields.u16()?);
    let go_away = GoAway { last_stream, code: Code::from_number(code), drain_ms: fields.u32()? };
    (last_stream <= STREAM_MAX).then_some(go_away)
}

fn health<'a>(fields: &mut Fields<'a>) -> Option<Health<'a>> {
    Some(Health {
        upstream_ok: boolean(fields.u8()?)?,
        upstream_round_trip_us: fields.u32()?,
        streams: fields.u32()?,
        memory_bytes: fields.u64()?,
        disk_free_bytes: fields.u64()?,
        text: text(fields, HEALTH_TEXT_BYTES_MAX)?,
    })
}

fn open<'a>(fields: &mut Fields<'a>, end: bool) -> Option<Open<'a>> {
    let (flags, head_ms, identity_length) = (fields.u8()?, fields.u32()?, fields.u16()?);
    let (method, path) = (fields.short()?, fields.long()?);
    let headers = Headers::parse(rest(fields))?;
    let is_known = flags & !(OPEN_UPGRADE | OPEN_LONG | OPEN_EXPECT | OPEN_RETRIED) == 0;
    let open = Open {
        end,
        upgrade: flags & OPEN_UPGRADE != 0,
        long: flags & OPEN_LONG != 0,
        expect: flags & OPEN_EXPECT != 0,
        retried: flags & OPEN_RETRIED != 0,
        head_ms,
        method,
        path,
        headers,
    };
    (is_known && identity_length == 0 && open.is_valid()).then_some(open)
}

fn head<'a>(fields: &mut Fields<'a>, end: bool) -> Option<Head<'a>> {
    let (status, source) = (fields.u16()?, fields.u8()?);
    let source = if boolean(source)? { Source::Agent } else { Source::Upstream };
    let head = Head { end, status, source, headers: Headers::parse(rest(fields))? };
    head.is_valid().then_some(head)
}

fn data(bytes: &[u8], flags: u8) -> Option<Data<'_>> {
    let flag = match flags {
        END => DataFlag::End,
        BLOCKED => DataFlag::Blocked,
        _ => DataFlag::None,
    };
    let data = Data { bytes, flag };
    data.is_valid().then_some(data)
}

fn credit(fields: Fields<'_>) -> Option<u32> {
    fields.last(Fields::u32).filter(|bytes| is_credit(*bytes))
}

fn reset<'a>(fields: &mut Fields<'a>) -> Option<Reset<'a>> {
    let (code, flags) = (fields.u16()?, fields.u8()?);
    let is_known = flags & !(RESET_NOT_DISPATCHED | RESET_HEAD_SENT | RESET_STOP) == 0;
    let retry_after_ms = fields.u32()?;
    let message = text(fields, MESSAGE_BYTES_MAX)?;
    is_known.then_some(Reset {
        code: Code::from_number(code),
        not_dispatched: flags & RESET_NOT_DISPATCHED != 0,
        head_sent: flags & RESET_HEAD_SENT != 0,
        stop: flags & RESET_STOP != 0,
        retry_after_ms,
        message,
    })
}

const fn boolean(byte: u8) -> Option<bool> {
    match byte {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// Takes all that is left as a text.
fn text<'a>(fields: &mut Fields<'a>, bytes_max: usize) -> Option<&'a str> {
    str::from_utf8(rest(fields)).ok().filter(|text| text.len() <= bytes_max)
}

fn rest<'a>(fields: &mut Fields<'a>) -> &'a [u8] {
    std::mem::replace(fields, Fields(&[])).0
}

/// Types whose frames are skipped where they are unknown, as all of them are.
const UNKNOWN_SKIPPED: std::ops::RangeInclusive<u8> = 64..=127;
