//! Behaviour of the gateway with real parts: servers and networks that fail on purpose.

#![allow(unreachable_pub)]

mod bus;
mod bus_faults;
mod store;
mod support;
