//! Model of a store of logs that trims, expires, is emptied and rolled back, with the truth about what was published.

use std::collections::VecDeque;

use bytes::Bytes;
use wsproxy_proto::history::{Entry, Log, Position, Resolved, Snapshot};

/// Message that was published, whatever became of it.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) log: usize,
    pub(crate) id: Position,
    pub(crate) prev: Position,
    /// Time of its publication, which no clock of a store changes.
    at: u64,
    /// Whether a rollback, or the emptying of the store, has undone the message.
    pub(crate) undone: bool,
    /// Number of messages that had been published at that rollback.
    pub(crate) rolled_back_at: Option<usize>,
}

/// State of the store.
#[derive(Debug, Clone, Default)]
struct Data {
    logs: Vec<Option<Stored>>,
    heads: Vec<Option<Head>>,
    clock: (u64, u64),
}

#[derive(Debug, Clone, Copy)]
struct Head {
    position: Position,
    expires: u64,
    /// Whether an entry was published in this life.
    is_used: bool,
}

#[derive(Debug, Clone, Default)]
struct Stored {
    entries: VecDeque<usize>,
    expires: u64,
}

/// The store, and the messages of all publishers.
#[derive(Debug)]
pub(crate) struct Redis {
    pub(crate) now: u64,
    /// Time since the beginning.
    elapsed: u64,
    /// Time by which the store's clock is behind.
    skew: u64,
    /// Number of the store. Connections end when another store takes over.
    pub(crate) store: u64,
    pub(crate) truth: Vec<Published>,
    entries_max: usize,
    /// Source of tags for heads without an entry.
    anchors: u32,
    data: Data,
    saved: (usize, Data),
}

impl Redis {
    pub(crate) fn new(logs: usize, entries_max: usize) -> Self {
        let data = Data { logs: vec![None; logs], heads: vec![None; logs], ..Data::default() };
        let saved = (0, data.clone());
        let (truth, anchors) = (Vec::new(), u32::MAX);
        Self {
            now: 10_000,
            elapsed: 0,
            skew: 0,
            store: 0,
            truth,
            entries_max,
            anchors,
            data,
            saved,
        }
    }

    pub(crate) fn advance(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        self.elapsed += milliseconds;
        for log in &mut self.data.logs {
            log.take_if(|log| log.expires <= self.now);
        }
        for head in &mut self.data.heads {
            head.take_if(|head| head.expires <= self.now);
        }
    }

    /// Publishes a message. Returns its serial.
    pub(crate) fn publish(&mut self, log: usize) -> usize {
        let serial = self.truth.len();
        let prev = self.data.heads[log].map_or(Position::START, |head| head.position);
        let (data, now) = (&mut self.data, self.now);
        let after = |(milliseconds, sequence): (u64, u64)| match milliseconds < now {
            true => (now, 0),
            false => (milliseconds, sequence + 1),
        };
        // Several logs share one clock. A single log has its own clock, which is removed with it.
        let shared = data.logs.len() > 1;
        let last = data.logs[log].as_ref().and_then(|log| log.entries.back());
        let own = last.map_or((0, 0), |last| self.truth[*last].id.id());
        let mut id = after(if shared { data.clock } else { own });
        if id <= prev.id() {
            id = (prev.milliseconds, prev.sequence + 1);
        }
        data.clock = id;
        let tag = u32::try_from(serial).unwrap();
        let id = Position { milliseconds: id.0, sequence: id.1, tag };
        self.truth.push(Published {
            log,
            id,
            prev,
            at: self.elapsed,
            undone: false,
            rolled_back_at: None,
        });
        let stored = data.logs[log].get_or_insert_default();
        stored.entries.push_back(serial);
        stored.expires = now + TTL;
        data.heads[log] = Some(Head { position: id, expires: now + HEAD, is_used: true });
        let truth = &self.truth;
        let is_old = |first: &mut usize| truth[*first].id.milliseconds + TTL < id.milliseconds;
        while stored.entries.len() > self.entries_max
            || (stored.entries.len() > 1 && stored.entries.front_mut().is_some_and(is_old))
        {
            stored.entries.pop_front();
        }
        serial
    }

