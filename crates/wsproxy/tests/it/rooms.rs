//! Rooms with real clients, over one instance and over several on one Redis.

mod bounds;
mod clocks;
mod crowds;
mod dead_instances;
mod drain;
mod faults;
mod hostile;
mod members;
mod messages;
mod revoked;
pub(crate) mod room_client;
mod stale;
mod tokens;
