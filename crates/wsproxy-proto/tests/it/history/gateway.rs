//! An instance of the gateway, which does with reader, fence and rules what the hub does.

use std::collections::VecDeque;

use wsproxy_proto::history::{
    Fence, Log, Lost, Pages, Position, Reader, Snapshot,
    fence::Released,
    pages::Since,
    reader::{Filled, Verdict},
};

use crate::history::{
    client::View,
    redis::{HEAD, Redis, serial},
};

/// What one message costs where it waits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) message_bytes: usize,
    pub(crate) fence_bytes: usize,
    pub(crate) page: usize,
}

/// One instance.
#[derive(Debug)]
pub(crate) struct Instance {
    bounds: Bounds,
    readers: Vec<Option<Reader<usize>>>,
    /// Messages that have left the store.
    queue: VecDeque<usize>,
    /// The store still sends to it.
    fed: bool,
    /// The instance takes the link for alive.
    pub(crate) linked: bool,
    /// Counts holes and losses.
    outages: u64,
    heal: Option<Heal>,
    pub(crate) clients: Vec<Client>,
}

/// Holes that are being read.
#[derive(Debug)]
struct Heal {
    outages: u64,
    store: u64,
    moment: Option<(u64, u64)>,
    logs: Vec<Read>,
}

#[derive(Debug)]
struct Read {
    log: usize,
    from: Position,
    judged: Option<Result<(), Lost>>,
    pages: Pages,
    /// Behind which position the next page is read.
    behind: Position,
    found: Log,
    published: usize,
}

/// A client on an instance.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: usize,
    pub(crate) logs: Vec<usize>,
    pub(crate) view: View,
    after: Option<Position>,
    /// How often its snapshot was earlier than the reader.
    early: u32,
    /// Something is missing already, and it is to be told.
    lost: Option<Lost>,
    fence: Fence<usize>,
    /// For these logs the fence was thrown away.
    passed: Vec<usize>,
    /// `None`: it is open.
    replay: Option<Replay>,
}

/// What was read for a client so far.
#[derive(Debug, Default)]
struct Replay {
    outages: u64,
    judged: Option<Result<(), Lost>>,
    pages: Pages,
    last: Option<Snapshot>,
    /// Where the next page begins.
    behind: Option<Position>,
    published: usize,
    complete: bool,
}

impl Instance {
    pub(crate) fn new(logs: usize, bounds: Bounds) -> Self {
        let readers = (0..logs).map(|_| None).collect();
        let (queue, clients) = (VecDeque::new(), Vec::new());
        let fed = true;
        Self { bounds, readers, queue, fed, linked: true, outages: 0, heal: None, clients }
    }

    pub(crate) fn receive(&mut self, serial: usize) {
        if self.fed {
            self.queue.push_back(serial);
        }
    }

    /// The store sends nothing any more; of what it sent the first `kept` still arrive.
    pub(crate) fn cut(&mut self, kept: usize) {
        self.queue.truncate(kept);
        self.fed = false;
    }

    /// The instance notices.
    pub(crate) fn lose_link(&mut self) {
        self.cut(0);
        self.linked = false;
        self.interrupt();
    }

    pub(crate) const fn is_cut(&self) -> bool {
        !self.fed
    }

    fn interrupt(&mut self) {
        self.outages += 1;
        self.readers.iter_mut().flatten().for_each(Reader::interrupt);
    }

    /// Keeps the heads of the logs that it reads; one that is gone is a hole.
    pub(crate) fn keep_heads(&mut self, redis: &mut Redis) {
        let begun = |reader: &Option<Reader<usize>>| {
            reader.as_ref().is_some_and(|one| one.position().is_some() && !one.has_hole())
        };
        let logs: Vec<_> =
            (0..self.readers.len()).filter(|log| begun(&self.readers[*log])).collect();
        for log in logs {
            if !redis.keep_head(log) {
                self.interrupt();
            }
        }
    }

    pub(crate) fn link(&mut self) {
        if !self.linked {
            (self.linked, self.fed) = (true, true);
        }
    }

    /// Takes the next message from the channel.
    pub(crate) fn deliver(&mut self, redis: &Redis) -> bool {
        let Some(serial) = self.queue.pop_front() else { return false };
        let message = &redis.truth[serial];
        let log = message.log;
        let Some(reader) = &mut self.readers[log] else { return true };
        let kept = || (serial, self.bounds.message_bytes);
        match reader.accept(message.id, message.prev, u64::MAX, kept) {
            Verdict::Deliver => self.offer(log, serial, true, redis),
            Verdict::Duplicate => self.offer(log, serial, false, redis),
            Verdict::Held => {}
            // Logs with one order wait for each other.
            Verdict::Hole => self.interrupt(),
        }
        true
    }

