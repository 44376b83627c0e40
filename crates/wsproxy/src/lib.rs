//! The wsproxy gateway as a library, so that tests start instances in-process.

pub mod bus;
pub mod config;
pub mod store;
