//! The keys of waiting data frames: a newer frame with the same key replaces the older one.

use std::collections::HashMap;

use bytes::Bytes;

use crate::{
    clock::Micros,
    outbox::{Entry, FRAME_OVERHEAD, Lane, More, Outbox, Tag},
};

/// Numbers of the data frames that have a key, by key.
///
/// Frames are numbered in the order in which they were pushed. A dropped frame leaves an empty frame in its place, so
/// that the numbers of the others stay. When half of the lane is empty frames, all of these are removed.
#[derive(Debug, Default)]
pub(super) struct Keys {
    numbers: HashMap<u64, u64>,
    /// Number of [`Outbox::first`].
    first: u64,
    /// Empty frames in the lane.
    empty: usize,
}

impl Outbox {
    /// Drops the data frame with this key, if it waits and no byte of it is written.
    pub fn take_keyed(&mut self, key: u64) -> bool {
        let is_cut = self.cut() == Some(Lane::Data);
        let Some(more) = &mut self.more else { return false };
        let Some(keys) = &mut more.keys else { return false };
        let Some(number) = keys.numbers.remove(&key) else { return false };
        let Some(at) = number.checked_sub(keys.first) else { return false };
        let (bytes, is_reply) = if at == 0 {
            let Some(entry) = self.first.as_ref().filter(|_| !is_cut) else { return false };
            (entry.frame.len(), entry.tag.is_reply())
        } else {
            let Some(entry) = more.data.get_mut(at as usize - 1) else { return false };
            let dropped = std::mem::replace(entry, Entry::EMPTY);
            keys.empty += 1;
            (dropped.frame.len(), dropped.tag.is_reply())
        };
        self.remove(bytes + FRAME_OVERHEAD, is_reply);
        if at == 0 {
            self.pop(Lane::Data);
        } else if let Some(more) = &mut self.more {
            more.compact();
        }
        true
    }

    /// Sets the key of the data frame that was pushed last. Does nothing where that frame is written already.
    pub fn name_last(&mut self, key: u64) {
        if self.first.is_none() {
            return;
        }
        let more = self.more.get_or_insert_default();
        let keys = more.keys.get_or_insert_default();
        keys.numbers.insert(key, keys.first + more.data.len() as u64);
        // The keys of written frames are dropped now and then, so that the map stays small.
        if keys.numbers.len() > 2 * more.data.len() + SLACK {
            keys.numbers.retain(|_, number| *number >= keys.first);
        }
    }
}

impl More {
    /// The data frame behind [`Outbox::first`].
    pub(super) fn next_data(&mut self) -> Option<Entry> {
        if self.keys.is_some() { self.next_of_keyed() } else { self.data.pop_front() }
    }

    /// Apart, so that frames without keys do not pay for it.
    #[inline(never)]
    fn next_of_keyed(&mut self) -> Option<Entry> {
        let mut next = self.data.pop_front();
        let Some(keys) = &mut self.keys else { return next };
        keys.first += 1;
        while next.as_ref().is_some_and(|entry| entry.frame.is_empty()) {
            next = self.data.pop_front();
            keys.first += 1;
            keys.empty -= 1;
        }
        next
    }

    /// Removes the empty frames once they are half of the lane, and numbers the others anew.
    fn compact(&mut self) {
        let Some(keys) = &mut self.keys else { return };
        if keys.empty <= self.data.len() / 2 + SLACK {
            return;
        }
        let first = keys.first;
        let mut number = first;
        let count = |entry: &Entry| {
            number += u64::from(!entry.frame.is_empty());
            number
        };
        let numbers: Vec<_> = self.data.iter().map(count).collect();
        keys.numbers.retain(|_, number| *number >= first);
        for number in keys.numbers.values_mut().filter(|number| **number > first) {
            *number = numbers[(*number - first) as usize - 1];
        }
        self.data.retain(|entry| !entry.frame.is_empty());
        keys.empty = 0;
    }
}

impl Entry {
    /// Place of a frame that was dropped; it counts as no message.
    const EMPTY: Self = Self { frame: Bytes::new(), tag: Tag::new(Micros::NEVER, false) };
}

