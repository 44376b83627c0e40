//! The wsproxy gateway as a library, so that tests start instances in-process.

pub mod audit;
pub mod auth;
pub mod bus;
pub mod cli;
pub mod client;
pub mod config;
pub mod core;
pub mod database;
pub mod descriptors;
pub mod dev;
pub mod embedded;
pub mod endpoint;
pub mod http;
pub mod hub;
pub mod logic;
mod outbound;
mod queue;
pub mod redis;
pub mod registry;
pub mod reload;
pub mod server;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod traces;
