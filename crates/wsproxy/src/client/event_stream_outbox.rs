//! The outbox of a client with an event stream: a bounded queue that counts in the process's budget.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use uuid::Uuid;
use wsproxy_conn::{Runtime, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, history::Position};

use crate::client::{event::Event, gzip::Deflation};

/// The bounded queue of an event stream.
///
/// Invariant: holds at most `bytes_max` bytes, not counting messages that the client had missed when it connected. A
/// message beyond that empties the outbox and ends the stream as a slow consumer's.
#[derive(Debug)]
pub struct EventStreamOutbox {
    id: Uuid,
    bytes_max: usize,
    /// Holder of the budget, which counts all waiting bytes.
    runtime: Arc<Runtime>,
    /// Compression of the events; `None`: the client does not accept it.
    gzip: Option<Deflation>,
    state: Mutex<State>,
    /// Bytes that were taken from the queue, and that the socket does not take.
    stalled: AtomicUsize,
    aborted: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<EventStreamEntry>,
    /// Bytes of all entries but the first `missed`.
    bytes: usize,
    /// Bytes of the first `missed` entries.
    missed_bytes: usize,
    /// Number of entries at the front that do not count against the bound.
    missed: usize,
    /// Number of messages that were dropped.
    discarded: u64,
    /// The outbox takes no further entry.
    closed: bool,
    waker: Option<Waker>,
}

/// Entry of an event stream's outbox.
#[derive(Debug)]
pub enum EventStreamEntry {
    /// Message as the client gets it, with the time at which it was read from the bus.
    Message(Bytes, Micros),
    /// Position of the client before the following entries.
    Position(Position),
    /// Event for the endpoint's logic.
    Event(Event),
    /// End of the stream; no entry follows.
    End(EventStreamEnding),
}

/// The end of an event stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventStreamEnding {
    /// Entry of the table of disconnects.
    pub why: &'static Disconnect,
    /// Code for the client.
    pub code: u16,
    /// Reason for the client.
    pub reason: Box<str>,
}

impl EventStreamEnding {
    /// Makes an end with a code and a reason that may be a worker's.
    #[must_use]
    pub fn new(why: &'static Disconnect, code: u16, reason: &str) -> Self {
        Self { why, code, reason: reason.into() }
    }
}

impl From<&'static Disconnect> for EventStreamEnding {
    fn from(why: &'static Disconnect) -> Self {
        Self::new(why, why.code, why.reason)
    }
}

impl EventStreamOutbox {
    /// Makes an empty outbox for a connection.
    #[must_use]
    pub fn new(
        id: Uuid,
        bytes_max: usize,
        runtime: Arc<Runtime>,
        gzip: Option<Deflation>,
    ) -> Arc<Self> {
        let (state, stalled, aborted) = (Mutex::default(), AtomicUsize::new(0), Notify::new());
        Arc::new(Self { id, bytes_max, runtime, gzip, state, stalled, aborted })
    }

    /// Returns the connection's id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// Returns the upper bound of the waiting bytes.
    #[must_use]
    pub const fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Returns the compression of the client's events.
    #[must_use]
    pub const fn gzip(&self) -> Option<Deflation> {
        self.gzip
    }

