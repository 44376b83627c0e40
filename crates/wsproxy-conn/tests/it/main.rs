//! Connections over real sockets, with a time that the tests advance themselves.

#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod budget;
mod closing;
mod deadlines;
mod dial;
mod heartbeat;
mod keyed;
mod lane;
mod memory;
mod pressure;
mod pushes;
mod rates;
mod rounds;
mod stress;
mod support;
mod tcp;
mod tls;
mod writable;
