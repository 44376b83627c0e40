//! Clients that do not read: bounded, closed, and without effect on others.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use tokio::io::AsyncWriteExt;
use wsproxy_conn::{Profile, clock, link::Queued};
use wsproxy_proto::ws::frame::{Opcode, client_frame};

use crate::support::{Connection, Process, close_code, profile, settle, text, until};

#[tokio::test]
async fn slow_consumer_is_closed_and_others_are_untouched() {
    let process = Process::new();
    let profile = Arc::new(Profile { send_buffer_bytes: 100_000, ..profile() });
    let mut slow = Connection::shared(&process, &profile);
    let mut other = Connection::shared(&process, &profile);
    let frame = text(&"x".repeat(1000));
    let mut pushed = 0_u64;
    loop {
        pushed += 1;
        assert_ne!(other.link.push(frame.clone(), clock::now()), Queued::Ending);
        other.link.flush(clock::now());
        other.hears(1).await;
        let queued = slow.link.push(frame.clone(), clock::now());
        slow.link.flush(clock::now());
        assert!(slow.link.queued_bytes() <= 100_000);
        if queued == Queued::Ending {
            break;
        }
    }
    assert_eq!(slow.link.push(frame, clock::now()), Queued::Ending);
    let heard = slow.hears(slow.link.sent().0 as usize + 1).await;
    assert_eq!(close_code(heard.last().unwrap()), 1008);
    assert_eq!(heard.last().unwrap().1[2..], *b"slow consumer");
    slow.says(Opcode::Close, &1008_u16.to_be_bytes()).await;
    assert_eq!(slow.ends().await, ("slow_consumer", 1008, false));
    let (sent, discarded) =
        (profile.stats.messages_sent.load(SeqCst), profile.stats.messages_discarded.load(SeqCst));
    assert_eq!(sent + discarded, 2 * pushed + 1);
    assert!(!other.link.is_closing());
    assert_eq!(process.runtime.budget.used(), 0);
}

#[tokio::test]
async fn tiny_messages_count_with_what_they_cost() {
    let profile = Profile { send_buffer_bytes: 64 * 1024, ..profile() };
    let connection = Connection::new(&Process::new(), profile);
    let mut waiting = 0;
    while connection.link.push(text("1"), clock::now()) != Queued::Ending {
        connection.link.flush(clock::now());
        waiting += u32::from(connection.link.queued_bytes() > 0);
    }
    // 3 bytes each: by their bytes alone more than 20,000 would fit.
    assert!(waiting < 2000, "{waiting} messages wait");
}

#[tokio::test]
async fn control_frames_overtake_data() {
    let mut connection = Connection::new(&Process::new(), profile());
    let pushed = connection.clog(200_000) as usize;
    connection.says(Opcode::Ping, b"quick").await;
    settle().await;
    let heard = connection.hears(pushed + 1).await;
    let at = heard.iter().position(|(opcode, _)| *opcode == Opcode::Pong).unwrap();
    assert!(at < pushed / 2, "the pong came as number {at} of {pushed}");
}

#[tokio::test]
async fn ping_flood_of_unreading_client_pauses_reading() {
    let connection = Connection::new(&Process::new(), profile());
    let Connection { peer, link, .. } = connection;
    let (mut from, mut to) = peer.into_split();
    let flood = tokio::spawn(async move {
        let ping = client_frame(Opcode::Ping, b"", false, [0; 4]);
        to.write_all(&ping.repeat(100_000)).await.unwrap();
        to.write_all(&client_frame(Opcode::Ping, b"last", false, [0; 4])).await.unwrap();
        to
    });
    until("reading pauses", || link.profile().stats.reads_paused.load(SeqCst) > 0).await;
    settle().await;
    assert!(!flood.is_finished());
    // A read may hold ten thousand pings: all their pongs would cost ten times this.
    assert!(link.queued_bytes() < 66_000, "{} bytes wait", link.queued_bytes());
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"last") {
        tokio::io::AsyncReadExt::read_buf(&mut from, &mut bytes).await.unwrap();
    }
    flood.await.unwrap();
}

#[tokio::test]
async fn reading_client_gets_a_pong_per_ping() {
    let mut connection = Connection::new(&Process::new(), profile());
    let pings: Vec<u8> = (0..500_u32)
        .flat_map(|i| client_frame(Opcode::Ping, &i.to_be_bytes(), false, [0; 4]).to_vec())
        .collect();
    for burst in pings.chunks(1000) {
        connection.peer.write_all(burst).await.unwrap();
        let _ = connection.hears(burst.len() / 10).await;
    }
}

#[tokio::test]
async fn client_with_unread_echoes_is_not_read() {
    let connection = Connection::new(&Process::new(), profile());
    connection.seen.echoes.store(true, SeqCst);
    let Connection { peer, link, .. } = connection;
    let (mut from, mut to) = peer.into_split();
    let sender = tokio::spawn(async move {
        for i in 0..2000_u32 {
            let payload = [&i.to_be_bytes()[..], &[7; 996]].concat();
            to.write_all(&client_frame(Opcode::Binary, &payload, false, [0; 4])).await.unwrap();
        }
        to
    });
    until("reading pauses", || link.profile().stats.reads_paused.load(SeqCst) > 0).await;
    settle().await;
    assert!(!sender.is_finished());
    assert!(link.queued_bytes() < 3 * 64 * 1024, "{} bytes wait", link.queued_bytes());
    let mut bytes = vec![0; 2000 * 1004];
    tokio::io::AsyncReadExt::read_exact(&mut from, &mut bytes).await.unwrap();
    let (frames, rest) = crate::support::frames(&bytes);
    assert_eq!(rest, 0);
    assert!(frames.iter().zip(0_u32..).all(|((_, payload), i)| payload[..4] == i.to_be_bytes()));
    sender.await.unwrap();
}

#[tokio::test]
async fn client_that_never_reads_echoes_times_out() {
    let mut process = Process::new();
    let mut connection = Connection::new(&process, profile());
    connection.seen.echoes.store(true, SeqCst);
    let frame = client_frame(Opcode::Binary, &[7; 1000], false, [0; 4]);
    while connection.link.profile().stats.reads_paused.load(SeqCst) == 0 {
        let _ = connection.peer.try_write(&frame);
        tokio::task::yield_now().await;
    }
    settle().await;
    process.pass_seconds(89);
    assert!(!connection.link.is_closing());
    process.pass_seconds(2);
    assert!(connection.link.is_closing());
    assert!(connection.link.queued_bytes() < 4000);
    process.pass_seconds(6);
    assert_eq!(connection.ends().await, ("heartbeat_timeout", 4002, false));
    assert_eq!(process.runtime.budget.used(), 0);
}
