//! The frame, RFC 6455 section 5: its header both ways, its mask, and whole frames ready to send.

use bytes::{BufMut, Bytes, BytesMut};

use crate::disconnect::Disconnect;

/// Longest payload of a control frame (section 5.5).
pub const CONTROL_BYTES_MAX: usize = 125;

/// Longest header: 2 bytes, 8 of length, 4 of mask.
pub const HEADER_BYTES_MAX: usize = 14;

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Masks what it sends, and gets frames without a mask.
    Client,
    /// Sends without a mask, and gets masked frames.
    Server,
}

/// The kind of a data message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// UTF-8.
    Text,
    /// Any bytes.
    Binary,
}

/// What a frame is (section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// A further fragment of a message.
    Continuation = 0,
    /// A text message, or its first fragment.
    Text = 1,
    /// A binary message, or its first fragment.
    Binary = 2,
    /// The close handshake.
    Close = 8,
    /// A question.
    Ping = 9,
    /// Its answer.
    Pong = 10,
}

impl Opcode {
    /// Whether frames of this opcode may stand between the fragments of a message.
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

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whether it is the last fragment.
    pub fin: bool,
    /// RSV1: the message is compressed (RFC 7692 section 6).
    pub compressed: bool,
    /// What it is.
    pub opcode: Opcode,
    /// What the payload is masked with.
    pub mask: Option<[u8; 4]>,
    /// Bytes of payload.
    pub length: u64,
}

impl Header {
    /// Reads a header. `Ok(None)`: `bytes` do not hold all of it. Else the header and its length.
    ///
    /// # Errors
    /// Reserved bits or opcodes, a length that is not the shortest, a control frame that is
    /// fragmented, compressed or too long.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, &'static Disconnect> {
        let [first, second, ..] = *bytes else { return Ok(None) };
        let protocol = &Disconnect::PROTOCOL;
        let opcode = Opcode::from_bits(first & 0x0f).ok_or(protocol)?;
        let (fin, compressed) = (first & 0x80 != 0, first & 0x40 != 0);
        let short = second & 0x7f;
        if first & 0x30 != 0 || (opcode.is_control() && (!fin || compressed || short > 125)) {
            return Err(protocol);
        }
        let (length, mut at) = match short {
            126 => match bytes.get(2..4) {
                Some(&[a, b]) => (u64::from(u16::from_be_bytes([a, b])), 4),
                _ => return Ok(None),
            },
            127 => match bytes.get(2..10).and_then(|bytes| bytes.try_into().ok()) {
                Some(bytes) => (u64::from_be_bytes(bytes), 10),
                None => return Ok(None),
            },
            short => (u64::from(short), 2),
        };
        let shortest = match short {
            126 => length > 125,
            127 => length > 0xffff && length >> 63 == 0,
            _ => true,
        };
        if !shortest {
            return Err(protocol);
        }
        let mut mask = None;
        if second & 0x80 != 0 {
            let Some(&[a, b, c, d]) = bytes.get(at..at + 4) else { return Ok(None) };
            mask = Some([a, b, c, d]);
            at += 4;
        }
        Ok(Some((Self { fin, compressed, opcode, mask, length }, at)))
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut impl BufMut) {
        let flags = u8::from(self.fin) << 7 | u8::from(self.compressed) << 6;
        out.put_u8(flags | self.opcode as u8);
        let masked = if self.mask.is_some() { 0x80 } else { 0 };
        match self.length {
            length @ 0..=125 => out.put_u8(masked | length as u8),
            length @ 126..=0xffff => {
                out.put_u8(masked | 126);
                out.put_u16(length as u16);
            }
            length => {
                out.put_u8(masked | 127);
                out.put_u64(length);
            }
        }
        if let Some(mask) = self.mask {
            out.put_slice(&mask);
        }
    }
}

