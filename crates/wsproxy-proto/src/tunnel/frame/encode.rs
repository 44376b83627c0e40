//! Frames into the message that carries them; knows no batch.

use super::{
    BLOCKED, Data, DataFlag, END, Frame, HEADER_BYTES, HEALTH_TEXT_BYTES_MAX, Head, Health,
    MESSAGE_BYTES_MAX, OPEN_EXPECT, OPEN_LONG, OPEN_RETRIED, OPEN_UPGRADE, Open, RESET_HEAD_SENT,
    RESET_NOT_DISPATCHED, RESET_STOP, Reset, Source, StreamFrame, is_credit, kind,
};
use crate::tunnel::{STREAM_MAX, fields};

/// Failure of [`Frame::encode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The payload would exceed [`PAYLOAD_BYTES_MAX`]; of a head: `head_too_large`.
    #[error("the frame is too large")]
    TooLarge,
    /// A field has a value that a decoder refuses.
    #[error("the frame is invalid")]
    Invalid,
}

impl Frame<'_> {
    /// Appends the frame to a message. Texts that are too long are cut.
    ///
    /// # Errors
    /// [`EncodeError`]; the message is then as before.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let at = out.len();
        let (stream, kind, flags) = match self {
            Self::Hello(_) => (0, kind::HELLO, 0),
            Self::Ping(_) => (0, kind::PING, 0),
            Self::Pong(_) => (0, kind::PONG, 0),
            Self::GoAway(_) => (0, kind::GOAWAY, 0),
            Self::Health(_) => (0, kind::HEALTH, 0),
            Self::Stream(stream, frame) => (*stream, frame.kind(), frame.flags()),
        };
        if !self.is_valid() {
            return Err(EncodeError::Invalid);
        }
        out.extend_from_slice(&stream.to_be_bytes());
        out.extend_from_slice(&[kind, flags, 0, 0]);
        match self {
            Self::Hello(hello) => hello.encode(out),
            Self::Ping(number) => out.extend_from_slice(&number.to_be_bytes()),
            Self::Pong(pong) => {
                out.extend_from_slice(&pong.number.to_be_bytes());
                out.extend_from_slice(&pong.waited_us.to_be_bytes());
            }
            Self::GoAway(go_away) => {
                out.extend_from_slice(&go_away.last_stream.to_be_bytes());
                out.extend_from_slice(&go_away.code.number().to_be_bytes());
                out.extend_from_slice(&go_away.drain_ms.to_be_bytes());
            }
            Self::Health(health) => put_health(health, out),
            Self::Stream(_, frame) => frame.put(out),
        }
        let Ok(length) = u16::try_from(out.len() - at - HEADER_BYTES) else {
            out.truncate(at);
            return Err(EncodeError::TooLarge);
        };
        out[at + HEADER_BYTES - 2..at + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    fn is_valid(&self) -> bool {
        match self {
            Self::Hello(hello) => hello.is_valid(),
            Self::GoAway(go_away) => go_away.last_stream <= STREAM_MAX,
            Self::Ping(_) | Self::Pong(_) | Self::Health(_) => true,
            Self::Stream(stream, frame) => {
                (1..=STREAM_MAX).contains(stream)
                    && match frame {
                        StreamFrame::Open(open) => open.is_valid(),
                        StreamFrame::Head(head) => head.is_valid(),
                        StreamFrame::Data(data) => data.is_valid(),
                        StreamFrame::Credit(bytes) => is_credit(*bytes),
                        StreamFrame::Trailers(_) | StreamFrame::Reset(_) => true,
                    }
            }
        }
    }
}

/// Appends the header of a DATA frame, whose `length` bytes the caller appends. They are at most 16 KiB.
pub(crate) fn data_header(stream: u32, length: usize, flag: DataFlag, out: &mut Vec<u8>) {
    let flags = StreamFrame::Data(Data { bytes: &[], flag }).flags();
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[kind::DATA, flags]);
    out.extend_from_slice(&(length as u16).to_be_bytes());
}

impl StreamFrame<'_> {
    const fn kind(&self) -> u8 {
        match self {
            Self::Open(_) => kind::OPEN,
            Self::Head(_) => kind::HEAD,
            Self::Data(_) => kind::DATA,
            Self::Trailers(_) => kind::TRAILERS,
            Self::Credit(_) => kind::CREDIT,
            Self::Reset(_) => kind::RESET,
        }
    }

    const fn flags(&self) -> u8 {
        match self {
            Self::Open(Open { end: true, .. })
            | Self::Head(Head { end: true, .. })
            | Self::Data(Data { flag: DataFlag::End, .. }) => END,
            Self::Data(Data { flag: DataFlag::Blocked, .. }) => BLOCKED,
            _ => 0,
        }
    }

    /// Appends the payload.
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Open(open) => put_open(open, out),
            Self::Head(head) => {
                out.extend_from_slice(&head.status.to_be_bytes());
                out.push((head.source == Source::Agent).into());
                out.extend_from_slice(head.headers.as_bytes());
            }
            Self::Data(data) => out.extend_from_slice(data.bytes),
            Self::Trailers(headers) => out.extend_from_slice(headers.as_bytes()),
            Self::Credit(bytes) => out.extend_from_slice(&bytes.to_be_bytes()),
            Self::Reset(reset) => put_reset(reset, out),
        }
    }
}

/// Appends the payload of OPEN. A path that is longer than its length can say makes the payload too large.
fn put_open(open: &Open<'_>, out: &mut Vec<u8>) {
    let flags = [
        (open.upgrade, OPEN_UPGRADE),
        (open.long, OPEN_LONG),
        (open.expect, OPEN_EXPECT),
        (open.retried, OPEN_RETRIED),
    ];
    out.push(flags_of(&flags));
    out.extend_from_slice(&open.head_ms.to_be_bytes());
    fields::put_long(IDENTITY, out);
    fields::put_short(open.method, out);
    fields::put_long(open.path, out);
    out.extend_from_slice(open.headers.as_bytes());
}

fn put_reset(reset: &Reset<'_>, out: &mut Vec<u8>) {
    let flags = [
        (reset.not_dispatched, RESET_NOT_DISPATCHED),
        (reset.head_sent, RESET_HEAD_SENT),
        (reset.stop, RESET_STOP),
    ];
    out.extend_from_slice(&reset.code.number().to_be_bytes());
    out.push(flags_of(&flags));
    out.extend_from_slice(&reset.retry_after_ms.to_be_bytes());
    out.extend_from_slice(fields::start(reset.message, MESSAGE_BYTES_MAX).as_bytes());
}

fn put_health(health: &Health<'_>, out: &mut Vec<u8>) {
    out.push(health.upstream_ok.into());
    out.extend_from_slice(&health.upstream_round_trip_us.to_be_bytes());
    out.extend_from_slice(&health.streams.to_be_bytes());
    out.extend_from_slice(&health.memory_bytes.to_be_bytes());
    out.extend_from_slice(&health.disk_free_bytes.to_be_bytes());
    out.extend_from_slice(fields::start(health.text, HEALTH_TEXT_BYTES_MAX).as_bytes());
}

fn flags_of(flags: &[(bool, u8)]) -> u8 {
    flags.iter().filter(|(is_set, _)| *is_set).fold(0, |sum, (_, flag)| sum | flag)
}

/// The identity block, which is reserved.
const IDENTITY: &[u8] = &[];
