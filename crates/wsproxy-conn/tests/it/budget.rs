//! Budget of all connections together.

use std::sync::Arc;

use wsproxy_conn::clock;
use wsproxy_proto::disconnect::Disconnect;

use crate::support::{Connection, Process, profile, settle, text};

#[tokio::test]
async fn the_worst_offenders_go_until_the_rest_fits() {
    let mut process = Process::with_budget(500_000);
    let profile = Arc::new(profile());
    let waiting = [200_000, 50_000, 300_000, 0, 100_000];
    let mut connections: Vec<_> = waiting
        .iter()
        .map(|bytes| {
            let connection = Connection::shared(&process, &profile);
            connection.clog(*bytes);
            connection
        })
        .collect();
    assert!(process.runtime.budget.used() > 650_000);
    process.pass(100);
    let closed: Vec<_> =
        connections.iter().map(|connection| connection.link.is_closing()).collect();
    assert_eq!(closed, [false, false, true, false, false]);
    assert!(process.runtime.budget.used() <= 500_000);
    for connection in &connections {
        connection.link.disconnect(&Disconnect::RESTART, process.now);
    }
    process.pass_seconds(6);
    for connection in &mut connections {
        connection.ends().await;
    }
    assert_eq!(process.runtime.budget.used(), 0);
}

#[tokio::test]
async fn finishing_connection_counts_against_the_budget() {
    let mut process = Process::with_budget(500_000);
    let profile = Arc::new(profile());
    let [worst, other] = [600_000, 100_000].map(|bytes| {
        let connection = Connection::shared(&process, &profile);
        connection.clog(bytes);
        connection.link.finish(&Disconnect::RESTART, clock::now());
        connection
    });
    process.pass(100);
    assert!(worst.link.queued_bytes() < 2000);
    assert!(other.link.queued_bytes() >= 100_000);
}

#[tokio::test]
async fn a_partly_written_frame_goes_with_its_connection_alone() {
    let mut process = Process::with_budget(500_000);
    let profile = Arc::new(profile());
    let mut stuck = Connection::shared(&process, &profile);
    let small = Connection::shared(&process, &profile);
    let idle = Connection::shared(&process, &profile);
    small.link.push(text("unflushed"), clock::now());
    // A part of it is in the kernel, so no close frame can follow unless the rest does.
    stuck.link.push(text(&"x".repeat(800_000)), clock::now());
    stuck.link.flush(clock::now());
    settle().await;
    process.pass(100);
    assert!(process.runtime.budget.used() <= 500_000 && stuck.link.is_closing());
    assert!(!idle.link.is_closing() && !small.link.is_closing());
    assert_eq!(stuck.ends().await, ("slow_consumer", 1008, false));
}
