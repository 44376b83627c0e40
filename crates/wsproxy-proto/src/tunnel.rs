//! The tunnel's protocol `wsproxy.tunnel.v1`: streams of HTTP over one WebSocket between a gateway and a cluster agent.
//! Knows neither sockets nor a clock nor HTTP's libraries.
//!
//! `spec/tunnel/README.md` describes the bytes. Sections (§) beside the rules are those of that page.

pub mod code;
mod direction;
pub mod event;
mod fields;
pub mod frame;
pub mod headers;
pub mod hello;
pub mod lane;
pub mod memory;
mod receiving;
mod schedule;
mod sending;

/// Token of `Sec-WebSocket-Protocol` that stands for this protocol (§1).
pub const SUBPROTOCOL: &str = "wsproxy.tunnel.v1";

/// Version of the frames; the lowest and the highest that this crate speaks (§3).
pub const VERSION: u8 = 1;

/// Upper bound of one WebSocket message, in bytes (§1).
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// Upper bound of the bytes of one DATA frame, without its header (§2).
pub const DATA_BYTES_MAX: usize = 16 << 10;

/// Upper bound of stream numbers: 31 bits (§2).
pub const STREAM_MAX: u32 = (1 << 31) - 1;

/// Credit of each direction of a stream at its start, in bytes, where HELLO says nothing else (§5).
pub const WINDOW: u32 = 32 << 10;

/// Streams that may be open on one lane, where HELLO says nothing else (§3).
pub const STREAMS_MAX: u32 = 1024;

/// Upper bound of a head that the receiver takes, in bytes of payload, where HELLO says nothing else (§3).
pub const HEAD_BYTES_MAX: u32 = 32 << 10;

/// Upper bound of the credit that one side may have for one direction of a stream, in bytes: 31 bits (§5).
pub const WINDOW_MAX: u32 = (1 << 31) - 1;
