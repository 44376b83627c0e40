//! The wsproxy gateway as a library, so that tests start instances in-process.

pub mod auth;
pub mod bus;
pub mod cli;
pub mod config;
pub mod descriptors;
pub mod dev;
pub mod endpoint;
pub mod gateway;
pub mod http;
pub mod hub;
pub mod registry;
pub mod server;
pub mod shutdown;
pub mod store;
pub mod streams;
pub mod telemetry;
mod tls;
