//! The server's side of the opening handshake (RFC 6455 section 4.2); knows no sockets.

use http::{HeaderMap, Method, Version};

/// A request that may be answered with `101`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upgrade {
    /// Value of `Sec-WebSocket-Accept`.
    pub accept: String,
}

/// Why a request is no opening handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `426` with `Upgrade: websocket`.
    NotAnUpgrade,
    /// `426` with `Sec-WebSocket-Version: 13`.
    Version,
    /// `405` with `Allow: GET`.
    Method,
    /// `400`; says what is wrong.
    Malformed(&'static str),
}

/// Checks the opening handshake of a client.
///
/// # Errors
/// How to refuse it.
pub fn read_upgrade(
    method: &Method,
    version: Version,
    headers: &HeaderMap,
) -> Result<Upgrade, Refusal> {
    let _ = (method, version, headers);
    Err(Refusal::NotAnUpgrade)
}

/// The subprotocols that a client offers, in its order of preference.
pub fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let _ = headers;
    std::iter::empty()
}