/// Empty frames and old keys up to this number are left alone.
const SLACK: usize = 32;

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use proptest::prelude::*;

    use super::*;
    use crate::outbox::SLICES_MAX;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Push(usize),
        Keyed(u64, usize),
        Control,
        /// The socket takes so many bytes.
        Write(usize),
        Discard,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..6_usize).prop_map(Step::Push),
            12 => (0..6_u64, 1..6_usize).prop_map(|(key, length)| Step::Keyed(key, length)),
            1 => Just(Step::Control),
            4 => (0..12_usize).prop_map(Step::Write),
            1 => Just(Step::Discard),
        ]
    }

    /// A plain queue with the same promise.
    #[derive(Debug, Default)]
    struct Plain {
        control: Vec<Vec<u8>>,
        data: Vec<(Option<u64>, Vec<u8>)>,
        /// Something of the first frame of this lane is written.
        cut: Option<Lane>,
    }

    impl Plain {
        fn push(&mut self, key: Option<u64>, frame: Vec<u8>) {
            let from = usize::from(self.cut == Some(Lane::Data));
            let waiting = self.data.iter().skip(from).position(|(other, _)| *other == key);
            if let (Some(at), true) = (waiting, key.is_some()) {
                self.data.remove(from + at);
            }
            self.data.push((key, frame));
        }

        fn lane(&self) -> Option<Lane> {
            let lane = if self.control.is_empty() { Lane::Data } else { Lane::Control };
            let is_empty = self.control.is_empty() && self.data.is_empty();
            self.cut.or_else(|| (!is_empty).then_some(lane))
        }

        fn write(&mut self, mut count: usize) {
            while let (Some(lane), 1..) = (self.lane(), count) {
                let frame = match lane {
                    Lane::Data => &mut self.data[0].1,
                    Lane::Control => &mut self.control[0],
                };
                let taken = count.min(frame.len());
                frame.drain(..taken);
                count -= taken;
                self.cut = (!frame.is_empty()).then_some(lane);
                match (self.cut, lane) {
                    (Some(_), _) => {}
                    (None, Lane::Data) => drop(self.data.remove(0)),
                    (None, Lane::Control) => drop(self.control.remove(0)),
                }
            }
        }

        fn discard(&mut self) {
            self.data.truncate(usize::from(self.cut == Some(Lane::Data)));
            self.control.truncate(usize::from(self.cut == Some(Lane::Control)));
        }

        fn frames(&self) -> Vec<&[u8]> {
            let mut data: Vec<_> = self.data.iter().map(|(_, frame)| &frame[..]).collect();
            let cut = (self.cut == Some(Lane::Data)).then(|| data.remove(0));
            cut.into_iter().chain(self.control.iter().map(|frame| &frame[..])).chain(data).collect()
        }
    }

    fn check(outbox: &Outbox, plain: &Plain) {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let filled = outbox.fill(&mut slices);
        let frames = plain.frames();
        assert_eq!(filled, frames.len().min(SLICES_MAX));
        for (slice, frame) in slices[..filled].iter().zip(&frames) {
            assert_eq!(&**slice, *frame);
        }
        let bytes: usize = frames.iter().map(|frame| frame.len() + FRAME_OVERHEAD).sum();
        assert_eq!((outbox.bytes(), outbox.is_empty()), (bytes, frames.is_empty()));
        assert!(outbox.only().is_none_or(|only| frames == [only]));
        assert!(!outbox.is_empty() || outbox.more.is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 64,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn keyed_frames_wait_as_in_a_plain_queue(steps in prop::collection::vec(step(), 1..300)) {
            let (mut outbox, mut plain) = (Outbox::default(), Plain::default());
            for (number, step) in steps.into_iter().enumerate() {
                let frame = |length| vec![number as u8; length + 1];
                match step {
                    Step::Push(length) => {
                        plain.push(None, frame(length));
                        outbox.push(frame(length).into(), Micros(1), false);
                    }
                    Step::Keyed(key, length) => {
                        plain.push(Some(key), frame(length));
                        outbox.take_keyed(key);
                        outbox.push(frame(length).into(), Micros(1), false);
                        outbox.name_last(key);
                    }
                    Step::Control => {
                        plain.control.push(frame(1));
                        outbox.push_control(frame(1).into());
                    }
                    Step::Write(count) => {
                        let waiting = plain.frames().iter().map(|frame| frame.len()).sum();
                        plain.write(count.min(waiting));
                        outbox.advance(count.min(waiting));
                    }
                    Step::Discard => {
                        plain.discard();
                        outbox.discard();
                    }
                }
                check(&outbox, &plain);
            }
        }
    }

    #[test]
    fn replaced_frames_leave_no_memory_behind() {
        let mut outbox = Outbox::default();
        outbox.push(Bytes::from_static(b"front"), Micros(1), false);
        for number in 0..100_000_u64 {
            outbox.take_keyed(number % 10);
            outbox.push(Bytes::from(number.to_string()), Micros(1), false);
            outbox.name_last(number % 10);
        }
        let more = outbox.more.as_ref().unwrap();
        assert!(more.data.len() <= 100, "{} places", more.data.len());
        assert_eq!(outbox.messages(), 11);
    }
}
