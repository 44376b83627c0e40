//! A client: what its application has seen, compared with what was published.

use wsproxy_proto::history::{Lost, Position};

use crate::history::redis::{HEAD, Redis};

/// What an application knows since it was last told to load its state.
#[derive(Debug, Clone)]
pub(crate) struct View {
    logs: Vec<usize>,
    /// Everything published from here on is owed to it.
    owed_from: usize,
    /// The last that it has seen, and the last one of those that a rollback has undone.
    last: Option<usize>,
    seen: Vec<usize>,
    /// Its last event id.
    pub(crate) position: Option<Position>,
    /// How often, and why, it was told that something is missing.
    pub(crate) lost: Vec<Lost>,
}

impl View {
    pub(crate) fn new(logs: Vec<usize>) -> Self {
        let (seen, lost) = (Vec::new(), Vec::new());
        Self { logs, owed_from: 0, last: None, seen, position: None, lost }
    }

    /// It begins at a position at which so many had been published.
    pub(crate) fn begin(&mut self, position: Position, published: usize) {
        (self.owed_from, self.last, self.position) = (published, None, Some(position));
        self.seen.clear();
    }

    pub(crate) fn tell_lost(&mut self, lost: Lost, position: Position, published: usize) {
        self.lost.push(lost);
        self.begin(position, published);
    }

    /// A message comes.
    pub(crate) fn see(&mut self, serial: usize, redis: &Redis) {
        assert!(!self.seen.contains(&serial), "duplicate {serial}: {self:?}");
        self.seen.push(serial);
        let message = &redis.truth[serial];
        assert!(self.logs.contains(&message.log));
        self.position = Some(message.id);
        if message.undone {
            return; // never published, if it is not told so later
        }
        self.check_gap(serial, redis);
        self.check_told(serial, redis);
        assert!(self.last.is_none_or(|last| last < serial), "order of {serial}: {self:?}");
        self.last = Some(serial);
    }

    /// It has got everything that it will get.
    pub(crate) fn check(&self, redis: &Redis) {
        self.check_gap(redis.truth.len(), redis);
        self.check_told(redis.truth.len(), redis);
    }

    /// Nothing before `end` may be missing that was not undone.
    fn check_gap(&self, end: usize, redis: &Redis) {
        let from = self.owed_from.max(self.last.map_or(0, |last| last + 1));
        for (serial, message) in redis.truth.iter().enumerate().take(end).skip(from) {
            let is_missing = self.logs.contains(&message.log) && !message.undone;
            assert!(!is_missing, "silent gap: {serial} before {end}: {self:?}");
        }
    }

    /// Nothing that was published after a rollback may follow what was seen and undone by it, unless that is
    /// so old that it would be gone anyway.
    fn check_told(&self, end: usize, redis: &Redis) {
        for serial in &self.seen {
            let message = &redis.truth[*serial];
            let is_old = message.id.milliseconds + HEAD <= redis.now;
            let undone = message.rolled_back_at.is_some_and(|published| published <= end);
            assert!(is_old || !undone, "{serial} was undone, then came {end}: {self:?}");
        }
    }
}
