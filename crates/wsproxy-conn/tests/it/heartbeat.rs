//! Liveness: pings, dead peers, idle peers, and a process that was itself stopped.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use uuid::Uuid;
use wsproxy_conn::{Link, Profile, clock::Micros};
use wsproxy_proto::ws::frame::{Kind, Opcode};

use crate::support::{Connection, Process, SECOND, close_code, profile, settle, until};

#[tokio::test]
async fn a_silent_client_is_pinged_then_closed() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    process.pass_seconds(29);
    assert!(connection.hears_nothing());
    process.pass_seconds(2);
    assert_eq!(connection.hears(1).await, [(Opcode::Ping, vec![])]);
    process.pass_seconds(58);
    assert_eq!(connection.hears(1).await, [(Opcode::Ping, vec![])]);
    assert!(!connection.link.is_closing());
    process.pass_seconds(2);
    assert_eq!(close_code(&connection.hears(1).await[0]), 4002);
    process.pass_seconds(6);
    assert_eq!(connection.ends().await, ("heartbeat_timeout", 4002, false));
}

#[tokio::test]
async fn any_frame_is_a_sign_of_life() {
    let mut connection = Connection::new(&Process::new(), profile());
    for (opcode, payload) in [(Opcode::Pong, &b"x"[..]), (Opcode::Ping, b""), (Opcode::Text, b"")] {
        let before = connection.link.heard();
        connection.says(opcode, payload).await;
        until("it is heard", || connection.link.heard() > before).await;
    }
}

#[tokio::test]
async fn idle_client_is_closed_despite_pings() {
    let mut process = Process::new();
    let profile = Profile {
        idle_timeout: Micros(100 * SECOND),
        heartbeat_timeout: Micros(1000 * SECOND),
        ..profile()
    };
    let mut connection = Connection::new(&process, profile);
    process.pass_seconds(99);
    connection.says(Opcode::Pong, b"").await;
    assert_eq!(connection.hears(3).await.len(), 3);
    assert!(!connection.link.is_closing());
    process.pass_seconds(2);
    assert_eq!(close_code(&connection.hears(1).await[0]), 4003);
}

#[tokio::test]
async fn clients_are_pinged_after_a_standstill_before_timeout() {
    for away in [3, 40, 95, 1000] {
        let mut process = Process::new();
        let profile = Profile { idle_timeout: Micros(90 * SECOND), ..profile() };
        let mut connection = Connection::new(&process, profile);
        process.pass_seconds(88);
        connection.hears(2).await;
        process.now = process.now.after(Micros(away * SECOND));
        process.runtime.tick(process.now);
        assert_eq!(process.runtime.links().len(), 1, "lost after {away} seconds");
        process.pass(4900);
        assert!(!connection.link.is_closing(), "closed after {away} seconds");
        process.pass_seconds(1);
        assert!(connection.link.is_closing(), "forgotten after {away} seconds");
    }
}

#[tokio::test]
async fn clients_survive_while_the_handler_is_full() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.seen.set_bus_full(true);
    connection.says(Opcode::Text, b"waits").await;
    until("reading pauses", || connection.link.profile().stats.reads_paused.load(SeqCst) == 1)
        .await;
    process.pass_seconds(200);
    settle().await;
    assert!(!connection.link.is_closing() && connection.seen.messages.lock().is_empty());
    // One ping each 30 seconds, not one each tick.
    assert_eq!(connection.hears(6).await.len(), 6);
    assert!(connection.hears_nothing());
    connection.seen.set_bus_full(false);
    until("the message", || connection.seen.messages.lock().len() == 1).await;
    assert_eq!(connection.seen.messages.lock()[0], (Kind::Text, b"waits".to_vec()));
}

#[tokio::test]
async fn silence_begins_when_reading_resumes() {
    let mut connection = Connection::new(&Process::new(), profile());
    let before = connection.link.heard();
    connection.seen.set_bus_full(true);
    connection.link.notify(wsproxy_conn::HandlerEvent::Fact(0));
    until("reading pauses", || connection.link.profile().stats.reads_paused.load(SeqCst) == 1)
        .await;
    assert_eq!(connection.link.heard(), before);
    connection.seen.set_bus_full(false);
    until("its silence begins", || connection.link.heard() > before).await;
    assert!(connection.hears_nothing());
    connection.says(Opcode::Text, b"x").await;
}

#[tokio::test]
async fn half_open_peer_with_full_socket_times_out() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.clog(1 << 20);
    settle().await;
    process.pass_seconds(91);
    assert!(connection.link.queued_bytes() < 2000);
    process.pass_seconds(6);
    assert_eq!(connection.ends().await.0, "heartbeat_timeout");
    assert_eq!(process.runtime.budget.used(), 0);
    assert_eq!(Arc::weak_count(&connection.link), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_is_lost_while_time_passes() {
    let process = Process::new();
    let profile = Arc::new(Profile {
        heartbeat_interval: Micros(100_000),
        heartbeat_timeout: Micros::NEVER,
        ..profile()
    });
    let runtime = Arc::clone(&process.runtime);
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = Arc::clone(&done);
    let ticking = std::thread::spawn(move || {
        let mut now = process.now;
        while !stop.load(SeqCst) {
            now = now.after(Micros(100_000));
            process.runtime.tick(now);
        }
    });
    let connections: Vec<_> = (0..300)
        .map(|_| {
            let (profile, runtime) = (Arc::clone(&profile), Arc::clone(&runtime));
            // At the time of the wheel, so that each is due at once.
            let link = Link::new(Uuid::new_v4(), None, profile, runtime, Micros(0));
            Connection::over(link, &[])
        })
        .collect();
    for _ in 0..100 {
        assert_eq!(runtime.links().len(), connections.len());
        tokio::task::yield_now().await;
    }
    done.store(true, SeqCst);
    ticking.join().unwrap();
}
