//! Cost of a connection: bounds that show growth.

use wsproxy_conn::{Driver, Link, Socket, outbox::Outbox};

use crate::support::{Connection, Process, Recorder, profile, settle, text};

#[test]
fn connections_stay_small() {
    assert!(size_of::<Outbox>() <= 56, "Outbox: {}", size_of::<Outbox>());
    assert!(size_of::<Socket>() <= size_of::<tokio::net::TcpStream>() + 8);
    // With the two counters of its `Arc` it fills a class of the allocators, the next is 320.
    assert!(size_of::<Link>() + 16 <= 256, "Link: {}", size_of::<Link>());
    assert!(size_of::<Driver<Recorder>>() <= 80, "Driver: {}", size_of::<Driver<Recorder>>());
}

/// Prints what an idle connection costs in user space, apart from its handler.
#[tokio::test]
#[ignore = "a measurement, alone in its process"]
async fn idle_connections_cost_little() {
    const COUNT: usize = 4000;
    let process = Process::new();
    let profile = std::sync::Arc::new(profile());
    let mut connections = Vec::with_capacity(2 * COUNT);
    let mut open = || {
        for _ in 0..COUNT {
            connections.push(Connection::shared(&process, &profile));
        }
    };
    open();
    settle().await;
    let before = resident_bytes();
    open();
    settle().await;
    println!("{} bytes for each, with its other end", (resident_bytes() - before) / COUNT);
    let before = resident_bytes();
    for connection in &mut connections {
        connection.link.push(text(&"x".repeat(64 * 1024)), wsproxy_conn::clock::now());
        connection.link.flush(wsproxy_conn::clock::now());
        connection.hears(1).await;
    }
    settle().await;
    let more = resident_bytes() as isize - before as isize;
    println!("{} bytes more for each after a burst of 64 KiB", more / connections.len() as isize);
}

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