    /// Returns the waiting bytes.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        let state = self.state.lock();
        state.bytes + state.missed_bytes
    }

    /// Returns the bytes that were taken from the queue, and that the socket does not take.
    #[must_use]
    pub fn stalled_bytes(&self) -> usize {
        self.stalled.load(Relaxed)
    }

    /// Notes how many bytes the socket does not take. They count in the process's budget, and not against the bound.
    pub fn set_stalled(&self, bytes: usize) {
        let before = self.stalled.swap(bytes, Relaxed);
        self.account(before, bytes);
    }

    /// Returns the number of messages that were dropped or still wait.
    #[must_use]
    pub fn discarded(&self) -> u64 {
        let state = self.state.lock();
        state.discarded + state.messages()
    }

    /// Returns whether the stream was ended or has overflowed, so that no further message is taken.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Returns the end that waits to be taken, if any.
    #[must_use]
    pub fn ending(&self) -> Option<EventStreamEnding> {
        let state = self.state.lock();
        state.entries.iter().rev().find_map(|entry| match entry {
            EventStreamEntry::End(ending) => Some(ending.clone()),
            _ => None,
        })
    }

    /// Queues a message. `since` is the time at which it was read from the bus, or [`Micros::UNTIMED`].
    pub fn push(&self, message: Bytes, since: Micros) {
        self.queue(EventStreamEntry::Message(message, since));
    }

    /// Queues an event for the endpoint's logic, behind the messages that wait.
    pub fn notify(&self, event: Event) {
        self.queue(EventStreamEntry::Event(event));
    }

    /// Queues a message that the client had missed. Such messages do not count against the bound, or a client that has
    /// missed many would overflow at once. The replay bounds them.
    pub fn push_missed(&self, message: Bytes) {
        self.queue_missed(EventStreamEntry::Message(message, Micros::UNTIMED));
    }

    /// Queues the client's position, before all messages.
    pub fn set_position(&self, position: Position) {
        self.queue_missed(EventStreamEntry::Position(position));
    }

    /// Ends the stream after all waiting entries.
    pub fn finish(&self, ending: impl Into<EventStreamEnding>) {
        let mut state = self.state.lock();
        if !state.closed {
            state.entries.push_back(EventStreamEntry::End(ending.into()));
            state.closed = true;
        }
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    /// Ends the stream at once and drops all waiting entries, even an earlier end.
    pub fn disconnect(&self, ending: impl Into<EventStreamEnding>) {
        let mut state = self.state.lock();
        self.empty(&mut state);
        state.entries.push_back(EventStreamEntry::End(ending.into()));
        state.closed = true;
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    /// Asks for the socket to be closed at once, even in the middle of an event.
    pub fn abort(&self) {
        self.aborted.notify_one();
    }

    /// Waits until the socket is to be closed.
    pub async fn wait_aborted(&self) {
        self.aborted.notified().await;
    }

    /// Takes the next entry; `None` at the end.
    pub async fn next(&self) -> Option<EventStreamEntry> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Self::next`], for the task of the stream.
    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<EventStreamEntry>> {
        let mut state = self.state.lock();
        let Some(entry) = state.entries.pop_front() else {
            if state.closed {
                return Poll::Ready(None);
            }
            if state.waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            // Free the memory of a queue that was long once.
            state.entries.shrink_to(ENTRIES_KEPT);
            return Poll::Pending;
        };
        let bytes = entry.bytes();
        if state.missed > 0 {
            state.missed -= 1;
            state.missed_bytes -= bytes;
        } else {
            state.bytes -= bytes;
        }
        self.account(bytes, 0);
        Poll::Ready(Some(entry))
    }

    fn queue(&self, entry: EventStreamEntry) {
        let mut state = self.state.lock();
        if state.closed {
            state.discarded += u64::from(entry.is_message());
            return;
        }
        let bytes = entry.bytes();
        if state.bytes + bytes <= self.bytes_max {
            state.bytes += bytes;
            state.entries.push_back(entry);
            self.account(0, bytes);
        } else {
            state.closed = true;
            state.discarded += u64::from(entry.is_message());
            self.empty(&mut state);
            state.entries.push_back(EventStreamEntry::End((&Disconnect::SLOW).into()));
        }
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    fn queue_missed(&self, entry: EventStreamEntry) {
        let mut state = self.state.lock();
        if state.missed < state.entries.len() {
            // A live message came first. Entries behind it count against the bound.
            drop(state);
            return self.queue(entry);
        }
        let bytes = entry.bytes();
        state.missed += 1;
        state.missed_bytes += bytes;
        state.entries.push_back(entry);
        self.account(0, bytes);
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    fn empty(&self, state: &mut State) {
        self.account(state.bytes + state.missed_bytes, 0);
        let discarded = state.discarded + state.messages();
        let (closed, waker) = (state.closed, state.waker.take());
        *state = State { discarded, closed, waker, ..State::default() };
    }

    fn account(&self, before: usize, after: usize) {
        self.runtime.budget.change(before, after);
    }
}

impl Drop for EventStreamOutbox {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let waiting = state.bytes + state.missed_bytes;
        self.account(waiting + self.stalled_bytes(), 0);
    }
}

impl State {
    fn messages(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.is_message()).count() as u64
    }
}

impl EventStreamEntry {
    const fn is_message(&self) -> bool {
        matches!(self, Self::Message(..))
    }

    const fn bytes(&self) -> usize {
        match self {
            Self::Message(message, _) => ENTRY_BYTES + message.len(),
            Self::Event(event) => ENTRY_BYTES + event.bytes(),
            Self::Position(_) => ENTRY_BYTES,
            Self::End(_) => 0,
        }
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Bytes that an entry counts in addition to its message: empty messages need memory too.
const ENTRY_BYTES: usize = 96;

/// Entries for which an empty outbox keeps room.
const ENTRIES_KEPT: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(bytes_max: usize) -> (Arc<EventStreamOutbox>, Arc<Runtime>) {
        let runtime = Runtime::new(1 << 20, Micros(0));
        (EventStreamOutbox::new(Uuid::nil(), bytes_max, Arc::clone(&runtime), None), runtime)
    }

    #[tokio::test]
    async fn a_slow_client_loses_what_waits_and_the_budget_knows() {
        let (outbox, runtime) = outbox(2 * ENTRY_BYTES);
        // Missed messages do not make the client too slow.
        (0..10).for_each(|_| outbox.push_missed("missed".into()));
        outbox.push("".into(), Micros(1));
        outbox.push("".into(), Micros(1));
        assert_eq!(runtime.budget.used(), 12 * ENTRY_BYTES + 60);
        let Some(EventStreamEntry::Message(missed, _)) = outbox.next().await else {
            panic!("no message")
        };
        assert_eq!(missed, "missed");
        outbox.push("x".into(), Micros(1));
        assert_eq!((runtime.budget.used(), outbox.waiting_bytes()), (0, 0));
        outbox.push("after the end".into(), Micros(1));
        assert_eq!(outbox.discarded(), 13);
        let Some(EventStreamEntry::End(ending)) = outbox.next().await else { panic!("no end") };
        assert_eq!(ending, (&Disconnect::SLOW).into());
        assert!(outbox.next().await.is_none());
    }

    #[tokio::test]
    async fn waiting_bytes_are_given_back_with_the_outbox() {
        let (outbox, runtime) = outbox(1000);
        outbox.set_position(Position::START);
        outbox.push("1".into(), Micros(1));
        outbox.set_stalled(500);
        outbox.set_stalled(300);
        assert_eq!(runtime.budget.used(), 2 * ENTRY_BYTES + 1 + 300);
        outbox.finish(&Disconnect::RESTART);
        drop(outbox);
        assert_eq!(runtime.budget.used(), 0);
    }
}
