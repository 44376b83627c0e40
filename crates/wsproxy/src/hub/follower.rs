//! Queues of a topic's messages for readers in this process: HTTP followers, the registry, the demo worker.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;

/// A bounded queue of messages, with one reader.
///
/// Invariant: holds at most `bytes_max` bytes. A message beyond that closes the queue. The reader gets the messages in
/// it and then learns that it was too slow, so that it does not read on behind a hole.
#[derive(Debug)]
pub struct FollowerQueue {
    bytes_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<Followed>,
    bytes: usize,
    /// A message did not fit, and the queue takes no further one.
    overflowed: bool,
    waker: Option<Waker>,
}

/// Entry of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Payload of a message.
    Message(Bytes),
    /// The bus was away for this time: messages may be missing here.
    Gap(Duration),
}

impl FollowerQueue {
    /// Makes an empty queue.
    #[must_use]
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, state: Mutex::default() })
    }

    /// Returns the upper bound of the waiting bytes.
    #[must_use]
    pub const fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Takes the payload of the next message; `None` if the queue has overflowed and is empty.
    pub async fn next_message(&self) -> Option<Bytes> {
        loop {
            if let Followed::Message(message) = self.next().await? {
                return Some(message);
            }
        }
    }

    /// Takes the next entry; `None` as in [`Self::next_message`].
    pub async fn next(&self) -> Option<Followed> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    pub(super) fn push(&self, entry: Followed) {
        let mut state = self.state.lock();
        let bytes = entry.bytes();
        if !state.overflowed && state.bytes + bytes <= self.bytes_max {
            state.bytes += bytes;
            state.entries.push_back(entry);
        } else {
            state.overflowed = true;
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Followed>> {
        let mut state = self.state.lock();
        let Some(entry) = state.entries.pop_front() else {
            if state.overflowed {
                return Poll::Ready(None);
            }
            if state.waker.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
                state.waker = Some(cx.waker().clone());
            }
            // Free the memory of a queue that was long once.
            state.entries.shrink_to(ENTRIES_KEPT);
            return Poll::Pending;
        };
        state.bytes -= entry.bytes();
        Poll::Ready(Some(entry))
    }
}

impl Followed {
    const fn bytes(&self) -> usize {
        match self {
            Self::Message(payload) => ENTRY_BYTES + payload.len(),
            Self::Gap(_) => ENTRY_BYTES,
        }
    }
}

/// Bytes that an entry counts in addition to its payload: empty messages need memory too.
const ENTRY_BYTES: usize = 96;

/// Entries for which an empty queue keeps room.
const ENTRIES_KEPT: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_follower_that_is_too_slow_is_told() {
        let queue = FollowerQueue::new(2 * ENTRY_BYTES + 10);
        for payload in ["1234", "123456789", "x"] {
            queue.push(Followed::Message(payload.into()));
        }
        assert_eq!(queue.next_message().await, Some(Bytes::from_static(b"1234")));
        assert_eq!(queue.next_message().await, None);
    }
}
