//! Messages of rooms: checked, stamped, written, and translated between protobuf and JSON; and the state of a room on one
//! instance.
//!
//! A binary frame holds one protobuf envelope of `spec/rooms/v1/rooms.proto`, a text frame the same in the JSON mapping of
//! proto3. A gateway relays a client's bytes as they came and appends its stamp behind them.
//!
//! Each instance mirrors the rooms of its members. Between instances, messages have a head of their own.

pub mod check;
mod fields;
pub mod hello_text;
pub mod mirror;
pub mod positions;
mod schema;
pub mod snapshot;
pub mod stamp;
pub mod text;
/// Generated from `spec/rooms/v1/rooms.proto` by `codegen`. Decodes and encodes whole messages, and knows no limits.
#[rustfmt::skip]
#[expect(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod v1;
pub mod wire;
pub mod write;
