//! Fence of one client: joins the entries that the client missed with the messages that come meanwhile, each once, in
//! order.

use crate::history::{Lost, Position};

/// Gate of one client that reads logs behind its position while their channels are subscribed.
///
/// Live messages wait, up to `bytes_max`, until the fence is released. From then on the fence lets those through that
/// were not read. It can be thrown away once it [is passed](Self::is_passed).
///
/// ```
/// use wsproxy_proto::history::{Fence, Position, fence::Released};
///
/// let at = |sequence| Position { milliseconds: 1, sequence, tag: 7 };
/// let mut fence = Fence::new(1000);
/// // Two live messages come while the log is read up to the first of them.
/// for sequence in [1, 2] {
///     let ids = Some((at(sequence), at(sequence - 1)));
///     assert!(!fence.offer(ids, || (sequence, 10)));
/// }
/// let released = fence.release_or_restart(&[at(1)], |_| true);
/// assert!(matches!(released, Released::Open(live) if live == [2]));
/// ```
#[derive(Debug)]
pub struct Fence<M> {
    bytes_max: usize,
    state: State<M>,
}

/// Position of a message, and of the one before it.
pub type EntryIds = (Position, Position);

/// Result of [`Fence::release_or_restart`].
#[derive(Debug)]
pub enum Released<M> {
    /// The fence is open. The live messages that waited, and are not among the read entries, are to be delivered
    /// after the read entries.
    Open(Vec<M>),
    /// The fence is empty and holds live messages again. The logs are to be read again. With a reason the client
    /// is to be told that its history is lost, and the new reading begins at the end of its logs.
    ReadAgain(Option<Lost>),
}

#[derive(Debug)]
enum State<M> {
    Holding { held: Vec<(Option<EntryIds>, M)>, bytes: usize },
    Lost(Lost),
    Open { seen: Position },
}

impl<M> Fence<M> {
    /// Creates a closed fence with room for `bytes_max`.
    #[must_use]
    pub const fn new(bytes_max: usize) -> Self {
        Self { bytes_max, state: State::Holding { held: Vec::new(), bytes: 0 } }
    }

    /// Creates an open fence of a client that has all messages up to `seen`.
    #[must_use]
    pub const fn opened(seen: Position) -> Self {
        Self { bytes_max: 0, state: State::Open { seen } }
    }

    /// Offers a live message, which has ids where it belongs to a history. Returns `true` where it is to be delivered
    /// now. Where it has to wait, `message` makes the form that is kept, with its number of bytes.
    pub fn offer(&mut self, ids: Option<EntryIds>, message: impl FnOnce() -> (M, usize)) -> bool {
        match &mut self.state {
            State::Holding { held, bytes: waiting } => {
                let (message, bytes) = message();
                *waiting += bytes + MESSAGE_BYTES;
                if *waiting > self.bytes_max {
                    self.state = State::Lost(Lost::Overflow);
                } else {
                    held.push((ids, message));
                }
                false
            }
            State::Lost(_) => false,
            State::Open { seen } => ids.is_none_or(|(id, _)| seen.is_before(id)),
        }
    }

    /// Returns whether the fence is open. Then the client is at the reader's position, or further. It needs no
    /// message that comes twice: it has that, or a rollback has undone it.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// Notes that the history of one of the client's logs is lost; a client that has seen all is at `position`.
    /// Returns `true` where the client is to be told now. A closed fence tells when it is released.
    pub fn lose(&mut self, lost: Lost, position: Position) -> bool {
        // If the store was rolled back, the log may go on with lower ids than were seen.
        let is_open = self.is_open();
        self.state = if is_open { State::Open { seen: position } } else { State::Lost(lost) };
        is_open
    }

    /// Opens the fence of a client that gets its logs as they were read, up to their `heads`. `fits` says whether
    /// the client has room for the read entries together with the live messages that waited.
    ///
    /// The fence starts anew, and the logs are to be read again, in three cases. A history was lost, or more live
    /// messages came than can wait: the client is told why. The client has no room: it is told of an overflow.
    /// Live messages do not follow the read entries: both are of different lives of a log, and the client is told
    /// nothing, since the next reading shows which life goes on.
    ///
    /// Messages that are dropped here are in what is read next, or are of a life of a log that has ended.
    pub fn release_or_restart(
        &mut self,
        heads: &[Position],
        fits: impl FnOnce(&[M]) -> bool,
    ) -> Released<M> {
        let lost = match self.release(heads) {
            Ok(waited) if fits(&waited) => return Released::Open(waited),
            Ok(_) => Some(Lost::Overflow),
            Err(lost) => lost,
        };
        *self = Self::new(self.bytes_max);
        Released::ReadAgain(lost)
    }

