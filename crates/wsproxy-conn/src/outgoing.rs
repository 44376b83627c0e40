//! A message that is encoded once for all connections that get it. Of a connection it knows the compression only.

use std::{borrow::Cow, cell::RefCell};

use bytes::Bytes;
use wsproxy_proto::ws::{
    deflate::Deflaters,
    frame::{Kind, Opcode, server_frame},
};

use crate::profile::Profile;

thread_local! {
    static DEFLATERS: RefCell<Option<(u32, Deflaters)>> = const { RefCell::new(None) };
}

/// Message on its way to any number of connections.
///
/// The frame is built for the first connection, and compressed at most once for each window size that was negotiated.
/// All other connections share the bytes.
pub struct Outgoing<'a> {
    kind: Kind,
    payload: Cow<'a, [u8]>,
    plain: Option<Bytes>,
    /// Compressed frames by window bits; `None` where compression does not make the message smaller.
    deflated: Vec<(u8, Option<Bytes>)>,
}

impl<'a> Outgoing<'a> {
    /// Creates a message. `payload` must be UTF-8 where `kind` is text.
    #[must_use]
    pub fn new(kind: Kind, payload: impl Into<Cow<'a, [u8]>>) -> Self {
        Self { kind, payload: payload.into(), plain: None, deflated: Vec::new() }
    }

    /// Bytes of the message.
    #[must_use]
    pub fn len(&self) -> usize {
        self.payload.len()
    }

    /// Whether the message has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }

    /// Returns the frame for a connection that negotiated `window_bits` (`None`: no compression).
    pub fn frame(&mut self, window_bits: Option<u8>, profile: &Profile) -> Bytes {
        if let Some(bits) = window_bits
            && self.payload.len() >= profile.compress_from_bytes
        {
            let known = self.deflated.iter().position(|(known, _)| *known == bits);
            let at = known.unwrap_or_else(|| {
                let opcode = opcode(self.kind);
                let frame = |compressed: &[u8]| server_frame(opcode, compressed, true);
                let frame = with_compressed(&self.payload, bits, profile.compress_level, frame);
                self.deflated.push((bits, frame));
                self.deflated.len() - 1
            });
            if let Some(frame) = &self.deflated[at].1 {
                return frame.clone();
            }
        }
        let (kind, payload) = (self.kind, &self.payload);
        self.plain.get_or_insert_with(|| server_frame(opcode(kind), payload, false)).clone()
    }
}

/// Compresses `plain` with the compressor of this thread, and lends the result to `use_it`. `None` where compression
/// does not make it smaller.
pub fn with_compressed<T>(
    plain: &[u8],
    window_bits: u8,
    level: u32,
    use_it: impl FnOnce(&[u8]) -> T,
) -> Option<T> {
    DEFLATERS.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(kept_level, _)| *kept_level != level) {
            *kept = Some((level, Deflaters::new(level)));
        }
        let (_, deflaters) = kept.as_mut()?;
        Some(use_it(deflaters.compress(window_bits, plain)?))
    })
}

const fn opcode(kind: Kind) -> Opcode {
    match kind {
        Kind::Text => Opcode::Text,
        Kind::Binary => Opcode::Binary,
    }
}