/// A whole message, or control frame, from a server: header and payload in one piece, for any
/// number of clients to share.
#[must_use]
pub fn server_frame(opcode: Opcode, payload: &[u8], compressed: bool) -> Bytes {
    let length = payload.len() as u64;
    let header = Header { fin: true, compressed, opcode, mask: None, length };
    let mut frame = BytesMut::with_capacity(payload.len() + HEADER_BYTES_MAX - 4);
    header.encode(&mut frame);
    frame.put_slice(payload);
    frame.freeze()
}

/// The same from a client; `mask` must be unpredictable, and new for every frame.
#[must_use]
pub fn client_frame(opcode: Opcode, payload: &[u8], compressed: bool, mask: [u8; 4]) -> Bytes {
    let length = payload.len() as u64;
    let header = Header { fin: true, compressed, opcode, mask: Some(mask), length };
    let mut frame = BytesMut::with_capacity(payload.len() + HEADER_BYTES_MAX);
    header.encode(&mut frame);
    let start = frame.len();
    frame.put_slice(payload);
    apply_mask(&mut frame[start..], mask, 0);
    frame.freeze()
}

/// Masks or unmasks `bytes`, of which the first is byte `offset` of the payload (section 5.3).
pub fn apply_mask(bytes: &mut [u8], mask: [u8; 4], offset: usize) {
    let mut mask = mask;
    mask.rotate_left(offset % 4);
    let wide = u64::from_ne_bytes([
        mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3],
    ]);
    let (chunks, rest) = bytes.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The payload of a close frame (section 5.5.1).
#[derive(Debug, Clone, Copy)]
pub struct ClosePayload {
    bytes: [u8; CONTROL_BYTES_MAX],
    length: usize,
}

impl AsRef<[u8]> for ClosePayload {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// A code and a reason, which is cut at a character to what fits.
#[must_use]
pub fn close_payload(code: u16, reason: &str) -> ClosePayload {
    let reason = &reason.as_bytes()[..reason.floor_char_boundary(CONTROL_BYTES_MAX - 2)];
    let mut bytes = [0; CONTROL_BYTES_MAX];
    bytes[..2].copy_from_slice(&code.to_be_bytes());
    bytes[2..2 + reason.len()].copy_from_slice(reason);
    ClosePayload { bytes, length: 2 + reason.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_every_length_come_back() {
        for length in [0, 1, 125, 126, 0xffff, 0x10000, u64::MAX >> 1] {
            for mask in [None, Some([1, 2, 3, 4])] {
                let header =
                    Header { fin: true, compressed: true, opcode: Opcode::Text, mask, length };
                let mut bytes = Vec::new();
                header.encode(&mut bytes);
                for cut in 0..bytes.len() {
                    assert_eq!(Header::decode(&bytes[..cut]), Ok(None));
                }
                assert_eq!(Header::decode(&bytes), Ok(Some((header, bytes.len()))));
            }
        }
    }

    #[test]
    fn what_the_rfc_forbids_in_a_header_is_refused() {
        for bad in [
            &[0xa1, 0][..],
            &[0x91, 0],
            &[0x83, 0],
            &[0x8b, 0],
            &[0x09, 0],
            &[0xc9, 0],
            &[0x89, 126, 0, 126],
            &[0x81, 126, 0, 125],
            &[0x81, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff],
            &[0x81, 127, 0x80, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(Header::decode(bad), Err(&Disconnect::PROTOCOL), "{bad:x?}");
        }
    }

    #[test]
    fn masking_in_parts_is_masking_at_once() {
        let whole: Vec<u8> = (0..100).collect();
        let mask = [1, 2, 3, 4];
        let mut at_once = whole.clone();
        apply_mask(&mut at_once, mask, 0);
        for cut in 0..whole.len() {
            let mut parts = whole.clone();
            let (a, b) = parts.split_at_mut(cut);
            apply_mask(a, mask, 0);
            apply_mask(b, mask, cut);
            assert_eq!(parts, at_once);
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let payload = close_payload(4004, &"ä".repeat(100));
        assert_eq!(payload.as_ref().len(), 2 + 122);
        assert!(std::str::from_utf8(&payload.as_ref()[2..]).is_ok());
    }
}
