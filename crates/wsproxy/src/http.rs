//! The HTTP side of an instance: handshakes, event streams, the worker API and the admin routes.

pub mod admin;
pub(crate) mod answer_time;
pub mod api;
pub mod cors;
pub mod detached;
pub mod follow;
pub mod handshake;
pub mod host;
pub mod listener;
pub mod path;
pub mod rejection;

/// A response body: a short text, or a stream that follows a topic.
pub type Body = axum::body::Body;
