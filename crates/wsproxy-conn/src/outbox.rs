//! Frames that wait to be written to one client: two lanes, bounded in bytes by the caller, without IO.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

use crate::clock::Micros;

mod keys;

use keys::Keys;

/// Data frame with its tag.
#[derive(Debug)]
struct Entry {
    frame: Bytes,
    tag: Tag,
}

/// Tag of a data frame: the time at which its message was read from the bus (for the latency metric), whether the
/// client's own messages caused it, and whether a part of it is written. It is one number, since there can be very
/// many.
#[derive(Debug, Clone, Copy)]
struct Tag(u64);

/// The two lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Control,
    Data,
}

/// Frames that wait for one client.
///
/// Control frames overtake data frames, but never cut a frame that is partly written. The owner bounds
/// [`Self::bytes`]; the outbox only counts. The outbox allocates nothing while at most one data frame waits, and
/// keeps nothing once it is empty.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Oldest data frame, or the rest of it.
    first: Option<Entry>,
    more: Option<Box<More>>,
    /// The owner's bound is far below 4 GiB, so this does not overflow.
    bytes: u32,
    reply_bytes: u32,
}

/// Frames that wait in addition to the oldest data frame.
#[derive(Debug, Default)]
struct More {
    control: VecDeque<Bytes>,
    /// Data frames behind [`Outbox::first`].
    data: VecDeque<Entry>,
    /// Keys of data frames; on the heap, since hardly any connection has them.
    keys: Option<Box<Keys>>,
    /// The first control frame is partly written.
    control_is_cut: bool,
}

/// Result of one write.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Number of data frames that are written completely.
    pub messages: u32,
    /// Number of bytes of all frames.
    pub bytes: usize,
    /// Number of these data frames that came from the bus, whose latency is measured.
    pub timed: u32,
    /// Time at which the oldest of these came. Without meaning where `timed` is 0.
    pub oldest: Micros,
}

impl Outbox {
    /// Outbox in which nothing waits.
    pub const EMPTY: Self = Self { first: None, more: None, bytes: 0, reply_bytes: 0 };

    /// Appends a frame to the data lane. A frame with [`Micros::NEVER`] is not counted as a message. The latency of a
    /// reply, and of a frame with [`Micros::UNTIMED`], is not measured.
    pub fn push(&mut self, frame: Bytes, since: Micros, reply: bool) {
        self.add(frame.len() + FRAME_OVERHEAD, reply);
        let entry = Entry { frame, tag: Tag::new(since, reply) };
        if self.first.is_none() {
            self.first = Some(entry);
        } else {
            self.more.get_or_insert_default().data.push_back(entry);
        }
    }

    /// Appends a control frame, ahead of all data frames. It counts as a reply.
    pub fn push_control(&mut self, frame: Bytes) {
        self.add(frame.len() + FRAME_OVERHEAD, true);
        self.more.get_or_insert_default().control.push_back(frame);
    }

    /// Replaces the last control frame, where it is a pong of which nothing is written: RFC 6455, section 5.5.3,
    /// allows to answer only the newest ping.
    ///
    /// # Errors
    /// The frame itself, where there is no such pong.
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

    /// Puts a frame in the place of a data frame of which nothing is written. No effect where that frame does not wait.
    pub fn replace(&mut self, old: &Bytes, new: Bytes) {
        let more = self.more.iter_mut().flat_map(|more| &mut more.data);
        let is_old = |entry: &&mut Entry| {
            (entry.frame.as_ptr(), entry.frame.len()) == (old.as_ptr(), old.len())
        };
        let Some(entry) = self.first.iter_mut().chain(more).find(is_old) else { return };
        if entry.tag.is_cut() {
            return;
        }
        let (after, is_reply) = (new.len(), entry.tag.is_reply());
        entry.frame = new;
        self.remove(old.len(), is_reply);
        self.add(after, is_reply);
    }

