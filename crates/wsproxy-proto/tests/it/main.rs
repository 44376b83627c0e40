//! The WebSocket core and the JSON validator from outside: rule by rule, at any split of the
//! input, and against other implementations.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod bodies;
mod corpus;
mod deflate;
mod history;
mod json;
mod oracle;
mod rules;
mod splits;
mod support;
