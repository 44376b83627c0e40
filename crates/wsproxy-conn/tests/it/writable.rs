//! A handler that waits until its peer has read enough.

use std::sync::atomic::Ordering::SeqCst;

use wsproxy_conn::clock;
use wsproxy_proto::disconnect::Disconnect;

use crate::support::{Connection, Process, profile, settle, text, until};

#[tokio::test]
async fn handler_is_told_once_when_little_waits_again() {
    let mut connection = Connection::new(&Process::new(), profile());
    assert!(connection.link.is_writable());
    let mut pushed = connection.clog(200_000) as usize;
    assert!(!connection.link.is_writable());
    settle().await;
    assert_eq!(connection.seen.writable.load(SeqCst), 0);
    connection.hears(pushed).await;
    until("the handler is told", || connection.seen.writable.load(SeqCst) == 1).await;
    // A handler that has not asked again is not told again.
    pushed = connection.clog(200_000) as usize;
    connection.hears(pushed).await;
    settle().await;
    assert_eq!(connection.seen.writable.load(SeqCst), 1);
    assert!(connection.link.is_writable());
}

#[tokio::test]
async fn handler_is_told_though_the_socket_took_all_at_once() {
    let mut connection = Connection::new(&Process::new(), profile());
    // Queued, and not yet flushed: more than the mark, less than is written early.
    for _ in 0..100 {
        connection.link.push(text(&"x".repeat(1000)), clock::now());
    }
    assert!(!connection.link.is_writable());
    connection.link.flush(clock::now());
    connection.hears(100).await;
    until("the handler is told", || connection.seen.writable.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn handler_of_a_dead_connection_is_told_of_the_end_only() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.clog(200_000);
    assert!(!connection.link.is_writable());
    connection.link.abort();
    assert_eq!(connection.ends().await.0, Disconnect::GONE.label);
    assert_eq!(connection.seen.writable.load(SeqCst), 0);
}
