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

#[derive(Debug)]
enum State<M> {
    Holding { held: Vec<(Option<Position>, M)>, bytes: usize },
    Lost(Lost),
    Open { seen: Position },
}

impl<M> Fence<M> {
    /// Closed, with room for so many bytes.
    #[must_use]
    pub const fn new(bytes_max: usize) -> Self {
        Self { bytes_max, state: State::Holding { held: Vec::new(), bytes: 0 } }
    }

    /// A live message, of a history where it has an id. `true` where it is to be delivered now; where it has
    /// to wait, `message` makes what is kept of it, and how many bytes that is.
    pub fn offer(&mut self, id: Option<Position>, message: impl FnOnce() -> (M, usize)) -> bool {
        match &mut self.state {
            State::Holding { held, bytes: waiting } => {
                let (message, bytes) = message();
                *waiting += bytes + MESSAGE_BYTES;
                if *waiting > self.bytes_max {
                    self.state = State::Lost(Lost::Overflow);
                } else {
                    held.push((id, message));
                }
                false
            }
            State::Lost(_) => false,
            State::Open { seen } => is_new(id, seen),
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

    /// Opens: the client has everything up to `seen`. Answers what waited and is not part of that.
    ///
    /// # Errors
    /// Something is missing, as [`Lost::Overflow`] where more came than could wait; it stays closed until
    /// [`Self::reopen`].
    pub fn release(&mut self, mut seen: Position) -> Result<Vec<M>, Lost> {
        let mut waited = Vec::new();
        match &mut self.state {
            State::Lost(lost) => return Err(*lost),
            State::Holding { held, .. } => {
                // What was read from a log to fill a hole may come over the channel once more.
                let is_new = |(id, message)| is_new(id, &mut seen).then_some(message);
                waited = std::mem::take(held).into_iter().filter_map(is_new).collect();
            }
            State::Open { .. } => {}
        }
        self.state = State::Open { seen };
        Ok(waited)
    }

    /// Opens although something is missing: the client is told to begin anew at `seen`.
    pub fn reopen(&mut self, seen: Position) {
        self.state = State::Open { seen };
    }

    /// Whether it is of no more use to the messages of a log, after the one with this id was offered.
    ///
    /// Not the reader's position counts: it may have come further than what was delivered.
    #[must_use]
    pub fn is_passed(&self, id: Position) -> bool {
        matches!(self.state, State::Open { seen } if id >= seen)
    }
}

fn is_new(id: Option<Position>, seen: &mut Position) -> bool {
    let Some(id) = id else { return true };
    let is_new = id > *seen;
    *seen = id.max(*seen);
    is_new
}

/// What a waiting message costs beside its bytes, roughly.
const MESSAGE_BYTES: usize = 64;
