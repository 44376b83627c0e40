//! The clock of all rooms: one task that tells a room when its time has come.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wsproxy_conn::clock::{self, Micros};

use crate::endpoint::rooms::room::Room;

/// Rooms that wait for a time. A room has one entry, or a few of which all but the earliest have no effect.
#[derive(Default)]
pub(super) struct Ticker {
    waiting: Mutex<BinaryHeap<Reverse<Entry>>>,
    changed: Notify,
}

struct Entry {
    at: Micros,
    room: Weak<Room>,
}

impl Ticker {
    /// Adds a room that is to be told at a time.
    pub(super) fn add(&self, at: Micros, room: Weak<Room>) {
        let mut waiting = self.waiting.lock();
        let is_first = waiting.peek().is_none_or(|Reverse(first)| at < first.at);
        waiting.push(Reverse(Entry { at, room }));
        drop(waiting);
        if is_first {
            self.changed.notify_one();
        }
    }

    fn next(&self) -> Option<Micros> {
        self.waiting.lock().peek().map(|Reverse(entry)| entry.at)
    }

    fn pop(&self, now: Micros) -> Option<(Micros, Option<Arc<Room>>)> {
        let mut waiting = self.waiting.lock();
        if waiting.peek().is_none_or(|Reverse(entry)| entry.at > now) {
            return None;
        }
        let Reverse(entry) = waiting.pop()?;
        Some((entry.at, entry.room.upgrade()))
    }
}

/// Tells rooms, until `end`.
pub(super) async fn run(ticker: Arc<Ticker>, end: CancellationToken) {
    loop {
        let next = ticker.next();
        let due = async {
            match next {
                Some(at) => {
                    let wait = Duration::from(at.since(clock::now()));
                    // An earlier entry may come.
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = ticker.changed.notified() => {}
                    }
                }
                None => ticker.changed.notified().await,
            }
        };
        tokio::select! {
            () = end.cancelled() => return,
            () = due => {}
        }
        let now = clock::now();
        while let Some((at, room)) = ticker.pop(now) {
            if let Some(room) = room {
                room.on_tick(at);
            }
        }
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
