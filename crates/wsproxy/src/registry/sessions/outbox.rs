//! Sessions that are open here, and announcements that wait for the log of their agent; without IO.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use tokio::time::Instant;
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::registry::sessions::SessionRecord;

/// Announcements by agent, each agent's in order. An agent whose log refuses them rests, and does not delay other
/// agents.
///
/// Invariant: the announcements weigh at most `bytes_max`. A further one is dropped, which the next look at the
/// hash makes up for ([`AnnouncementQueue::take_overflow`]): the session is still in it, or missing.
pub(super) struct AnnouncementQueue {
    bytes_max: usize,
    bytes: usize,
    open: HashMap<Uuid, Open>,
    /// Connections whose `closed` waits.
    closing: HashSet<Uuid>,
    agents: HashMap<Id, Agent>,
    /// Agents with something to write, each once.
    ready: VecDeque<Id>,
    /// Resting agents by the end of their rest. The number tells equal times apart.
    resting: BTreeMap<(Instant, u64), Id>,
    rests: u64,
    overflow: bool,
}

struct Open {
    record: Arc<SessionRecord>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The announcement `opened` waits.
    Waiting,
    /// The announcement `opened` is in the log.
    Announced,
    /// The announcement `opened` did not fit.
    Dropped,
}

#[derive(Default)]
struct Agent {
    items: VecDeque<Item>,
    /// Set while the agent is ready, rests, or is being written.
    listed: bool,
    /// Length of the last rest.
    pause: Duration,
}

/// An announcement that waits.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) connection: Uuid,
    pub(super) what: What,
}

/// Content of an announcement.
#[derive(Debug)]
pub(super) enum What {
    /// The connection opened; `again`: it was announced before.
    Opened {
        /// The session.
        record: Arc<SessionRecord>,
        /// Set if it was announced before: a reaper may have announced its end since.
        again: bool,
    },
    /// The connection closed; with the message.
    Closed(Bytes),
}

impl Item {
    fn bytes(&self) -> usize {
        match &self.what {
            What::Opened { .. } => ITEM_BYTES,
            What::Closed(payload) => ITEM_BYTES + payload.len(),
        }
    }
}