    /// # Errors
    /// The reason where a history was lost; `None` where the messages that waited do not follow `heads`.
    fn release(&mut self, heads: &[Position]) -> Result<Vec<M>, Option<Lost>> {
        let mut ends = heads.to_vec();
        let seen = heads.iter().copied().fold(Position::START, Position::later);
        let mut waited = Vec::new();
        match &mut self.state {
            State::Lost(lost) => return Err(Some(*lost)),
            State::Open { .. } => {}
            State::Holding { held, .. } => {
                // An entry that was read from a log may come over its channel too.
                let mut is_new = Vec::with_capacity(held.len());
                for (ids, _) in held.iter() {
                    let Some((id, prev)) = ids else {
                        is_new.push(true);
                        continue;
                    };
                    match ends.iter().position(|end| end == prev) {
                        _ if heads.contains(id) || id.is_before(seen) => is_new.push(false),
                        Some(end) => {
                            ends[end] = *id;
                            is_new.push(true);
                        }
                        // The message is a copy of one that waits already.
                        None if ends.contains(id) => is_new.push(false),
                        None => return Err(None),
                    }
                }
                let held = std::mem::take(held).into_iter().zip(is_new);
                waited = held.filter_map(|((_, message), new)| new.then_some(message)).collect();
            }
        }
        self.state = State::Open { seen };
        Ok(waited)
    }

    /// Returns whether the fence is of no more use to the messages of a log, after the message with this id was
    /// offered.
    ///
    /// The reader's position does not count: it may be ahead of the delivered messages.
    #[must_use]
    pub fn is_passed(&self, id: Position) -> bool {
        matches!(self.state, State::Open { seen } if !id.is_before(seen))
    }
}

/// Rough cost of a waiting message beside its bytes.
const MESSAGE_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(sequence: u64) -> Position {
        Position { milliseconds: 1, sequence, tag: 7 }
    }

    fn hold(fence: &mut Fence<u64>, id: u64) -> bool {
        fence.offer(Some((at(id), at(id - 1))), || (id, 100))
    }

    #[test]
    fn opens_with_what_was_not_read() {
        let mut fence = Fence::new(1000);
        assert!([1, 2, 3].iter().all(|id| !hold(&mut fence, *id)));
        let released = fence.release_or_restart(&[at(2)], |held| held == [3]);
        assert!(matches!(released, Released::Open(held) if held == [3]));
        assert!(fence.is_open() && hold(&mut fence, 4) && !hold(&mut fence, 2));
    }

    #[test]
    fn overflow_is_told_and_holds_anew() {
        let mut fence = Fence::new(1000);
        (1..=20).for_each(|id| assert!(!hold(&mut fence, id)));
        let released = fence.release_or_restart(&[at(2)], |_| true);
        assert!(matches!(released, Released::ReadAgain(Some(Lost::Overflow))));
        assert!(!fence.is_open() && !hold(&mut fence, 21));
        let released = fence.release_or_restart(&[at(20)], |_| true);
        assert!(matches!(released, Released::Open(held) if held == [21]));
    }

    #[test]
    fn client_without_room_reads_again() {
        let mut fence = Fence::new(1000);
        hold(&mut fence, 3);
        let released = fence.release_or_restart(&[at(2)], |_| false);
        assert!(matches!(released, Released::ReadAgain(Some(Lost::Overflow))));
        assert!(!fence.is_open());
    }

    #[test]
    fn gap_between_read_and_live_is_read_again() {
        let mut fence = Fence::new(1000);
        hold(&mut fence, 5);
        assert!(matches!(fence.release_or_restart(&[at(2)], |_| true), Released::ReadAgain(None)));
        assert!(!fence.is_open());
    }
}
