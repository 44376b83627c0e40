//! An agent between an imitation of a gateway and upstreams that the tests write by hand.

#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod answers;
mod bodies;
mod cancel;
mod compression;
mod failures;
mod gateway;
mod health;
mod lanes;
mod links;
mod metrics;
mod program;
mod retries;
mod rules;
mod support;
mod tls;
mod upgrades;
mod upstream;
