//! Support for several tests: servers, a network that fails, buses that are watched.

// Not every test uses everything.
#![allow(dead_code)]

pub mod binary;
pub mod bus;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod cluster_agent;
pub mod fault_proxy;
pub mod gateway;
pub mod http;
pub mod issuer;
pub mod killable;
pub mod postgres;
pub mod raw;
pub mod redis_process;
pub mod redis_server;
pub mod sentinel;
pub mod sse;
pub mod tls;

use std::time::{Duration, Instant};

use wsproxy::registry::lease::Timing;

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

/// Asks until the answer is yes; panics with `what` when patience ends.
#[track_caller]
pub fn eventually_yes(what: &str, mut ask: impl AsyncFnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !ask().await {
            assert!(start.elapsed() < PATIENCE, "{caller}: not in time: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Tries until it succeeds; panics with `what` and the last error when patience ends.
#[track_caller]
pub fn eventually_ok<T, E: std::fmt::Debug>(
    what: &str,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        loop {
            match attempt().await {
                Ok(value) => return value,
                Err(error) => {
                    let is_late = start.elapsed() >= PATIENCE;
                    assert!(!is_late, "{caller}: not in time: {what}: {error:?}");
                }
            }
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

/// Timing of a lease, short enough for a test; an instance that a busy machine delays is not dead yet.
pub const FAST_LEASE: Timing = Timing {
    lease: Duration::from_millis(2500),
    refresh: Duration::from_millis(150),
    retry: Duration::from_millis(100),
    linger: Duration::from_millis(20),
};
