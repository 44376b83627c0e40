//! The substitute for Redis inside this process: a bus and a store for one instance.
//!
//! Knows only the plain types of `bus` and `store`: messages, commands, outcomes, errors.

pub mod bus;
mod history;
mod request;
pub mod store;
mod token_streams;
