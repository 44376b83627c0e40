//! What waits to be written to one client: two lanes, bounded by the caller in bytes, no IO.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

use crate::clock::Micros;

/// Most frames handed to one vectored write.
pub const SLICES_MAX: usize = 64;

/// What a waiting frame costs beside its bytes: its place in a lane, which grows by doubling.
/// Without it a bound in bytes would allow twenty times as much memory for tiny messages.
pub const FRAME_OVERHEAD: usize = 64;

/// A data frame and why it waits.
#[derive(Debug)]
struct Entry {
    frame: Bytes,
    origin: Origin,
}

/// When a frame's message was read from the bus, for the latency metric; whether the client's own
/// messages caused it; whether a part of it is written. One number, since there can be very many.
#[derive(Debug, Clone, Copy)]
struct Origin(u64);

/// The two lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Control,
    Data,
}

/// Frames waiting for one client.
///
/// Control frames overtake data, but never cut a frame that is partly written.
/// The owner bounds [`Self::bytes`]; the outbox itself only counts. Nothing is allocated while
/// at most one data frame waits, and nothing is kept once it is empty.
#[derive(Debug, Default)]
pub struct Outbox {
    /// The oldest data frame, or what is left of it.
    first: Option<Entry>,
    more: Option<Box<More>>,
    /// The owner's bound, which 4 GiB are far beyond, keeps it from overflowing.
    bytes: u32,
    reply_bytes: u32,
}

/// What waits beside the oldest data frame.
#[derive(Debug, Default)]
struct More {
    control: VecDeque<Bytes>,
    /// Only used behind [`Outbox::first`].
    data: VecDeque<Entry>,
    /// The first control frame is partly written.
    control_is_cut: bool,
}

/// What one write completed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Data frames of which the last byte was handed over.
    pub messages: u32,
    /// Bytes, of any kind.
    pub bytes: usize,
    /// Those of the messages that came from the bus: their time is measured.
    pub timed: u32,
    /// Since when the oldest of these waited; of value only where `timed` > 0.
    pub oldest: Micros,
}

impl Outbox {
    /// Nothing waits.
    pub const EMPTY: Self = Self { first: None, more: None, bytes: 0, reply_bytes: 0 };

    /// Appends a frame to the data lane; one with [`Micros::NEVER`] is not counted as a message, and the time of one
    /// with [`Micros::UNTIMED`] and of a reply is not measured.
    pub fn push(&mut self, frame: Bytes, since: Micros, reply: bool) {
        self.add(frame.len() + FRAME_OVERHEAD, reply);
        let entry = Entry { frame, origin: Origin::new(since, reply) };
        if self.first.is_none() {
            self.first = Some(entry);
        } else {
            self.more.get_or_insert_default().data.push_back(entry);
        }
    }

    /// Appends a control frame, ahead of all data. It counts as a reply.
    pub fn push_control(&mut self, frame: Bytes) {
        self.add(frame.len() + FRAME_OVERHEAD, true);
        self.more.get_or_insert_default().control.push_back(frame);
    }

    /// Puts a pong in the place of the last one, where that is the last control frame and
    /// untouched (RFC 6455 section 5.5.3 allows to answer only the newest ping).
    ///
    /// # Errors
    /// There is none to replace; the frame comes back.
    pub fn replace_pong(&mut self, frame: Bytes) -> Result<(), Bytes> {
        let more = self.more.as_mut();
        let more = more.filter(|more| more.control.len() > usize::from(more.control_is_cut));
        let last = more.and_then(|more| more.control.back_mut());
        let Some(last) = last.filter(|last| last.first() == frame.first()) else {
            return Err(frame);
        };
        let (before, after) = (last.len(), frame.len());
        *last = frame;
        self.remove(before, true);
        self.add(after, true);
        Ok(())
    }

    /// Drops all that is not partly written, so that a close frame can follow at once.
    /// Returns how many messages were lost.
    pub fn discard(&mut self) -> usize {
        let before = self.messages();
        let cut = self.cut();
        let data = self.first.take().filter(|_| cut == Some(Lane::Data));
        let control = self.take_control().filter(|_| cut == Some(Lane::Control));
        *self = Self::EMPTY;
        if let Some(entry) = data {
            self.add(entry.frame.len() + FRAME_OVERHEAD, entry.origin.is_reply());
            self.first = Some(entry);
        }
        if let Some(frame) = control {
            self.push_control(frame);
            self.set_cut(Lane::Control, true);
        }
        before - self.messages()
    }

    /// Drops everything. Returns how many messages were lost.
    pub fn clear(&mut self) -> usize {
        let lost = self.messages();
        *self = Self::EMPTY;
        lost
    }

