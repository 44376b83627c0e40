//! What arrives: from bytes in any pieces to whole messages; knows nothing of sending.

use super::deflate::{Inflaters, Params};
use super::frame::{Kind, Role};
use crate::disconnect::Disconnect;

/// What a peer may make us keep and work on for one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest message, before and after inflating.
    pub message_bytes_max: usize,
    /// Most frames of one message, empty ones included.
    pub fragments_max: u32,
}

/// One thing that the peer said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'r> {
    /// A whole message; text is valid UTF-8.
    Message(Kind, &'r [u8]),
    /// To be answered with a pong of the same payload.
    Ping(&'r [u8]),
    /// The answer to a ping, or unasked.
    Pong(&'r [u8]),
    /// The last thing the peer says: code and reason where it gave them.
    Close(Option<(u16, &'r str)>),
}

/// Bytes just read, which the receiver uses up and unmasks in place.
#[derive(Debug)]
pub struct Input<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Input<'a> {
    /// All of `bytes` is still to be looked at.
    #[must_use]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Whether all bytes are used up.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }
}

/// The receiving half of one connection.
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    role: Role,
    deflate: Option<Params>,
}

impl Receiver {
    /// `role` is ours; `deflate` is what was negotiated.
    #[must_use]
    pub fn new(role: Role, limits: Limits, deflate: Option<Params>) -> Self {
        Self { limits, role, deflate }
    }

    /// The next event in `input`; `None` when it is used up. Bytes of an incomplete frame or
    /// message are kept inside.
    ///
    /// # Errors
    /// How the connection is to be ended. What arrives afterwards is ignored.
    pub fn next<'r>(
        &'r mut self,
        input: &'r mut Input<'_>,
        inflaters: &'r mut Inflaters,
    ) -> Result<Option<Event<'r>>, Disconnect> {
        let _ = (&self.limits, self.role, self.deflate, &mut input.at, inflaters);
        todo!()
    }

    /// Bytes that this connection holds on the heap now.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        todo!()
    }
}
