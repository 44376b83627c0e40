//! WebSocket (RFC 6455) with permessage-deflate (RFC 7692) in both roles; knows no socket.
//!
//! Bytes from the peer go through a [`receiver::Receiver`], which hands out whole messages and
//! control frames. The functions of [`frame`] build what is sent, one contiguous frame at a time.
//! So a server can share one frame among all clients that get the same message.

pub mod client;
pub mod deflate;
mod extension;
pub mod frame;
pub mod handshake;
pub mod mask;
mod negotiation;
mod partial;
pub mod receiver;
mod scratch;
mod utf8;
