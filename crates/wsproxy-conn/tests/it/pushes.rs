//! Frames that may wait for others, and the state of a new client, which may exceed the send buffer.

use std::sync::Arc;

use wsproxy_conn::{Profile, clock, link::Queued};

use crate::support::{Connection, Process, close_code, profile, settle, text};

#[tokio::test]
async fn frame_that_may_wait_leaves_with_the_next() {
    let mut connection = Connection::new(&Process::new(), profile());
    // The first frame that waits is flushed with all behind it.
    for (number, told) in [Queued::Flush, Queued::Queued, Queued::Queued].into_iter().enumerate() {
        let frame = text(&format!("later {number}"));
        assert_eq!(connection.link.push_later(frame, clock::now()), told);
    }
    settle().await;
    assert!(connection.hears_nothing());
    assert_eq!(connection.link.push(text("now"), clock::now()), Queued::Flush);
    // Who has queued the frame before flushes.
    assert_eq!(connection.link.push_later(text("behind"), clock::now()), Queued::Queued);
    connection.link.flush(clock::now());
    let heard = connection.hears(5).await;
    let heard: Vec<_> = heard.iter().map(|(_, text)| &text[..]).collect();
    assert_eq!(heard, [&b"later 0"[..], b"later 1", b"later 2", b"now", b"behind"]);
    assert_eq!(connection.link.push_later(text("again"), clock::now()), Queued::Flush);
}

#[tokio::test]
async fn frames_that_may_wait_do_not_make_a_client_slow() {
    let profile = Profile { low_water_bytes: 1000, ..profile() };
    let mut connection = Connection::new(&Process::new(), profile);
    for _ in 0..20 {
        connection.link.push_later(text(&"x".repeat(100)), clock::now());
        assert!(connection.link.is_writable());
    }
    connection.link.flush(clock::now());
    connection.hears(20).await;
}

#[tokio::test]
async fn state_may_exceed_the_send_buffer() {
    let process = Process::new();
    let profile = Arc::new(Profile { send_buffer_bytes: 100_000, ..profile() });
    let mut connection = Connection::shared(&process, &profile);
    let page = "x".repeat(90_000);
    for _ in 0..10 {
        connection.link.push_state(text(&page));
        connection.link.release_state([], clock::now());
    }
    let state = connection.link.queued_bytes();
    assert!(state > 500_000, "{state}");
    assert_eq!(process.runtime.budget.used(), state);
    // Messages behind the state have the send buffer to themselves.
    for _ in 0..90 {
        assert_eq!(connection.link.push(text(&page[..1000]), clock::now()), Queued::Queued);
    }
    let heard = connection.hears(100).await;
    let sizes: Vec<_> = heard.iter().map(|(_, text)| text.len()).collect();
    assert_eq!(sizes, [vec![90_000; 10], vec![1000; 90]].concat());
    // What was excused is read: the bound is the same as for all.
    while connection.link.push(text(&page[..1000]), clock::now()) != Queued::Ending {
        connection.link.flush(clock::now());
        assert!(connection.link.queued_bytes() <= 100_000);
    }
    let heard = connection.hears(connection.link.sent().0 as usize - 100 + 1).await;
    assert_eq!(close_code(heard.last().unwrap()), 1008);
}

#[tokio::test]
async fn state_that_nearly_fills_the_send_buffer_leaves_it_to_messages() {
    let profile = Profile { send_buffer_bytes: 100_000, ..profile() };
    let mut connection = Connection::new(&Process::new(), profile);
    connection.link.push_state(text(&"x".repeat(90_000)));
    connection.link.release_state([], clock::now());
    for _ in 0..90 {
        assert_eq!(connection.link.push(text(&"x".repeat(1000)), clock::now()), Queued::Queued);
    }
    assert!(connection.link.queued_bytes() > 100_000);
    connection.hears(91).await;
}

#[tokio::test]
async fn unread_state_excuses_no_more_than_itself() {
    let profile = Profile { send_buffer_bytes: 100_000, ..profile() };
    let connection = Connection::new(&Process::new(), profile);
    for _ in 0..10 {
        connection.link.push_state(text(&"x".repeat(90_000)));
        connection.link.release_state([], clock::now());
    }
    let mut pushed = 0;
    while connection.link.push(text(&"x".repeat(1000)), clock::now()) != Queued::Ending {
        pushed += 1;
    }
    // Each takes its 1,004 bytes and the overhead of a frame.
    assert!((85..100).contains(&pushed), "{pushed}");
}

/// State waits for its compressed frames, whatever comes meanwhile and however much.
#[tokio::test]
async fn state_is_written_once_it_is_compressed() {
    let process = Process::new();
    let profile = Arc::new(Profile { send_buffer_bytes: 2_000_000, ..profile() });
    let mut connection = Connection::shared(&process, &profile);
    let pages = ["x", "y"].map(|letter| text(&letter.repeat(900_000)));
    pages.iter().for_each(|page| connection.link.push_state(page.clone()));
    connection.link.push(text("behind"), clock::now());
    connection.link.flush(clock::now());
    connection.link.push_and_flush(text("last"), clock::now());
    settle().await;
    assert!(connection.hears_nothing());
    let [first, second] = pages;
    let others = [(first, text("small x")), (second, text("small y"))];
    connection.link.release_state(others, clock::now());
    let heard = connection.hears(4).await;
    let heard: Vec<_> = heard.iter().map(|(_, text)| &text[..]).collect();
    assert_eq!(heard, [&b"small x"[..], b"small y", b"behind", b"last"]);
    assert_eq!((connection.link.queued_bytes(), process.runtime.budget.used()), (0, 0));
}
