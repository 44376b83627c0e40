//! Cluster agent of the tunnel: dials a gateway, and serves the streams of its lane from one HTTP service, the upstream.
//! Knows no bus, no database and no credentials of clients.
//!
//! # Parts
//! - [`settings::Settings`] are the values of an operator, as text; [`config::AgentConfig`] is what an agent needs.
//! - [`agent::run`] keeps one lane open until it is told to stop.
//! - A task for each stream checks its head, sends it to the upstream, and passes the answer on.

mod access;
pub mod agent;
mod answer;
mod compression;
pub mod config;
mod credential;
mod dialling;
mod failure;
mod health;
mod metrics;
mod paths;
pub mod pauses;
mod request;
mod serve;
pub mod settings;
mod tls;
mod upgraded;
mod upstream;
