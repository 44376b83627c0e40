//! The parts of wsproxy that can be proved without IO: WebSocket, names, limits, endings.
//!
//! Nothing here opens a socket, reads a clock or knows tokio: bytes and time are arguments.

pub mod backoff;
pub mod disconnect;
pub mod history;
pub mod json;
pub mod names;
pub mod rate;
pub mod ws;
