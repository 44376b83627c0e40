//! Order in which streams get their turns at the writer; knows no frames.

use std::collections::VecDeque;

/// Streams that have something to write, in two lists (fq_codel's rule).
///
/// A stream that has something to write and is in no list joins the new ones. These go first, so heads, small answers
/// and keystrokes pass bulk. After its turn, a stream goes to the tail of the old ones, even if it is empty: so it
/// cannot be new again before all old ones had their turns. A stream leaves when its turn as an old one finds it empty.
///
/// Bound: each stream of the lane is at most once in one list.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    new: VecDeque<u32>,
    old: VecDeque<u32>,
}

/// List in which a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum List {
    #[default]
    None,
    New,
    Old,
}

impl Schedule {
    /// Takes in a stream that has something to write, if it is in no list.
    pub(crate) fn join(&mut self, stream: u32, list: &mut List) {
        if *list == List::None {
            *list = List::New;
            self.new.push_back(stream);
        }
    }

    /// Returns the stream whose turn it is.
    pub(crate) fn first(&self) -> Option<u32> {
        self.new.front().or_else(|| self.old.front()).copied()
    }

    /// Ends the turn of the first stream.
    pub(crate) fn end_turn(&mut self, list: &mut List, is_empty: bool) {
        let first = if *list == List::New { self.new.pop_front() } else { self.old.pop_front() };
        let is_leaving = is_empty && *list == List::Old;
        *list = if is_leaving { List::None } else { List::Old };
        self.old.extend(first.filter(|_| !is_leaving));
    }

    /// Takes out a stream that has ended.
    pub(crate) fn remove(&mut self, stream: u32, list: List) {
        match list {
            List::None => {}
            List::New => self.new.retain(|other| *other != stream),
            List::Old => self.old.retain(|other| *other != stream),
        }
    }

    /// Takes out all streams.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Frames that each stream has, and the streams in the order in which they wrote.
    #[derive(Default)]
    struct Lane {
        schedule: Schedule,
        frames: HashMap<u32, (usize, List)>,
    }

    impl Lane {
        fn put(&mut self, stream: u32, frames: usize) {
            let (waiting, list) = self.frames.entry(stream).or_default();
            *waiting += frames;
            self.schedule.join(stream, list);
        }

        fn write(&mut self, most: usize) -> Vec<u32> {
            let mut written = Vec::new();
            while let Some(stream) = self.schedule.first() {
                let (waiting, list) = self.frames.get_mut(&stream).unwrap();
                if *waiting > 0 && written.len() == most {
                    break;
                }
                let is_empty = *waiting == 0;
                if !is_empty {
                    *waiting -= 1;
                    written.push(stream);
                }
                self.schedule.end_turn(list, is_empty);
            }
            written
        }
    }

    #[test]
    fn small_streams_pass_bulk_and_bulk_takes_turns() {
        let mut lane = Lane::default();
        lane.put(1, 9);
        lane.put(3, 9);
        assert_eq!(lane.write(4), [1, 3, 1, 3]);
        lane.put(5, 1);
        assert_eq!(lane.write(3), [5, 1, 3]);
        // A stream that was new a moment ago waits for the old ones.
        lane.put(5, 1);
        assert_eq!(lane.write(3), [5, 1, 3]);
        assert_eq!(lane.write(2), [1, 3]);
        lane.put(5, 2);
        assert_eq!(lane.write(4), [5, 1, 3, 5]);
    }

    #[test]
    fn streams_that_are_new_again_and_again_do_not_stop_old_ones() {
        let mut lane = Lane::default();
        lane.put(1, 9);
        lane.write(1);
        let mut written = Vec::new();
        for _ in 0..8 {
            lane.put(3, 1);
            lane.put(5, 1);
            written.extend(lane.write(1));
        }
        assert!(written.iter().filter(|stream| **stream == 1).count() >= 2, "{written:?}");
    }

    #[test]
    fn a_new_stream_that_is_found_empty_becomes_an_old_one() {
        let (mut schedule, mut list) = (Schedule::default(), List::None);
        schedule.join(1, &mut list);
        for expected in [List::Old, List::None] {
            assert_eq!(schedule.first(), Some(1));
            schedule.end_turn(&mut list, true);
            assert_eq!(list, expected);
        }
        assert_eq!(schedule.first(), None);
    }

    #[test]
    fn a_stream_that_ended_has_no_turn() {
        let mut lane = Lane::default();
        [1, 3, 5].into_iter().for_each(|stream| lane.put(stream, 2));
        lane.write(1);
        lane.schedule.remove(1, List::Old);
        lane.schedule.remove(3, List::New);
        assert_eq!(lane.write(9), [5, 5]);
        assert_eq!(lane.schedule.first(), None);
        lane.schedule.clear();
    }
}