impl AnnouncementQueue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            open: HashMap::new(),
            closing: HashSet::new(),
            agents: HashMap::new(),
            ready: VecDeque::new(),
            resting: BTreeMap::new(),
            rests: 0,
            overflow: false,
        }
    }

    /// Adds an opened connection; returns whether its announcement fits.
    pub(super) fn opened(&mut self, connection: Uuid, record: SessionRecord) -> bool {
        let record = Arc::new(record);
        let what = What::Opened { record: Arc::clone(&record), again: false };
        let fits = self.push(record.agent.clone(), Item { connection, what });
        let state = if fits { State::Waiting } else { State::Dropped };
        self.open.insert(connection, Open { record, state });
        fits
    }

    /// Removes a closed connection; returns whether its announcement fits.
    pub(super) fn closed(&mut self, connection: Uuid, announcement: Bytes) -> bool {
        let Some(Open { record, .. }) = self.open.remove(&connection) else { return true };
        let what = What::Closed(announcement);
        let fits = self.push(record.agent.clone(), Item { connection, what });
        if fits {
            self.closing.insert(connection);
        }
        fits
    }

    fn push(&mut self, agent: Id, item: Item) -> bool {
        let bytes = item.bytes();
        if self.bytes + bytes > self.bytes_max {
            self.overflow = true;
            return false;
        }
        self.bytes += bytes;
        let waiting = self.agents.entry(agent.clone()).or_default();
        waiting.items.push_back(item);
        if !std::mem::replace(&mut waiting.listed, true) {
            self.ready.push_back(agent);
        }
        true
    }

    /// Takes the next announcements by agent, at most about `count`. The caller ends each agent's turn with
    /// [`Self::done`], [`Self::refused`] or [`Self::give_back`].
    pub(super) fn take(&mut self, count: usize, now: Instant) -> Vec<(Id, Vec<Item>)> {
        while let Some(entry) = self.resting.first_entry().filter(|entry| entry.key().0 <= now) {
            self.ready.push_back(entry.remove());
        }
        let (mut batch, mut left) = (Vec::new(), count);
        while left > 0
            && let Some(agent) = self.ready.pop_front()
        {
            let Some(waiting) = self.agents.get_mut(&agent) else { continue };
            let items: Vec<_> = waiting.items.drain(..left.min(waiting.items.len())).collect();
            left -= items.len();
            batch.push((agent, items));
        }
        batch
    }

    /// Ends an agent's turn: all of its announcements that were taken are in the log.
    pub(super) fn done(&mut self, agent: &Id, items: &[Item]) {
        self.forget(items);
        let Some(waiting) = self.agents.get_mut(agent) else { return };
        waiting.pause = Duration::ZERO;
        if waiting.items.is_empty() {
            self.agents.remove(agent);
            self.give_memory_back();
        } else {
            self.ready.push_back(agent.clone());
        }
    }

    /// Removes announcements that are in the log.
    pub(super) fn forget(&mut self, items: &[Item]) {
        for item in items {
            self.bytes -= item.bytes();
            match &item.what {
                What::Opened { .. } => {
                    if let Some(open) = self.open.get_mut(&item.connection) {
                        open.state = State::Announced;
                    }
                }
                What::Closed(_) => drop(self.closing.remove(&item.connection)),
            }
        }
    }

    /// Puts back announcements that the log refused, and lets the agent rest, each time longer.
    pub(super) fn refused(&mut self, agent: Id, items: Vec<Item>, now: Instant) {
        let Some(waiting) = self.put_back(&agent, items) else { return };
        waiting.pause = (waiting.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        let until = now + waiting.pause;
        self.rests += 1;
        self.resting.insert((until, self.rests), agent);
    }

    /// Puts back announcements that may or may not be in the log.
    pub(super) fn give_back(&mut self, agent: Id, items: Vec<Item>) {
        if self.put_back(&agent, items).is_some() {
            self.ready.push_back(agent);
        }
    }

    fn put_back(&mut self, agent: &Id, items: Vec<Item>) -> Option<&mut Agent> {
        let waiting = self.agents.get_mut(agent)?;
        for item in items.into_iter().rev() {
            waiting.items.push_front(item);
        }
        Some(waiting)
    }

    /// Ends all rests.
    pub(super) fn wake_all(&mut self) {
        self.ready.extend(std::mem::take(&mut self.resting).into_values());
    }

    /// Returns the end of the next agent's rest.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.resting.first_key_value().map(|((until, _), _)| *until)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.agents.is_empty()
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.len()
    }

    pub(super) fn is_open(&self, connection: Uuid) -> bool {
        self.open.contains_key(&connection)
    }

    pub(super) fn is_closing(&self, connection: Uuid) -> bool {
        self.closing.contains(&connection)
    }

    /// Returns the open connections whose `opened` is in the log.
    pub(super) fn announced(&self) -> HashSet<Uuid> {
        let is_announced = |open: &Open| open.state == State::Announced;
        self.open.iter().filter(|(_, open)| is_announced(open)).map(|(id, _)| *id).collect()
    }

    /// Announces again the connections that Redis is `missing` although their `opened` was in the log, and returns
    /// their number. Also announces those whose `opened` did not fit before.
    pub(super) fn announce_again(&mut self, missing: &HashSet<Uuid>) -> usize {
        let again: Vec<_> = self
            .open
            .iter()
            .filter(|(id, open)| match open.state {
                State::Announced => missing.contains(*id),
                State::Dropped => true,
                State::Waiting => false,
            })
            .map(|(id, open)| (*id, Arc::clone(&open.record), open.state == State::Announced))
            .collect();
        let mut count = 0;
        for (connection, record, again) in again {
            let (agent, what) = (record.agent.clone(), What::Opened { record, again });
            let fits = self.push(agent, Item { connection, what });
            count += usize::from(fits && again);
            if let Some(open) = self.open.get_mut(&connection) {
                open.state = if fits { State::Waiting } else { State::Dropped };
            }
        }
        count
    }

    /// Returns whether an announcement was dropped since the last call, and there is room for it now.
    pub(super) fn take_overflow(&mut self) -> bool {
        self.bytes <= self.bytes_max / 2 && std::mem::take(&mut self.overflow)
    }

    fn give_memory_back(&mut self) {
        if self.agents.is_empty() {
            self.agents.shrink_to(KEPT);
            self.ready.shrink_to(KEPT);
            self.closing.shrink_to(KEPT);
        }
    }
}

/// Rough cost of a waiting announcement beside its text.
const ITEM_BYTES: usize = 192;

