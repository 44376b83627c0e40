//! Reader of one log on one instance: its position, and the messages that wait while a hole is filled.

use crate::history::{Log, Lost, Position, rule};

/// Reader of one log on one instance, for all its clients there.
///
/// `M` is a message in the form that the caller needs.
#[derive(Debug)]
pub struct Reader<M> {
    /// Position up to which all was delivered; `None` where the reader has not begun.
    position: Option<Position>,
    /// Position at which the reader began. All messages behind it were offered to every fence.
    began: Position,
    /// Positions ahead of the reader up to which clients have read by themselves: the channel, or the log, must bring
    /// each of these entries. They are as many as the messages on their way, at most, and nearly always none.
    ahead: Box<[Position]>,
    /// Latest position behind the reader up to which a client has read by itself. It may be of another life.
    doubted: Position,
    /// Start of the life of the log in which the reader is, where that is known.
    life: Option<Position>,
    hole: Option<Box<Hole<M>>>,
}

/// Hole: messages behind the position may be missing.
#[derive(Debug)]
struct Hole<M> {
    /// Live messages behind the hole.
    held: Vec<Live<M>>,
    held_bytes: usize,
    /// Some of them were thrown away, so the log has to be read again.
    overflowed: bool,
    /// A reading of the log has begun since the hole was opened.
    is_read: bool,
}

/// Message that came over the channel and waits.
#[derive(Debug)]
struct Live<M> {
    id: Position,
    prev: Position,
    latest_ms: u64,
    bytes: usize,
    message: M,
}

/// Decision about a live message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All clients get the message.
    Deliver,
    /// Clients behind a [closed fence](crate::history::Fence::is_open) may need the message. All others have it.
    Duplicate,
    /// The message waits until the hole before it is filled.
    Held,
    /// The message shows a hole: the log has to be read, and this message with it.
    Hole,
}

impl<M> Default for Reader<M> {
    fn default() -> Self {
        let (began, doubted) = (Position::START, Position::START);
        Self { position: None, began, ahead: Box::default(), doubted, life: None, hole: None }
    }
}

impl<M> Reader<M> {
    /// Lets a client continue behind `at`, where its snapshot of the log has ended. A reader that has not begun
    /// begins there.
    ///
    /// Returns `false` where the reader began later. The messages between do not wait for this client, so it has to
    /// read the log again.
    #[must_use]
    pub fn begin(&mut self, at: Position) -> bool {
        if self.position.is_none() {
            (self.position, self.began, self.life) = (Some(at), at, life_of(at));
            // Messages up to there may still be on their way, in another life with the same ids.
            self.doubted = at;
            return true;
        }
        if self.is_behind(at) {
            if !self.ahead.contains(&at) {
                self.ahead = [&*self.ahead, &[at]].concat().into();
            }
        } else if self.position != Some(at) {
            self.doubted = self.doubted.later(at);
        }
        self.began == at || self.began.is_before(at)
    }

    /// Returns whether all messages from now on are behind `at`. A client at `at` needs no fence any more.
    #[must_use]
    pub fn has_passed(&self, at: Position) -> bool {
        self.position.is_some_and(|position| !position.is_before(at))
    }

