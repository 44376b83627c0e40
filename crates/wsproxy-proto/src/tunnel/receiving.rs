//! The receiver's side of one direction of a stream: bytes that wait for their consumer, and credit. Knows no order of
//! frames.

use std::collections::VecDeque;

use crate::tunnel::memory::{CHUNK_BYTES, Chunk, Share};

/// Received bytes of a stream, and the credit of their sender (§5).
///
/// Invariant: the sender may send at most `window` beyond the bytes that the consumer took. Where a window shrank, its
/// share keeps memory for the credit that was granted before.
///
/// Bound: memory for the bytes that wait, and [`CHUNK_BYTES`].
#[derive(Debug)]
pub(crate) struct Receiving {
    chunks: VecDeque<Chunk>,
    window: u64,
    // Bytes since the start of the stream.
    granted: u64,
    received: u64,
    taken: u64,
    /// Whether the newest DATA said that the sender waits for credit.
    is_newest_blocked: bool,
    /// The same, and no window grew for it yet.
    is_blocked: bool,
}

/// More bytes came than there was credit for, or the sender said a second time that it waits for the same credit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CreditBroken;

impl Receiving {
    pub(crate) fn new(share: &Share) -> Self {
        let window = share.memory().limits().window.into();
        Self {
            chunks: VecDeque::new(),
            window,
            granted: window,
            received: 0,
            taken: 0,
            is_newest_blocked: false,
            is_blocked: false,
        }
    }

    /// Bytes that wait for the consumer.
    pub(crate) const fn len(&self) -> usize {
        (self.received - self.taken) as usize
    }

    /// Memory of the bytes that wait.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::capacity).sum()
    }

    /// Copies bytes that came. The last chunk is filled before there is another one, so that many small frames need no
    /// more memory than one large frame.
    pub(crate) fn receive(
        &mut self,
        mut bytes: &[u8],
        is_blocked: bool,
        share: &Share,
    ) -> Result<(), CreditBroken> {
        let is_repeated = bytes.is_empty() && is_blocked && self.is_newest_blocked;
        if bytes.len() as u64 > self.granted - self.received || is_repeated {
            return Err(CreditBroken);
        }
        (self.is_blocked, self.is_newest_blocked) = (is_blocked, is_blocked);
        self.received += bytes.len() as u64;
        if let Some(last) = self.chunks.back_mut() {
            bytes = last.fill(bytes);
        }
        while !bytes.is_empty() {
            // As large as all that waits: few chunks, and none that is large for a few bytes.
            let size = self.len().next_power_of_two().clamp(CHUNK_BYTES_MIN, CHUNK_BYTES);
            let mut chunk = share.memory().chunk(size);
            bytes = chunk.fill(bytes);
            self.chunks.push_back(chunk);
        }
        Ok(())
    }

    /// Takes the bytes that came first, for the consumer.
    pub(crate) fn take(&mut self, share: &mut Share) -> Option<Chunk> {
        let chunk = self.chunks.pop_front()?;
        self.taken += chunk.as_ref().len() as u64;
        if !share.is_growing() {
            share.shrink(self.beyond_start(share));
        }
        Some(chunk)
    }

    /// Widens the window, where the sender waits for credit although all that it sent was taken: the round trip, and
    /// neither side, is the limit. Called when the consumer waits.
    pub(crate) fn grow(&mut self, share: &mut Share) {
        let window_max = u64::from(share.memory().limits().window_max);
        let wider = self.window.saturating_mul(4).min(window_max);
        let is_due = self.is_blocked && self.len() == 0 && wider > self.window;
        if is_due && share.grow(wider - self.window) {
            self.window = wider;
            self.is_blocked = false;
        }
    }

    /// Narrows the window to that of the start, since the consumer takes nothing. Its growth becomes free for other
    /// streams where there is memory for the bytes that the sender may still send.
    pub(crate) fn narrow(&mut self, share: &mut Share) {
        if share.park(self.beyond_start(share)) {
            self.window = share.memory().limits().window.into();
        }
    }

    /// Bytes that wait or may still come, beyond the window of the start.
    fn beyond_start(&self, share: &Share) -> u64 {
        (self.granted - self.taken).saturating_sub(share.memory().limits().window.into())
    }

    /// Returns whether credit is to be granted: half of the window was taken.
    pub(crate) const fn is_due(&self) -> bool {
        self.credit() > 0 && self.credit() >= self.window / 2
    }

    /// Grants all credit up to the window.
    pub(crate) fn grant(&mut self) -> u32 {
        let credit = self.credit();
        self.granted += credit;
        credit as u32
    }

    const fn credit(&self) -> u64 {
        (self.taken + self.window).saturating_sub(self.granted)
    }

    /// No more bytes will come, so no memory is kept for them.
    pub(crate) fn end(&mut self, share: &mut Share) {
        self.granted = self.received;
        share.shrink(self.beyond_start(share));
    }

    /// Frees all bytes. Those that still come are to be dropped before they get here.
    pub(crate) fn clear(&mut self, share: &mut Share) {
        self.chunks = VecDeque::new();
        self.taken = self.received;
        self.end(share);
    }
}