    /// Drops all frames but one that is partly written, so that a close frame can follow at once. Returns the number
    /// of lost messages.
    pub fn discard(&mut self) -> usize {
        let before = self.messages();
        let cut = self.cut();
        let data = self.first.take().filter(|_| cut == Some(Lane::Data));
        let control = self.take_control().filter(|_| cut == Some(Lane::Control));
        *self = Self::EMPTY;
        if let Some(entry) = data {
            self.add(entry.frame.len() + FRAME_OVERHEAD, entry.tag.is_reply());
            self.first = Some(entry);
        }
        if let Some(frame) = control {
            self.push_control(frame);
            self.set_cut(Lane::Control, true);
        }
        before - self.messages()
    }

    /// Drops all frames. Returns the number of lost messages.
    pub fn clear(&mut self) -> usize {
        let lost = self.messages();
        *self = Self::EMPTY;
        lost
    }

    /// Returns the number of waiting bytes, with [`FRAME_OVERHEAD`] for each frame.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// Returns the share of [`Self::bytes`] that the client's own messages caused.
    #[must_use]
    pub const fn reply_bytes(&self) -> usize {
        self.reply_bytes as usize
    }

    /// Returns the share of [`Self::bytes`] that [`Self::discard`] would free.
    #[must_use]
    pub fn untouched_bytes(&self) -> usize {
        let cut = match self.cut() {
            None => return self.bytes(),
            Some(Lane::Data) => self.first.as_ref().map(|entry| &entry.frame),
            Some(Lane::Control) => self.more.as_ref().and_then(|more| more.control.front()),
        };
        self.bytes() - cut.map_or(0, |frame| frame.len() + FRAME_OVERHEAD)
    }

    /// Returns whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Returns the number of waiting control frames.
    #[must_use]
    pub fn control_frames(&self) -> usize {
        self.more.as_ref().map_or(0, |more| more.control.len())
    }

    /// Returns the waiting data frame, where there is no other frame. Most rounds leave just one.
    #[must_use]
    pub fn only(&self) -> Option<&[u8]> {
        match (&self.first, &self.more) {
            (Some(entry), None) => Some(&entry.frame),
            _ => None,
        }
    }

