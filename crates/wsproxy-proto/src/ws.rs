//! WebSocket (RFC 6455) with permessage-deflate (RFC 7692) in both roles; knows no socket.
//!
//! Bytes from the peer go through a [`receiver::Receiver`], which hands out whole messages and
//! control frames. What is sent is built by the functions of [`frame`], one contiguous frame
//! at a time, so that a server may share one frame among all who get the same message.

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
