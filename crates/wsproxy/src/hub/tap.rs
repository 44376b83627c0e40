//! A topic's messages for somebody in this process who is no connection: an HTTP follower, the demo worker.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use wsproxy_proto::disconnect::Disconnect;

/// A bounded queue of messages.
///
/// Invariant: never holds more than `limit` bytes. A message beyond it ends the tap: whoever
/// follows is told that it was too slow, rather than given a stream with a hole.
#[derive(Debug)]
pub struct Tap {
    limit: usize,
    state: Mutex<State>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct State {
    entries: VecDeque<TapEntry>,
    bytes: usize,
    /// Nothing more is taken.
    closed: bool,
}

/// What a follower finds in its tap, in the order in which it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapEntry {
    /// A message's payload.
    Message(Bytes),
    /// The bus was away for so long: messages may be missing here.
    Gap(Duration),
    /// The gateway ends it for this reason; nothing follows.
    End(&'static Disconnect),
}

impl Tap {
    /// A tap that holds at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default(), notify: Notify::new() })
    }

    /// What may wait in it, in bytes.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn push(&self, payload: Bytes) {
        self.queue(ENTRY_BYTES + payload.len(), || TapEntry::Message(payload));
    }

    /// The bus is back after so long.
    pub(crate) fn interrupt(&self, gap: Duration) {
        self.queue(ENTRY_BYTES, || TapEntry::Gap(gap));
    }

    /// The follower is told why, after all that waits.
    pub(crate) fn end(&self, why: &'static Disconnect) {
        self.queue(0, || TapEntry::End(why));
        self.state.lock().closed = true;
        self.notify.notify_one();
    }

    fn queue(&self, bytes: usize, entry: impl FnOnce() -> TapEntry) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        state.bytes += bytes;
        if state.bytes > self.limit {
            state.closed = true;
        } else {
            state.entries.push_back(entry());
        }
        drop(state);
        self.notify.notify_one();
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
                TapEntry::Message(message) => return Some(message),
                TapEntry::Gap(_) => {}
                TapEntry::End(_) => return None,
            }
        }
    }

    /// The next message or gap; `None` as in [`Self::next`].
    pub async fn next_entry(&self) -> Option<TapEntry> {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(entry) = state.entries.pop_front() {
                    state.bytes -= entry.bytes();
                    return Some(entry);
                }
                if state.closed {
                    return None;
                }
            }
            self.notify.notified().await;
        }
    }
}

impl TapEntry {
    fn bytes(&self) -> usize {
        match self {
            Self::Message(payload) => ENTRY_BYTES + payload.len(),
            Self::Gap(_) => ENTRY_BYTES,
            Self::End(_) => 0,
        }
    }
}

/// What an entry counts against the limit beside its bytes: empty messages need memory too.
const ENTRY_BYTES: usize = 96;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_follower_that_is_too_slow_is_told() {
        let tap = Tap::new(2 * ENTRY_BYTES + 10);
        tap.push("1234".into());
        tap.push("123456789".into());
        tap.push("x".into());
        assert_eq!(tap.next().await, Some(Bytes::from_static(b"1234")));
        assert_eq!(tap.next().await, None);
    }
}
