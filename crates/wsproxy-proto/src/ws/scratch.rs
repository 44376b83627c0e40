//! Buffer for output that is used again and again, without clearing it each time.

/// Bytes, of which the first part is filled.
///
/// A plain vector would have to zero its spare capacity for each call of the compressor. For small
/// messages that costs more than the compressor itself.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    filled: usize,
}

impl Scratch {
    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    pub(crate) fn spare(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// Notes that `length` bytes of [`Self::spare`] are filled.
    pub(crate) fn fill(&mut self, length: usize) {
        self.filled += length;
    }

    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }

    /// Adds spare room where there is less than `least`.
    pub(crate) fn make_room(&mut self, least: usize) {
        if self.bytes.len() - self.filled < least {
            let length = self.filled + least;
            self.bytes.reserve_exact(length - self.bytes.len());
            self.bytes.resize(length, 0);
        }
    }

    /// Replaces the content by `bytes`.
    pub(crate) fn replace(&mut self, bytes: Vec<u8>) {
        self.filled = bytes.len();
        self.bytes = bytes;
    }

    /// Clears the content, and frees the room that a big message needed.
    #[inline]
    pub(crate) fn trim(&mut self) {
        self.filled = 0;
        if self.bytes.capacity() > RETAINED_BYTES_MAX {
            self.bytes = Vec::new();
        }
    }
}

/// Upper bound of the room that is kept between messages.
const RETAINED_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_room_is_kept_and_large_room_is_given_back() {
        let mut scratch = Scratch::default();
        scratch.make_room(RETAINED_BYTES_MAX);
        scratch.fill(10);
        scratch.make_room(100);
        assert_eq!((scratch.filled().len(), scratch.spare().len()), (10, RETAINED_BYTES_MAX - 10));
        scratch.trim();
        assert_eq!((scratch.filled().len(), scratch.bytes.capacity()), (0, RETAINED_BYTES_MAX));
        scratch.make_room(RETAINED_BYTES_MAX + 1);
        scratch.trim();
        assert_eq!(scratch.bytes.capacity(), 0);
        scratch.replace(vec![1, 2, 3]);
        scratch.make_room(2);
        assert_eq!(scratch.spare().len(), 2);
        assert_eq!(scratch.filled(), [1, 2, 3]);
    }
}
