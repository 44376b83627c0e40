//! Messages that a client has to acknowledge, with their due times. Knows neither clocks nor connections.

use std::collections::VecDeque;

use bytes::Bytes;
use wsproxy_conn::clock::Micros;

/// Limits of an [`AckWindow`].
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Time after which a message is sent again.
    pub interval: Micros,
    /// Upper bound of the times that a message is sent.
    pub tries_max: u32,
    /// Upper bound of waiting messages.
    pub messages_max: usize,
    /// Upper bound of waiting bytes.
    pub bytes_max: usize,
}

/// The messages of one client that wait for an `ack`.
///
/// Invariant: at most [`Patience::messages_max`] messages and [`Patience::bytes_max`] bytes. Beyond that the oldest
/// messages are given up. Only a single message may be larger.
#[derive(Debug, Default)]
pub struct AckWindow {
    /// Messages in the order of their due times: a message goes to the end when it is sent again.
    waiting: VecDeque<UnackedMessage>,
    bytes: usize,
    /// Number of the next message, so that numbers follow the order of first sends.
    added: u64,
}

/// A message that waits for an `ack`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnackedMessage {
    /// Id in the client's `ack`.
    pub event_id: Bytes,
    /// The message as it was sent.
    pub message: Bytes,
    /// Number of times that the message was sent.
    pub tries: u32,
    due: Micros,
    number: u64,
}

/// Step that is due for a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// Send this message again.
    Resend(Bytes),
    /// Give the message up: it was sent [`Patience::tries_max`] times.
    GiveUp(UnackedMessage),
}

impl UnackedMessage {
    fn bytes(&self) -> usize {
        self.event_id.len() + self.message.len() + WAITING_BYTES
    }
}

impl AckWindow {
    /// Adds a message that is being sent; one that waits already stays as it is. Returns the messages that are given up
    /// to make room.
    pub fn add(
        &mut self,
        event_id: Bytes,
        message: Bytes,
        now: Micros,
        patience: &Patience,
    ) -> Vec<UnackedMessage> {
        if self.waiting.iter().any(|waiting| waiting.event_id == event_id) {
            return Vec::new();
        }
        let (due, number) = (now.after(patience.interval), self.added);
        self.added += 1;
        let waiting = UnackedMessage { event_id, message, tries: 1, due, number };
        self.bytes += waiting.bytes();
        self.waiting.push_back(waiting);
        let mut given_up = Vec::new();
        while self.waiting.len() > patience.messages_max.max(1)
            || (self.bytes > patience.bytes_max && self.waiting.len() > 1)
        {
            let oldest = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| waiting.number);
            let Some(at) = oldest.map(|(at, _)| at) else { break };
            given_up.extend(self.take(at));
        }
        given_up
    }

    /// Removes an acknowledged message; `None` if it does not wait.
    pub fn acked(&mut self, event_id: &[u8]) -> Option<UnackedMessage> {
        let at = self.waiting.iter().position(|waiting| waiting.event_id == event_id)?;
        self.take(at)
    }

    /// Removes the messages whose ids are acknowledged together. Returns their number.
    pub fn acked_together(&mut self, is_acked: impl Fn(&[u8]) -> bool) -> usize {
        let before = self.waiting.len();
        let bytes = &mut self.bytes;
        self.waiting.retain(|waiting| {
            let is_acked = is_acked(&waiting.event_id);
            *bytes -= if is_acked { waiting.bytes() } else { 0 };
            !is_acked
        });
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
        before - self.waiting.len()
    }

    /// Returns the next step that is due at `now`. Call until `None`.
    pub fn due(&mut self, now: Micros, patience: &Patience) -> Option<Due> {
        if self.next().is_none_or(|next| next > now) {
            return None;
        }
        if self.waiting.front()?.tries >= patience.tries_max {
            return self.take(0).map(Due::GiveUp);
        }
        let mut waiting = self.waiting.pop_front()?;
        waiting.tries += 1;
        waiting.due = now.after(patience.interval);
        let message = waiting.message.clone();
        self.waiting.push_back(waiting);
        Some(Due::Resend(message))
    }

    /// Gives all due messages another interval: the client has not read the copies that it was sent.
    pub fn postpone(&mut self, now: Micros, patience: &Patience) {
        let due = self.waiting.iter().take_while(|waiting| waiting.due <= now).count();
        self.waiting.rotate_left(due);
        let rest = self.waiting.len() - due;
        for waiting in self.waiting.iter_mut().skip(rest) {
            waiting.due = now.after(patience.interval);
        }
    }

    /// Returns the time of the next due step.
    #[must_use]
    pub fn next(&self) -> Option<Micros> {
        self.waiting.front().map(|waiting| waiting.due)
    }

    /// Returns the number of waiting messages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Returns whether no message waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Removes all messages: the client is gone.
    pub fn drain(&mut self) -> impl Iterator<Item = UnackedMessage> + use<> {
        self.bytes = 0;
        std::mem::take(&mut self.waiting).into_iter()
    }

    fn take(&mut self, at: usize) -> Option<UnackedMessage> {
        let waiting = self.waiting.remove(at)?;
        self.bytes -= waiting.bytes();
        if self.waiting.is_empty() {
            // Free the memory: most clients have nothing to acknowledge most of the time.
            self.waiting = VecDeque::new();
        }
        Some(waiting)
    }
}

