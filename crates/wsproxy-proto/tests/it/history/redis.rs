//! A store of logs that trims, expires, is emptied and rolled back, and the truth about what was published.

use std::collections::VecDeque;

use bytes::Bytes;
use wsproxy_proto::history::{Entry, Log, Position, Snapshot};

/// How long entries are held, in milliseconds.
const TTL: u64 = 100;

/// How much the clocks of stores that replace each other may differ.
pub(crate) const SKEW: u64 = 30;

/// What the rules are told.
pub(crate) const RETENTION: u64 = TTL - SKEW;

/// What was published once, whatever became of it.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) log: usize,
    pub(crate) id: Position,
    pub(crate) prev: Position,
    /// A rollback or somebody who empties the store has undone it.
    pub(crate) undone: bool,
    /// It was a rollback: so many had been published then.
    pub(crate) rolled_back_at: Option<usize>,
}

/// What is stored.
#[derive(Debug, Clone, Default)]
struct Data {
    logs: Vec<Option<Stored>>,
    clock: Position,
    epoch: Option<u64>,
}

#[derive(Debug, Clone, Default)]
struct Stored {
    entries: VecDeque<usize>,
    expires: u64,
}

/// The store, and what all who publish know together.
#[derive(Debug)]
pub(crate) struct Redis {
    pub(crate) now: u64,
    /// How far the store's clock is behind.
    skew: u64,
    /// Which store it is: connections end where another one takes over.
    pub(crate) store: u64,
    pub(crate) truth: Vec<Published>,
    entries_max: usize,
    data: Data,
    saved: (usize, Data),
}

impl Redis {
    pub(crate) fn new(logs: usize, entries_max: usize) -> Self {
        let data = Data { logs: vec![None; logs], ..Data::default() };
        let saved = (0, data.clone());
        Self { now: 10_000, skew: 0, store: 0, truth: Vec::new(), entries_max, data, saved }
    }

    pub(crate) fn advance(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        for log in &mut self.data.logs {
            log.take_if(|log| log.expires <= self.now);
        }
    }

    /// Answers which of all that was published it is.
    pub(crate) fn publish(&mut self, log: usize) -> usize {
        let serial = self.truth.len();
        let stored = self.data.logs[log].get_or_insert_default();
        let prev = stored.entries.back().map_or(Position::START, |last| self.truth[*last].id);
        // Two stores never give the same id here: the numbers go on although the clock goes back.
        let milliseconds = self.now.max(self.data.clock.milliseconds).max(prev.milliseconds);
        let id = Position { milliseconds, sequence: serial as u64 };
        self.data.clock = id;
        self.truth.push(Published { log, id, prev, undone: false, rolled_back_at: None });
        stored.entries.push_back(serial);
        stored.expires = self.now + TTL;
        let truth = &self.truth;
        let is_old = |first: &mut usize| truth[*first].id.milliseconds + TTL < milliseconds;
        while stored.entries.len() > self.entries_max
            || (stored.entries.len() > 1 && stored.entries.front_mut().is_some_and(is_old))
        {
            stored.entries.pop_front();
        }
        serial
    }

    /// Remembers the state to which [`Self::roll_back`] goes.
    pub(crate) fn save(&mut self) {
        self.saved = (self.truth.len(), self.data.clone());
    }

    /// Another store takes over, which lags, and whose clock may be behind.
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

    /// All keys are removed; not while the clock is behind the last id, which no rule can tell from messages
    /// that come twice, as long as the link holds.
    pub(crate) fn empty(&mut self) {
        if self.now <= self.data.clock.milliseconds {
            return;
        }
        self.data = Data { logs: vec![None; self.data.logs.len()], ..Data::default() };
        self.truth.iter_mut().for_each(|one| one.undone = true);
        self.save();
    }

    /// What `read` of the gateway answers.
    pub(crate) fn snapshot(
        &mut self,
        logs: &[usize],
        after: Option<Position>,
        page: usize,
    ) -> Snapshot {
        let epoch_ms = *self.data.epoch.get_or_insert(self.now);
        let logs = logs.iter().map(|log| self.read(*log, after, page)).collect();
        Snapshot { now_ms: self.now, epoch_ms, after, logs }
    }

    fn read(&self, log: usize, after: Option<Position>, page: usize) -> Log {
        let Some(stored) = &self.data.logs[log] else {
            return Log { complete: true, ..Log::default() };
        };
        let entry = |serial: &usize| self.entry(*serial);
        let all: Vec<Entry> = stored.entries.iter().map(entry).collect();
        let behind = all.iter().filter(|entry| after.is_some_and(|after| entry.id > after));
        let mut entries: Vec<Entry> = behind.cloned().collect();
        let complete = entries.len() <= page;
        entries.truncate(page);
        let first = all.first().map(|entry| (entry.id, entry.prev));
        Log { last: all.last().map(|entry| entry.id), first, entries, complete }
    }

    fn entry(&self, serial: usize) -> Entry {
        let Published { id, prev, .. } = self.truth[serial];
        let data = Bytes::from(serial.to_string());
        Entry { id, prev, event_id: None, data }
    }
}

/// Which of all that was published an entry is.
pub(crate) fn serial(entry: &Entry) -> usize {
    std::str::from_utf8(&entry.data).unwrap().parse().unwrap()
}
