//! Message compression, RFC 7692 section 7.2: pools of working memory lent to messages.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use crate::disconnect::Disconnect;

/// What a compressed message lacks at its end (section 7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

/// Memory that a pool keeps for the next message; what a larger one took is given back.
const KEPT_BYTES: usize = 256 * 1024;

/// Output grows by at least this much.
const STEP_BYTES: usize = 8 * 1024;

/// What both ends agreed on (section 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// The server compresses every message for itself.
    pub server_no_context_takeover: bool,
    /// The client compresses every message for itself.
    pub client_no_context_takeover: bool,
    /// Window of what the server sends: 9 to 15 bits.
    pub server_max_window_bits: u8,
    /// Window of what the client sends: 8 to 15 bits.
    pub client_max_window_bits: u8,
}

/// Decompression for all connections of a thread whose messages stand for themselves.
#[derive(Debug, Default)]
pub struct Inflaters {
    shared: Option<Inflater>,
    out: Vec<u8>,
}

impl Inflaters {
    /// Inflates a whole message, by `own` where the peer keeps its context.
    /// Never holds more than `limit` bytes of it.
    ///
    /// # Errors
    /// It is damaged, or larger than `limit`.
    pub fn inflate(
        &mut self,
        own: Option<&mut Inflater>,
        message: &[u8],
        limit: usize,
    ) -> Result<(), &'static Disconnect> {
        self.out.clear();
        self.out.shrink_to(KEPT_BYTES);
        match own {
            Some(inflater) => inflater.inflate(message, limit, &mut self.out),
            None => {
                let shared = self.shared.get_or_insert_default();
                shared.0.reset(false);
                shared.inflate(message, limit, &mut self.out)
            }
        }
    }

    /// What the last message inflated to.
    #[must_use]
    pub fn inflated(&self) -> &[u8] {
        &self.out
    }
}

/// Decompression with a context of its own.
#[derive(Debug)]
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        // The largest window reads what was compressed with any.
        Self(Decompress::new(false))
    }
}

impl Inflater {
    fn inflate(
        &mut self,
        message: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), &'static Disconnect> {
        self.feed(message, limit, out)?;
        self.feed(&TAIL, limit, out)
    }

    fn feed(
        &mut self,
        mut input: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), &'static Disconnect> {
        loop {
            if out.len() == out.capacity() {
                // One byte beyond the limit tells a message of its size from a larger one.
                let room = (limit + 1).saturating_sub(out.len());
                out.reserve(room.min(out.len().max(STEP_BYTES)));
            }
            let before = (self.0.total_in(), out.len());
            let status = self
                .0
                .decompress_vec(input, out, FlushDecompress::Sync)
                .map_err(|_| &Disconnect::BAD_DEFLATE)?;
            input = &input[(self.0.total_in() - before.0) as usize..];
            if out.len() > limit {
                return Err(&Disconnect::TOO_BIG);
            }
            if status == Status::StreamEnd {
                // A block with BFINAL ends a stream; what follows is a new one (section 7.2.3.5).
                self.0.reset(false);
            } else if input.is_empty() && out.len() < out.capacity() {
                return Ok(());
            } else if out.len() == before.1 && out.len() < out.capacity() {
                return Err(&Disconnect::BAD_DEFLATE);
            }
            if input.is_empty() && status == Status::StreamEnd {
                return Ok(());
            }
        }
    }
}

/// Compression for all connections of a thread; every message stands for itself, so that any
/// number of clients can share it.
#[derive(Debug)]
pub struct Deflaters {
    level: u32,
    /// By window bits.
    by_bits: [Option<Box<Deflater>>; 16],
    out: Vec<u8>,
}

impl Deflaters {
    /// `level`: 1 (fast) to 9 (small).
    #[must_use]
    pub fn new(level: u32) -> Self {
        Self { level, by_bits: [const { None }; 16], out: Vec::new() }
    }

