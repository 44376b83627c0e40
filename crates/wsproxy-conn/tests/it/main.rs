//! Connections over real sockets, with a time that the tests advance themselves.

#![allow(clippy::unwrap_used)]

mod budget;
mod closing;
mod heartbeat;
mod memory;
mod pressure;
mod rounds;
mod stress;
mod support;
mod tcp;
