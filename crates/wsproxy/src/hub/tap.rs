//! A topic's messages for somebody in this process who is no WebSocket: an event stream, an HTTP follower, the
//! demo worker.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use wsproxy_conn::{Runtime, clock::Micros};
use wsproxy_proto::{disconnect::Disconnect, history::Position};

use crate::hub::gzip::Deflation;

/// A bounded queue of messages, with one reader.
///
/// Invariant: never holds more than `limit` bytes beside what its reader had missed when it came. A message
/// beyond it ends the tap: whoever follows is told that it was too slow, rather than given a stream with a hole.
#[derive(Debug)]
pub struct Tap {
    limit: usize,
    /// Whose budget counts what waits here, where the reader is a client.
    runtime: Option<Arc<Runtime>>,
    /// How that client's events are compressed, where it accepts that.
    gzip: Option<Deflation>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<TapEntry>,
    /// Of all entries but the first `missed`.
    bytes: usize,
    /// Of these.
    missed_bytes: usize,
    /// So many entries at the front do not count against the limit.
    missed: usize,
    /// Messages that came and were never taken out.
    discarded: u64,
    /// Nothing more is taken.
    closed: bool,
    waker: Option<Waker>,
}

/// What a follower finds in its tap, in the order in which it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapEntry {
    /// A message, its payload or what a client is sent of it, and when it was read from the bus.
    Message(Bytes, Micros),
    /// What follows is behind this position.
    Position(Position),
    /// Something for the endpoint's logic, with the tag of its sink.
    Event(u8, Bytes),
    /// The bus was away for so long: messages may be missing here.
    Gap(Duration),
    /// The gateway ends it; nothing follows.
    End(Ending),
}

/// How a tap ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The entry of the table.
    pub why: &'static Disconnect,
    /// The code that the reader is told.
    pub code: u16,
    /// The reason that the reader is told.
    pub reason: Box<str>,
}

impl From<&'static Disconnect> for Ending {
    fn from(why: &'static Disconnect) -> Self {
        Self { why, code: why.code, reason: why.reason.into() }
    }
}