/// Approximate memory of a waiting message beside its bytes.
const WAITING_BYTES: usize = 96;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Patience =
        Patience { interval: Micros(5), tries_max: 3, messages_max: 4, bytes_max: 10_000 };

    fn add(window: &mut AckWindow, id: &str, now: u64) -> Vec<Bytes> {
        let (id, message) = (Bytes::from(id.to_owned()), Bytes::from(format!("message {id}")));
        let given_up = window.add(id, message, Micros(now), &PATIENCE);
        given_up.into_iter().map(|waiting| waiting.event_id).collect()
    }

    /// Returns the due steps: `+` and a message to send again, or `-` and the id of a message to give up.
    fn due(window: &mut AckWindow, now: u64) -> Vec<String> {
        let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let mut all = Vec::new();
        while let Some(due) = window.due(Micros(now), &PATIENCE) {
            all.push(match due {
                Due::Resend(message) => format!("+{}", text(message)),
                Due::GiveUp(waiting) => format!("-{} {}", text(waiting.event_id), waiting.tries),
            });
        }
        all
    }

    #[test]
    fn messages_are_acknowledged_together() {
        let mut window = AckWindow::default();
        for id in ["1", "2", "3"] {
            add(&mut window, id, 0);
        }
        assert_eq!(window.acked_together(|id| id < b"3".as_slice()), 2);
        assert_eq!(window.acked_together(|id| id < b"3".as_slice()), 0);
        assert_eq!(due(&mut window, 5), ["+message 3"]);
        assert_eq!(window.acked_together(|_| true), 1);
        assert_eq!((window.len(), window.bytes), (0, 0));
    }

    #[test]
    fn a_message_is_sent_three_times_and_then_given_up() {
        let mut window = AckWindow::default();
        add(&mut window, "a", 0);
        assert_eq!(window.next(), Some(Micros(5)));
        assert!(due(&mut window, 4).is_empty());
        assert_eq!(due(&mut window, 5), ["+message a"]);
        assert!(due(&mut window, 9).is_empty());
        assert_eq!(due(&mut window, 12), ["+message a"]);
        assert_eq!(window.next(), Some(Micros(17)));
        assert_eq!(due(&mut window, 17), ["-a 3"]);
        assert_eq!((window.next(), window.bytes, window.waiting.capacity()), (None, 0, 0));
    }

    #[test]
    fn an_ack_ends_it_whatever_its_turn_and_a_second_one_is_unknown() {
        let mut window = AckWindow::default();
        for (id, now) in [("a", 0), ("b", 1), ("c", 2)] {
            add(&mut window, id, now);
        }
        assert_eq!(window.acked(b"b").unwrap().tries, 1);
        assert_eq!(window.acked(b"b"), None);
        assert_eq!(window.acked(b"other"), None);
        assert_eq!(due(&mut window, 6), ["+message a"]);
        assert_eq!(window.acked(b"a").unwrap().tries, 2);
        assert_eq!(due(&mut window, 100), ["+message c"]);
        assert_eq!(window.acked(b"c").unwrap().tries, 2);
        assert_eq!((window.len(), window.bytes), (0, 0));
    }

    #[test]
    fn what_waits_already_is_not_added_again() {
        let mut window = AckWindow::default();
        add(&mut window, "a", 0);
        add(&mut window, "a", 3);
        assert_eq!((window.len(), window.next()), (1, Some(Micros(5))));
    }

    #[test]
    fn beyond_the_bound_the_oldest_is_given_up_even_where_it_was_just_sent_again() {
        let mut window = AckWindow::default();
        add(&mut window, "a", 0);
        for id in ["b", "c", "d"] {
            assert!(add(&mut window, id, 2).is_empty());
        }
        assert_eq!(due(&mut window, 5), ["+message a"]);
        assert_eq!(add(&mut window, "e", 6), ["a"]);
        assert_eq!(add(&mut window, "f", 6), ["b"]);
        assert_eq!(window.len(), 4);
    }

    #[test]
    fn bytes_are_bounded_but_for_the_newest_message() {
        let mut window = AckWindow::default();
        let mut push = |id: &'static str, bytes: usize| {
            let message = Bytes::from(vec![b'x'; bytes]);
            window.add(Bytes::from_static(id.as_bytes()), message, Micros(0), &PATIENCE).len()
        };
        assert_eq!((push("a", 4000), push("b", 4000), push("c", 4000)), (0, 0, 1));
        assert_eq!(push("d", 100_000), 2);
        assert_eq!(push("e", 1), 1);
        assert_eq!((window.len(), window.bytes), (1, 2 + WAITING_BYTES));
    }

    #[test]
    fn postponing_costs_no_try() {
        let mut window = AckWindow::default();
        for (id, now) in [("a", 0), ("b", 1), ("c", 7)] {
            add(&mut window, id, now);
        }
        window.postpone(Micros(8), &PATIENCE);
        assert!(due(&mut window, 11).is_empty());
        assert_eq!(due(&mut window, 12), ["+message c"]);
        assert_eq!(due(&mut window, 13), ["+message a", "+message b"]);
        assert!(window.waiting.iter().is_sorted_by_key(|waiting| waiting.due));
    }

    proptest! {
        /// Whatever happens, the window holds what it says, within its bounds and in the order of what is due; and
        /// every message ends exactly once.
        #[test]
        fn every_message_ends_once_and_the_bounds_hold(
            steps in prop::collection::vec((0_u8..5, 0_u64..12, 0_usize..4000), 1..200),
        ) {
            let mut window = AckWindow::default();
            let (mut now, mut added, mut ended) = (0, Vec::new(), Vec::new());
            for (kind, number, bytes) in steps {
                now += number / 4;
                match kind {
                    0 | 1 => {
                        let id = Bytes::from(added.len().to_string());
                        added.push(id.clone());
                        let message = Bytes::from(vec![0; bytes]);
                        let given_up = window.add(id, message, Micros(now), &PATIENCE);
                        ended.extend(given_up.into_iter().map(|waiting| waiting.event_id));
                    }
                    2 => ended.extend(window.acked(number.to_string().as_bytes()).map(|w| w.event_id)),
                    3 => window.postpone(Micros(now), &PATIENCE),
                    _ => while let Some(due) = window.due(Micros(now), &PATIENCE) {
                        if let Due::GiveUp(waiting) = due {
                            prop_assert_eq!(waiting.tries, PATIENCE.tries_max);
                            ended.push(waiting.event_id);
                        }
                    },
                }
                prop_assert_eq!(window.bytes, window.waiting.iter().map(UnackedMessage::bytes).sum::<usize>());
                prop_assert!(window.len() <= PATIENCE.messages_max);
                prop_assert!(window.bytes <= PATIENCE.bytes_max || window.len() == 1);
                prop_assert!(window.waiting.iter().is_sorted_by_key(|waiting| waiting.due));
            }
            ended.extend(window.drain().map(|waiting| waiting.event_id));
            ended.sort_unstable();
            added.sort_unstable();
            prop_assert_eq!(ended, added);
        }
    }

    #[test]
    fn whoever_leaves_leaves_nothing() {
        let mut window = AckWindow::default();
        for id in ["a", "b"] {
            add(&mut window, id, 0);
        }
        assert_eq!(window.drain().map(|waiting| waiting.event_id).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((window.len(), window.bytes, window.next()), (0, 0, None));
    }
}
