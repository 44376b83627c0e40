//! Model of an instance, which uses reader, fence and rules as the hub does.

use std::collections::VecDeque;

use wsproxy_proto::history::{
    Entry, Fence, Log, Lost, Pages, Position, Reader, Snapshot, fence::Released, pages::Since,
    reader::Verdict,
};

use crate::history::{
    client::View,
    redis::{HEAD, Redis, serial},
};

/// Bounds of messages that wait, and of pages.
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
    /// Messages that have left the store and have not arrived.
    queue: VecDeque<usize>,
    /// Whether the store still sends to the instance.
    fed: bool,
    /// Whether the instance takes its connection for alive.
    pub(crate) linked: bool,
    /// Number of holes and losses.
    outages: u64,
    /// Of these, losses.
    losses: u64,
    heal: Option<Heal>,
    pub(crate) clients: Vec<Client>,
}

/// Holes that are being read.
#[derive(Debug)]
struct Heal {
    losses: u64,
    store: u64,
    moment: Option<(u64, u64)>,
    logs: Vec<Read>,
    /// Entries that are still to be delivered, in reverse order, once all logs are read.
    items: Option<Vec<Item>>,
}

/// An entry that is to be delivered.
#[derive(Debug)]
struct Item {
    id: Position,
    serial: usize,
    /// Which of the logs.
    read: usize,
}

#[derive(Debug)]
struct Read {
    log: usize,
    from: Position,
    /// Up to where it is delivered.
    at: Position,
    judged: Option<Result<(), Lost>>,
    pages: Pages,
    /// Position behind which the next page is read.
    behind: Position,
    found: Log,
    published: usize,
}

/// Client on an instance.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: usize,
    pub(crate) logs: Vec<usize>,
    pub(crate) view: View,
    after: Option<Position>,
    /// Number of snapshots that were earlier than the reader.
    early: u32,
    /// Reason of a loss that the client is to be told.
    lost: Option<Lost>,
    fence: Fence<usize>,
    /// Logs for which the fence was thrown away.
    passed: Vec<usize>,
    /// Reading of the client's logs; `None` once the client is open.
    replay: Option<Replay>,
}

/// Entries that were read for a client so far.
#[derive(Debug, Default)]
struct Replay {
    outages: u64,
    judged: Option<Result<(), Lost>>,
    pages: Pages,
    last: Option<Snapshot>,
    /// Position behind which the next page is read.
    behind: Option<Position>,
    /// All entries that the client missed, once they are read.
    entries: Vec<Entry>,
    published: usize,
    complete: bool,
}

impl Instance {
    pub(crate) fn new(logs: usize, bounds: Bounds) -> Self {
        let readers = (0..logs).map(|_| None).collect();
        let (queue, clients) = (VecDeque::new(), Vec::new());
        let fed = true;
        let (outages, losses) = (0, 0);
        Self { bounds, readers, queue, fed, linked: true, outages, losses, heal: None, clients }
    }

    pub(crate) fn receive(&mut self, serial: usize) {
        if self.fed {
            self.queue.push_back(serial);
        }
    }

    /// Ends what the store sends. Of the messages on their way the first `kept` arrive.
    pub(crate) fn cut(&mut self, kept: usize) {
        self.queue.truncate(kept);
        self.fed = false;
    }

    /// Lets the instance notice that its connection is lost.
    pub(crate) fn lose_link(&mut self) {
        self.cut(0);
        self.linked = false;
        self.losses += 1;
        self.interrupt();
    }

    pub(crate) const fn is_cut(&self) -> bool {
        !self.fed
    }

    fn interrupt(&mut self) {
        self.outages += 1;
        self.readers.iter_mut().flatten().for_each(Reader::interrupt);
    }

    /// Keeps the heads of the logs that the instance reads. A head that is gone is a hole.
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

