//! permessage-deflate (RFC 7692): negotiation, compression and bounded inflation; knows no frames.

use http::HeaderMap;

/// What both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// The server starts each message with an empty window.
    pub server_no_context_takeover: bool,
    /// The client starts each message with an empty window.
    pub client_no_context_takeover: bool,
    /// Base-2 logarithm of the server's window.
    pub server_max_window_bits: u8,
    /// Base-2 logarithm of the client's window.
    pub client_max_window_bits: u8,
}

/// What we, as server, allow and ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether clients may keep their window between messages, which costs us an inflater
    /// (up to 48 KiB) per connection; else we answer `client_no_context_takeover`.
    pub client_context_takeover: bool,
    /// Largest window that we compress with, 9 to 15.
    pub server_window_bits: u8,
    /// Largest window that we let clients use where they let us choose, 9 to 15.
    pub client_window_bits: u8,
}

impl Default for Policy {
    fn default() -> Self {
        Self { client_context_takeover: false, server_window_bits: 15, client_window_bits: 15 }
    }
}

/// Takes the first acceptable offer; with it the value of `Sec-WebSocket-Extensions` to answer.
#[must_use]
pub fn negotiate(headers: &HeaderMap, policy: &Policy) -> Option<(Params, String)> {
    let _ = (headers, policy);
    None
}

/// Decompressor and room for output, one per worker thread.
#[derive(Debug, Default)]
pub struct Inflaters {}

/// Compressors without context takeover, one set per worker thread.
#[derive(Debug)]
pub struct Deflaters {}

impl Deflaters {
    /// `level` 1 (fast) to 9.
    #[must_use]
    pub fn new(level: u32) -> Self {
        let _ = level;
        Self {}
    }

    /// `payload` compressed with an empty window, hence good for every connection that agreed on
    /// at least `window_bits`; `None` if it did not get smaller.
    pub fn compress(&mut self, window_bits: u8, payload: &[u8]) -> Option<&[u8]> {
        let _ = (window_bits, payload);
        None
    }
}

/// A compressor that belongs to one connection and may keep its window.
#[derive(Debug)]
pub struct Deflater {}

impl Deflater {
    /// `takeover`: whether the window is kept between messages.
    #[must_use]
    pub fn new(level: u32, window_bits: u8, takeover: bool) -> Self {
        let _ = (level, window_bits, takeover);
        Self {}
    }

    /// `payload` compressed; must be sent, since the peer's window follows ours.
    pub fn compress(&mut self, payload: &[u8]) -> &[u8] {
        let _ = payload;
        &[]
    }
}