impl Tap {
    /// A tap that holds at most `limit` bytes. All that fitted is still there for the reader when it overflows.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, runtime: None, gzip: None, state: Mutex::default() })
    }

    /// A tap whose reader is a client, with compressed events or plain ones. When it overflows it is emptied,
    /// and ends as a slow consumer's.
    #[must_use]
    pub fn of_client(limit: usize, runtime: Arc<Runtime>, gzip: Option<Deflation>) -> Arc<Self> {
        Arc::new(Self { limit, runtime: Some(runtime), gzip, state: Mutex::default() })
    }

    /// What may wait in it, in bytes.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// How its client's events are compressed.
    #[must_use]
    pub const fn gzip(&self) -> Option<Deflation> {
        self.gzip
    }

    /// What waits in it, in bytes.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        let state = self.state.lock();
        state.bytes + state.missed_bytes
    }

    /// Messages that came and never reached the reader.
    #[must_use]
    pub fn discarded(&self) -> u64 {
        let state = self.state.lock();
        state.discarded + state.messages()
    }

    /// A message that was read from the bus at `since`; [`Micros::UNTIMED`]: it was not.
    pub(crate) fn push(&self, payload: Bytes, since: Micros) {
        self.queue(TapEntry::Message(payload, since));
    }

    /// Something for the endpoint's logic.
    pub(crate) fn notify(&self, tag: u8, payload: Bytes) {
        self.queue(TapEntry::Event(tag, payload));
    }

    /// A message that the reader had missed before anything else came. Whoever reads them from a log bounds
    /// them; if they counted here, a reader that has missed much would be too slow before it has begun.
    pub(crate) fn push_missed(&self, payload: Bytes) {
        self.queue_missed(TapEntry::Message(payload, Micros::UNTIMED));
    }

    /// Tells the reader where it is, before anything else.
    pub(crate) fn place(&self, position: Position) {
        self.queue_missed(TapEntry::Position(position));
    }

    /// The bus is back after so long.
    pub(crate) fn interrupt(&self, gap: Duration) {
        self.queue(TapEntry::Gap(gap));
    }

    /// The follower is told why, after all that waits.
    pub(crate) fn end(&self, ending: impl Into<Ending>) {
        let mut state = self.state.lock();
        if !state.closed {
            state.entries.push_back(TapEntry::End(ending.into()));
            state.closed = true;
        }
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    /// The same, but what waits is thrown away, even where the end was known before.
    pub(crate) fn cut_off(&self, ending: impl Into<Ending>) {
        let mut state = self.state.lock();
        self.empty(&mut state);
        state.entries.push_back(TapEntry::End(ending.into()));
        state.closed = true;
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    fn queue(&self, entry: TapEntry) {
        let mut state = self.state.lock();
        if state.closed {
            state.discarded += u64::from(entry.is_message());
            return;
        }
        let bytes = entry.bytes();
        if state.bytes + bytes <= self.limit {
            state.bytes += bytes;
            state.entries.push_back(entry);
            self.account(0, bytes);
        } else {
            state.closed = true;
            state.discarded += u64::from(entry.is_message());
            if self.runtime.is_some() {
                self.empty(&mut state);
                state.entries.push_back(TapEntry::End((&Disconnect::SLOW).into()));
            }
        }
        let waker = state.waker.take();
        drop(state);
        wake(waker);
    }

    fn queue_missed(&self, entry: TapEntry) {
        let mut state = self.state.lock();
        if state.missed < state.entries.len() {
            // Something else was first: it counts like everything behind that.
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
        if let Some(runtime) = &self.runtime {
            runtime.budget.change(before, after);
        }
    }

    /// Whether nothing more is taken: it was ended or has overflowed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// The next message; `None` when the tap overflowed and all that fitted was taken.
    pub async fn next(&self) -> Option<Bytes> {
        loop {
            match self.next_entry().await? {
                TapEntry::Message(message, _) => return Some(message),
                TapEntry::Position(_) | TapEntry::Event(..) | TapEntry::Gap(_) => {}
                TapEntry::End(_) => return None,
            }
        }
    }

    /// The next entry; `None` as in [`Self::next`].
    pub async fn next_entry(&self) -> Option<TapEntry> {
        poll_fn(|cx| self.poll_entry(cx)).await
    }

    /// The same, for its one reader's task.
    pub fn poll_entry(&self, cx: &mut Context<'_>) -> Poll<Option<TapEntry>> {
        let mut state = self.state.lock();
        let Some(entry) = state.entries.pop_front() else {
            if state.closed {
                return Poll::Ready(None);
            }
            if state.waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            // A list that was long once is not kept for ever.
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
}

impl Drop for Tap {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let waiting = state.bytes + state.missed_bytes;
        self.account(waiting, 0);
    }
}

impl State {
    fn messages(&self) -> u64 {
        self.entries.iter().filter(|entry| entry.is_message()).count() as u64
    }
}

impl TapEntry {
    const fn is_message(&self) -> bool {
        matches!(self, Self::Message(..))
    }

    const fn bytes(&self) -> usize {
        match self {
            Self::Message(payload, _) | Self::Event(_, payload) => ENTRY_BYTES + payload.len(),
            Self::Position(_) | Self::Gap(_) => ENTRY_BYTES,
            Self::End(_) => 0,
        }
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// What an entry counts against the limit beside its bytes: empty messages need memory too.
const ENTRY_BYTES: usize = 96;

/// Room for so many entries stays when the tap is empty.
const ENTRIES_KEPT: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_follower_that_is_too_slow_is_told() {
        let tap = Tap::new(2 * ENTRY_BYTES + 10);
        tap.push("1234".into(), Micros(1));
        tap.push("123456789".into(), Micros(1));
        tap.push("x".into(), Micros(1));
        assert_eq!(tap.next().await, Some(Bytes::from_static(b"1234")));
        assert_eq!(tap.next().await, None);
    }

    #[tokio::test]
    async fn a_client_that_is_too_slow_loses_what_waits_and_the_budget_knows() {
        let runtime = Runtime::new(1 << 20, Micros(0));
        let tap = Tap::of_client(2 * ENTRY_BYTES, Arc::clone(&runtime), None);
        // What it had missed is no fault of its own.
        (0..10).for_each(|_| tap.push_missed("missed".into()));
        tap.push("".into(), Micros(1));
        tap.push("".into(), Micros(1));
        assert_eq!(runtime.budget.used(), 12 * ENTRY_BYTES + 60);
        assert_eq!(tap.next().await, Some(Bytes::from_static(b"missed")));
        tap.push("x".into(), Micros(1));
        assert_eq!((runtime.budget.used(), tap.waiting_bytes()), (0, 0));
        tap.push("after the end".into(), Micros(1));
        assert_eq!(tap.discarded(), 13);
        assert_eq!(tap.next_entry().await, Some(TapEntry::End((&Disconnect::SLOW).into())));
        assert_eq!(tap.next_entry().await, None);
    }

    #[tokio::test]
    async fn what_waits_is_given_back_with_the_tap() {
        let runtime = Runtime::new(1 << 20, Micros(0));
        let tap = Tap::of_client(1000, Arc::clone(&runtime), None);
        tap.place(Position::START);
        tap.push("1".into(), Micros(1));
        tap.end(&Disconnect::RESTART);
        drop(tap);
        assert_eq!(runtime.budget.used(), 0);
    }
}