    /// Compresses a message; `None` where that does not make it smaller.
    pub fn compress(&mut self, window_bits: u8, message: &[u8]) -> Option<&[u8]> {
        let bits = window_bits.clamp(9, 15);
        let deflater = self.by_bits[usize::from(bits)]
            .get_or_insert_with(|| Box::new(Deflater::new(self.level, bits)));
        deflater.0.reset();
        self.out.shrink_to(KEPT_BYTES);
        deflater.compress(message, &mut self.out);
        (self.out.len() < message.len()).then_some(&self.out)
    }
}

/// Compression with a context of its own, for an end that keeps it between messages.
#[derive(Debug)]
pub struct Deflater(Compress);

impl Deflater {
    /// `level`: 1 (fast) to 9 (small); `window_bits`: 9 to 15.
    #[must_use]
    pub fn new(level: u32, window_bits: u8) -> Self {
        let level = Compression::new(level);
        Self(Compress::new_with_window_bits(level, false, window_bits.clamp(9, 15)))
    }

    /// Replaces `out` by the compressed message, without the tail.
    pub fn compress(&mut self, message: &[u8], out: &mut Vec<u8>) {
        out.clear();
        let start = self.0.total_in();
        loop {
            out.reserve(message.len() / 2 + 64);
            let input = &message[(self.0.total_in() - start) as usize..];
            // Compressing fails only where the stream was finished, which it never is.
            let _ = self.0.compress_vec(input, out, FlushCompress::Sync);
            let consumed = (self.0.total_in() - start) as usize == message.len();
            if consumed && out.len() < out.capacity() {
                break;
            }
        }
        if out.ends_with(&TAIL) {
            out.truncate(out.len() - TAIL.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inflate(message: &[u8], limit: usize) -> Result<Vec<u8>, &'static Disconnect> {
        let mut pool = Inflaters::default();
        pool.inflate(None, message, limit)?;
        Ok(pool.inflated().to_vec())
    }

    #[test]
    fn messages_come_back_through_every_window() {
        let text: Vec<u8> =
            (0..100_000_u32).flat_map(|i| (i / 7).to_string().into_bytes()).collect();
        for bits in 9..=15 {
            for level in [1, 6, 9] {
                let mut pool = Deflaters::new(level);
                for message in [&text[..], &text[..2000], b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
                    let compressed = pool.compress(bits, message).unwrap().to_vec();
                    assert_eq!(inflate(&compressed, message.len()).unwrap(), message);
                    assert_eq!(inflate(&compressed, message.len() - 1), Err(&Disconnect::TOO_BIG));
                }
            }
        }
    }

    #[test]
    fn the_examples_of_the_rfc_inflate() {
        let hello = b"Hello";
        for message in [
            &[0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00][..],
            &[0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00],
            &[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00],
            &[0xf2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xff, 0xff, 0xca, 0xc9, 0xc9, 0x07, 0x00],
        ] {
            assert_eq!(inflate(message, 100).unwrap(), hello, "{message:x?}");
        }
        assert_eq!(inflate(&[0], 100).unwrap(), b"");
    }

    #[test]
    fn a_context_that_is_kept_is_used() {
        let (mut deflater, mut inflater) = (Deflater::new(6, 15), Inflater::default());
        let mut pool = Inflaters::default();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        deflater.compress(b"Hello, hello, is there anybody", &mut first);
        deflater.compress(b"Hello, hello, is there anybody", &mut second);
        assert!(second.len() < first.len() / 2);
        for message in [first, second] {
            pool.inflate(Some(&mut inflater), &message, 100).unwrap();
            assert_eq!(pool.inflated(), b"Hello, hello, is there anybody");
        }
    }

    #[test]
    fn bombs_and_garbage_are_refused_without_growing() {
        let mut pool = Deflaters::new(9);
        let bomb = pool.compress(15, &vec![0; 50_000_000]).unwrap().to_vec();
        let mut inflaters = Inflaters::default();
        assert_eq!(inflaters.inflate(None, &bomb, 100_000), Err(&Disconnect::TOO_BIG));
        assert!(inflaters.out.capacity() < 400_000);
        assert_eq!(inflate(&[0xff; 20], 100), Err(&Disconnect::BAD_DEFLATE));
    }
}
