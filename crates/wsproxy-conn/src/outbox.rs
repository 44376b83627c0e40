//! What waits to be written to one client: two lanes, bounded by the caller in bytes, no IO.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

use crate::clock::Micros;

/// Most frames handed to one vectored write.
pub const SLICES_MAX: usize = 64;

/// A frame and why it waits.
#[derive(Debug)]
struct Entry {
    frame: Bytes,
    /// When its message was read from the bus, for the latency metric. [`Micros::NEVER`] marks
    /// a control frame, which is no message.
    since: Micros,
    /// Caused by the client's own messages, and so a reason not to read more of them.
    reply: bool,
}

/// Frames waiting for one client.
///
/// Control frames overtake data, but never cut a frame that is partly written.
/// The owner bounds [`Self::bytes`]; the outbox itself only counts. Nothing is allocated while
/// at most one data frame waits, and nothing is kept once it is empty.
#[derive(Debug, Default)]
pub struct Outbox {
    /// The oldest data frame. `rest` is only used behind it.
    first: Option<Entry>,
    rest: Option<Box<VecDeque<Entry>>>,
    control: Option<Box<VecDeque<Bytes>>>,
    /// What is left of a frame of which the beginning is written.
    partial: Option<Entry>,
    bytes: usize,
    reply_bytes: usize,
}

/// What one write completed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Data frames of which the last byte was handed over.
    pub messages: u32,
    /// Bytes, of any kind.
    pub bytes: usize,
    /// Since when the oldest of those messages waited; of value only where `messages` > 0.
    pub oldest: Micros,
}

impl Outbox {
    /// Nothing waits.
    pub const EMPTY: Self =
        Self { first: None, rest: None, control: None, partial: None, bytes: 0, reply_bytes: 0 };

    /// Appends a frame to the data lane; one with [`Micros::NEVER`] is not counted as a message.
    pub fn push(&mut self, frame: Bytes, since: Micros, reply: bool) {
        self.bytes += frame.len();
        if reply {
            self.reply_bytes += frame.len();
        }
        let entry = Entry { frame, since, reply };
        if self.first.is_none() {
            self.first = Some(entry);
        } else {
            self.rest.get_or_insert_default().push_back(entry);
        }
    }

    /// Appends a control frame, ahead of all data. Pongs count as replies.
    pub fn push_control(&mut self, frame: Bytes) {
        self.bytes += frame.len();
        self.reply_bytes += frame.len();
        self.control.get_or_insert_default().push_back(frame);
    }

    /// Drops all that is not partly written, so that a close frame can follow at once.
    /// Returns how many data frames were lost.
    pub fn discard(&mut self) -> usize {
        let lost = usize::from(self.first.is_some()) + self.rest.as_ref().map_or(0, |r| r.len());
        (self.first, self.rest, self.control) = (None, None, None);
        self.bytes = self.partial.as_ref().map_or(0, |e| e.frame.len());
        self.reply_bytes = self.partial.as_ref().filter(|e| e.reply).map_or(0, |e| e.frame.len());
        lost
    }

    /// Bytes that wait.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that wait and were caused by the client itself.
    #[must_use]
    pub const fn reply_bytes(&self) -> usize {
        self.reply_bytes
    }

    /// Whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether a control frame waits.
    #[must_use]
    pub const fn has_control(&self) -> bool {
        self.control.is_some()
    }

