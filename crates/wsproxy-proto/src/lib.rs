//! Protocol parts of wsproxy that need no IO: WebSocket, JSON, histories, names, users' agents, rooms, the tunnel,
//! rate limits, endings, trace contexts.
//!
//! No code here opens a socket, reads a clock or knows tokio: bytes and time are arguments.

pub mod agents;
pub mod backoff;
pub mod disconnect;
pub mod hex;
pub mod history;
pub mod json;
pub mod names;
pub mod proxy_header;
pub mod rate;
pub mod rooms;
pub mod trace_context;
pub mod tunnel;
pub mod ws;
