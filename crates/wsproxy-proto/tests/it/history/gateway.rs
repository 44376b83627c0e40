//! An instance of the gateway, which does with reader, fence and rules what the hub does.

use std::collections::VecDeque;

use wsproxy_proto::history::{
    Entry, Fence, Log, Lost, Position, Reader, Snapshot,
    reader::{Filled, Verdict},
    rule,
};

use crate::history::{
    client::View,
    redis::{RETENTION, Redis, serial},
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
    /// Messages that have left the store, and when.
    queue: VecDeque<(usize, u64)>,
    /// The store still sends to it; when it stopped.
    fed: Result<(), u64>,
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
    first_ms: Option<u64>,
    logs: Vec<Read>,
}

#[derive(Debug)]
struct Read {
    log: usize,
    from: Position,
    judged: Option<Result<(), Lost>>,
    found: Log,
    now_ms: u64,
    published: usize,
}

/// A client on an instance.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: usize,
    pub(crate) logs: Vec<usize>,
    pub(crate) view: View,
    after: Option<Position>,
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
    chains: Vec<Log>,
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
        let fed = Ok(());
        Self { bounds, readers, queue, fed, linked: true, outages: 0, heal: None, clients }
    }

    pub(crate) fn receive(&mut self, serial: usize, now: u64) {
        if self.fed.is_ok() {
            self.queue.push_back((serial, now));
        }
    }

    /// The store sends nothing any more; of what it sent the first `kept` still arrive.
    pub(crate) fn cut(&mut self, now: u64, kept: usize) {
        // How long a message may be on its way counts as part of the gap.
        let oldest = self.queue.front().map_or(now, |(_, since)| *since);
        let since = oldest.min(self.fed.err().unwrap_or(now));
        self.queue.truncate(kept);
        self.fed = Err(since);
    }

    /// The instance notices.
    pub(crate) fn lose_link(&mut self, now: u64) {
        self.cut(now, 0);
        self.linked = false;
        self.interrupt(self.fed.err().unwrap());
    }

    pub(crate) const fn is_cut(&self) -> bool {
        self.fed.is_err()
    }

    fn interrupt(&mut self, since: u64) {
        self.outages += 1;
        self.readers.iter_mut().flatten().for_each(|reader| reader.interrupt(since));
    }

    pub(crate) fn link(&mut self) {
        if !self.linked {
            (self.linked, self.fed) = (true, Ok(()));
        }
    }

    /// Takes the next message from the channel.
    pub(crate) fn deliver(&mut self, redis: &Redis, now: u64) -> bool {
        let Some((serial, sent)) = self.queue.pop_front() else { return false };
        let message = &redis.truth[serial];
        let log = message.log;
        let Some(reader) = &mut self.readers[log] else { return true };
        let kept = || (serial, self.bounds.message_bytes);
        let since = sent.min(self.fed.err().unwrap_or(now));
        match reader.accept((message.id, message.prev), since, kept) {
            Verdict::Deliver => self.offer(log, serial, true, redis),
            Verdict::Duplicate => self.offer(log, serial, false, redis),
            Verdict::Held => {}
            // Logs with one order wait for each other.
            Verdict::Hole => self.interrupt(since),
        }
        true
    }

    fn offer(&mut self, log: usize, serial: usize, to_all: bool, redis: &Redis) {
        let id = redis.truth[serial].id;
        for client in self.clients.iter_mut().filter(|client| client.logs.contains(&log)) {
            let bytes = self.bounds.message_bytes;
            let is_due = match client.passed.contains(&log) || client.fence.is_open() && !to_all {
                true => to_all,
                false => client.fence.offer(Some(id), || (serial, bytes)),
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
    pub(crate) fn heal(&mut self, redis: &mut Redis, now: u64) -> bool {
        if !self.linked {
            return false;
        }
        if self.heal.as_ref().is_none_or(|heal| heal.outages != self.outages) {
            let holes = self.readers.iter().enumerate();
            let holes = holes.filter_map(|(log, reader)| Some((log, reader.as_ref()?.hole()?.0)));
            let logs: Vec<_> = holes.map(|(log, from)| Read::new(log, from)).collect();
            if logs.is_empty() {
                return false;
            }
            self.heal =
                Some(Heal { outages: self.outages, store: redis.store, first_ms: None, logs });
        }
        let heal = self.heal.as_mut().unwrap();
        if heal.store != redis.store {
            self.heal = None; // the connection to the store broke meanwhile
            return true;
        }
        let Some(read) = heal.logs.iter_mut().find(|read| !read.found.complete) else {
            self.fill(redis);
            return true;
        };
        heal.first_ms.get_or_insert(redis.now);
        if let Some(since) =
            self.readers[read.log].as_ref().and_then(|reader| Some(reader.hole()?.1))
        {
            read.page(redis, now - since, self.bounds.page);
        } else {
            self.heal = None; // nobody wants it any more
        }
        true
    }

    /// All that was read is delivered as one.
    fn fill(&mut self, redis: &Redis) {
        let mut heal = self.heal.take().unwrap();
        let limit = Position { milliseconds: heal.first_ms.unwrap(), sequence: 0 };
        heal.logs.retain(|read| self.readers[read.log].is_some());
        if self.readers.len() > 1 {
            heal.logs.iter_mut().for_each(|read| read.found.cut(limit));
        }
        let joins = |read: &Read| {
            let reader = self.readers[read.log].as_ref().unwrap();
            reader.joins(read.from, read.judged.unwrap(), &read.found, read.now_ms)
        };
        let whole = heal.logs.iter().all(joins);
        let mut items = Vec::new();
        for read in &heal.logs {
            let reader = self.readers[read.log].as_mut().unwrap();
            let judged = read.judged.unwrap();
            let filled = reader.fill(read.from, judged, &read.found, read.now_ms, whole);
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
        items.sort_by_key(|(id, ..)| *id);
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
        self.clients.push(Client { id, logs, view, after, fence, passed: Vec::new(), replay });
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
        for (log, found) in client.logs.iter().zip(&snapshot.logs) {
            let reader = self.readers[*log].as_mut().unwrap();
            covered &= reader.begin(found.position(snapshot.now_ms));
        }
        if !covered {
            let outages = self.outages;
            client.replay = Some(Replay { outages, ..Replay::default() });
            return;
        }
        let seen = snapshot.position();
        let held = match client.fence.release(seen) {
            Ok(held) => held,
            Err(lost) => {
                let positions =
                    client.logs.iter().filter_map(|log| self.readers[*log].as_ref()?.position());
                let seen = positions.max().unwrap();
                client.fence.reopen(seen);
                // The number of an id is its place in the truth.
                let published = if seen.is_entry() { seen.sequence as usize + 1 } else { 0 };
                let published = published.max(replay.published);
                client.view.tell_lost(lost, seen, published);
                return;
            }
        };
        match replay.judged {
            None => client.view.begin(seen, replay.published),
            Some(Err(lost)) => client.view.tell_lost(lost, seen, replay.published),
            Some(Ok(())) => {
                if client.after == Some(Position::START) {
                    client.view.begin(seen, replay.published);
                }
                let mut entries: Vec<_> =
                    replay.chains.iter().flat_map(|log| &log.entries).collect();
                entries.sort_by_key(|entry| entry.id);
                entries.into_iter().for_each(|entry| client.view.see(serial(entry), redis));
            }
        }
        held.into_iter().for_each(|serial| client.view.see(serial, redis));
    }
}

impl Read {
    fn new(log: usize, from: Position) -> Self {
        Self { log, from, judged: None, found: Log::default(), now_ms: 0, published: 0 }
    }

    fn page(&mut self, redis: &mut Redis, gap_ms: u64, page: usize) {
        // Every page is a heal of its own: time passes between them.
        let behind = self.found.entries.last().map_or(self.from, |entry| entry.id);
        let mut snapshot = redis.snapshot(&[self.log], Some(behind), page);
        (self.now_ms, self.published) = (snapshot.now_ms, redis.truth.len());
        let clocks = (snapshot.now_ms, snapshot.epoch_ms);
        let judged = rule::heal(behind, gap_ms, RETENTION, clocks, &snapshot.logs[0]);
        merge(&mut snapshot.logs, std::slice::from_mut(&mut self.found));
        let is_chain = self.found.is_chain();
        self.judged = Some(judged.and(if is_chain { Ok(()) } else { Err(Lost::Trimmed) }));
        self.found.complete = snapshot.logs[0].complete || self.judged != Some(Ok(()));
    }
}

impl Replay {
    fn page(&mut self, after: Option<Position>, logs: &[usize], redis: &mut Redis, page: usize) {
        self.chains.resize(logs.len(), Log::default());
        // Every page is a resume of its own: the store may have been rolled back between them.
        let behind = self.behind.or(after);
        let mut snapshot = redis.snapshot(logs, behind, page);
        self.published = redis.truth.len();
        let judged = behind.map(|behind| rule::resume(behind, RETENTION, &snapshot));
        self.behind = merge(&mut snapshot.logs, &mut self.chains);
        let is_chain = self.chains.iter().all(Log::is_chain);
        self.judged =
            judged.map(|judged| judged.and(if is_chain { Ok(()) } else { Err(Lost::Trimmed) }));
        self.complete = self.behind.is_none() || self.judged != Some(Ok(()));
        self.last = Some(snapshot);
    }
}

/// Appends a page to what was read before. Answers behind which position the next one begins.
fn merge(page: &mut [Log], chains: &mut [Log]) -> Option<Position> {
    let ends = page.iter().filter(|log| !log.complete);
    let behind = ends.filter_map(|log| log.entries.last().map(|entry| entry.id)).min();
    for (log, chain) in page.iter_mut().zip(chains) {
        (chain.last, chain.first) = (log.last, chain.first.or(log.first));
        let is_within = |entry: &Entry| behind.is_none_or(|behind| entry.id <= behind);
        chain.entries.extend(log.entries.drain(..).filter(is_within));
    }
    behind
}