    /// What to write next, in order. Returns how many slices were filled.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let partial = self.partial.iter().map(|e| &e.frame);
        let control = self.control.iter().flat_map(|c| c.iter());
        let first = self.first.iter().map(|e| &e.frame);
        let rest = self.rest.iter().flat_map(|r| r.iter().map(|e| &e.frame));
        let frames = partial.chain(control).chain(first).chain(rest);
        let mut filled = 0;
        for (slice, frame) in slices.iter_mut().zip(frames) {
            *slice = IoSlice::new(frame);
            filled += 1;
        }
        filled
    }

    /// Removes the first `count` bytes of what [`Self::fill`] showed.
    pub fn advance(&mut self, mut count: usize) -> Written {
        let mut written = Written { bytes: count, ..Written::default() };
        while count > 0 {
            let Some(mut entry) = self.take_next() else { break };
            let taken = count.min(entry.frame.len());
            count -= taken;
            self.bytes -= taken;
            if entry.reply {
                self.reply_bytes -= taken;
            }
            if taken < entry.frame.len() {
                entry.frame.advance(taken);
                self.partial = Some(entry);
            } else if entry.since != Micros::NEVER {
                if written.messages == 0 {
                    written.oldest = entry.since;
                }
                written.messages += 1;
            }
        }
        written
    }

    fn take_next(&mut self) -> Option<Entry> {
        if let Some(entry) = self.partial.take() {
            return Some(entry);
        }
        if let Some(control) = &mut self.control {
            let frame = control.pop_front();
            if control.is_empty() {
                self.control = None;
            }
            if let Some(frame) = frame {
                return Some(Entry { frame, since: Micros::NEVER, reply: true });
            }
        }
        let entry = self.first.take()?;
        if let Some(rest) = &mut self.rest {
            self.first = rest.pop_front();
            if rest.is_empty() {
                self.rest = None;
            } else if rest.capacity() > 64 && rest.len() < rest.capacity() / 4 {
                rest.shrink_to(rest.len() * 2);
            }
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn shown(outbox: &Outbox) -> String {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let filled = outbox.fill(&mut slices);
        slices[..filled].iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect()
    }

    #[test]
    fn control_overtakes_data_but_not_a_frame_in_progress() {
        let mut outbox = Outbox::default();
        outbox.push(frame("aaaa"), Micros(1), false);
        outbox.push(frame("bb"), Micros(2), false);
        assert_eq!(outbox.advance(2).messages, 0);
        outbox.push_control(frame("P"));
        assert_eq!(shown(&outbox), "aaPbb");
        assert_eq!(outbox.advance(3), Written { messages: 1, bytes: 3, oldest: Micros(1) });
        assert_eq!(outbox.advance(2), Written { messages: 1, bytes: 2, oldest: Micros(2) });
        assert!(outbox.is_empty() && outbox.reply_bytes() == 0);
    }

    #[test]
    fn a_partly_written_control_frame_is_not_counted_as_a_message() {
        let mut outbox = Outbox::default();
        outbox.push_control(frame("PONG"));
        assert_eq!(outbox.advance(1).messages, 0);
        assert_eq!(outbox.reply_bytes(), 3);
        assert_eq!(outbox.advance(3).messages, 0);
        assert!(outbox.is_empty());
    }

    #[test]
    fn discarding_keeps_what_is_partly_written() {
        let mut outbox = Outbox::default();
        for text in ["aaaa", "bb", "cc"] {
            outbox.push(frame(text), Micros(1), true);
        }
        outbox.advance(1);
        assert_eq!(outbox.discard(), 2);
        assert_eq!((outbox.bytes(), outbox.reply_bytes()), (3, 3));
        outbox.push_control(frame("C"));
        assert_eq!(shown(&outbox), "aaaC");
    }

    #[test]
    fn any_pattern_of_partial_writes_keeps_order_and_counts() {
        for step in 1..17 {
            let mut outbox = Outbox::default();
            let mut expected = String::new();
            for i in 0..100_usize {
                let text = format!("{i}.");
                expected.push_str(&text);
                outbox.push(Bytes::from(text), Micros(i as u64), i % 2 == 0);
            }
            let (mut seen, mut messages) = (String::new(), 0);
            while !outbox.is_empty() {
                let part: String = shown(&outbox).chars().take(step).collect();
                messages += outbox.advance(part.len()).messages;
                seen.push_str(&part);
            }
            assert_eq!((seen, messages, outbox.reply_bytes()), (expected, 100, 0));
            assert!(outbox.rest.is_none() && outbox.first.is_none());
        }
    }
}
