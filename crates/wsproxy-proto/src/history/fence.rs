//! Where what a client missed and what comes meanwhile are joined: once, in order.

use crate::history::{Lost, Position};

/// The gate of one client that reads logs behind its position while their channels are subscribed.
///
/// Until it is released live messages wait, at most `bytes_max` of them. From then on it lets through what
/// was not read, and can be thrown away as soon as something was.
#[derive(Debug)]
pub struct Fence<M> {
    bytes_max: usize,
    state: State<M>,
}

#[derive(Debug)]
enum State<M> {
    Holding { held: Vec<(Option<Position>, M)>, bytes: usize },
    Overflowed,
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
                    self.state = State::Overflowed;
                } else {
                    held.push((id, message));
                }
                false
            }
            State::Overflowed => false,
            State::Open { seen } => is_new(id, *seen),
        }
    }

    /// Opens: the client has everything up to `seen`. Answers what waited and is not part of that.
    ///
    /// # Errors
    /// [`Lost::Overflow`] where more came than could wait; it stays closed until [`Self::reopen`].
    pub fn release(&mut self, seen: Position) -> Result<Vec<M>, Lost> {
        if matches!(self.state, State::Overflowed) {
            return Err(Lost::Overflow);
        }
        match std::mem::replace(&mut self.state, State::Open { seen }) {
            State::Holding { held, .. } => {
                let is_new = |(id, message)| is_new(id, seen).then_some(message);
                Ok(held.into_iter().filter_map(is_new).collect())
            }
            State::Overflowed | State::Open { .. } => Ok(Vec::new()),
        }
    }

    /// Opens although something is missing: the client is told to begin anew at `seen`.
    pub fn reopen(&mut self, seen: Position) {
        self.state = State::Open { seen };
    }

    /// Whether it is of no more use to the messages of a log whose reader has come to `position`.
    #[must_use]
    pub fn is_passed(&self, position: Position) -> bool {
        matches!(self.state, State::Open { seen } if position >= seen)
    }
}

fn is_new(id: Option<Position>, seen: Position) -> bool {
    id.is_none_or(|id| id > seen)
}

/// What a waiting message costs beside its bytes, roughly.
const MESSAGE_BYTES: usize = 64;
