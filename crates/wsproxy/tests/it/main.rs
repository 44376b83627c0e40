//! Behaviour of the gateway with real parts: servers and networks that fail on purpose.

#![allow(missing_docs, clippy::unwrap_used, clippy::too_many_lines)]

mod bus;
mod bus_faults;
mod store;
mod support;
