//! The compression of event streams: an event is compressed once, and all clients share the bytes.
//!
//! A gzip stream may consist of parts that do not refer to each other. Only the checksum differs between clients. It is
//! combined from the checksums of the parts.
//!
//! Every part ends with a sync marker: an empty block that is not compressed. Some inflaters, such as Go's and zlib's
//! in some proxies, hold their output back until they see a marker or their window is full.

use bytes::{Buf, Bytes};
use wsproxy_conn::outgoing::with_compressed;
use zlib_rs::crc32::{crc32, crc32_combine};

/// Options of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deflation {
    /// Level from 1 to 9.
    pub level: u32,
    /// Size in bytes from which events are compressed.
    pub from_bytes: usize,
}

/// Makes a part that fits into any gzip stream: checksum and length for [`Gzip::append`], then the blocks.
#[must_use]
pub fn part(plain: &[u8], how: Deflation) -> Bytes {
    if plain.len() >= how.from_bytes {
        let deflated = with_compressed(plain, WINDOW_BITS, how.level, |blocks| {
            let mut part = begin(plain, blocks.len() + MARKER_END.len());
            part.extend_from_slice(blocks);
            part.extend_from_slice(&MARKER_END);
            part
        });
        if let Some(part) = deflated {
            return Bytes::from(part);
        }
    }
    let blocks = plain.len().div_ceil(STORED_BYTES_MAX);
    let mut part = begin(plain, plain.len() + (blocks + 1) * MARKER.len());
    for block in plain.chunks(STORED_BYTES_MAX) {
        // Head of a block that is neither final nor compressed: its length, and the length inverted.
        let length = block.len() as u16;
        part.push(0);
        part.extend_from_slice(&length.to_le_bytes());
        part.extend_from_slice(&(!length).to_le_bytes());
        part.extend_from_slice(block);
    }
    part.extend_from_slice(&MARKER);
    Bytes::from(part)
}

fn begin(plain: &[u8], room: usize) -> Vec<u8> {
    let mut part = Vec::with_capacity(PART_HEAD_BYTES + room);
    part.extend_from_slice(&crc32(0, plain).to_le_bytes());
    part.extend_from_slice(&(plain.len() as u32).to_le_bytes());
    part
}

/// State of one client's gzip stream.
#[derive(Debug, Default)]
pub struct Gzip {
    crc: u32,
    bytes: u32,
}

impl Gzip {
    /// Header: deflate, no name, no time, no system.
    pub const HEAD: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

    /// Adds a part, and returns its bytes for the client.
    #[must_use]
    pub fn append(&mut self, mut part: Bytes) -> Bytes {
        let (crc, bytes) = (part.get_u32_le(), part.get_u32_le());
        self.crc = crc32_combine(self.crc, crc, u64::from(bytes));
        self.bytes = self.bytes.wrapping_add(bytes);
        part
    }

    /// Returns the trailer: an empty final block, checksum, length.
    #[must_use]
    pub fn end(&self) -> Vec<u8> {
        let mut end = vec![1, 0, 0, 0xff, 0xff];
        end.extend_from_slice(&self.crc.to_le_bytes());
        end.extend_from_slice(&self.bytes.to_le_bytes());
        end
    }
}

/// Size of the window: the largest one, which every gzip client has.
const WINDOW_BITS: u8 = 15;

/// Sync marker: the head of a block that is neither final nor compressed, with length 0.
const MARKER: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// Rest of the marker behind compressed blocks, which end with its first bits.
const MARKER_END: [u8; 4] = [0, 0, 0xff, 0xff];

/// Size of a part's checksum and length.
const PART_HEAD_BYTES: usize = 8;

/// Upper bound of a block that is not compressed.
const STORED_BYTES_MAX: usize = 0xffff;

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const HOW: Deflation = Deflation { level: 1, from_bytes: 100 };

    #[test]
    fn any_parts_in_any_order_are_one_stream() {
        let mut random = Vec::new();
        let mut state = 1_u32;
        for _ in 0..200_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random.push((state >> 24) as u8);
        }
        let texts: [&[u8]; 6] =
            [b"", b"small", &[b'x'; 99], &[b'y'; 100], &[b'z'; 300_000], &random];
        let (mut stream, mut plain) = (Gzip::HEAD.to_vec(), Vec::new());
        let mut gzip = Gzip::default();
        for text in texts.iter().chain(texts.iter().rev()) {
            stream.extend_from_slice(&gzip.append(part(text, HOW)));
            plain.extend_from_slice(text);
        }
        stream.extend_from_slice(&gzip.end());
        // It checks the checksum and the length.
        let mut inflated = Vec::new();
        flate2::read::GzDecoder::new(&stream[..]).read_to_end(&mut inflated).unwrap();
        assert!(inflated == plain);
        assert!(part(&[b'z'; 300_000], HOW).len() < 3000);
    }

    /// Returns the output of an inflater that keeps everything until it sees a marker.
    struct AtMarkers {
        inflater: flate2::Decompress,
        wire: Vec<u8>,
        held: Vec<u8>,
    }

    impl AtMarkers {
        fn new() -> Self {
            let (wire, held) = (Vec::new(), Vec::new());
            Self { inflater: flate2::Decompress::new(false), wire, held }
        }

        fn read(&mut self, blocks: &[u8]) -> Vec<u8> {
            self.wire.extend_from_slice(blocks);
            self.held.reserve(1 << 20);
            self.inflater
                .decompress_vec(blocks, &mut self.held, flate2::FlushDecompress::Sync)
                .unwrap();
            match self.wire.ends_with(&MARKER_END) {
                true => std::mem::take(&mut self.held),
                false => Vec::new(),
            }
        }
    }

    #[test]
    fn every_part_can_be_read_at_its_marker() {
        let mut gzip = Gzip::default();
        let mut inflater = AtMarkers::new();
        let long = vec![b'y'; 70_000];
        let plain = Deflation { level: 1, from_bytes: usize::MAX };
        for how in [HOW, plain] {
            for text in [&b"short"[..], &[b'x'; 5000], b":\n", b"", &long, b"again"] {
                assert!(inflater.read(&gzip.append(part(text, how))) == text);
            }
        }
        let small = part(b"short", HOW);
        assert!(small.ends_with(&MARKER), "{small:?}");
    }
}
