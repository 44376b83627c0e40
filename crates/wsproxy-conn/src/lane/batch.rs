//! Bytes on their way to the socket: one WebSocket frame at a time, masked where this side dialled. Knows no streams.

use std::cell::Cell;

use uuid::Uuid;
use wsproxy_proto::ws::{
    frame::{CONTROL_BYTES_MAX, HEADER_BYTES_MAX, Header, Opcode, Role, encode_header},
    mask,
};

thread_local! {
    /// Buffer of this thread, lent to the lane that writes. An idle lane has none.
    static WRITE_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// One WebSocket frame, of which the socket has taken a part.
///
/// Bound: one message of the lane.
#[derive(Debug)]
pub(super) struct Batch {
    role: Role,
    /// Room for a header, then the payload.
    buffer: Vec<u8>,
    /// Start of the bytes that the socket has not taken.
    at: usize,
}

impl Batch {
    pub(super) const fn new(role: Role) -> Self {
        Self { role, buffer: Vec::new(), at: 0 }
    }

    /// Returns the bytes that the socket has not taken.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer[self.at..]
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.at == self.buffer.len()
    }

    /// Notes that the socket took bytes.
    pub(super) const fn advance(&mut self, bytes: usize) {
        self.at += bytes;
    }

    /// Makes the next frame, for which all bytes of the last one are gone. `write` appends its payload, and returns
    /// whether there is one.
    pub(super) fn fill(
        &mut self,
        opcode: Opcode,
        write: impl FnOnce(&mut Vec<u8>) -> bool,
    ) -> bool {
        if self.buffer.capacity() == 0 {
            self.buffer = WRITE_BUFFER.take();
        }
        self.buffer.resize(HEADER_BYTES_MAX, 0);
        self.at = HEADER_BYTES_MAX;
        if !write(&mut self.buffer) {
            return false;
        }
        let mask = (self.role == Role::Client).then(masking_key);
        let payload = &mut self.buffer[HEADER_BYTES_MAX..];
        let payload_len = payload.len() as u64;
        let header = Header { fin: true, compressed: false, opcode, mask, payload_len };
        let header = encode_header(&header);
        if let Some(mask) = mask {
            mask::apply(payload, mask, 0);
        }
        self.at = HEADER_BYTES_MAX - header.as_ref().len();
        self.buffer[self.at..HEADER_BYTES_MAX].copy_from_slice(header.as_ref());
        true
    }

    /// Makes a control frame; bytes of the payload beyond their bound are cut.
    pub(super) fn fill_control(&mut self, opcode: Opcode, payload: &[u8]) {
        let payload = &payload[..payload.len().min(CONTROL_BYTES_MAX)];
        self.fill(opcode, |out| {
            out.extend_from_slice(payload);
            true
        });
    }

    /// Gives the buffer back to the thread, if nothing is in it.
    pub(super) fn rest_idle(&mut self) {
        if self.is_empty() {
            self.at = 0;
            let buffer = std::mem::take(&mut self.buffer);
            if (1..=KEPT_BYTES_MAX).contains(&buffer.capacity()) {
                WRITE_BUFFER.set(buffer);
            }
        }
    }
}

/// Random bytes that a peer cannot foresee (RFC 6455, section 10.3).
fn masking_key() -> [u8; 4] {
    let [a, b, c, d, ..] = Uuid::new_v4().into_bytes();
    [a, b, c, d]
}

/// Size of the largest buffer that a thread keeps, in bytes.
const KEPT_BYTES_MAX: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use wsproxy_proto::ws::frame::decode_header;

    use super::*;

    #[test]
    fn a_frame_is_contiguous_whatever_its_length() {
        for role in [Role::Client, Role::Server] {
            let mut batch = Batch::new(role);
            for length in [0, 1, 125, 126, 65_535, 65_536, 100_000] {
                let payload: Vec<u8> = (0..length).map(|at| at as u8).collect();
                assert!(batch.fill(Opcode::Binary, |out| {
                    out.extend_from_slice(&payload);
                    true
                }));
                let (header, start) = decode_header(batch.rest()).unwrap().unwrap();
                assert_eq!(header.payload_len, payload.len() as u64);
                assert_eq!(header.mask.is_some(), role == Role::Client);
                let mut read = batch.rest()[start..].to_vec();
                mask::apply(&mut read, header.mask.unwrap_or_default(), 0);
                assert!(read == payload, "{length}");
                batch.advance(batch.rest().len());
                assert!(batch.is_empty());
            }
            assert!(!batch.fill(Opcode::Binary, |_| false) && batch.is_empty());
            batch.rest_idle();
            assert_eq!(batch.buffer.capacity(), 0);
            // The next lane of this thread gets the buffer.
            assert!(WRITE_BUFFER.take().capacity() >= 100_000);
        }
    }
}
