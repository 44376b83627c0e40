//! Frames with a key: of those that wait for a slow client only the newest is sent.

use std::sync::atomic::Ordering::SeqCst;

use wsproxy_conn::{clock, link::Queued};
use wsproxy_proto::ws::frame::{Opcode, client_frame};

use crate::support::{Connection, Process, profile, text};

#[tokio::test]
async fn newest_keyed_frame_replaces_what_waits() {
    let process = Process::new();
    let mut connection = Connection::new(&process, profile());
    let filler = connection.clog(50_000);
    let before = connection.link.queued_bytes();
    for round in 0..1000 {
        for key in 0..3 {
            let frame = text(&format!("{key}:{round}"));
            assert_eq!(connection.link.push_keyed(key, frame, clock::now()), Queued::Queued);
        }
        if round == 500 {
            connection.link.push(text("between"), clock::now());
        }
    }
    assert!(connection.link.queued_bytes() < before + 1000);
    assert_eq!(process.runtime.budget.used(), connection.link.queued_bytes());
    let heard = connection.hears(filler as usize + 4).await;
    let texts: Vec<_> = heard[filler as usize..].iter().map(|(_, text)| &text[..]).collect();
    assert_eq!(texts, [&b"between"[..], b"0:999", b"1:999", b"2:999"]);
    assert_eq!(connection.link.profile().stats.messages_replaced.load(SeqCst), 3 * 999);
    assert_eq!(process.runtime.budget.used(), 0);
}

#[tokio::test]
async fn client_that_reads_gets_every_keyed_frame() {
    let mut connection = Connection::new(&Process::new(), profile());
    for round in 0..10 {
        assert_eq!(connection.link.push_keyed(7, text("x"), clock::now()), Queued::Flush);
        connection.link.flush(clock::now());
        assert_eq!(connection.hears(1).await.len(), 1, "round {round}");
    }
    assert_eq!(connection.link.profile().stats.messages_replaced.load(SeqCst), 0);
}

#[tokio::test]
async fn keyed_frames_of_a_closing_connection_are_discarded() {
    let mut connection = Connection::new(&Process::new(), profile());
    connection.clog(50_000);
    connection.link.push_keyed(1, text("old"), clock::now());
    connection.link.disconnect(&wsproxy_proto::disconnect::Disconnect::BACKEND, clock::now());
    assert_eq!(connection.link.push_keyed(1, text("new"), clock::now()), Queued::Ending);
    let close = client_frame(Opcode::Close, &4004_u16.to_be_bytes(), false, [0; 4]);
    tokio::io::AsyncWriteExt::write_all(&mut connection.peer, &close).await.unwrap();
    let heard = connection.hears_all().await;
    assert!(heard.iter().all(|(_, payload)| payload != b"old" && payload != b"new"));
}