    /// Bytes that wait, with what it costs to keep them.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// The share of [`Self::bytes`] that the client itself caused.
    #[must_use]
    pub const fn reply_bytes(&self) -> usize {
        self.reply_bytes as usize
    }

    /// The share of [`Self::bytes`] that [`Self::discard`] would free.
    #[must_use]
    pub fn untouched_bytes(&self) -> usize {
        let cut = match self.cut() {
            None => return self.bytes(),
            Some(Lane::Data) => self.first.as_ref().map(|entry| &entry.frame),
            Some(Lane::Control) => self.more.as_ref().and_then(|more| more.control.front()),
        };
        self.bytes() - cut.map_or(0, |frame| frame.len() + FRAME_OVERHEAD)
    }

    /// Whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// How many control frames wait.
    #[must_use]
    pub fn control_frames(&self) -> usize {
        self.more.as_ref().map_or(0, |more| more.control.len())
    }

    /// The one data frame that waits, where there is nothing else: most rounds leave just that.
    #[must_use]
    pub fn only(&self) -> Option<&[u8]> {
        match (&self.first, &self.more) {
            (Some(entry), None) => Some(&entry.frame),
            _ => None,
        }
    }

    /// What to write next, in order. Returns how many slices were filled.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let (cut, first) = match self.cut() {
            Some(Lane::Data) => (&self.first, &None),
            _ => (&None, &self.first),
        };
        let control = self.more.iter().flat_map(|more| &more.control);
        let data = self.more.iter().flat_map(|more| &more.data);
        let frames = cut.iter().map(|entry| &entry.frame).chain(control);
        let frames = frames.chain(first.iter().chain(data).map(|entry| &entry.frame));
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
            let lane = self.cut().unwrap_or_else(|| match self.control_frames() {
                0 => Lane::Data,
                _ => Lane::Control,
            });
            let Some((frame, origin)) = self.front(lane) else { break };
            let taken = count.min(frame.len());
            let is_whole = taken == frame.len();
            frame.advance(taken);
            count -= taken;
            self.remove(taken, origin.is_reply());
            self.set_cut(lane, !is_whole);
            if is_whole {
                self.remove(FRAME_OVERHEAD, origin.is_reply());
                self.pop(lane);
                written.messages += u32::from(origin.is_message());
                if origin.is_timed() {
                    if written.timed == 0 {
                        written.oldest = origin.since();
                    }
                    written.timed += 1;
                }
            }
        }
        written
    }

    /// The lane of which the first frame is partly written: nothing may come before the rest of it.
    fn cut(&self) -> Option<Lane> {
        if self.first.as_ref().is_some_and(|entry| entry.origin.is_cut()) {
            return Some(Lane::Data);
        }
        self.more.as_ref().filter(|more| more.control_is_cut).map(|_| Lane::Control)
    }

    fn set_cut(&mut self, lane: Lane, cut: bool) {
        match (lane, &mut self.first, &mut self.more) {
            (Lane::Data, Some(entry), _) => entry.origin.set_cut(cut),
            (Lane::Control, _, Some(more)) => more.control_is_cut = cut,
            _ => {}
        }
    }

    /// The first frame of a lane.
    fn front(&mut self, lane: Lane) -> Option<(&mut Bytes, Origin)> {
        match lane {
            Lane::Data => self.first.as_mut().map(|entry| (&mut entry.frame, entry.origin)),
            Lane::Control => {
                let frame = self.more.as_mut()?.control.front_mut()?;
                Some((frame, Origin::new(Micros::NEVER, true)))
            }
        }
    }

    fn pop(&mut self, lane: Lane) {
        match lane {
            Lane::Data => self.first = self.more.as_mut().and_then(|more| more.data.pop_front()),
            Lane::Control => drop(self.take_control()),
        }
        let Some(more) = &mut self.more else { return };
        if more.control.is_empty() && more.data.is_empty() {
            self.more = None;
        } else if more.data.capacity() > 64 && more.data.len() < more.data.capacity() / 4 {
            more.data.shrink_to(more.data.len() * 2);
        }
    }

    fn take_control(&mut self) -> Option<Bytes> {
        self.more.as_mut()?.control.pop_front()
    }

    fn messages(&self) -> usize {
        let data = self.more.iter().flat_map(|more| &more.data);
        self.first.iter().chain(data).filter(|entry| entry.origin.is_message()).count()
    }

    const fn add(&mut self, bytes: usize, reply: bool) {
        self.bytes += bytes as u32;
        if reply {
            self.reply_bytes += bytes as u32;
        }
    }

    const fn remove(&mut self, bytes: usize, reply: bool) {
        self.bytes -= bytes as u32;
        if reply {
            self.reply_bytes -= bytes as u32;
        }
    }
}