    /// Returns the position of the reader.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        self.position
    }

    /// Judges a message that came over the bus while the store's clock showed `latest_ms` at most. Where the message
    /// has to wait, `message` makes the form that is kept, with its number of bytes.
    pub fn accept(
        &mut self,
        id: Position,
        prev: Position,
        latest_ms: u64,
        message: impl FnOnce() -> (M, usize),
    ) -> Verdict {
        if let Some(hole) = &mut self.hole {
            let (message, bytes) = message();
            hole.hold(Live { id, prev, latest_ms, bytes, message });
            return Verdict::Held;
        }
        match rule::step(self.position, id, prev, latest_ms) {
            // The bus lost no message, so the first entry of another life is the next message, although its id may be
            // lower. A client may have read it by itself before this reader was there.
            rule::Step::Gap if self.begins_another_life(id, prev, latest_ms) => {
                self.begin_anew(id, prev);
                self.life = Some(id);
                Verdict::Deliver
            }
            // Entries that a client has read by itself must come over the channel too, unless they are of another
            // life.
            rule::Step::Next if self.passes_ahead(id) => {
                self.interrupt();
                Verdict::Hole
            }
            rule::Step::Next => {
                if self.position.is_none() {
                    self.began = prev;
                }
                self.move_to(id);
                if prev.is_beginning() {
                    self.life = Some(if prev == Position::START { id } else { prev });
                }
                Verdict::Deliver
            }
            rule::Step::Duplicate => Verdict::Duplicate,
            rule::Step::Gap => {
                // The message is in the log, or never will be. If it were kept, it could only open the same hole
                // again.
                self.interrupt();
                Verdict::Hole
            }
        }
    }

    fn begins_another_life(&self, id: Position, prev: Position, latest_ms: u64) -> bool {
        let is_plausible = id.milliseconds <= latest_ms && !id.is_beginning();
        let is_another = prev == Position::START && self.life.is_some_and(|life| life != id);
        is_plausible && is_another && !self.may_be_read(id)
    }

    /// Returns whether a client whose snapshot ended behind the reader may have read this message of another life by
    /// itself: then only the log can tell who misses what.
    fn may_be_read(&self, id: Position) -> bool {
        !self.doubted.is_before(id)
    }

    fn passes_ahead(&self, id: Position) -> bool {
        self.ahead.iter().any(|ahead| !id.is_before(*ahead) && id != *ahead)
    }

    fn is_behind(&self, at: Position) -> bool {
        self.position.is_some_and(|position| position.is_before(at))
    }

    fn move_to(&mut self, position: Position) {
        self.position = Some(position);
        if !self.ahead.is_empty() {
            let still = self.ahead.iter().filter(|ahead| position.is_before(**ahead));
            self.ahead = still.copied().collect();
        }
    }

    /// Goes on at a position of another life, behind `began`.
    fn begin_anew(&mut self, position: Position, began: Position) {
        (self.position, self.began) = (Some(position), began);
        (self.ahead, self.doubted) = (Box::default(), Position::START);
    }

    /// Opens a hole: until the log was read, something may be missing behind the position. What waits is thrown
    /// away. Where a reading of the log has begun already it may not hold that, so another one has to follow.
    ///
    /// A reader that has not begun has no hole: its clients begin with a later snapshot.
    pub fn interrupt(&mut self) {
        if self.position.is_some() {
            self.hole = Some(Box::default());
        }
    }

    /// Begins a reading of the log: returns the position behind which it has to be read; `None` where there is no hole.
    /// Only a reading that has begun since the hole was opened can show that nothing is missing.
    pub fn begin_reading(&mut self) -> Option<Position> {
        self.hole.as_mut()?.is_read = true;
        self.position
    }

    /// Returns the position behind which the log has to be read; `None` where there is no hole. A reader that has not
    /// begun has none.
    #[must_use]
    pub fn hole(&self) -> Option<Position> {
        self.hole.as_ref().and(self.position)
    }

    /// Returns whether there is a hole.
    #[must_use]
    pub const fn has_hole(&self) -> bool {
        self.hole.is_some()
    }

    /// Begins to fill the hole behind `from` with what was read of the log, judged by [`rule::heal`]. The entries are
    /// to be delivered where the answer is `Ok`, each with [`Self::advance`]. Live messages still wait meanwhile.
    ///
    /// `None` where the hole is not the one for which the log was read.
    ///
    /// # Errors
    /// The history cannot be continued. Clients are to be told why, and at which position they are then.
    pub fn begin_fill(
        &mut self,
        from: Position,
        judged: Result<(), Lost>,
        log: &Log,
    ) -> Option<Result<(), (Lost, Position)>> {
        if self.hole() != Some(from) {
            return None;
        }
        let judged = self.judge(from, judged, log);
        Some(judged.map_err(|lost| {
            let position = log.position();
            self.begin_anew(position, position);
            self.life = life_of(position);
            (lost, position)
        }))
    }

    /// Moves the position from `from` to an entry of the log that is delivered now. `false` where the entry must not be
    /// delivered: the hole is closed, or another one.
    #[must_use]
    pub fn advance(&mut self, from: Position, to: Position) -> bool {
        let follows = self.hole() == Some(from);
        if follows {
            self.move_to(to);
        }
        follows
    }

    /// Whether nothing is missing where all entries up to `at` were delivered of a log that ended at `head` when it
    /// was read: then the hole can be [closed](Self::close).
    ///
    /// Logs with one order must be filled together. Otherwise a client gets a later message of one log before an
    /// earlier message of another, and its last event id no longer stands for all that it has.
    #[must_use]
    pub fn joins(&self, at: Position, head: Option<Position>) -> bool {
        let is_sure = |hole: &&Hole<M>| hole.is_read && !hole.overflowed;
        let Some(hole) = self.hole.as_deref().filter(is_sure) else { return false };
        if self.position != Some(at) || !self.ahead.is_empty() {
            return false;
        }
        let mut position = at;
        for live in &hole.held {
            match rule::step(Some(position), live.id, live.prev, live.latest_ms) {
                rule::Step::Next => position = live.id,
                rule::Step::Duplicate => {}
                rule::Step::Gap => return false,
            }
        }
        head.is_none_or(|head| !position.is_before(head))
    }

    /// Closes the hole, and gives the live messages that waited: to all clients, or (`false`) only to clients that came
    /// meanwhile. To be called where [`Self::joins`] says so.
    pub fn close(&mut self) -> Vec<(Position, M, bool)> {
        let (Some(hole), Some(mut position)) = (self.hole.take(), self.position) else {
            return Vec::new();
        };
        let mut waited = Vec::with_capacity(hole.held.len());
        for live in hole.held {
            let step = rule::step(Some(position), live.id, live.prev, live.latest_ms);
            let is_new = step == rule::Step::Next;
            if is_new {
                position = live.id;
            }
            waited.push((live.id, live.message, is_new));
        }
        self.move_to(position);
        waited
    }

    /// Throws away what waits, since the log is to be read again: what waits is in the log by now.
    pub fn read_again(&mut self) {
        if let Some(hole) = &mut self.hole {
            **hole = Hole::default();
        }
    }

    /// Number of live messages that wait, and their bytes.
    #[must_use]
    pub fn held(&self) -> (usize, usize) {
        self.hole.as_ref().map_or((0, 0), |hole| (hole.held.len(), hole.held_bytes))
    }

    /// Returns whether the log still has the entries that a client has read by itself, if only behind a
    /// [cut](Log::cut).
    fn judge(&self, from: Position, judged: Result<(), Lost>, log: &Log) -> Result<(), Lost> {
        let end = log.entries.last().map_or(from, |entry| entry.id);
        let is_held = |ahead: &Position| {
            log.entries.iter().any(|entry| entry.id == *ahead)
                || (end.is_before(*ahead) && log.head.is_some_and(|head| !head.is_before(*ahead)))
        };
        if !self.ahead.iter().all(is_held) {
            return judged.and(Err(Lost::Unknown));
        }
        judged
    }
}

