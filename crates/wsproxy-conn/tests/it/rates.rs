//! Clients that send more bytes than they may, or more than the handler takes now: they are read later, and never
//! closed for it.

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use tokio::io::AsyncWriteExt;
use wsproxy_conn::{Profile, clock, clock::Micros, driver::TAKEN_BYTES_MAX};
use wsproxy_proto::{
    disconnect::Disconnect,
    rate::{ByteRate, Rate},
    ws::frame::{Opcode, client_frame},
};

use crate::support::{Connection, PATIENCE, Process, SECOND, profile, settle, until};

/// Limit: a burst of 100 KB, and 1 MB per second.
fn limited() -> Profile {
    Profile { byte_rate: ByteRate::new(1_000_000, 100_000, TAKEN_BYTES_MAX).into(), ..profile() }
}

#[tokio::test]
async fn bytes_beyond_the_rate_are_read_later() {
    let process = Process::new();
    let connection = Connection::new(&process, limited());
    let (seen, link) = (connection.seen.clone(), connection.link.clone());
    let mut peer = connection.peer;
    let started = clock::now();
    let sender = tokio::spawn(async move {
        let frame = client_frame(Opcode::Binary, &[7; 10_000], false, [0; 4]);
        for _ in 0..50 {
            peer.write_all(&frame).await.unwrap();
        }
        peer
    });
    while seen.messages.lock().len() < 50 {
        process.runtime.tick(clock::now());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = clock::now().since(started);
    // 500 KB less the burst, and less the last read, which is paid for afterwards.
    assert!(took >= Micros(300_000), "500 KB were read within {took:?}");
    assert!(link.profile().stats.reads_throttled.load(SeqCst) > 0);
    assert!(!link.is_closing());
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn many_small_messages_are_read_later_where_each_counts() {
    let process = Process::new();
    let connection = Connection::new(&process, Profile { message_bytes: 10_000, ..limited() });
    let (seen, link) = (connection.seen.clone(), connection.link.clone());
    let mut peer = connection.peer;
    let started = clock::now();
    let read = seen.clone();
    let sender = tokio::spawn(async move {
        // One message in each read: a read of several would be paid for afterwards.
        for count in 1..=50 {
            peer.write_all(&client_frame(Opcode::Text, b"1", false, [0; 4])).await.unwrap();
            while read.messages.lock().len() < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        peer
    });
    while seen.messages.lock().len() < 50 {
        process.runtime.tick(clock::now());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = clock::now().since(started);
    // 500 KB less the burst, and less the last message, which is paid for afterwards.
    assert!(took >= Micros(380_000), "50 messages were read within {took:?}");
    assert!(!link.is_closing());
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn throttled_client_is_not_closed_for_silence() {
    let mut process = Process::new();
    let profile = Profile {
        byte_rate: ByteRate::new(1, 1000, TAKEN_BYTES_MAX).into(),
        idle_timeout: Micros(60 * SECOND),
        ..profile()
    };
    let mut connection = Connection::new(&process, profile);
    connection.says(Opcode::Text, &[b'x'; 5000]).await;
    let stats = &connection.link.profile().stats;
    until("reading pauses", || stats.reads_throttled.load(SeqCst) > 0).await;
    process.pass_seconds(600);
    settle().await;
    assert!(!connection.link.is_closing());
    connection.link.disconnect(&Disconnect::BACKEND, process.now);
    connection.says(Opcode::Close, &4004_u16.to_be_bytes()).await;
    assert_eq!(connection.ends().await, ("backend", 4004, false));
}

#[tokio::test]
async fn an_honest_client_is_never_throttled() {
    let mut connection = Connection::new(&Process::new(), limited());
    for n in 0..100_u32 {
        connection.says(Opcode::Text, n.to_string().as_bytes()).await;
    }
    until("all came", || connection.seen.messages.lock().len() == 100).await;
    let stats = &connection.link.profile().stats;
    assert_eq!(stats.reads_throttled.load(SeqCst) + stats.reads_paused.load(SeqCst), 0);
}

/// Messages that came while a client was not read are not too many.
#[tokio::test]
async fn what_came_during_a_pause_is_no_burst() {
    for (count, is_too_much) in [(250, false), (4000, true)] {
        let rate = Rate::new(1000, 1000, 20).into();
        let mut connection = Connection::new(&Process::new(), Profile { rate, ..profile() });
        connection.seen.set_bus_full(true);
        settle().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let frame = client_frame(Opcode::Text, b"1", false, [3; 4]);
        connection.peer.write_all(&frame.repeat(count)).await.unwrap();
        settle().await;
        assert!(connection.seen.messages.lock().is_empty());
        connection.seen.set_bus_full(false);
        until("some came", || !connection.seen.messages.lock().is_empty()).await;
        settle().await;
        assert_eq!(connection.link.is_closing(), is_too_much);
        if !is_too_much {
            assert_eq!(connection.seen.messages.lock().len(), count);
            // Further messages are a burst again; those that come soon behind a long pause may still be late ones.
            let begun = Instant::now();
            while !connection.link.is_closing() {
                assert!(begun.elapsed() < PATIENCE, "it is never too much");
                let _ = connection.peer.write_all(&frame.repeat(100)).await;
                settle().await;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

#[tokio::test]
async fn full_handler_gets_the_rest_later_in_order() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.seen.full_each.store(3, SeqCst);
    let mut bytes = Vec::new();
    for n in 0..100_u8 {
        bytes.extend_from_slice(&client_frame(Opcode::Text, &[b'0' + n % 10], false, [3; 4]));
    }
    connection.peer.write_all(&bytes).await.unwrap();
    connection.says(Opcode::Close, &1000_u16.to_be_bytes()).await;
    for count in (3..100).step_by(3) {
        until("the handler is full", || connection.seen.messages.lock().len() == count).await;
        settle().await;
        assert_eq!(connection.seen.messages.lock().len(), count);
        connection.seen.set_bus_full(false);
    }
    assert_eq!(connection.ends().await, ("normal", 1000, true));
    let messages = connection.seen.messages.lock();
    assert_eq!(messages.len(), 100);
    assert!(messages.iter().zip(0_u8..).all(|((_, text), n)| text == &[b'0' + n % 10]));
}

#[tokio::test]
async fn connection_with_full_handler_ends_normally() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.seen.full_each.store(1, SeqCst);
    let frame = client_frame(Opcode::Text, b"x", false, [3; 4]);
    let close = client_frame(Opcode::Close, &4004_u16.to_be_bytes(), false, [3; 4]);
    connection.peer.write_all(&[&frame[..], &frame, &close].concat()).await.unwrap();
    until("the handler is full", || connection.seen.messages.lock().len() == 1).await;
    settle().await;
    connection.link.disconnect(&Disconnect::BACKEND, clock::now());
    assert_eq!(connection.ends().await, ("backend", 4004, false));
    assert_eq!(connection.seen.messages.lock().len(), 1);
}
