//! What a connection keeps of a frame or message that is still incomplete; knows no rules but
//! those of UTF-8.

use super::frame::{HEADER_BYTES_MAX, Kind, Opcode};
use super::utf8;
use crate::disconnect::Disconnect;

/// Everything kept between two reads.
#[derive(Debug, Default)]
pub(crate) struct Partial {
    header: [u8; HEADER_BYTES_MAX],
    header_len: u8,
    /// A frame whose header is complete and whose payload is not.
    pub(crate) frame: Option<OpenFrame>,
    /// The message to which `data` belongs.
    pub(crate) message: Option<Message>,
    /// Payload of the message so far, unmasked.
    pub(crate) data: Vec<u8>,
    /// Payload of an incomplete control frame, which may come between fragments.
    pub(crate) control: Vec<u8>,
    /// Bytes of `data` known to be whole characters.
    valid: usize,
}

/// A frame in the middle of its payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenFrame {
    /// The opcode of a control frame.
    pub(crate) control: Option<Opcode>,
    pub(crate) fin: bool,
    pub(crate) mask: [u8; 4],
    /// Which byte of the mask comes next.
    pub(crate) phase: u8,
    pub(crate) remaining: usize,
}

/// A message of which the first frame's header has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) compressed: bool,
    /// Frames so far.
    pub(crate) fragments: u32,
}

impl Partial {
    /// The bytes of an incomplete header.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
    }

    /// Keeps as many of `bytes` as a header can have, and says how many.
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

    /// Appends payload to the message. `to_come` is what is known to follow until its end.
    pub(crate) fn append(
        &mut self,
        chunk: &[u8],
        to_come: Option<usize>,
    ) -> Result<(), Disconnect> {
        let needed = self.data.len() + chunk.len();
        if needed > self.data.capacity() {
            // Twice what came, never what was claimed.
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

    /// Takes the complete message out: its payload, and whether that is compressed.
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

    /// Whether nothing is incomplete.
    pub(crate) fn is_idle(&self) -> bool {
        self.header_len == 0 && self.frame.is_none() && self.message.is_none()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.data.capacity() + self.control.capacity()
    }
}
