//! Behaviour of the gateway with real parts: servers and networks that fail on purpose.

#![allow(unreachable_pub, clippy::unwrap_used, clippy::result_large_err)]
#![expect(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod agents;
mod api_keys;
mod attack;
mod attack_history;
mod bus;
mod bus_access;
mod bus_cost;
mod bus_faults;
mod bus_loss;
mod console;
mod drain;
mod events;
mod frames;
mod handshake;
mod heartbeat;
mod history;
mod history_faults;
mod history_store;
mod hosts;
mod http_api;
mod jwt;
mod limits;
mod links;
mod logs;
mod memory;
mod metrics;
mod numbers;
mod operator;
mod presence;
mod proxy_protocol;
mod refusals;
mod registry;
mod reuse_port;
mod room_registry;
mod rooms;
mod rooms_api;
mod rooms_scripts;
mod scripts;
mod session_log;
mod sessions;
mod shares;
mod slow;
mod sse;
mod sse_events;
mod sse_pressure;
mod store;
mod streams;
mod support;
mod tls;
mod token_streams;
mod tokens;
mod two_instances;
mod unix;