/// The life of a log that is at its beginning began there.
fn life_of(at: Position) -> Option<Position> {
    at.is_beginning().then_some(at)
}

impl<M> Default for Hole<M> {
    fn default() -> Self {
        Self { held: Vec::new(), held_bytes: 0, overflowed: false, is_read: false }
    }
}

impl<M> Hole<M> {
    fn hold(&mut self, live: Live<M>) {
        self.held_bytes += live.bytes;
        if self.held.len() >= HELD_MAX || self.held_bytes > HELD_BYTES_MAX {
            self.overflowed = true;
            self.held = Vec::new();
        }
        if !self.overflowed {
            self.held.push(live);
        }
    }
}

/// Upper bound of the messages that wait while a hole is filled. Further ones are read from the log.
const HELD_MAX: usize = 20_000;

/// Upper bound of the bytes of these messages.
const HELD_BYTES_MAX: usize = 8 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(sequence: u64) -> Position {
        Position { milliseconds: 9, sequence, tag: 7 }
    }

    fn accept(reader: &mut Reader<u64>, id: u64) -> Verdict {
        reader.accept(at(id), at(id - 1), u64::MAX, || (id, 1))
    }

    #[test]
    fn live_messages_wait_while_entries_are_delivered() {
        let mut reader = Reader::default();
        assert!(reader.begin(at(1)));
        reader.interrupt();
        assert_eq!(reader.begin_reading(), Some(at(1)));
        let log = Log { head: Some(at(4)), ..Log::default() };
        assert_eq!(reader.begin_fill(at(1), Ok(()), &log), Some(Ok(())));
        assert!(reader.advance(at(1), at(2)) && !reader.advance(at(1), at(2)));
        assert_eq!([4, 5].map(|id| accept(&mut reader, id)), [Verdict::Held; 2]);
        assert!(!reader.joins(at(2), log.head), "3 is missing");
        assert!(reader.advance(at(2), at(3)) && reader.joins(at(3), log.head));
        assert_eq!(reader.close(), [(at(4), 4, true), (at(5), 5, true)]);
        assert_eq!(accept(&mut reader, 6), Verdict::Deliver);
    }

    #[test]
    fn another_life_that_a_client_has_read_is_a_hole() {
        let first = |tag| Position { milliseconds: 9, sequence: 1, tag };
        let reader = || {
            let mut reader = Reader::default();
            let verdict = reader.accept(at(1), Position::START, u64::MAX, || (1, 1));
            assert_eq!(verdict, Verdict::Deliver);
            reader
        };
        let begin_anew = |mut reader: Reader<u64>| {
            let verdict = reader.accept(first(8), Position::START, u64::MAX, || (8, 1));
            (verdict, reader.has_hole())
        };
        assert_eq!(begin_anew(reader()), (Verdict::Deliver, false));
        let mut same = reader();
        assert!(same.begin(at(1)));
        assert_eq!(begin_anew(same), (Verdict::Deliver, false));
        let mut read = reader();
        assert!(read.begin(first(8)));
        assert_eq!(
            accept(&mut read, 2),
            Verdict::Deliver,
            "the rest of the former life comes first"
        );
        assert_eq!(begin_anew(read), (Verdict::Hole, true));
    }

    #[test]
    fn interruption_while_a_log_is_read_needs_another_reading() {
        let mut reader = Reader::default();
        assert!(reader.begin(at(1)));
        reader.interrupt();
        assert_eq!(reader.begin_reading(), Some(at(1)));
        // The log ends at 1 when it is read; then 2 comes, and waits.
        let log = Log { head: Some(at(1)), ..Log::default() };
        assert_eq!(accept(&mut reader, 2), Verdict::Held);
        reader.interrupt();
        assert_eq!(reader.begin_fill(at(1), Ok(()), &log), Some(Ok(())));
        assert!(!reader.joins(at(1), log.head), "2 was thrown away, and is not in what was read");
        reader.read_again();
        assert!(!reader.joins(at(1), log.head), "it was not read again");
        assert_eq!(reader.begin_reading(), Some(at(1)));
        assert!(reader.joins(at(1), log.head));
    }

    #[test]
    fn hole_is_not_closed_by_an_earlier_reading() {
        // A log that ends at 1 is read for a reader that is given up meanwhile. Its successor begins at 1 too.
        let log = Log { head: Some(at(1)), ..Log::default() };
        let mut reader = Reader::default();
        assert!(reader.begin(at(1)));
        assert_eq!(accept(&mut reader, 3), Verdict::Hole);
        assert_eq!(reader.begin_fill(at(1), Ok(()), &log), Some(Ok(())));
        assert!(!reader.joins(at(1), log.head), "2 and 3 are in the log by now");
    }
}