    /// Returns whether a message arrives now if it has not arrived yet.
    ///
    /// A message that came after the head of its log has expired would be of an earlier life of the log than a reader
    /// that has begun meanwhile. That cannot happen: a head lives for an hour at least, and a connection to the store
    /// that brings nothing is lost within seconds.
    pub(crate) fn is_due(&self, serial: usize) -> bool {
        self.elapsed + 1 >= self.truth[serial].at + TRAVEL
    }

    /// Renews the head of a log for an instance that reads it. Returns whether there is a head.
    pub(crate) fn keep_head(&mut self, log: usize) -> bool {
        let Some(head) = &mut self.data.heads[log] else { return false };
        head.expires = head.expires.max(self.now + HEAD);
        true
    }

    /// Saves the state to which [`Self::roll_back`] returns.
    pub(crate) fn save(&mut self) {
        self.saved = (self.truth.len(), self.data.clone());
    }

    /// Lets another store take over, which lags, and whose clock may be behind.
    pub(crate) fn roll_back(&mut self, skew: u64) {
        let (published, data) = self.saved.clone();
        let until = self.truth.len();
        for one in self.truth[published..].iter_mut().filter(|one| !one.undone) {
            (one.undone, one.rolled_back_at) = (true, Some(until));
        }
        self.data = data;
        self.now = self.now + self.skew - skew;
        self.skew = skew;
        self.store += 1;
        self.advance(0);
    }

    /// Removes all keys.
    pub(crate) fn empty(&mut self) {
        let logs = self.data.logs.len();
        self.data = Data { logs: vec![None; logs], heads: vec![None; logs], ..Data::default() };
        self.truth.iter_mut().for_each(|one| one.undone = true);
        self.save();
    }

    /// Answers as the script `read` does.
    pub(crate) fn snapshot(
        &mut self,
        logs: &[usize],
        after: Option<Position>,
        page: usize,
        anchor: bool,
    ) -> Snapshot {
        let shared = self.data.logs.len() > 1;
        let moment = if shared { self.data.clock } else { (self.now, 0) };
        let logs = logs.iter().map(|log| self.read(*log, after, page, anchor));
        let logs = logs.collect();
        let after = after.map_or(Resolved::Nothing, Resolved::At);
        Snapshot { now_ms: self.now, moment, after, known: false, logs }
    }

    fn read(&mut self, log: usize, after: Option<Position>, page: usize, anchor: bool) -> Log {
        let is_new = anchor && self.data.heads[log].is_none();
        if is_new {
            self.anchors -= 1;
            let position = Position { milliseconds: 1, sequence: 0, tag: self.anchors };
            let head = Head { position, expires: self.now + HEAD, is_used: false };
            self.data.heads[log] = Some(head);
        }
        let head = self.data.heads[log];
        let stored = self.data.logs[log].clone().unwrap_or_default();
        let all: Vec<Entry> = stored.entries.iter().map(|serial| self.entry(*serial)).collect();
        let behind =
            all.iter().filter(|entry| after.is_some_and(|after| after.is_before(entry.id)));
        let mut entries: Vec<Entry> = behind.cloned().collect();
        let complete = entries.len() <= page;
        entries.truncate(page);
        let first = stored.entries.front().map(|first| &self.truth[*first]);
        // The first entry of a life follows no entry of that life.
        let is_first = |first: &Published| {
            !self.truth.iter().any(|other| other.log == log && other.id == first.prev)
        };
        let is_from_start = first.map_or_else(|| head.is_none_or(|head| !head.is_used), is_first);
        let head = head.map(|head| head.position);
        Log { head, is_new, is_from_start, is_private: false, entries, complete }
    }

    fn entry(&self, serial: usize) -> Entry {
        let Published { id, prev, .. } = self.truth[serial];
        let data = Bytes::from(serial.to_string());
        Entry { id, prev, event_id: None, data }
    }
}

/// Returns the serial of the message that an entry holds.
pub(crate) fn serial(entry: &Entry) -> usize {
    std::str::from_utf8(&entry.data).unwrap().parse().unwrap()
}

/// Time for which entries are held, in milliseconds.
const TTL: u64 = 100;

/// Time for which heads are held, in milliseconds.
pub(crate) const HEAD: u64 = 160;

/// Upper bound of the time for which a message is on its way: a head lives longer by the clock of any store.
const TRAVEL: u64 = HEAD - SKEW;

/// Upper bound of the difference between the clocks of stores that replace each other.
pub(crate) const SKEW: u64 = 30;
