//! A message that is encoded once for all who get it; knows no connection but its compression.

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

/// One message on its way to any number of connections.
///
/// The frame is built when the first connection asks, and compressed at most once per window
/// size that was negotiated; everybody else shares the bytes.
pub struct Outgoing<'a> {
    kind: Kind,
    payload: Cow<'a, [u8]>,
    plain: Option<Bytes>,
    /// By window bits; `None` where compressing did not make it smaller.
    deflated: Vec<(u8, Option<Bytes>)>,
}

impl<'a> Outgoing<'a> {
    /// `payload` must be UTF-8 where `kind` is text.
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

    /// The frame for a connection that negotiated `window_bits` (`None`: no compression).
    pub fn frame(&mut self, window_bits: Option<u8>, profile: &Profile) -> Bytes {
        if let Some(bits) = window_bits
            && self.payload.len() >= profile.compress_from_bytes
        {
            let known = self.deflated.iter().position(|(known, _)| *known == bits);
            let at = known.unwrap_or_else(|| {
                let frame = compress(self.kind, &self.payload, bits, profile.compress_level);
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

fn compress(kind: Kind, payload: &[u8], bits: u8, level: u32) -> Option<Bytes> {
    DEFLATERS.with_borrow_mut(|pool| {
        if pool.as_ref().is_none_or(|(pool_level, _)| *pool_level != level) {
            *pool = Some((level, Deflaters::new(level)));
        }
        let (_, deflaters) = pool.as_mut()?;
        let compressed = deflaters.compress(bits, payload)?;
        Some(server_frame(opcode(kind), compressed, true))
    })
}

const fn opcode(kind: Kind) -> Opcode {
    match kind {
        Kind::Text => Opcode::Text,
        Kind::Binary => Opcode::Binary,
    }
}
