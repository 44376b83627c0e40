//! Frames that are queued in one round leave together. Messages that are read in parts are put together.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use tokio::io::AsyncWriteExt;
use uuid::Uuid;
use wsproxy_conn::{Link, Profile, clock, link::Queued};
use wsproxy_proto::ws::frame::{Header, Kind, Opcode, client_frame, encode_header};

use crate::support::{Connection, PATIENCE, Process, profile, text, until};

#[tokio::test]
async fn round_leaves_at_its_flush_and_not_before() {
    let mut connection = Connection::new(&Process::new(), profile());
    let queued: Vec<_> =
        (0..100).map(|i| connection.link.push(text(&i.to_string()), clock::now())).collect();
    assert_eq!(queued[0], Queued::Flush);
    assert!(queued[1..].iter().all(|queued| *queued == Queued::Queued));
    assert!(connection.hears_nothing());
    connection.link.flush(clock::now());
    assert_eq!(connection.link.queued_bytes(), 0);
    let heard = connection.hears(100).await;
    assert!(heard.iter().enumerate().all(|(i, (_, text))| *text == i.to_string().as_bytes()));
    assert_eq!(connection.link.sent().0, 100);
}

#[tokio::test]
async fn round_larger_than_send_buffer_reaches_reading_client() {
    let profile = Profile { send_buffer_bytes: 4096, ..profile() };
    let mut connection = Connection::new(&Process::new(), profile);
    for _ in 0..8 {
        assert_ne!(connection.link.push(text(&"x".repeat(900)), clock::now()), Queued::Ending);
    }
    connection.link.flush(clock::now());
    assert_eq!(connection.hears(8).await.len(), 8);
}

#[tokio::test]
async fn messages_wait_for_the_101() {
    let process = Process::new();
    let (profile, runtime) = (Arc::new(profile()), Arc::clone(&process.runtime));
    let link = Link::new(Uuid::new_v4(), None, profile, runtime, clock::now());
    assert_eq!(link.push(text("one"), clock::now()), Queued::Queued);
    link.flush(clock::now());
    link.push(text("two"), clock::now());
    let mut connection = Connection::over(link, &[]);
    let heard = connection.hears(2).await;
    assert_eq!((&heard[0].1[..], &heard[1].1[..]), (&b"one"[..], &b"two"[..]));
}

#[tokio::test]
async fn leftover_bytes_are_handled_first() {
    let process = Process::new();
    let (profile, runtime) = (Arc::new(profile()), Arc::clone(&process.runtime));
    let link = Link::new(Uuid::new_v4(), None, profile, runtime, clock::now());
    let mut bytes = client_frame(Opcode::Text, b"early", false, [1, 2, 3, 4]).to_vec();
    bytes.extend_from_slice(&client_frame(Opcode::Text, b"cut in two", false, [5, 6, 7, 8]));
    let (head, tail) = bytes.split_at(bytes.len() - 4);
    let mut connection = Connection::over(link, head);
    connection.peer.write_all(tail).await.unwrap();
    until("both messages", || connection.seen.messages.lock().len() == 2).await;
    assert_eq!(connection.seen.messages.lock()[1], (Kind::Text, b"cut in two".to_vec()));
    let received = connection.link.profile().stats.bytes_received.load(SeqCst);
    assert_eq!(received, bytes.len() as u64);
}

#[tokio::test]
async fn fragments_in_single_bytes_make_one_message() {
    let mut connection = Connection::new(&Process::new(), profile());
    let mut bytes = Vec::new();
    for (opcode, fin, payload) in [
        (Opcode::Text, false, &b"a fragment, "[..]),
        (Opcode::Ping, true, b"between"),
        (Opcode::Continuation, false, b""),
        (Opcode::Continuation, true, b"and another"),
    ] {
        let payload_len = payload.len() as u64;
        let header = Header { fin, compressed: false, opcode, mask: Some([0; 4]), payload_len };
        bytes.extend_from_slice(encode_header(&header).as_ref());
        bytes.extend_from_slice(payload);
    }
    for byte in bytes {
        connection.peer.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(connection.hears(1).await, [(Opcode::Pong, b"between".to_vec())]);
    until("the message", || !connection.seen.messages.lock().is_empty()).await;
    let whole = b"a fragment, and another".to_vec();
    assert_eq!(*connection.seen.messages.lock(), [(Kind::Text, whole)]);
}

#[tokio::test]
async fn events_of_one_large_read_do_not_pile_up() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.seen.events_each.store(3, SeqCst);
    let frame = client_frame(Opcode::Text, b"1", false, [0; 4]);
    connection.peer.write_all(&frame.repeat(2000)).await.unwrap();
    until("all events", || connection.seen.events.load(SeqCst) == 6000).await;
    assert!(!connection.link.is_closing());
}

#[tokio::test]
async fn flooding_client_does_not_starve_another() {
    let process = Process::new();
    let busy = Connection::new(&process, profile());
    let mut other = Connection::new(&process, profile());
    for connection in [&busy, &other] {
        connection.seen.echoes.store(true, SeqCst);
    }
    let (mut from, mut to) = busy.peer.into_split();
    let endless = tokio::spawn(async move {
        let frame = client_frame(Opcode::Binary, &[7; 1000], false, [0; 4]).repeat(10);
        while to.write_all(&frame).await.is_ok() {}
    });
    let drain = tokio::spawn(async move {
        tokio::io::copy(&mut from, &mut tokio::io::sink()).await.unwrap();
    });
    let exchange = async {
        for _ in 0..100 {
            other.says(Opcode::Text, b"hello").await;
            assert_eq!(other.hears(1).await[0].1, b"hello");
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("the other one starves");
    endless.abort();
    drain.abort();
}