/// Size of the smallest chunk, in bytes.
const CHUNK_BYTES_MIN: usize = 256;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tunnel::memory::{Memory, MemoryLimits};

    fn memory(growth_bytes_max: u64) -> Arc<Memory> {
        Memory::new(MemoryLimits { growth_bytes_max, ..MemoryLimits::default() })
    }

    fn start(memory: &Arc<Memory>) -> (Receiving, Share) {
        let share = memory.place().unwrap();
        (Receiving::new(&share), share)
    }

    fn take_all(receiving: &mut Receiving, share: &mut Share) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(chunk) = receiving.take(share) {
            all.extend_from_slice(chunk.as_ref());
        }
        receiving.grow(share);
        all
    }

    #[test]
    fn credit_is_granted_at_half_and_never_exceeded() {
        let memory = memory(0);
        let (mut receiving, mut share) = start(&memory);
        assert_eq!(receiving.receive(&[1; W], false, &share), Ok(()));
        assert_eq!(receiving.receive(&[1], false, &share), Err(CreditBroken));
        assert!(!receiving.is_due());
        let taken = receiving.take(&mut share).unwrap();
        assert_eq!(taken.as_ref().len(), W / 2);
        assert!(receiving.is_due());
        assert_eq!(receiving.grant() as usize, W / 2);
        assert!(!receiving.is_due());
        assert_eq!(receiving.receive(&[1; W / 2 + 1], false, &share), Err(CreditBroken));
        assert_eq!(receiving.receive(&[1; W / 2], false, &share), Ok(()));
        assert_eq!(take_all(&mut receiving, &mut share).len(), W);
    }

    #[test]
    fn a_window_grows_only_for_a_waiting_consumer_and_a_blocked_sender() {
        let memory = memory(10 * W as u64);
        let (mut receiving, mut share) = start(&memory);
        receiving.receive(&[1; W], true, &share).unwrap();
        // The buffer is not empty.
        receiving.grow(&mut share);
        assert_eq!(memory.growth_bytes(), 0);
        take_all(&mut receiving, &mut share);
        assert_eq!((memory.growth_bytes(), receiving.grant()), (3 * W as u64, 4 * W as u32));
        // Once for each time that the sender waits.
        receiving.grow(&mut share);
        receiving.receive(&[1; 4 * W], false, &share).unwrap();
        take_all(&mut receiving, &mut share);
        assert_eq!(memory.growth_bytes(), 3 * W as u64);
        // Growth that does not fit into the budget does not happen.
        receiving.grant();
        receiving.receive(&[1; 4 * W], true, &share).unwrap();
        take_all(&mut receiving, &mut share);
        assert_eq!(memory.growth_bytes(), 3 * W as u64);
        drop(share);
        assert_eq!(memory.growth_bytes(), 0);
    }

    #[test]
    fn a_sender_says_once_that_it_waits() {
        let memory = memory(0);
        let (mut receiving, share) = start(&memory);
        for (bytes, expected) in [
            (&b"1"[..], Ok(())),
            (b"", Err(CreditBroken)),
            (b"1", Ok(())),
            (b"", Err(CreditBroken)),
        ] {
            assert_eq!(receiving.receive(bytes, true, &share), expected);
        }
        assert_eq!(receiving.receive(b"1", false, &share), Ok(()));
        assert_eq!(receiving.receive(b"", true, &share), Ok(()));
    }

    #[test]
    fn a_window_has_a_widest_size() {
        let memory = memory(64 << 20);
        let (mut receiving, mut share) = start(&memory);
        for _ in 0..9 {
            receiving.receive(b"1", true, &share).unwrap();
            take_all(&mut receiving, &mut share);
        }
        assert_eq!(receiving.window, 8 << 20);
        assert_eq!(memory.growth_bytes(), (8 << 20) - W as u64);
    }

    #[test]
    fn a_stalled_consumer_returns_growth_and_gets_no_credit_until_little_is_held() {
        let memory = memory(3 * W as u64);
        let (mut receiving, mut share) = start(&memory);
        receiving.receive(&[1; W], true, &share).unwrap();
        take_all(&mut receiving, &mut share);
        receiving.grant();
        receiving.receive(&[1; 4 * W], true, &share).unwrap();
        receiving.narrow(&mut share);
        // Other streams can grow, and what this one holds is still accounted for.
        let mut other = memory.place().unwrap();
        assert!(other.grow(3 * W as u64));
        assert_eq!(memory.growth_bytes(), 6 * W as u64);
        for _ in 0..6 {
            receiving.take(&mut share).unwrap();
            assert!(!receiving.is_due());
        }
        assert_eq!(memory.growth_bytes(), 3 * W as u64);
        receiving.take(&mut share).unwrap();
        assert!(receiving.is_due());
        assert_eq!(receiving.grant() as usize, W / 2);
        assert_eq!(receiving.window as usize, W);
    }

    #[test]
    fn small_frames_need_no_more_memory_than_large_ones() {
        let memory = memory(0);
        let (mut receiving, mut share) = start(&memory);
        let mut sent = Vec::new();
        while sent.len() + 20 <= W {
            let line = [(sent.len() / 20) as u8; 20];
            receiving.receive(&line, false, &share).unwrap();
            sent.extend_from_slice(&line);
            assert!(receiving.heap_bytes() <= (3 * sent.len()).max(CHUNK_BYTES_MIN));
        }
        assert!(receiving.chunks.len() < 10 && receiving.heap_bytes() <= sent.len() + CHUNK_BYTES);
        assert_eq!(take_all(&mut receiving, &mut share), sent);
        receiving.grant();
        // One line alone is in a chunk of its size.
        receiving.receive(&[1; 20], false, &share).unwrap();
        assert_eq!(receiving.heap_bytes(), CHUNK_BYTES_MIN);
    }

    #[test]
    fn the_end_keeps_memory_for_the_waiting_bytes_only() {
        let memory = memory(3 * W as u64);
        let (mut receiving, mut share) = start(&memory);
        receiving.receive(&[1; W], true, &share).unwrap();
        take_all(&mut receiving, &mut share);
        receiving.grant();
        receiving.receive(&[1; 2 * W], false, &share).unwrap();
        receiving.end(&mut share);
        assert_eq!(memory.growth_bytes(), W as u64);
        receiving.clear(&mut share);
        assert_eq!((memory.growth_bytes(), receiving.len(), receiving.heap_bytes()), (0, 0, 0));
    }

    const W: usize = 32 << 10;
}
