//! permessage-deflate (RFC 7692): compression and bounded inflation; knows no frames.
//!
//! Without context takeover a message needs no memory of earlier ones. So a worker thread has one inflater and few
//! compressors for all of its connections, and all receivers share a compressed message.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

pub use super::negotiation::{Params, Policy, negotiate};
use super::scratch::Scratch;
use crate::disconnect::Disconnect;

/// Decompressor and room for output, one per worker thread.
#[derive(Debug, Default)]
pub struct Inflaters {
    /// Inflater for peers without context takeover, made when it is first needed.
    shared: Option<Decompress>,
    output: Scratch,
}

impl Inflaters {
    /// Output that was inflated or taken over last.
    pub(crate) fn output(&self) -> &[u8] {
        self.output.filled()
    }

    /// Holds `payload` until the next call, in place of the connection.
    pub(crate) fn take_over(&mut self, payload: Vec<u8>) {
        self.output.replace(payload);
    }

    /// Frees the room that a big message needed.
    #[inline]
    pub(crate) fn trim(&mut self) {
        self.output.trim();
    }

    /// Inflates one whole message into the output. `own` is the connection's inflater, where its peer keeps the
    /// window between messages.
    pub(crate) fn inflate(
        &mut self,
        own: Option<&mut Decompress>,
        payload: &[u8],
        bytes_max: usize,
    ) -> Result<(), Disconnect> {
        self.output.clear();
        if payload.is_empty() {
            // The RFC does not allow this, but the meaning is plain.
            return Ok(());
        }
        let takeover = own.is_some();
        let inflater = match own {
            Some(inflater) => inflater,
            None => {
                let inflater = self.shared.get_or_insert_with(|| inflater(15));
                inflater.reset(false);
                inflater
            }
        };
        let mut run = Run { inflater, output: &mut self.output, bytes_max, final_blocks: 0 };
        if run.feed(payload)? == Status::StreamEnd {
            return Ok(());
        }
        if takeover {
            return run.feed(&TAIL).map(|_| ());
        }
        match run.feed(&TAIL_AND_END)? {
            Status::StreamEnd => Ok(()),
            _ => Err(Disconnect::BAD_DEFLATE),
        }
    }
}

/// Creates an inflater for a peer's window of 2 to the power of `bits`.
pub(crate) fn inflater(bits: u8) -> Decompress {
    Decompress::new_with_window_bits(false, bits.clamp(9, 15))
}

/// Returns the upper bound of a compressed message that may inflate to `bytes_max`. Incompressible data grows, by up
/// to an eighth when a fixed code is used.
pub(crate) fn compressed_bytes_max(bytes_max: usize) -> usize {
    bytes_max.saturating_add(bytes_max / 8).saturating_add(64)
}

/// Inflation of one message.
struct Run<'r> {
    inflater: &'r mut Decompress,
    output: &'r mut Scratch,
    bytes_max: usize,
    /// Number of final blocks so far.
    final_blocks: u32,
}

impl Run<'_> {
    /// Inflates all of `input`. Returns `StreamEnd` where it ends with the end of a final block.
    fn feed(&mut self, mut input: &[u8]) -> Result<Status, Disconnect> {
        loop {
            self.make_room(input.len());
            let (before_in, before_out) = (self.inflater.total_in(), self.inflater.total_out());
            let spare = self.output.spare();
            let room = spare.len();
            let status = self
                .inflater
                .decompress(input, spare, FlushDecompress::Sync)
                .map_err(|_| Disconnect::BAD_DEFLATE)?;
            let produced = (self.inflater.total_out() - before_out) as usize;
            input = &input[(self.inflater.total_in() - before_in) as usize..];
            self.output.fill(produced);
            if self.output.filled().len() > self.bytes_max {
                return Err(Disconnect::TOO_BIG);
            }
            match status {
                // Every compressor that makes a final block ends its window with it.
                Status::StreamEnd => {
                    self.final_blocks += 1;
                    if self.final_blocks > FINAL_BLOCKS_MAX {
                        return Err(Disconnect::BAD_DEFLATE);
                    }
                    self.inflater.reset(false);
                    if input.is_empty() {
                        return Ok(Status::StreamEnd);
                    }
                }
                _ if produced == room => {}
                _ if input.is_empty() => return Ok(Status::Ok),
                // There is room and input, but the inflater does not go on.
                _ => return Err(Disconnect::BAD_DEFLATE),
            }
        }
    }

    /// Grows the output step by step, so that the limit stops a message that inflates without end.
    fn make_room(&mut self, input: usize) {
        if self.output.spare().len() < 64 {
            let filled = self.output.filled().len();
            let step = filled.max(2 * input).clamp(1024, 1 << 20);
            let most = (self.bytes_max - filled).saturating_add(1);
            self.output.make_room(step.min(most).max(64));
        }
    }
}

