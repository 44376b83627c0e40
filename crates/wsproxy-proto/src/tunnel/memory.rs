//! Memory of a process that its lanes share: places of streams, room for wider windows, and freed chunks. Knows no lane.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory that all lanes of a process share (§5).
///
/// Bound: the bytes that streams hold never exceed [`MemoryLimits::bytes_max`] and
/// [`MemoryLimits::growth_bytes_max`] together. Beside these, [`FREE_BYTES_MAX`] of freed chunks are kept.
#[derive(Debug)]
pub struct Memory {
    limits: MemoryLimits,
    used: Mutex<Used>,
    free: Mutex<Vec<Vec<u8>>>,
}

/// Bounds that an operator may set. All are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Memory of streams at the window that they start with. Half of it may hold the bytes of wide windows whose
    /// consumers take nothing.
    pub bytes_max: u64,
    /// Growth of all windows together, of consumers that take bytes.
    pub growth_bytes_max: u64,
    /// Window that each direction of a stream starts with.
    pub window: u32,
    /// Widest window.
    pub window_max: u32,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        Self {
            bytes_max: 512 << 20,
            growth_bytes_max: 32 << 20,
            window: super::WINDOW,
            window_max: 8 << 20,
        }
    }
}

#[derive(Debug, Default)]
struct Used {
    streams: u64,
    growing: u64,
    parked: u64,
}

impl Memory {
    /// Returns memory of which nothing is used.
    #[must_use]
    pub fn new(limits: MemoryLimits) -> Arc<Self> {
        Arc::new(Self { limits, used: Mutex::default(), free: Mutex::default() })
    }

    /// Bounds of the memory.
    #[must_use]
    pub const fn limits(&self) -> &MemoryLimits {
        &self.limits
    }

