//! Frames: their headers on the wire, and whole frames to send. Knows nothing of messages.

use bytes::Bytes;

use super::mask;
use crate::disconnect::Disconnect;

/// Our end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We dialled. The frames that we send are masked.
    Client,
    /// We were dialled. The frames that arrive are masked.
    Server,
}

/// Kind of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// UTF-8.
    Text,
    /// Any bytes.
    Binary,
}

/// Types of frames (RFC 6455, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// A further fragment of a message.
    Continuation = 0,
    /// Text message, or its first fragment.
    Text = 1,
    /// Binary message, or its first fragment.
    Binary = 2,
    /// Last frame of the sender.
    Close = 8,
    /// Request for a pong with the same payload.
    Ping = 9,
    /// Answer to a ping.
    Pong = 10,
}

impl Opcode {
    /// Returns whether this is close, ping or pong.
    #[must_use]
    pub const fn is_control(self) -> bool {
        self as u8 >= 8
    }

    const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }
}

impl From<Kind> for Opcode {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Text => Self::Text,
            Kind::Binary => Self::Binary,
        }
    }
}

/// Header of a frame: everything but its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whether this is the last fragment.
    pub fin: bool,
    /// RSV1: the message is compressed.
    pub compressed: bool,
    /// Type of the frame.
    pub opcode: Opcode,
    /// Masking key, where the payload is masked.
    pub mask: Option<[u8; 4]>,
    /// Number of bytes of payload that follow the header.
    pub payload_len: u64,
}

/// Header as it goes over the wire.
#[derive(Debug, Clone, Copy)]
pub struct EncodedHeader {
    bytes: [u8; HEADER_BYTES_MAX],
    len: u8,
}

impl AsRef<[u8]> for EncodedHeader {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Encodes `header` for the wire.
#[must_use]
pub fn encode_header(header: &Header) -> EncodedHeader {
    let mut bytes = [0; HEADER_BYTES_MAX];
    bytes[0] = u8::from(header.fin) << 7 | u8::from(header.compressed) << 6 | header.opcode as u8;
    let masked = u8::from(header.mask.is_some()) << 7;
    let mut len = 2;
    match header.payload_len {
        short @ 0..=125 => bytes[1] = masked | short as u8,
        medium @ 126..=0xffff => {
            bytes[1] = masked | 126;
            bytes[2..4].copy_from_slice(&(medium as u16).to_be_bytes());
            len = 4;
        }
        long => {
            bytes[1] = masked | 127;
            bytes[2..10].copy_from_slice(&long.to_be_bytes());
            len = 10;
        }
    }
    if let Some(mask) = header.mask {
        bytes[len..len + 4].copy_from_slice(&mask);
        len += 4;
    }
    EncodedHeader { bytes, len: len as u8 }
}

/// Reads a header at the start of `bytes`. Returns it with its length; `None` where it is incomplete.
///
/// # Errors
/// [`Disconnect::PROTOCOL`] for errors in every context: reserved bits and opcodes, control frames that are
/// fragmented, compressed or too long, lengths that are not minimal. Two bytes are enough to find most of them.
#[inline]
pub fn decode_header(bytes: &[u8]) -> Result<Option<(Header, usize)>, Disconnect> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    let Some(opcode) = Opcode::from_bits(first & 0x0f) else { return Err(Disconnect::PROTOCOL) };
    let (fin, compressed) = (first & 0x80 != 0, first & 0x40 != 0);
    let short = second & 0x7f;
    let bad_control = opcode.is_control() && (!fin || usize::from(short) > CONTROL_BYTES_MAX);
    // RSV1 belongs to the first frame of a data message only.
    let bad_compressed = compressed && !matches!(opcode, Opcode::Text | Opcode::Binary);
    if first & 0x30 != 0 || bad_control || bad_compressed {
        return Err(Disconnect::PROTOCOL);
    }
    let (payload_len, rest) = match short {
        126 => {
            let Some((length, rest)) = rest.split_first_chunk::<2>() else { return Ok(None) };
            (minimal(u64::from(u16::from_be_bytes(*length)), 126)?, rest)
        }
        127 => {
            let Some((length, rest)) = rest.split_first_chunk::<8>() else { return Ok(None) };
            (minimal(u64::from_be_bytes(*length), 0x1_0000)?, rest)
        }
        short => (u64::from(short), rest),
    };
    let (mask, rest) = if second & 0x80 == 0 {
        (None, rest)
    } else {
        let Some((mask, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        (Some(*mask), rest)
    };
    let header = Header { fin, compressed, opcode, mask, payload_len };
    Ok(Some((header, bytes.len() - rest.len())))
}

/// Returns `length`, where it has no shorter form and its highest bit is clear.
fn minimal(length: u64, least: u64) -> Result<u64, Disconnect> {
    if length < least || length > i64::MAX as u64 { Err(Disconnect::PROTOCOL) } else { Ok(length) }
}

/// Encodes one whole FIN frame of a server. Header and payload are contiguous and unmasked, so that all receivers can
/// share the frame. `compressed` says that `payload` is compressed.
#[must_use]
pub fn server_frame(opcode: Opcode, payload: &[u8], compressed: bool) -> Bytes {
    whole_frame(opcode, payload, compressed, None).into()
}

/// Encodes one whole FIN frame of a client. `mask` is random bytes that the peer cannot foresee.
#[must_use]
pub fn client_frame(opcode: Opcode, payload: &[u8], compressed: bool, mask: [u8; 4]) -> Bytes {
    whole_frame(opcode, payload, compressed, Some(mask)).into()
}

fn whole_frame(opcode: Opcode, payload: &[u8], compressed: bool, mask: Option<[u8; 4]>) -> Vec<u8> {
    let payload_len = payload.len() as u64;
    let header = encode_header(&Header { fin: true, compressed, opcode, mask, payload_len });
    let header = header.as_ref();
    let mut frame = Vec::with_capacity(header.len() + payload.len());
    frame.extend_from_slice(header);
    frame.extend_from_slice(payload);
    if let Some(mask) = mask {
        mask::apply(&mut frame[header.len()..], mask, 0);
    }
    frame
}

/// Payload of a close frame.
#[derive(Debug, Clone, Copy)]
pub struct ClosePayload {
    bytes: [u8; CONTROL_BYTES_MAX],
    len: u8,
}

impl AsRef<[u8]> for ClosePayload {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Encodes `code` and as many whole characters of `reason` as fit a close frame.
#[must_use]
pub fn close_payload(code: u16, reason: &str) -> ClosePayload {
    let reason = &reason.as_bytes()[..reason.floor_char_boundary(CONTROL_BYTES_MAX - 2)];
    let mut bytes = [0; CONTROL_BYTES_MAX];
    bytes[..2].copy_from_slice(&code.to_be_bytes());
    bytes[2..2 + reason.len()].copy_from_slice(reason);
    ClosePayload { bytes, len: 2 + reason.len() as u8 }
}

/// Upper bound of a header on the wire.
pub const HEADER_BYTES_MAX: usize = 14;

/// Upper bound of the payload of a control frame.
pub const CONTROL_BYTES_MAX: usize = 125;