    /// Fills `slices` with the frames to write next, in their order. Returns the number of filled slices.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let (cut, first) = match self.cut() {
            Some(Lane::Data) => (&self.first, &None),
            _ => (&None, &self.first),
        };
        let control = self.more.iter().flat_map(|more| &more.control);
        let data = self.more.iter().flat_map(|more| &more.data);
        let frames = cut.iter().map(|entry| &entry.frame).chain(control);
        let data = first.iter().chain(data).map(|entry| &entry.frame);
        // A frame that a newer one made needless is empty.
        let frames = frames.chain(data.filter(|frame| !frame.is_empty()));
        let mut filled = 0;
        for (slice, frame) in slices.iter_mut().zip(frames) {
            *slice = IoSlice::new(frame);
            filled += 1;
        }
        filled
    }

    /// Removes the first `count` bytes of the slices that [`Self::fill`] filled.
    pub fn advance(&mut self, mut count: usize) -> Written {
        let mut written = Written { bytes: count, ..Written::default() };
        while count > 0 {
            let lane = self.cut().unwrap_or_else(|| match self.control_frames() {
                0 => Lane::Data,
                _ => Lane::Control,
            });
            let Some((frame, tag)) = self.front(lane) else { break };
            let taken = count.min(frame.len());
            let is_whole = taken == frame.len();
            frame.advance(taken);
            count -= taken;
            self.remove(taken, tag.is_reply());
            self.set_cut(lane, !is_whole);
            if is_whole {
                self.remove(FRAME_OVERHEAD, tag.is_reply());
                self.pop(lane);
                written.messages += u32::from(tag.is_message());
                if tag.is_timed() {
                    if written.timed == 0 {
                        written.oldest = tag.since();
                    }
                    written.timed += 1;
                }
            }
        }
        written
    }

    /// Returns the lane whose first frame is partly written. The rest of that frame comes before any other.
    fn cut(&self) -> Option<Lane> {
        if self.first.as_ref().is_some_and(|entry| entry.tag.is_cut()) {
            return Some(Lane::Data);
        }
        self.more.as_ref().filter(|more| more.control_is_cut).map(|_| Lane::Control)
    }

    fn set_cut(&mut self, lane: Lane, cut: bool) {
        match (lane, &mut self.first, &mut self.more) {
            (Lane::Data, Some(entry), _) => entry.tag.set_cut(cut),
            (Lane::Control, _, Some(more)) => more.control_is_cut = cut,
            _ => {}
        }
    }

    /// Returns the first frame of a lane.
    fn front(&mut self, lane: Lane) -> Option<(&mut Bytes, Tag)> {
        match lane {
            Lane::Data => self.first.as_mut().map(|entry| (&mut entry.frame, entry.tag)),
            Lane::Control => {
                let frame = self.more.as_mut()?.control.front_mut()?;
                Some((frame, Tag::new(Micros::NEVER, true)))
            }
        }
    }

    /// Drops the first frame of a lane that has one.
    fn pop(&mut self, lane: Lane) {
        let Some(more) = &mut self.more else {
            // A control frame would be in there.
            self.first = None;
            return;
        };
        match lane {
            Lane::Data => self.first = more.next_data(),
            Lane::Control => drop(more.control.pop_front()),
        }
        if more.data.is_empty() {
            if self.first.is_none() {
                more.keys = None;
            }
            if more.control.is_empty() && more.keys.is_none() {
                self.more = None;
                return;
            }
        }
        if more.data.capacity() > 64 && more.data.len() < more.data.capacity() / 4 {
            more.data.shrink_to(more.data.len() * 2);
        }
    }

    fn take_control(&mut self) -> Option<Bytes> {
        self.more.as_mut()?.control.pop_front()
    }

    fn messages(&self) -> usize {
        let data = self.more.iter().flat_map(|more| &more.data);
        self.first.iter().chain(data).filter(|entry| entry.tag.is_message()).count()
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

impl Tag {
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

    /// Returns whether the frame was not pushed with [`Micros::NEVER`].
    const fn is_message(self) -> bool {
        self.0 >> 2 != Micros::NEVER.0 << 2 >> 2
    }

    /// Returns whether the message came from the bus, and not from the gateway itself.
    const fn is_timed(self) -> bool {
        !self.is_reply() && self.is_message() && self.0 >> 2 != Micros::UNTIMED.0 << 2 >> 2
    }
}

/// Most frames handed to one vectored write.
pub const SLICES_MAX: usize = 64;

/// Cost of a waiting frame beside its bytes: its place in a lane, which grows by doubling. Without this cost a bound
/// in bytes would allow twenty times as much memory for tiny messages.
pub const FRAME_OVERHEAD: usize = 64;

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
    fn control_overtakes_data_but_no_cut_frame() {
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
    fn cut_control_frame_is_not_counted_as_a_message() {
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
    fn discard_keeps_a_cut_control_frame() {
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
    fn close_frame_in_data_lane_is_not_lost() {
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
    fn frame_is_replaced_unless_it_is_partly_written() {
        let mut outbox = Outbox::default();
        let [first, second] = [frame("aaaa"), frame("bbbb")];
        outbox.push(first.clone(), Micros(1), true);
        outbox.push(second.clone(), Micros(2), false);
        outbox.replace(&second, frame("b"));
        outbox.replace(&second, frame("never there"));
        assert_eq!((shown(&outbox).as_str(), outbox.bytes()), ("aaaab", 5 + 2 * FRAME_OVERHEAD));
        assert_eq!(outbox.reply_bytes(), 4 + FRAME_OVERHEAD);
        outbox.advance(1);
        outbox.replace(&first.slice(1..), frame("x"));
        assert_eq!(shown(&outbox), "aaab");
        outbox.advance(4);
        assert!(outbox.is_empty() && outbox.reply_bytes() == 0);
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
    fn partial_writes_keep_order_and_counts() {
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
