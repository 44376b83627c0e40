//! Blocks of headers, as they stand in OPEN, HEAD and TRAILERS; knows no header by its name.

use bytes::Bytes;

use crate::tunnel::fields::{self, Fields};

/// Valid block of headers, borrowed (§4). Names are lower case; neither names nor values can break a head of HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Headers<'a>(&'a [u8]);

impl<'a> Headers<'a> {
    /// Block without a header.
    pub const EMPTY: Self = Self(&[]);

    /// Checks the bytes of a block. `None`: they are no valid block.
    #[must_use]
    pub fn parse(block: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(block);
        while !fields.0.is_empty() {
            let (name, value) = (fields.short()?, fields.long()?);
            if !is_name(name) || !is_value(value) {
                return None;
            }
        }
        Some(Self(block))
    }

    /// Returns the bytes of the block.
    #[must_use]
    pub const fn as_bytes(self) -> &'a [u8] {
        self.0
    }

    /// Returns the names and values, in the order of the block.
    pub fn iter(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let mut fields = Fields(self.0);
        std::iter::from_fn(move || Some((fields.short()?, fields.long()?)))
    }
}

/// Valid block of headers of its own. Names and values can be taken out without a copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SharedHeaders(Bytes);

impl SharedHeaders {
    /// Copies a block.
    #[must_use]
    pub fn new(headers: Headers<'_>) -> Self {
        Self(Bytes::copy_from_slice(headers.0))
    }

    /// Takes the bytes of a block, which are valid.
    pub(crate) const fn of_valid(block: Bytes) -> Self {
        Self(block)
    }

    /// Returns the block.
    #[must_use]
    pub fn headers(&self) -> Headers<'_> {
        Headers(&self.0)
    }

    /// Returns the first value of a header, given in lower case. It shares the memory of the block.
    #[must_use]
    pub fn get(&self, wanted: &[u8]) -> Option<Bytes> {
        let (_, value) = self.headers().iter().find(|(name, _)| *name == wanted)?;
        Some(self.0.slice_ref(value))
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        self.0
    }

    /// Returns the names and values, in the order of the block. The values share its memory.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], Bytes)> {
        let parts = self.headers().iter();
        parts.map(|(name, value)| (name, self.0.slice_ref(value)))
    }
}

/// Block of headers that is being written. It is at most [`BLOCK_BYTES_MAX`] long.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeaderBlock(Vec<u8>);

impl HeaderBlock {
    /// Returns an empty block.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Returns an empty block with room for a usual head, which then does not grow in steps.
    #[must_use]
    pub fn of_head() -> Self {
        Self(Vec::with_capacity(USUAL_HEAD_BYTES))
    }

    /// Appends a header. The name must be in lower case, as in `http::HeaderName`.
    ///
    /// # Errors
    /// [`HeaderError`]; the block is then as before.
    pub fn push(&mut self, name: &[u8], value: &[u8]) -> Result<(), HeaderError> {
        if name.len() > u8::MAX.into()
            || self.0.len() + 3 + name.len() + value.len() > BLOCK_BYTES_MAX
        {
            return Err(HeaderError::TooLarge);
        }
        if !is_name(name) || !is_value(value) {
            return Err(HeaderError::Invalid);
        }
        fields::put_short(name, &mut self.0);
        fields::put_long(value, &mut self.0);
        Ok(())
    }

    /// Returns the block as it was written so far.
    #[must_use]
    pub fn headers(&self) -> Headers<'_> {
        Headers(&self.0)
    }
}

/// Reason why a header cannot stand in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The name is longer than 255 bytes, or the block would exceed [`BLOCK_BYTES_MAX`]: `head_too_large`.
    #[error("the head is too large")]
    TooLarge,
    /// The name is no token in lower case, or the value has control bytes.
    #[error("a header is invalid")]
    Invalid,
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|byte| IN_NAMES[usize::from(*byte)])
}

/// A value may have any bytes but control ones, of which the tabulator is allowed.
fn is_value(value: &[u8]) -> bool {
    // Without an early end the compiler makes vector instructions of the loop.
    value.iter().fold(true, |is_good, byte| is_good & (!byte.is_ascii_control() | (*byte == b'\t')))
}

/// Bytes that may stand in a name.
const IN_NAMES: [bool; 256] = {
    let mut all = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        all[byte] = fields::is_token(byte as u8) && !(byte as u8).is_ascii_uppercase();
        byte += 1;
    }
    all
};

/// Length of most heads, with those headers that the gateway adds.
const USUAL_HEAD_BYTES: usize = 768;

/// Upper bound of a block, in bytes (§4).
pub const BLOCK_BYTES_MAX: usize = (64 << 10) - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_its_headers_in_order() {
        let mut block = HeaderBlock::new();
        block.push(b"accept", b"").unwrap();
        block.push(b"x-a", b"\xff\t 1").unwrap();
        assert_eq!(block.headers().as_bytes(), b"\x06accept\0\0\x03x-a\0\x04\xff\t 1");
        let read = Headers::parse(block.headers().as_bytes()).unwrap();
        let expected: [(&[u8], &'static [u8]); 2] = [(b"accept", b""), (b"x-a", b"\xff\t 1")];
        assert_eq!(read.iter().collect::<Vec<_>>(), expected);
        let shared = SharedHeaders::new(read);
        let expected = expected.map(|(name, value)| (name, Bytes::from_static(value)));
        assert_eq!(shared.iter().collect::<Vec<_>>(), expected);
        assert_eq!(shared.get(b"x-a").unwrap(), expected[1].1);
        assert_eq!(shared.get(b"x"), None);
    }

    #[test]
    fn a_header_that_would_break_a_head_is_refused() {
        let mut block = HeaderBlock::new();
        for (name, value) in [
            ("", ""),
            ("Accept", ""),
            ("a b", ""),
            (":path", ""),
            ("a\n", ""),
            ("a", "1\r\nb: 2"),
            ("a", "\0"),
            ("a", "\x7f"),
        ] {
            let (name, value) = (name.as_bytes(), value.as_bytes());
            assert_eq!(block.push(name, value), Err(HeaderError::Invalid));
            let mut bytes = Vec::new();
            fields::put_short(name, &mut bytes);
            fields::put_long(value, &mut bytes);
            assert_eq!(Headers::parse(&bytes), None, "{name:?}");
        }
        assert_eq!(block, HeaderBlock::new());
    }

    #[test]
    fn a_block_ends_at_its_bound() {
        let mut block = HeaderBlock::new();
        assert_eq!(block.push(&[b'a'; 256], b""), Err(HeaderError::TooLarge));
        block.push(b"a", &vec![b'v'; BLOCK_BYTES_MAX - 4]).unwrap();
        assert_eq!(block.headers().as_bytes().len(), BLOCK_BYTES_MAX);
        assert_eq!(block.push(b"b", b""), Err(HeaderError::TooLarge));
    }

    #[test]
    fn a_cut_block_is_refused() {
        let block = b"\x01a\0\x01v";
        assert!(Headers::parse(block).is_some());
        (1..block.len()).for_each(|end| assert_eq!(Headers::parse(&block[..end]), None));
    }
}
