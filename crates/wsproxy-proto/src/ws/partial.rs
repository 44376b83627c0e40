//! Parts of an incomplete frame or message that a connection keeps; knows no rules but those of UTF-8.

use super::frame::{HEADER_BYTES_MAX, Kind, Opcode};
use super::utf8;
use crate::disconnect::Disconnect;

/// State that is kept between two reads.
#[derive(Debug, Default)]
pub(crate) struct Partial {
    header: [u8; HEADER_BYTES_MAX],
    header_len: u8,
    /// Frame whose header is complete and whose payload is not.
    pub(crate) frame: Option<OpenFrame>,
    /// Message to which `data` belongs.
    pub(crate) message: Option<PartialMessage>,
    /// Payload of the message so far, unmasked.
    pub(crate) data: Vec<u8>,
    /// Payload of an incomplete control frame, which may come between fragments.
    pub(crate) control: Vec<u8>,
    /// Number of bytes of `data` that are known to be whole characters.
    valid: usize,
}

/// Frame in the middle of its payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenFrame {
    /// Opcode of a control frame.
    pub(crate) control: Option<Opcode>,
    pub(crate) fin: bool,
    pub(crate) mask: [u8; 4],
    /// Index of the next byte of the mask.
    pub(crate) phase: u8,
    pub(crate) remaining: usize,
}

/// Message whose first header has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartialMessage {
    pub(crate) kind: Kind,
    pub(crate) compressed: bool,
    /// Number of frames so far.
    pub(crate) fragments: u32,
}

impl Partial {
    /// Bytes of an incomplete header.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }

    /// Keeps as many of `bytes` as a header can have. Returns their number.
    pub(crate) fn keep_header(&mut self, bytes: &[u8]) -> usize {
        let from = usize::from(self.header_len);
        let length = bytes.len().min(HEADER_BYTES_MAX - from);
        self.header[from..from + length].copy_from_slice(&bytes[..length]);
        self.header_len += length as u8;
        length
    }

    pub(crate) fn forget_header(&mut self) {
        self.header_len = 0;
    }

    /// Appends payload to the message. `to_come` is the number of bytes that are known to follow until its end.
    pub(crate) fn append(
        &mut self,
        chunk: &[u8],
        to_come: Option<usize>,
    ) -> Result<(), Disconnect> {
        let needed = self.data.len() + chunk.len();
        if needed > self.data.capacity() {
            // At most twice the bytes that came, never the bytes that the header claims.
            let most = to_come.map_or(usize::MAX, |to_come| needed + to_come);
            let target = (2 * self.data.capacity()).max(needed).min(most);
            self.data.reserve_exact(target - self.data.len());
        }
        self.data.extend_from_slice(chunk);
        if self.is_plain_text() {
            self.valid = utf8::advance(&self.data, self.valid).ok_or(Disconnect::NOT_UTF8)?;
        }
        Ok(())
    }

    /// Takes the payload of the complete message out, and whether that is compressed.
    pub(crate) fn close_message(&mut self) -> Result<(Vec<u8>, bool), Disconnect> {
        if self.is_plain_text() && self.valid != self.data.len() {
            return Err(Disconnect::NOT_UTF8);
        }
        self.valid = 0;
        let compressed = self.message.take().is_some_and(|message| message.compressed);
        Ok((std::mem::take(&mut self.data), compressed))
    }

    fn is_plain_text(&self) -> bool {
        self.message.is_some_and(|message| message.kind == Kind::Text && !message.compressed)
    }

    /// Returns whether nothing is incomplete.
    pub(crate) fn is_idle(&self) -> bool {
        self.header_len == 0 && self.frame.is_none() && self.message.is_none()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.data.capacity() + self.control.capacity()
    }
}
