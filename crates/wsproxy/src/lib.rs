//! The wsproxy gateway as a library, so that tests start instances in-process.

pub mod bus;
pub mod cli;
pub mod config;
pub mod server;
pub mod store;
pub mod telemetry;
