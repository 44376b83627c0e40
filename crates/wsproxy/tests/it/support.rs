//! What several tests need: servers, a network that fails, buses that are watched.

// Not every test uses everything.
#![allow(dead_code)]

pub mod binary;
pub mod bus;
pub mod client;
pub mod fault_proxy;
pub mod gateway;
pub mod http;
pub mod issuer;
pub mod raw;
pub mod redis_server;
pub mod sse;

use std::time::{Duration, Instant};

/// Polls until `condition` holds; panics with `what` when patience ends.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "{caller}: not in time: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Waits for something that must come; panics when patience ends.
#[track_caller]
pub fn soon<T>(what: &str, future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let Ok(value) = tokio::time::timeout(PATIENCE, future).await else {
            panic!("{caller}: not in time: {what}");
        };
        value
    }
}

/// Long enough for a busy machine: only failing tests wait so long.
pub const PATIENCE: Duration = Duration::from_secs(30);
