//! RFC 6455 and RFC 7692 without IO and without a clock.

pub mod deflate;
pub mod frame;
pub mod handshake;
pub mod negotiation;
pub mod receiver;
pub mod utf8;
