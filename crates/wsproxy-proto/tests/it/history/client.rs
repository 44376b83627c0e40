//! Model of a client: compares what its application has seen with what was published.

use wsproxy_proto::history::{Lost, Position};

use crate::history::redis::{HEAD, Redis};

/// State of an application since it was last told to load its state.
#[derive(Debug, Clone)]
pub(crate) struct View {
    logs: Vec<usize>,
    /// Serial from which every message is owed to the client.
    owed_from: usize,
    /// Last message that it has seen and that no rollback has undone.
    last: Option<usize>,
    seen: Vec<usize>,
    /// Last event id of the client.
    pub(crate) position: Option<Position>,
    /// Reasons for which it was told that messages are missing.
    pub(crate) lost: Vec<Lost>,
}

impl View {
    pub(crate) fn new(logs: Vec<usize>) -> Self {
        let (seen, lost) = (Vec::new(), Vec::new());
        Self { logs, owed_from: 0, last: None, seen, position: None, lost }
    }

    /// Begins at a position, at which `published` messages had been published.
    pub(crate) fn begin(&mut self, position: Position, published: usize) {
        (self.owed_from, self.last, self.position) = (published, None, Some(position));
        self.seen.clear();
    }

    pub(crate) fn tell_lost(&mut self, lost: Lost, position: Position, published: usize) {
        self.lost.push(lost);
        self.begin(position, published);
    }

    /// Handles a message.
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

    /// Checks the state once no more messages come.
    pub(crate) fn check(&self, redis: &Redis) {
        self.check_gap(redis.truth.len(), redis);
        self.check_told(redis.truth.len(), redis);
    }

    /// Checks that no message before `end` is missing, except those that were undone.
    fn check_gap(&self, end: usize, redis: &Redis) {
        let from = self.owed_from.max(self.last.map_or(0, |last| last + 1));
        for (serial, message) in redis.truth.iter().enumerate().take(end).skip(from) {
            let is_missing = self.logs.contains(&message.log) && !message.undone;
            assert!(!is_missing, "silent gap: {serial} before {end}: {self:?}");
        }
    }

    /// Checks that no message from after a rollback follows a seen message that the rollback has undone, unless that
    /// is so old that it would be gone anyway.
    fn check_told(&self, end: usize, redis: &Redis) {
        for serial in &self.seen {
            let message = &redis.truth[*serial];
            let is_old = message.id.milliseconds + HEAD <= redis.now;
            let undone = message.rolled_back_at.is_some_and(|published| published <= end);
            assert!(is_old || !undone, "{serial} was undone, then came {end}: {self:?}");
        }
    }
}
