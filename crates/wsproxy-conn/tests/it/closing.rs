//! Endings: the close handshake from both sides, violations, deadlines, and peers that just leave.

use std::{sync::Arc, sync::atomic::Ordering::SeqCst};

use tokio::io::AsyncWriteExt;
use wsproxy_conn::{clock, link::Queued};
use wsproxy_proto::{
    disconnect::Disconnect,
    ws::frame::{Opcode, client_frame},
};

use crate::support::{Connection, Process, close_code, profile, settle, text, until};

#[tokio::test]
async fn disconnect_sends_close_frame_and_ends_stream() {
    let process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.link.disconnect_with(&Disconnect::BACKEND, 4100, "go", clock::now());
    let heard = connection.hears(1).await;
    assert_eq!((close_code(&heard[0]), &heard[0].1[2..]), (4100, &b"go"[..]));
    // Messages before the peer's close frame are ignored.
    connection.says(Opcode::Text, b"late").await;
    connection.says(Opcode::Ping, b"late").await;
    connection.says(Opcode::Close, &4100_u16.to_be_bytes()).await;
    assert_eq!(connection.ends().await, ("backend", 4100, false));
    assert!(connection.hears_all().await.is_empty());
    assert!(connection.seen.messages.lock().is_empty());
}

#[tokio::test]
async fn a_peer_that_closes_gets_its_own_code_back() {
    for (payload, answer, code) in [
        (&4321_u16.to_be_bytes()[..], 4321, 4321),
        (&[0x03, 0xe9, b'x'], 1001, 1001),
        (&[], 1000, 1005),
    ] {
        let mut connection = Connection::new(&Process::new(), profile());
        let mut bytes = client_frame(Opcode::Close, payload, false, [9; 4]).to_vec();
        bytes.extend_from_slice(&client_frame(Opcode::Text, b"behind it", false, [9; 4]));
        connection.peer.write_all(&bytes).await.unwrap();
        let heard = connection.hears_all().await;
        assert_eq!((heard.len(), close_code(&heard[0])), (1, answer));
        assert_eq!(connection.ends().await, ("normal", code, true));
        assert!(connection.seen.messages.lock().is_empty());
    }
}

#[tokio::test]
async fn violation_gets_close_frame_and_rest_is_discarded() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.says(Opcode::Text, b"good").await;
    connection.peer.write_all(&[0x83, 0x80, 0, 0, 0, 0]).await.unwrap();
    connection.says(Opcode::Text, b"bad").await;
    let heard = connection.hears_all().await;
    assert_eq!((heard.len(), close_code(&heard[0])), (1, 1002));
    let frame = client_frame(Opcode::Text, &[b'x'; 1000], false, [1; 4]);
    for _ in 0..100 {
        connection.peer.write_all(&frame).await.unwrap();
    }
    assert!(!connection.task.is_finished());
    connection.peer.shutdown().await.unwrap();
    assert_eq!(connection.ends().await, ("protocol_error", 1002, false));
    assert_eq!(connection.seen.messages.lock().len(), 1);
}

/// Sends as much as the socket takes. Returns the number of bytes.
async fn floods(connection: &mut Connection) -> usize {
    let bytes = client_frame(Opcode::Binary, &[b'x'; 60_000], false, [1; 4]);
    let (mut taken, mut quiet) = (0, 0);
    while quiet < 3 && taken < 1 << 30 {
        match connection.peer.try_write(&bytes) {
            Ok(count) => (taken, quiet) = (taken + count, 0),
            Err(_) => {
                quiet += 1;
                settle().await;
            }
        }
    }
    taken
}

#[tokio::test]
async fn bytes_discarded_after_an_ending_are_bounded() {
    let mut process = Process::new();
    for is_violation in [true, false] {
        let mut connection = Connection::new(&process, profile());
        if is_violation {
            connection.peer.write_all(&[0x83, 0x80, 0, 0, 0, 0]).await.unwrap();
        } else {
            connection.link.disconnect(&Disconnect::BACKEND, process.now);
        }
        let code = close_code(&connection.hears(1).await[0]);
        let taken = floods(&mut connection).await;
        assert!((4 << 20..5 << 20).contains(&taken), "{taken} bytes were taken");
        // The peer's stream is no longer read. It has until the deadline to read our close frame.
        assert!(connection.hears_all().await.is_empty());
        assert!(!connection.task.is_finished());
        process.pass(5200);
        assert_eq!(connection.ends().await.1, code);
    }
}

