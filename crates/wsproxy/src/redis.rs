//! A client for Redis: connections that are made again for ever, and the bus and the store on them.
//!
//! Knows only the plain types of `bus` and `store`: messages, commands, outcomes, errors.

pub(crate) mod address;
mod answer;
pub mod bus;
pub mod client;
mod cluster;
pub(crate) mod connect;
mod connection;
mod fault;
mod health;
mod history;
mod links;
mod node;
mod outlet;
mod pipeline;
mod probe;
mod publish;
mod reader;
pub(crate) mod reply;
pub(crate) mod resp;
mod scout;
pub(crate) mod script;
mod sentinel;
mod shared;
pub mod store;
mod subscriptions;
mod supervisor;
mod topology;
pub(crate) mod trial;
mod watchdog;
pub(crate) mod words;