    /// Returns the streams that have a place.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.used().streams
    }

    /// Returns the bytes by which windows are wider than at their start, or were until their consumers stopped.
    #[must_use]
    pub fn growth_bytes(&self) -> u64 {
        let used = self.used();
        used.growing + used.parked
    }

    /// Takes the place of one stream. `None`: the memory is full.
    pub(crate) fn place(self: &Arc<Self>) -> Option<Share> {
        let mut used = self.used();
        if (used.streams + 1) * self.stream_bytes() + used.parked > self.limits.bytes_max {
            return None;
        }
        used.streams += 1;
        drop(used);
        Some(Share { memory: Arc::clone(self), has_place: true, growth: 0, is_parked: false })
    }

    /// Memory of a stream that never grew: received bytes and bytes to send.
    fn stream_bytes(&self) -> u64 {
        u64::from(self.limits.window) + super::sending::QUEUE_BYTES_MAX as u64
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns an empty chunk of at least `bytes`, which are at most [`CHUNK_BYTES`].
    pub(crate) fn chunk(self: &Arc<Self>, bytes: usize) -> Chunk {
        let free = (bytes == CHUNK_BYTES).then(|| self.free().pop()).flatten();
        let bytes = free.unwrap_or_else(|| Vec::with_capacity(bytes));
        Chunk { bytes, memory: Arc::clone(self) }
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Share of one stream: its place, and the growth of its window. Dropping the share returns both.
#[derive(Debug)]
pub(crate) struct Share {
    memory: Arc<Memory>,
    has_place: bool,
    growth: u64,
    is_parked: bool,
}

impl Share {
    /// The memory of the process.
    pub(crate) const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Returns whether the share has growth that other streams could use.
    pub(crate) const fn is_growing(&self) -> bool {
        self.growth > 0 && !self.is_parked
    }

    /// Draws growth. Returns whether there was enough; a share that is parked gets none.
    pub(crate) fn grow(&mut self, bytes: u64) -> bool {
        let mut used = self.memory.used();
        let is_enough =
            !self.is_parked && used.growing + bytes <= self.memory.limits.growth_bytes_max;
        if is_enough {
            used.growing += bytes;
            self.growth += bytes;
        }
        is_enough
    }

    /// Returns the growth to the other streams, and keeps `bytes` of memory in its place. Returns whether there was
    /// room for these; else the growth stays.
    pub(crate) fn park(&mut self, bytes: u64) -> bool {
        let Memory { limits, .. } = &*self.memory;
        let mut used = self.memory.used();
        let parked = used.parked + bytes;
        let is_room = parked <= limits.bytes_max / 2
            && used.streams * self.memory.stream_bytes() + parked <= limits.bytes_max;
        if is_room {
            used.growing -= self.growth;
            used.parked = parked;
            drop(used);
            (self.growth, self.is_parked) = (bytes, bytes > 0);
        }
        is_room
    }

    /// Returns the growth and the place: the stream holds no more bytes.
    pub(crate) fn release(&mut self) {
        self.shrink(0);
        if std::mem::take(&mut self.has_place) {
            self.memory.used().streams -= 1;
        }
    }

    /// Returns all that the share has beyond `bytes`, besides the place.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let freed = self.growth.saturating_sub(bytes);
        if freed > 0 {
            let mut used = self.memory.used();
            if self.is_parked {
                used.parked -= freed;
            } else {
                used.growing -= freed;
            }
            drop(used);
            self.growth -= freed;
            self.is_parked &= self.growth > 0;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.release();
    }
}

/// Received bytes of one stream, contiguous. Dropping a large chunk gives its room to later chunks.
///
/// `bytes::Bytes::from_owner` makes it a piece of a body without a copy.
#[derive(Debug)]
pub struct Chunk {
    bytes: Vec<u8>,
    memory: Arc<Memory>,
}

impl Chunk {
    /// Appends as many bytes as there is room for, and returns the rest.
    pub(crate) fn fill<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let room = self.bytes.capacity() - self.bytes.len();
        let (taken, rest) = bytes.split_at(bytes.len().min(room));
        self.bytes.extend_from_slice(taken);
        rest
    }

    pub(crate) const fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if self.bytes.capacity() == CHUNK_BYTES {
            let mut free = self.memory.free();
            if free.len() < FREE_BYTES_MAX / CHUNK_BYTES {
                self.bytes.clear();
                free.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

/// Size of a large chunk, in bytes.
pub(crate) const CHUNK_BYTES: usize = 16 << 10;

/// Upper bound of the freed chunks that are kept, in bytes.
pub const FREE_BYTES_MAX: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes_max: u64, growth_bytes_max: u64) -> Arc<Memory> {
        Memory::new(MemoryLimits { bytes_max, growth_bytes_max, ..MemoryLimits::default() })
    }

    #[test]
    fn places_end_with_the_memory_and_come_back() {
        let memory = memory(2 * PLACE, 0);
        let one = memory.place().unwrap();
        let _two = memory.place().unwrap();
        assert!(memory.place().is_none());
        drop(one);
        assert!(memory.place().is_some());
    }

    #[test]
    fn growth_ends_with_the_budget_and_comes_back() {
        let memory = memory(9 * PLACE, 100);
        let mut one = memory.place().unwrap();
        let mut two = memory.place().unwrap();
        assert!(one.grow(60) && !two.grow(60) && two.grow(40) && !one.grow(1));
        drop(one);
        assert!(two.grow(60));
        two.shrink(30);
        assert_eq!(memory.growth_bytes(), 30);
    }

    #[test]
    fn parked_growth_takes_the_place_of_streams() {
        let memory = memory(4 * PLACE, 3 * PLACE);
        let mut one = memory.place().unwrap();
        assert!(one.grow(3 * PLACE));
        // Half of the memory is the most.
        assert!(!one.park(2 * PLACE + 1) && one.is_growing());
        assert!(one.park(2 * PLACE) && !one.is_growing());
        assert!(!one.grow(1));
        let mut two = memory.place().unwrap();
        assert!(memory.place().is_none());
        assert!(two.grow(3 * PLACE) && !two.park(1));
        one.shrink(PLACE);
        assert!(memory.place().is_some());
        one.shrink(0);
        assert_eq!(memory.growth_bytes(), 3 * PLACE);
        assert!(!one.is_parked);
        drop((one, two));
        assert_eq!((memory.streams(), memory.growth_bytes()), (0, 0));
    }

    #[test]
    fn large_chunks_are_used_again_and_few_are_kept() {
        let memory = memory(PLACE, 0);
        let mut chunk = memory.chunk(CHUNK_BYTES);
        assert_eq!(chunk.fill(&[1; CHUNK_BYTES + 1]), [1]);
        let at = chunk.as_ref().as_ptr();
        drop(chunk);
        let chunk = memory.chunk(CHUNK_BYTES);
        assert_eq!((chunk.as_ref().as_ptr(), chunk.as_ref()), (at, &[][..]));
        drop(memory.chunk(1000));
        let many: Vec<_> = (0..600).map(|_| memory.chunk(CHUNK_BYTES)).collect();
        drop((chunk, many));
        assert_eq!(memory.free().len(), FREE_BYTES_MAX / CHUNK_BYTES);
    }

    const PLACE: u64 = 64 << 10;
}
