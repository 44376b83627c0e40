//! Expiry, wake-ups, and heartbeats that are messages.

use std::sync::atomic::Ordering::SeqCst;

use uuid::Uuid;
use wsproxy_conn::{Heartbeat, Link, Profile, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, ws::frame::Opcode};

use crate::support::{Connection, Process, SECOND, close_code, profile, settle, text, until};

/// Makes a connection with no deadlines but those that the test sets.
fn quiet() -> Profile {
    let never = Micros(1_000_000 * SECOND);
    Profile { heartbeat_interval: never, heartbeat_timeout: never, ..profile() }
}

fn messages() -> Profile {
    let heartbeat_timeout = Micros(60 * SECOND);
    Profile { heartbeat: Heartbeat::Messages, heartbeat_timeout, ..profile() }
}

impl Process {
    fn seconds_from_now(&self, seconds: u64) -> Micros {
        self.now.after(Micros(seconds * SECOND))
    }
}

#[tokio::test]
async fn busy_connection_ends_at_its_expiry() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, quiet());
    connection.link.expire_at(Some(process.seconds_from_now(100)), &Disconnect::EXPIRED);
    for _ in 0..33 {
        process.pass_seconds(3);
        connection.link.push_and_flush(text("x"), process.now);
        connection.hears(1).await;
        let before = connection.link.heard();
        connection.says(Opcode::Text, b"y").await;
        until("it is heard", || connection.link.heard() > before).await;
    }
    assert!(!connection.link.is_closing());
    process.pass(1200);
    assert_eq!(close_code(&connection.hears(1).await[0]), 4401);
    connection.says(Opcode::Close, &4401_u16.to_be_bytes()).await;
    assert_eq!(connection.ends().await, ("expired", 4401, false));
}

#[tokio::test]
async fn expiry_can_be_moved_and_removed() {
    let mut process = Process::new();
    let connection = Connection::new(&process, quiet());
    let link = &connection.link;
    link.expire_at(Some(process.seconds_from_now(10)), &Disconnect::EXPIRED);
    link.expire_at(Some(process.seconds_from_now(200)), &Disconnect::EXPIRED);
    process.pass_seconds(199);
    assert!(!link.is_closing());
    link.expire_at(None, &Disconnect::EXPIRED);
    process.pass_seconds(300);
    assert!(!link.is_closing());
    link.expire_at(Some(process.seconds_from_now(1000)), &Disconnect::EXPIRED);
    process.pass_seconds(3);
    link.expire_at(Some(process.seconds_from_now(1)), &Disconnect::EXPIRED);
    process.pass(1200);
    assert!(link.is_closing());
}

#[tokio::test]
async fn past_expiry_ends_at_next_tick_even_before_101() {
    let mut process = Process::new();
    let link = Link::new(
        Uuid::new_v4(),
        None,
        std::sync::Arc::new(quiet()),
        std::sync::Arc::clone(&process.runtime),
        process.now,
    );
    link.expire_at(Some(Micros(1)), &Disconnect::EXPIRED);
    let mut connection = Connection::over(link, &[]);
    process.pass(1000);
    let frames = connection.hears(1).await;
    assert_eq!(close_code(&frames[0]), 4401);
    // An ending that has begun stays what it is.
    connection.link.expire_at(Some(process.now), &Disconnect::HEARTBEAT);
    connection.link.wake_at(process.now);
    process.pass_seconds(6);
    assert_eq!(connection.ends().await, ("expired", 4401, false));
    assert_eq!(connection.seen.timers.load(SeqCst), 0);
}

#[tokio::test]
async fn expired_connection_gets_no_ping_after_close() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.link.expire_at(Some(process.seconds_from_now(30)), &Disconnect::EXPIRED);
    process.now = process.seconds_from_now(31);
    process.runtime.tick(process.now);
    let frames = connection.hears(1).await;
    assert_eq!(close_code(&frames[0]), 4401);
    process.pass_seconds(1);
    assert!(connection.hears_nothing());
}

#[tokio::test]
async fn a_handler_is_woken_once_about_when_it_wanted() {
    let mut process = Process::new();
    let connection = Connection::new(&process, quiet());
    let woken = || connection.seen.timers.load(SeqCst);
    connection.link.wake_at(process.seconds_from_now(2));
    process.pass(1900);
    settle().await;
    assert_eq!(woken(), 0);
    process.pass(300);
    until("it is woken", || woken() == 1).await;
    process.pass_seconds(100);
    settle().await;
    assert_eq!(woken(), 1);
    // Only the last wish counts, be it later or earlier.
    connection.link.wake_at(process.seconds_from_now(1));
    connection.link.wake_at(process.seconds_from_now(90));
    process.pass_seconds(89);
    settle().await;
    assert_eq!(woken(), 1);
    connection.link.wake_at(process.now);
    process.pass(300);
    until("it is woken", || woken() == 2).await;
    assert_eq!(connection.seen.events.load(SeqCst), 0);
    assert!(!connection.link.is_closing() && connection.hears_nothing());
}

#[tokio::test]
async fn message_heartbeat_ignores_control_frames() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, messages());
    process.pass_seconds(35);
    let before = connection.link.heard();
    connection.says(Opcode::Ping, b"p").await;
    assert_eq!(connection.hears(1).await, [(Opcode::Pong, b"p".to_vec())]);
    connection.says(Opcode::Pong, b"").await;
    settle().await;
    assert_eq!(connection.link.heard(), before);
    process.pass_seconds(24);
    assert!(!connection.link.is_closing() && connection.hears_nothing());
    process.pass_seconds(2);
    assert_eq!(close_code(&connection.hears(1).await[0]), 4002);
    process.pass_seconds(6);
    assert_eq!(connection.ends().await, ("heartbeat_timeout", 4002, false));
}

#[tokio::test]
async fn message_heartbeat_counts_each_message() {
    let process = Process::new();
    let mut connection = Connection::new(&process, messages());
    for payload in [&b"{}"[..], b"x", b""] {
        let before = connection.link.heard();
        connection.says(Opcode::Text, payload).await;
        until("it is heard", || connection.link.heard() > before).await;
    }
}