    /// Takes the messages that are on their way for as long as a message can be.
    pub(crate) fn deliver_due(&mut self, redis: &Redis) {
        while self.queue.front().is_some_and(|serial| redis.is_due(*serial)) {
            self.deliver(redis);
        }
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

    /// Reads one page of a hole. Returns whether there was something to do.
    pub(crate) fn heal(&mut self, redis: &mut Redis) -> bool {
        if !self.linked {
            return false;
        }
        if self.heal.as_ref().is_none_or(|heal| heal.losses != self.losses) {
            let holes = self.readers.iter_mut().enumerate();
            let holes =
                holes.filter_map(|(log, reader)| Some((log, reader.as_mut()?.begin_reading()?)));
            let logs: Vec<_> = holes.map(|(log, from)| Read::new(log, from)).collect();
            if logs.is_empty() {
                return false;
            }
            let (losses, store) = (self.losses, redis.store);
            self.heal = Some(Heal { losses, store, moment: None, logs, items: None });
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
            self.heal = None; // no client wants the log any more
        }
        true
    }

    /// Delivers what was read, one entry at a time; live messages wait until all of it is.
    fn fill(&mut self, redis: &Redis) {
        let mut heal = self.heal.take().unwrap();
        let Some(items) = &mut heal.items else {
            self.begin_fill(&mut heal);
            self.heal = Some(heal);
            return;
        };
        let Some(Item { id, serial, read }) = items.pop() else {
            return self.close_holes(&heal.logs, redis);
        };
        let read = &mut heal.logs[read];
        let reader = self.readers[read.log].as_mut();
        if reader.is_some_and(|reader| reader.advance(read.at, id)) {
            read.at = id;
            let log = read.log;
            self.offer(log, serial, true, redis);
        }
        self.heal = Some(heal);
    }

    fn begin_fill(&mut self, heal: &mut Heal) {
        let limit = heal.moment.unwrap();
        if self.readers.len() > 1 {
            heal.logs.iter_mut().for_each(|read| read.found.cut(limit));
        }
        let mut items = Vec::new();
        for (number, read) in heal.logs.iter_mut().enumerate() {
            let Some(reader) = self.readers[read.log].as_mut() else { continue };
            match reader.begin_fill(read.from, read.judged.unwrap(), &read.found) {
                Some(Ok(())) => {
                    let entries = read.found.entries.iter();
                    let item =
                        |entry: &Entry| Item { id: entry.id, serial: serial(entry), read: number };
                    items.extend(entries.map(item));
                }
                Some(Err((lost, position))) => {
                    read.at = position;
                    let (log, published) = (read.log, read.published);
                    self.tell_lost(log, lost, position, published);
                }
                None => {}
            }
        }
        items.sort_by_key(|item| std::cmp::Reverse(item.id.id()));
        heal.items = Some(items);
    }

    /// All logs are whole at once, or all are read again.
    fn close_holes(&mut self, logs: &[Read], redis: &Redis) {
        // A reader that has begun anew meanwhile misses nothing.
        let has_hole = |read: &&Read| self.readers[read.log].as_ref().is_some_and(Reader::has_hole);
        let logs: Vec<_> = logs.iter().filter(has_hole).collect();
        let joins = |read: &&Read| {
            let reader = self.readers[read.log].as_ref().unwrap();
            reader.joins(read.at, read.found.head)
        };
        if !logs.iter().all(joins) {
            let readers = self.readers.iter_mut().flatten();
            return readers.for_each(Reader::read_again);
        }
        let mut items = Vec::new();
        for read in logs {
            let held = self.readers[read.log].as_mut().unwrap().close();
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

    /// Opens a client, whose channels are subscribed.
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

    /// Does the next step of a client's opening. Returns whether there was one.
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
            replay.page(client.after, &client.logs, redis, self.bounds);
        }
        true
    }

    fn release(&mut self, number: usize, redis: &Redis) {
        let client = &mut self.clients[number];
        let replay = client.replay.take().unwrap();
        let snapshot = replay.last.as_ref().unwrap();
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
        let Bounds { message_bytes, fence_bytes, .. } = self.bounds;
        let fits = |held: &[usize]| {
            (replay.entries.len() + held.len()).saturating_mul(message_bytes) <= fence_bytes
        };
        let held = match client.fence.release_or_restart(&heads, fits) {
            Released::Open(held) => held,
            Released::ReadAgain(lost) => {
                if lost.is_some() {
                    (client.after, client.lost) = (None, lost);
                }
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
                replay.entries.iter().for_each(|entry| client.view.see(serial(entry), redis));
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
            at: from,
            judged: None,
            pages: Pages::default(),
            behind: from,
            found: Log::default(),
            published: 0,
        }
    }

    /// Reads a page. Returns the moment up to which it is complete.
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
    fn page(&mut self, after: Option<Position>, logs: &[usize], redis: &mut Redis, bounds: Bounds) {
        let mut snapshot = redis.snapshot(logs, self.behind.or(after), bounds.page, true);
        self.published = redis.truth.len();
        self.complete = true;
        if let Some(after) = after {
            match self.pages.push(Since::Client(after), HEAD, &mut snapshot) {
                Ok(Some(behind)) => (self.behind, self.complete) = (Some(behind), false),
                Ok(None) => self.judged = Some(self.collect(bounds)),
                Err(lost) => self.judged = Some(Err(lost)),
            }
        }
        self.last = Some(snapshot);
    }

    /// Puts the entries into their order. They are lost where more was missed than may wait for the client.
    fn collect(&mut self, bounds: Bounds) -> Result<(), Lost> {
        let logs = std::mem::take(&mut self.pages).into_logs();
        let mut entries: Vec<_> = logs.into_iter().flat_map(|log| log.entries).collect();
        entries.sort_by_key(|entry| entry.id.id());
        if entries.len().saturating_mul(bounds.message_bytes) > bounds.fence_bytes {
            return Err(Lost::Overflow);
        }
        self.entries = entries;
        Ok(())
    }
}