#[tokio::test]
async fn finish_writes_the_queue_before_the_close_frame() {
    for says_close in [true, false] {
        let mut connection = Connection::new(&Process::new(), profile());
        let pushed = connection.clog(100_000) as usize;
        connection.link.finish(&Disconnect::RESTART, clock::now());
        assert_eq!(connection.link.push(text("late"), clock::now()), Queued::Ending);
        if says_close {
            connection.says(Opcode::Close, &1000_u16.to_be_bytes()).await;
        }
        connection.peer.shutdown().await.unwrap();
        settle().await;
        let heard = connection.hears_all().await;
        assert_eq!(heard.len(), pushed + 1);
        assert_eq!(close_code(&heard[pushed]), 1012);
        assert_eq!(connection.ends().await, ("restart", 1012, false));
        assert_eq!(connection.link.profile().stats.messages_discarded.load(SeqCst), 1);
    }
}

#[tokio::test]
async fn disconnect_cuts_finish_short_between_frames() {
    let mut connection = Connection::new(&Process::new(), profile());
    let pushed = connection.clog(100_000);
    connection.link.finish(&Disconnect::RESTART, clock::now());
    connection.link.disconnect(&Disconnect::SLOW, clock::now());
    assert!(connection.link.queued_bytes() < 2000);
    connection.link.disconnect(&Disconnect::INTERNAL, clock::now());
    let stats = &Arc::clone(connection.link.profile()).stats;
    let lost = stats.messages_discarded.load(SeqCst);
    let heard = connection.hears((pushed - lost) as usize + 1).await;
    assert_eq!(close_code(heard.last().unwrap()), 1008);
    connection.says(Opcode::Close, &1008_u16.to_be_bytes()).await;
    assert_eq!(connection.ends().await, ("slow_consumer", 1008, false));
    assert_eq!(stats.messages_sent.load(SeqCst) + stats.messages_discarded.load(SeqCst), pushed);
}

#[tokio::test]
async fn unanswered_close_frame_ends_at_the_deadline() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    let pushed = connection.clog(100_000);
    connection.link.disconnect(&Disconnect::BACKEND, process.now);
    assert!(connection.link.queued_bytes() < 2000);
    process.pass(4900);
    settle().await;
    assert!(!connection.task.is_finished());
    process.pass(200);
    assert_eq!(connection.ends().await, ("backend", 4004, false));
    assert_eq!((process.runtime.budget.used(), connection.link.queued_bytes()), (0, 0));
    // A message that is partly written is lost like the others.
    let stats = &connection.link.profile().stats;
    assert_eq!(stats.messages_sent.load(SeqCst) + stats.messages_discarded.load(SeqCst), pushed);
}

#[tokio::test]
async fn partly_written_message_counts_as_lost() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.link.push(text(&"x".repeat(1 << 20)), clock::now());
    connection.link.flush(clock::now());
    connection.link.push(text("behind it"), clock::now());
    assert!(connection.link.sent().1 > 0);
    connection.link.abort();
    connection.ends().await;
    assert_eq!(connection.link.sent().0, 0);
    assert_eq!(connection.link.profile().stats.messages_discarded.load(SeqCst), 2);
}

#[tokio::test]
async fn a_peer_that_leaves_without_a_word_is_gone() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.peer.shutdown().await.unwrap();
    assert_eq!(connection.ends().await, ("gone", 1006, false));
    assert_eq!(connection.link.push(text("late"), clock::now()), Queued::Ending);
}

#[tokio::test]
async fn aborted_connection_sends_nothing_and_leaves_the_wheel() {
    let process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.clog(100_000);
    assert_eq!(process.runtime.links().len(), 1);
    connection.link.abort();
    assert_eq!(connection.ends().await, ("gone", 1006, false));
    assert!(process.runtime.links().is_empty());
    // Only its own reference to itself is left.
    assert_eq!((Arc::weak_count(&connection.link), Arc::strong_count(&connection.link)), (1, 1));
}

#[tokio::test]
async fn a_connection_whose_task_is_dropped_is_over() {
    let process = Process::new();
    let connection = Connection::new(&process, profile());
    let pushed = connection.clog(100_000);
    connection.task.abort();
    until("the task ends", || connection.task.is_finished()).await;
    assert_eq!(connection.link.push(text("late"), clock::now()), Queued::Ending);
    assert_eq!(process.runtime.budget.used(), 0);
    assert!(process.runtime.links().is_empty());
    let stats = &connection.link.profile().stats;
    let counted = stats.messages_sent.load(SeqCst) + stats.messages_discarded.load(SeqCst);
    assert_eq!(counted, pushed + 1);
}

#[tokio::test]
async fn connection_ended_before_101_is_closed_after_it() {
    let process = Process::new();
    let (profile, runtime) = (Arc::new(profile()), Arc::clone(&process.runtime));
    let link = wsproxy_conn::Link::new(uuid::Uuid::new_v4(), None, profile, runtime, clock::now());
    link.push(text("first"), clock::now());
    link.finish(&Disconnect::RESTART, clock::now());
    let mut connection = Connection::over(link, &[]);
    let heard = connection.hears(2).await;
    assert_eq!(close_code(&heard[1]), 1012);
}