/// Compressors without context takeover, one set per worker thread: at most one for each size of
/// window, each of up to 320 KiB.
#[derive(Debug)]
pub struct Deflaters {
    level: Compression,
    by_bits: [Option<Compress>; 7],
    output: Scratch,
}

impl Deflaters {
    /// Creates the set. `level` is 1 (fast) to 9.
    #[must_use]
    pub fn new(level: u32) -> Self {
        let level = Compression::new(level.clamp(1, 9));
        Self { level, by_bits: Default::default(), output: Scratch::default() }
    }

    /// Compresses `payload` with an empty window, so that the result suits every connection that agreed on at least
    /// `window_bits` (9 to 15). `None` where the result is not smaller.
    pub fn compress(&mut self, window_bits: u8, payload: &[u8]) -> Option<&[u8]> {
        let bits = window_bits.clamp(9, 15);
        let level = self.level;
        let compressor = self.by_bits[usize::from(bits - 9)]
            .get_or_insert_with(|| Compress::new_with_window_bits(level, false, bits));
        compressor.reset();
        self.output.trim();
        self.output.make_room(compressed_room(payload.len()));
        let done = compressor.compress(payload, self.output.spare(), FlushCompress::Sync);
        let whole = done.is_ok() && compressor.total_in() == payload.len() as u64;
        let length = compressor.total_out() as usize;
        if !whole || length == self.output.spare().len() {
            // A compressor that was stopped in the middle of a message is not used again.
            self.by_bits[usize::from(bits - 9)] = None;
            return None;
        }
        self.output.fill(length);
        self.output.filled().strip_suffix(&TAIL).filter(|small| small.len() < payload.len())
    }
}

/// Returns the room in which any message of `length` bytes can be compressed at once. At level 1 a byte costs up to 9
/// bits.
///
/// No call may run out of room. At level 1, zlib-rs 0.6.8 panics ("must fit in remaining") some messages after such a
/// call, if a reset or a further call followed it.
const fn compressed_room(length: usize) -> usize {
    length + length / 8 + 256
}

/// Compressor that belongs to one connection and may keep its window.
#[derive(Debug)]
pub struct Deflater {
    compressor: Compress,
    takeover: bool,
    output: Scratch,
}

impl Deflater {
    /// Creates a compressor. `level` is 1 to 9, `window_bits` 9 to 15; `takeover` is whether the window is kept
    /// between messages.
    #[must_use]
    pub fn new(level: u32, window_bits: u8, takeover: bool) -> Self {
        let level = Compression::new(level.clamp(1, 9));
        let bits = window_bits.clamp(9, 15);
        let compressor = Compress::new_with_window_bits(level, false, bits);
        Self { compressor, takeover, output: Scratch::default() }
    }

    /// Compresses `payload`. The result must be sent, since the peer's window follows ours.
    pub fn compress(&mut self, payload: &[u8]) -> &[u8] {
        if !self.takeover {
            self.compressor.reset();
        }
        self.output.trim();
        let mut rest = payload;
        // One turn is enough, except for a compressor that needs several.
        loop {
            self.output.make_room(compressed_room(rest.len()));
            let (before_in, before_out) = (self.compressor.total_in(), self.compressor.total_out());
            let spare = self.output.spare();
            let room = spare.len();
            let done = self.compressor.compress(rest, spare, FlushCompress::Sync);
            let produced = (self.compressor.total_out() - before_out) as usize;
            rest = &rest[(self.compressor.total_in() - before_in) as usize..];
            self.output.fill(produced);
            if done.is_err() || rest.is_empty() && produced < room {
                break;
            }
        }
        let output = self.output.filled();
        output.strip_suffix(&TAIL).unwrap_or(output)
    }
}

/// End of a sync flush, which senders leave out (RFC 7692, section 7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

/// [`TAIL`] and an empty final block. A message that does not end with it was cut off.
const TAIL_AND_END: [u8; 6] = [0, 0, 0xff, 0xff, 3, 0];

/// Upper bound of the final blocks in one message. A sender may need one. Each makes us start the inflater anew, for
/// as little as two bytes on the wire.
const FINAL_BLOCKS_MAX: u32 = 64;

/// Approximate size of an inflater with a full window.
pub(crate) const INFLATER_BYTES: usize = 48 << 10;
