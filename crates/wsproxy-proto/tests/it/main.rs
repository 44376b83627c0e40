//! WebSocket, JSON, histories, users' agents, rooms, the tunnel and close codes from outside: rule by rule, at any split of the input, against other
//! implementations and against the shared tables.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod agents;
mod bodies;
mod corpus;
mod deflate;
mod disconnects;
mod history;
mod json;
mod oracle;
mod rooms;
mod rooms_state;
mod rules;
mod splits;
mod support;
mod tunnel;