    fn offer(&mut self, log: usize, serial: usize, to_all: bool, redis: &Redis) {
        let (id, prev) = (redis.truth[serial].id, redis.truth[serial].prev);
        for client in self.clients.iter_mut().filter(|client| client.logs.contains(&log)) {
            let bytes = self.bounds.message_bytes;
            let is_due = match client.passed.contains(&log) || client.fence.is_open() && !to_all {
                true => to_all,
                false => client.fence.offer(Some((id, prev)), || (serial, bytes)),
            };
            if is_due {
                client.view.see(serial, redis);
            }
            if client.fence.is_passed(id) {
                client.passed.push(log);
            }
        }
    }

    /// Reads one page of a hole; answers whether there was something to do.
    pub(crate) fn heal(&mut self, redis: &mut Redis) -> bool {
        if !self.linked {
            return false;
        }
        if self.heal.as_ref().is_none_or(|heal| heal.outages != self.outages) {
            let holes = self.readers.iter().enumerate();
            let holes = holes.filter_map(|(log, reader)| Some((log, reader.as_ref()?.hole()?)));
            let logs: Vec<_> = holes.map(|(log, from)| Read::new(log, from)).collect();
            if logs.is_empty() {
                return false;
            }
            self.heal =
                Some(Heal { outages: self.outages, store: redis.store, moment: None, logs });
        }
        let heal = self.heal.as_mut().unwrap();
        if heal.store != redis.store {
            self.heal = None; // the connection to the store broke meanwhile
            return true;
        }
        let Some(read) = heal.logs.iter_mut().find(|read| read.judged.is_none()) else {
            self.fill(redis);
            return true;
        };
        if self.readers[read.log].as_ref().is_some_and(Reader::has_hole) {
            let moment = read.page(redis, self.bounds.page);
            let first = heal.moment.get_or_insert(moment);
            *first = moment.min(*first);
        } else {
            self.heal = None; // nobody wants it any more
        }
        true
    }

    /// All that was read is delivered as one.
    fn fill(&mut self, redis: &Redis) {
        let mut heal = self.heal.take().unwrap();
        let limit = heal.moment.unwrap();
        heal.logs.retain(|read| self.readers[read.log].is_some());
        if self.readers.len() > 1 {
            heal.logs.iter_mut().for_each(|read| read.found.cut(limit));
        }
        let joins = |read: &Read| {
            let reader = self.readers[read.log].as_ref().unwrap();
            reader.joins(read.from, read.judged.unwrap(), &read.found)
        };
        let whole = heal.logs.iter().all(joins);
        let mut items = Vec::new();
        for read in &heal.logs {
            let reader = self.readers[read.log].as_mut().unwrap();
            let judged = read.judged.unwrap();
            let filled = reader.fill(read.from, judged, &read.found, whole);
            let Some(Filled { lost, entries, held, whole: is_whole }) = filled else { continue };
            assert_eq!(whole, is_whole);
            if let Some((lost, position)) = lost {
                self.tell_lost(read.log, lost, position, read.published);
            }
            if entries {
                let found = read.found.entries.iter();
                items.extend(found.map(|entry| (entry.id, serial(entry), read.log, true)));
            }
            items.extend(held.into_iter().map(|(id, serial, new)| (id, serial, read.log, new)));
        }
        items.sort_by_key(|(id, ..)| id.id());
        for (_, serial, log, to_all) in items {
            self.offer(log, serial, to_all, redis);
        }
    }

    fn tell_lost(&mut self, log: usize, lost: Lost, position: Position, published: usize) {
        for client in self.clients.iter_mut().filter(|client| client.logs.contains(&log)) {
            if client.fence.lose(lost, position) {
                client.view.tell_lost(lost, position, published);
            }
        }
    }

    /// A client comes, and its channels are subscribed.
    pub(crate) fn open(
        &mut self,
        id: usize,
        view: View,
        logs: Vec<usize>,
        after: Option<Position>,
    ) {
        for log in &logs {
            self.readers[*log].get_or_insert_default();
        }
        let fence = Fence::new(self.bounds.fence_bytes);
        let replay = Some(Replay::default());
        self.clients.push(Client {
            id,
            logs,
            view,
            after,
            early: 0,
            lost: None,
            fence,
            passed: Vec::new(),
            replay,
        });
    }

    pub(crate) fn close(&mut self, number: usize) -> View {
        let client = self.clients.remove(number);
        for log in client.logs {
            if !self.clients.iter().any(|other| other.logs.contains(&log)) {
                self.readers[log] = None;
            }
        }
        client.view
    }