impl Origin {
    const REPLY: u64 = 1;
    const CUT: u64 = 2;

    const fn new(since: Micros, reply: bool) -> Self {
        Self(since.0 << 2 | if reply { Self::REPLY } else { 0 })
    }

    const fn since(self) -> Micros {
        Micros(self.0 >> 2)
    }

    const fn is_reply(self) -> bool {
        self.0 & Self::REPLY != 0
    }

    const fn is_cut(self) -> bool {
        self.0 & Self::CUT != 0
    }

    const fn set_cut(&mut self, cut: bool) {
        self.0 = self.0 & !Self::CUT | if cut { Self::CUT } else { 0 };
    }

    /// Whether it was not pushed with [`Micros::NEVER`].
    const fn is_message(self) -> bool {
        self.0 >> 2 != Micros::NEVER.0 << 2 >> 2
    }

    /// Whether it came from the bus, rather than from the gateway itself.
    const fn is_timed(self) -> bool {
        !self.is_reply() && self.is_message() && self.0 >> 2 != Micros::UNTIMED.0 << 2 >> 2
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
        let written = |bytes, oldest| Written { messages: 1, timed: 1, bytes, oldest };
        assert_eq!(outbox.advance(3), written(3, Micros(1)));
        assert_eq!(outbox.advance(2), written(2, Micros(2)));
        assert!(outbox.is_empty() && outbox.reply_bytes() == 0);
    }

    #[test]
    fn a_partly_written_control_frame_is_not_counted_as_a_message() {
        let mut outbox = Outbox::default();
        outbox.push_control(frame("PONG"));
        assert_eq!(outbox.advance(1).messages, 0);
        assert_eq!(outbox.reply_bytes(), 3 + FRAME_OVERHEAD);
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
        let left = 3 + FRAME_OVERHEAD;
        assert_eq!((outbox.bytes(), outbox.reply_bytes()), (left, left));
        assert_eq!(outbox.untouched_bytes(), 0);
        outbox.push_control(frame("C"));
        assert_eq!(shown(&outbox), "aaaC");
        assert_eq!(outbox.clear(), 1);
        assert!(outbox.is_empty() && shown(&outbox).is_empty());
    }

    #[test]
    fn discarding_keeps_a_control_frame_that_is_partly_written() {
        let mut outbox = Outbox::default();
        for text in ["PING", "PONG"] {
            outbox.push_control(frame(text));
        }
        outbox.push(frame("aa"), Micros(1), false);
        outbox.advance(1);
        assert_eq!(outbox.untouched_bytes(), 6 + 2 * FRAME_OVERHEAD);
        assert_eq!(outbox.discard(), 1);
        outbox.push_control(frame("C"));
        assert_eq!(shown(&outbox), "INGC");
        outbox.advance(4);
        assert!(outbox.is_empty() && outbox.more.is_none());
    }

    #[test]
    fn a_close_frame_in_the_data_lane_is_not_counted_as_lost() {
        let mut outbox = Outbox::default();
        outbox.push(frame("aa"), Micros(1), false);
        outbox.push(frame("C"), Micros::NEVER, false);
        assert_eq!(outbox.discard(), 1);
    }

    #[test]
    fn only_messages_from_the_bus_are_timed() {
        let mut outbox = Outbox::default();
        outbox.push(frame("notice"), Micros::UNTIMED, false);
        outbox.push(frame("bus"), Micros(7), false);
        outbox.push(frame("answer"), Micros(8), true);
        outbox.push(frame("C"), Micros::NEVER, false);
        let expected = Written { messages: 3, timed: 1, bytes: 16, oldest: Micros(7) };
        assert_eq!(outbox.advance(16), expected);
    }

    #[test]
    fn only_a_whole_pong_is_replaced() {
        let mut outbox = Outbox::default();
        assert!(outbox.replace_pong(frame("O1")).is_err());
        outbox.push_control(frame("O1"));
        assert!(outbox.replace_pong(frame("O222")).is_ok());
        assert_eq!(shown(&outbox), "O222");
        outbox.advance(1);
        assert!(outbox.replace_pong(frame("O3")).is_err());
        outbox.push_control(frame("I"));
        assert!(outbox.replace_pong(frame("O3")).is_err());
        outbox.advance(4);
        assert!(outbox.is_empty() && outbox.reply_bytes() == 0);
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
            assert!(outbox.more.is_none() && outbox.first.is_none() && outbox.bytes() == 0);
        }
    }
}
