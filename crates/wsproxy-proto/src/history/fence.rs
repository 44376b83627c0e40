//! Where what a client missed and what comes meanwhile are joined: once, in order.

use crate::history::{Lost, Position};

/// The gate of one client that reads logs behind its position while their channels are subscribed.
///
/// Until it is released live messages wait, at most `bytes_max` of them. From then on it lets through what
/// was not read, and can be thrown away where it [is passed](Self::is_passed).
#[derive(Debug)]
pub struct Fence<M> {
    bytes_max: usize,
    state: State<M>,
}

/// The position of a message, and the one before it.
pub type Ids = (Position, Position);

/// What became of a release.
#[derive(Debug)]
pub enum Released<M> {
    /// It is open. What waited and was not read follows.
    Open(Vec<M>),
    /// What waited does not follow what was read: both are of different lives of a log. The logs are to be read
    /// again, behind a new fence.
    Torn,
    /// Something is missing, as [`Lost::Overflow`] where more came than could wait. It stays closed: the client is
    /// to be told, behind a new fence and with a new reading of its logs.
    Lost(Lost),
}

#[derive(Debug)]
enum State<M> {
    Holding { held: Vec<(Option<Ids>, M)>, bytes: usize },
    Lost(Lost),
    Open { seen: Position },
}

impl<M> Fence<M> {
    /// Closed, with room for so many bytes.
    #[must_use]
    pub const fn new(bytes_max: usize) -> Self {
        Self { bytes_max, state: State::Holding { held: Vec::new(), bytes: 0 } }
    }

    /// Open: the client has everything up to `seen`.
    #[must_use]
    pub const fn opened(seen: Position) -> Self {
        Self { bytes_max: 0, state: State::Open { seen } }
    }

    /// A live message, of a history where it has an id. `true` where it is to be delivered now; where it has
    /// to wait, `message` makes what is kept of it, and how many bytes that is.
    pub fn offer(&mut self, ids: Option<Ids>, message: impl FnOnce() -> (M, usize)) -> bool {
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

    /// Whether nothing waits any more. Then the client is where the reader is, or further, and messages that
    /// come twice are nothing to it: it has them, or they are of a time before a rollback.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// The history of one of its logs cannot be continued; whoever has seen everything is at `position`.
    /// `true` where the client is to be told now; a closed fence says so when it is released.
    pub fn lose(&mut self, lost: Lost, position: Position) -> bool {
        // The log may go on with lower ids than were seen, if the store was rolled back.
        let is_open = self.is_open();
        self.state = if is_open { State::Open { seen: position } } else { State::Lost(lost) };
        is_open
    }

    /// Opens: the client has everything up to `heads`, where its logs ended when they were read.
    pub fn release(&mut self, heads: &[Position]) -> Released<M> {
        let mut ends = heads.to_vec();
        let seen = heads.iter().copied().fold(Position::START, Position::later);
        let mut waited = Vec::new();
        match &mut self.state {
            State::Lost(lost) => return Released::Lost(*lost),
            State::Open { .. } => {}
            State::Holding { held, .. } => {
                // What was read from a log may come over its channel once more.
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
                        // A copy of one that waits already.
                        None if ends.contains(id) => is_new.push(false),
                        None => return Released::Torn,
                    }
                }
                let held = std::mem::take(held).into_iter().zip(is_new);
                waited = held.filter_map(|((_, message), new)| new.then_some(message)).collect();
            }
        }
        self.state = State::Open { seen };
        Released::Open(waited)
    }

    /// Whether it is of no more use to the messages of a log, after the one with this id was offered.
    ///
    /// Not the reader's position counts: it may have come further than what was delivered.
    #[must_use]
    pub fn is_passed(&self, id: Position) -> bool {
        matches!(self.state, State::Open { seen } if !id.is_before(seen))
    }
}

/// What a waiting message costs beside its bytes, roughly.
const MESSAGE_BYTES: usize = 64;
