//! Everything before `101`, and everything that is no WebSocket.

pub mod address;
pub mod admin;
pub mod admission;
pub mod announcements;
pub mod api;
pub mod cors;
pub mod credentials;
pub mod events;
pub mod follow;
pub mod host;
pub mod lasting;
pub mod line;
pub mod listener;
pub mod origin;
pub mod peer;
pub mod rejection;
pub mod resume;
pub mod routes;
pub mod sockets;
pub mod sse;
pub mod upgrade;

/// A response body: a short text, or a stream that follows a topic.
pub type Body = axum::body::Body;
