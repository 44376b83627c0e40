//! Several publishers on several threads, many connections, clients of every kind.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
};

use tokio::{io::AsyncReadExt, net::UnixStream};
use wsproxy_conn::{Link, Profile, clock, link::Queued};
use wsproxy_proto::ws::frame::Opcode;

use crate::support::{Connection, PATIENCE, Process, frames, profile, text, until};

/// Behaviour of a client.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Habit {
    Fast,
    /// Reads a little at a time, now and then.
    Slow,
    /// Reads for a while, then drops its socket.
    Leaves,
    /// Never reads.
    Stuck,
}

/// Pushes rounds of messages to all links, as the readers of several buses would.
fn publish(links: &[Arc<Link>], source: usize, pushed: &AtomicU64) {
    let mut seed = source as u64 + 1;
    for round in 0..ROUNDS {
        let mut dirty = Vec::new();
        for message in 0..ROUND_MESSAGES {
            let number = round * ROUND_MESSAGES + message;
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let padding = "x".repeat((seed >> 33) as usize % 700);
            let frame = text(&format!("{source} {number} {padding}"));
            for link in links {
                pushed.fetch_add(1, Relaxed);
                if link.push(frame.clone(), clock::now()) == Queued::Flush {
                    dirty.push(Arc::clone(link));
                }
            }
        }
        dirty.iter().for_each(|link| link.flush(clock::now()));
        thread::yield_now();
    }
}

/// Reads as the habit says. Returns all bytes that it got.
async fn read(mut peer: UnixStream, habit: Habit, index: usize) -> (Habit, Vec<u8>) {
    let mut bytes = Vec::new();
    let most = match habit {
        Habit::Stuck => std::future::pending().await,
        Habit::Leaves => 20_000 + 3000 * index,
        Habit::Fast | Habit::Slow => usize::MAX,
    };
    while bytes.len() < most {
        let part = if habit == Habit::Slow { 700 } else { 64 * 1024 };
        let mut reader = (&mut peer).take(part);
        if reader.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            break;
        }
        if habit == Habit::Slow {
            tokio::task::yield_now().await;
        }
    }
    (habit, bytes)
}

/// Checks that every publisher's messages came in order and without a hole. Returns their number.
fn check(bytes: &[u8]) -> u64 {
    let mut next = [0; PUBLISHERS * THREADS_EACH];
    let mut count = 0;
    for (opcode, payload) in frames(bytes).0 {
        if opcode != Opcode::Text {
            assert_eq!(opcode, Opcode::Close);
            continue;
        }
        let payload = String::from_utf8(payload).unwrap();
        let mut words = payload.split(' ');
        let mut number = || words.next().unwrap().parse::<usize>().unwrap();
        let (source, number) = (number(), number());
        assert_eq!(number, next[source], "publisher {source}");
        next[source] += 1;
        count += 1;
    }
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_unbroken_prefixes_and_counts_are_exact() {
    let mut process = Process::with_budget(64 << 20);
    let profile = Arc::new(Profile { send_buffer_bytes: 400_000, ..profile() });
    let (mut links, mut seen, mut clients, mut stuck) = (vec![], vec![], vec![], vec![]);
    for index in 0..LINKS {
        let connection = Connection::shared(&process, &profile);
        let habit = [Habit::Fast, Habit::Slow, Habit::Leaves, Habit::Fast, Habit::Stuck][index % 5];
        links.push(connection.link);
        seen.push(connection.seen);
        match habit {
            Habit::Stuck => stuck.push(connection.peer),
            _ => clients.push((index, tokio::spawn(read(connection.peer, habit, index)))),
        }
    }
    let (links, pushed) = (Arc::new(links), Arc::new(AtomicU64::new(0)));
    let publishers: Vec<_> = (0..PUBLISHERS * THREADS_EACH)
        .map(|source| {
            let (links, pushed) = (Arc::clone(&links), Arc::clone(&pushed));
            thread::spawn(move || publish(&links, source, &pushed))
        })
        .collect();
    until("all is published", || publishers.iter().all(thread::JoinHandle::is_finished)).await;
    publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
    until("what can be read is read", || {
        links.iter().enumerate().all(|(i, link)| i % 5 == 4 || link.queued_bytes() == 0)
    })
    .await;
    links.iter().for_each(|link| link.abort());
    until("all ended", || seen.iter().all(|seen| seen.end().is_some())).await;
    let all = (PUBLISHERS * THREADS_EACH * ROUNDS * ROUND_MESSAGES) as u64;
    for (index, client) in clients {
        let (habit, bytes) = tokio::time::timeout(PATIENCE, client).await.unwrap().unwrap();
        let (count, end) = (check(&bytes), seen[index].end().unwrap().0);
        let whole = count == all || habit == Habit::Leaves || end == "slow_consumer";
        assert!(whole, "{habit:?} got {count} of {all} and ended as {end}");
    }
    assert!((4..LINKS).step_by(5).all(|stuck| seen[stuck].end().unwrap().0 == "slow_consumer"));
    let stats = &profile.stats;
    let (sent, lost) = (stats.messages_sent.load(SeqCst), stats.messages_discarded.load(SeqCst));
    assert_eq!(sent + lost, pushed.load(SeqCst));
    assert_eq!(links.iter().map(|link| link.sent().0).sum::<u64>(), sent);
    assert_eq!(links.iter().map(|link| link.queued_bytes()).sum::<usize>(), 0);
    assert_eq!(process.runtime.budget.used(), 0);
    process.pass_seconds(60);
    assert!(process.runtime.links().is_empty());
    assert!(links.iter().all(|link| Arc::weak_count(link) == 1));
}

const LINKS: usize = 50;
const PUBLISHERS: usize = 4;
const THREADS_EACH: usize = 2;
const ROUNDS: usize = 60;
const ROUND_MESSAGES: usize = 20;