    /// The next step of a client's opening; answers whether there was one.
    pub(crate) fn replay(&mut self, number: usize, redis: &mut Redis) -> bool {
        let client = &self.clients[number];
        let has_hole = |log: &usize| self.readers[*log].as_ref().unwrap().has_hole();
        if client.replay.is_none() || !self.linked || client.logs.iter().any(has_hole) {
            return false;
        }
        let client = &mut self.clients[number];
        let replay = client.replay.as_mut().unwrap();
        if replay.outages != self.outages {
            *replay = Replay { outages: self.outages, ..Replay::default() };
        }
        if replay.complete {
            self.release(number, redis);
        } else {
            replay.page(client.after, &client.logs, redis, self.bounds.page);
        }
        true
    }

    fn release(&mut self, number: usize, redis: &Redis) {
        let client = &mut self.clients[number];
        let replay = client.replay.take().unwrap();
        let snapshot = replay.last.unwrap();
        let mut covered = true;
        let mut passed = Vec::new();
        for (log, found) in client.logs.iter().zip(&snapshot.logs) {
            let reader = self.readers[*log].as_mut().unwrap();
            covered &= reader.begin(found.position());
            if reader.has_passed(found.position()) {
                passed.push(*log);
            }
        }
        if !covered {
            client.early += 1;
            client.replay = Some(Replay { outages: self.outages, ..Replay::default() });
            // A snapshot that is early again is of another life of the log.
            if client.early > 1 {
                self.interrupt();
            }
            return;
        }
        let seen = snapshot.position();
        let heads: Vec<_> = snapshot.logs.iter().map(Log::position).collect();
        let held = match client.fence.release(&heads) {
            Released::Open(held) => held,
            Released::Torn => {
                // What waits is in what is read from now on, or of a life that has ended.
                client.fence = Fence::new(self.bounds.fence_bytes);
                client.replay = Some(Replay { outages: self.outages, ..Replay::default() });
                return;
            }
            Released::Lost(lost) => {
                // What is read from now on has what could not wait.
                client.fence = Fence::new(self.bounds.fence_bytes);
                (client.after, client.lost) = (None, Some(lost));
                client.replay = Some(Replay { outages: self.outages, ..Replay::default() });
                return;
            }
        };
        client.passed = passed;
        if let Some(lost) = client.lost.take() {
            client.view.tell_lost(lost, seen, replay.published);
            held.into_iter().for_each(|serial| client.view.see(serial, redis));
            return;
        }
        match replay.judged {
            None => client.view.begin(seen, replay.published),
            Some(Err(lost)) => client.view.tell_lost(lost, seen, replay.published),
            Some(Ok(())) => {
                if client.after == Some(Position::START) {
                    client.view.begin(seen, replay.published);
                }
                let logs = replay.pages.into_logs();
                let mut entries: Vec<_> = logs.iter().flat_map(|log| &log.entries).collect();
                entries.sort_by_key(|entry| entry.id.id());
                entries.into_iter().for_each(|entry| client.view.see(serial(entry), redis));
            }
        }
        held.into_iter().for_each(|serial| client.view.see(serial, redis));
    }
}

impl Read {
    fn new(log: usize, from: Position) -> Self {
        Self {
            log,
            from,
            judged: None,
            pages: Pages::default(),
            behind: from,
            found: Log::default(),
            published: 0,
        }
    }

    /// Answers the moment up to which it is complete.
    fn page(&mut self, redis: &mut Redis, page: usize) -> (u64, u64) {
        let mut snapshot = redis.snapshot(&[self.log], Some(self.behind), page, true);
        self.published = redis.truth.len();
        self.found = snapshot.logs[0].clone();
        match self.pages.push(Since::Reader(self.from), HEAD, &mut snapshot) {
            Ok(Some(behind)) => self.behind = behind,
            Ok(None) => {
                self.found = std::mem::take(&mut self.pages).into_logs().remove(0);
                self.judged = Some(Ok(()));
            }
            Err(lost) => self.judged = Some(Err(lost)),
        }
        snapshot.moment
    }
}

impl Replay {
    fn page(&mut self, after: Option<Position>, logs: &[usize], redis: &mut Redis, page: usize) {
        let mut snapshot = redis.snapshot(logs, self.behind.or(after), page, true);
        self.published = redis.truth.len();
        self.complete = true;
        if let Some(after) = after {
            match self.pages.push(Since::Client(after), HEAD, &mut snapshot) {
                Ok(behind) => {
                    (self.behind, self.complete) = (behind, behind.is_none());
                    self.judged = Some(Ok(()));
                }
                Err(lost) => self.judged = Some(Err(lost)),
            }
        }
        self.last = Some(snapshot);
    }
}
