//! A topic's messages for somebody in this process who is no connection: an HTTP follower, the demo worker.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

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
    messages: VecDeque<TapMessage>,
    bytes: usize,
    overflowed: bool,
}

/// A message as it came from the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapMessage {
    /// The channel.
    pub topic: Bytes,
    /// The payload.
    pub payload: Bytes,
}

impl Tap {
    /// A tap that holds at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default(), notify: Notify::new() })
    }

    pub(crate) fn push(&self, topic: &[u8], payload: &[u8]) {
        let mut state = self.state.lock();
        if state.overflowed {
            return;
        }
        state.bytes += topic.len() + payload.len();
        if state.bytes > self.limit {
            state.overflowed = true;
        } else {
            state.messages.push_back(TapMessage {
                topic: Bytes::copy_from_slice(topic),
                payload: Bytes::copy_from_slice(payload),
            });
        }
        drop(state);
        self.notify.notify_one();
    }

    /// The next message; `None` when the tap overflowed and all that fitted was taken.
    pub async fn next(&self) -> Option<TapMessage> {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(message) = state.messages.pop_front() {
                    state.bytes -= message.topic.len() + message.payload.len();
                    return Some(message);
                }
                if state.overflowed {
                    return None;
                }
            }
            self.notify.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_follower_that_is_too_slow_is_told() {
        let tap = Tap::new(10);
        tap.push(b"t", b"1234");
        tap.push(b"t", b"123456789");
        tap.push(b"t", b"x");
        assert_eq!(tap.next().await.map(|m| m.payload), Some(Bytes::from_static(b"1234")));
        assert_eq!(tap.next().await, None);
    }
}