/// First rest of an agent whose log refused something.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Longest rest.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Agents and connections for which memory is kept after a burst.
const KEPT: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Transport;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    fn record(agent: &str) -> SessionRecord {
        let opened = "2026-11-28T00:00:00.000Z".into();
        SessionRecord {
            agent: id(agent),
            session: id("s"),
            transport: Transport::Sse,
            opened,
            trace: None,
        }
    }

    fn open(outbox: &mut AnnouncementQueue, agent: &str) -> Uuid {
        let connection = Uuid::now_v7();
        assert!(outbox.opened(connection, record(agent)));
        connection
    }

    fn said(batch: &[(Id, Vec<Item>)]) -> Vec<String> {
        let word = |item: &Item| match &item.what {
            What::Opened { again: false, .. } => "opened".to_owned(),
            What::Opened { again: true, .. } => "again".to_owned(),
            What::Closed(_) => "closed".to_owned(),
        };
        let words = batch.iter().flat_map(|(agent, items)| {
            items.iter().map(move |item| format!("{agent} {}", word(item)))
        });
        words.collect()
    }

    #[test]
    fn each_agents_announcements_keep_their_order() {
        let (mut outbox, now) = (AnnouncementQueue::new(10_000), Instant::now());
        let (one, two) = (open(&mut outbox, "a"), open(&mut outbox, "b"));
        outbox.closed(one, "x".into());
        let batch = outbox.take(10, now);
        assert_eq!(said(&batch), ["a opened", "a closed", "b opened"]);
        // An announcement that comes meanwhile waits behind those that are being written.
        outbox.closed(two, "x".into());
        assert!(outbox.take(10, now).is_empty());
        for (agent, items) in batch {
            outbox.give_back(agent, items);
        }
        let batch = outbox.take(10, now);
        assert_eq!(said(&batch), ["a opened", "a closed", "b opened", "b closed"]);
        for (agent, items) in batch {
            outbox.done(&agent, &items);
        }
        assert!(outbox.is_idle() && outbox.bytes() == 0 && outbox.closing.is_empty());
    }

    #[test]
    fn a_refused_agent_rests_and_others_go_on() {
        let (mut outbox, mut now) = (AnnouncementQueue::new(10_000), Instant::now());
        open(&mut outbox, "bad");
        for seconds in [1, 2, 4, 8, 10, 10] {
            let mut batch = outbox.take(10, now);
            let (agent, items) = batch.pop().unwrap();
            outbox.refused(agent, items, now);
            open(&mut outbox, "good");
            let batch = outbox.take(10, now);
            assert_eq!(said(&batch), ["good opened"]);
            outbox.done(&batch[0].0, &batch[0].1);
            now += Duration::from_secs(seconds);
            assert_eq!(outbox.next_due(), Some(now));
        }
        assert_eq!(said(&outbox.take(10, now)), ["bad opened"]);
    }

    #[test]
    fn a_batch_is_bounded_and_agents_take_turns() {
        let (mut outbox, now) = (AnnouncementQueue::new(100_000), Instant::now());
        for _ in 0..10 {
            open(&mut outbox, "a");
        }
        open(&mut outbox, "b");
        let first = outbox.take(4, now);
        assert_eq!(said(&first).len(), 4);
        outbox.done(&first[0].0, &first[0].1);
        let second = outbox.take(4, now);
        assert_eq!(said(&second)[0], "b opened");
    }

    #[test]
    fn an_overflow_is_made_up_for_when_there_is_room() {
        let (mut outbox, now) = (AnnouncementQueue::new(3 * ITEM_BYTES), Instant::now());
        let closes = open(&mut outbox, "a");
        let batch = outbox.take(10, now);
        outbox.done(&batch[0].0, &batch[0].1);
        for _ in 0..3 {
            open(&mut outbox, "a");
        }
        let dropped = Uuid::now_v7();
        assert!(!outbox.opened(dropped, record("a")));
        assert!(!outbox.closed(closes, "x".into()));
        assert!(!outbox.take_overflow());
        let batch = outbox.take(10, now);
        outbox.done(&batch[0].0, &batch[0].1);
        assert!(outbox.take_overflow() && !outbox.take_overflow());
        assert!(!outbox.is_open(closes) && !outbox.is_closing(closes));
        assert_eq!(outbox.announce_again(&HashSet::new()), 0);
        assert_eq!(said(&outbox.take(10, now)), ["a opened"]);
    }

    #[test]
    fn only_what_is_missing_is_announced_again() {
        let (mut outbox, now) = (AnnouncementQueue::new(10_000), Instant::now());
        let (one, two) = (open(&mut outbox, "a"), open(&mut outbox, "a"));
        let batch = outbox.take(10, now);
        outbox.done(&batch[0].0, &batch[0].1);
        let mut missing = outbox.announced();
        assert_eq!(missing, HashSet::from_iter([one, two]));
        missing.remove(&one);
        assert_eq!(outbox.announce_again(&missing), 1);
        let batch = outbox.take(10, now);
        assert_eq!(said(&batch), ["a again"]);
        assert_eq!(batch[0].1[0].connection, two);
    }
}
