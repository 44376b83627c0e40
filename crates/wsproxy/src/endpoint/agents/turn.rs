//! The part of a commands channel that belongs to one connection: from its own marker to the next one. Knows neither
//! the commands nor the bus.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use uuid::Uuid;
use wsproxy_proto::agents::command::Marker;

use crate::endpoint::agents::{counters::AgentCounters, owner::Claimed};

#[cfg(test)]
mod tests;

/// A connection's view of the commands channel of its user.
///
/// Every holder of the place is announced by a marker on the channel. Commands between two markers belong to the holder
/// that the first one names, so each command has one holder, although several connections may read it.
#[derive(Debug)]
pub(super) struct Turn {
    connection: Uuid,
    /// Generation of this connection; 0 until the claim is answered.
    generation: u64,
    stage: Stage,
    /// Commands that wait for the decision whose they are.
    kept: Kept,
    /// Counts commands that are dropped without that decision.
    counters: Arc<AgentCounters>,
}

/// Commands that wait for a decision.
///
/// Invariant: at most [`KEPT_MAX`] commands and [`KEPT_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub(super) struct Kept {
    commands: VecDeque<Bytes>,
    bytes: usize,
}

#[derive(Debug)]
enum Stage {
    /// Before the first own marker was seen and the claim was answered.
    Opening(Opening),
    /// Every command is this connection's.
    Holding,
    /// Messages may have been missed. Every command is kept.
    Doubting,
    /// The place was released, and no other marker was seen since. Commands are kept: perhaps no other connection has
    /// them.
    Vacant,
    /// The marker of another holder has ended the turn.
    Over,
}

#[derive(Debug, Default)]
struct Opening {
    /// Commands before the own marker belong to another holder, whose marker was seen.
    is_foreign: bool,
    /// The holder before has left the place, and its marker was seen.
    is_released: bool,
    /// Answer to the claim: whether no other connection can have held the place.
    found_nobody: Option<bool>,
    /// Number of the kept commands that came before the own marker; `None`: the marker was not seen.
    marked: Option<usize>,
    /// Another holder's marker came behind the own one, and the claim is not answered yet.
    is_replaced: bool,
}

/// Decision on a message of the channel, or on the answer to a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The command is this connection's.
    Mine,
    /// Nothing is to be done now.
    Wait,
    /// The command is dropped, since too many are kept.
    Full,
    /// The connection holds the place now, and the kept commands are its own.
    Settled,
    /// A newer connection holds the place.
    Replaced,
    /// The place was released, though this connection did not ask for that.
    Released,
}

impl Turn {
    /// Makes the view of a connection that has just subscribed to the channel.
    #[must_use]
    pub(super) fn new(connection: Uuid, counters: Arc<AgentCounters>) -> Self {
        let stage = Stage::Opening(Opening::default());
        Self { connection, generation: 0, stage, kept: Kept::default(), counters }
    }

    /// Returns the generation with which the connection holds the place; `None` before the claim is answered.
    #[must_use]
    pub(super) const fn generation(&self) -> Option<u64> {
        match self.generation {
            0 => None,
            generation => Some(generation),
        }
    }

    /// Returns whether every command is this connection's.
    #[must_use]
    pub(super) const fn is_holding(&self) -> bool {
        matches!(self.stage, Stage::Holding)
    }

    /// Returns whether messages may have been missed since the connection was the holder.
    #[must_use]
    pub(super) const fn is_doubting(&self) -> bool {
        matches!(self.stage, Stage::Doubting)
    }

    /// Returns whether a marker has ended the turn.
    #[must_use]
    pub(super) const fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Vacant | Stage::Over)
    }

    /// Returns whether the place was released, and no other marker was seen since.
    pub(super) const fn is_vacant(&self) -> bool {
        matches!(self.stage, Stage::Vacant)
    }

    /// Takes a command, and keeps it where its holder is not known yet.
    pub(super) fn command(&mut self, payload: &[u8]) -> Verdict {
        let is_kept = match &self.stage {
            Stage::Holding => return Verdict::Mine,
            Stage::Opening(
                Opening { is_foreign: true, marked: None, .. } | Opening { is_replaced: true, .. },
            )
            | Stage::Over => true,
            Stage::Opening(_) | Stage::Doubting | Stage::Vacant => self.kept.push(payload),
        };
        if is_kept { Verdict::Wait } else { Verdict::Full }
    }

    /// Takes a marker: its connection is the holder from here on.
    pub(super) fn marker(&mut self, marker: Marker) -> Verdict {
        let Marker { connection: holder, generation, former } = marker;
        if holder == Some(self.connection) {
            return self.own_marker(generation);
        }
        match &mut self.stage {
            Stage::Opening(opening) if opening.marked.is_none() => {
                // Commands before this marker are the holder's before it.
                (opening.is_foreign, opening.is_released) = (holder.is_some(), holder.is_none());
                self.kept = Kept::default();
                return Verdict::Wait;
            }
            // A marker that is older than the own one may come late after Redis lost data.
            Stage::Opening(_) | Stage::Holding | Stage::Doubting
                if generation < self.generation => {}
            // Only the answer to the claim tells whether the kept commands are this connection's.
            Stage::Opening(opening) if holder.is_some() && opening.found_nobody.is_none() => {
                opening.is_replaced = true;
            }
            Stage::Opening(_) => {
                // Until now the commands behind the own marker were this connection's, and the kept ones before it
                // too where no other connection can have had them.
                self.settle_opening();
                return self.end(holder);
            }
            Stage::Holding | Stage::Doubting => {
                // Where this connection held the place until the marker, none was missed between, and the commands are
                // its own. Else they may be another holder's.
                if self.is_doubting() && former != Some(self.connection) {
                    self.drop_doubted();
                }
                return self.end(holder);
            }
            // The kept commands stay: the new holder may have subscribed behind them.
            Stage::Vacant if holder.is_some() => self.stage = Stage::Over,
            Stage::Vacant | Stage::Over => {}
        }
        Verdict::Wait
    }

    /// Takes the answer to a claim or refresh of this instance, which is `server`.
    pub(super) fn claimed(&mut self, claimed: &Claimed, server: &str) -> Verdict {
        match claimed {
            Claimed::Held { generation, replaced, is_alone } => {
                self.generation = self.generation.max(*generation);
                match &mut self.stage {
                    Stage::Opening(opening) => {
                        // A free place has no holder to answer them. Other subscribers are other newcomers, or a holder
                        // of whom Redis lost the data. A holder of another instance that does not subscribe is dead.
                        let is_here =
                            replaced.as_ref().is_some_and(|owner| *owner.server == *server);
                        let nobody = replaced.is_none() || (*is_alone && !is_here);
                        opening.found_nobody.get_or_insert(nobody);
                        self.settle()
                    }
                    // The marker that a claim announces settles a doubt: the script publishes it for the holder only.
                    _ => Verdict::Wait,
                }
            }
            Claimed::Lost { owner, .. } => {
                if owner.is_some() {
                    Verdict::Replaced
                } else {
                    Verdict::Released
                }
            }
            Claimed::Flapping { .. } => Verdict::Replaced,
        }
    }

    /// Notes that messages may have been missed.
    pub(super) fn lost(&mut self) {
        match &mut self.stage {
            Stage::Holding | Stage::Doubting => self.stage = Stage::Doubting,
            // Either the marker or the answer to the claim is known. The commands before the marker are this connection's
            // only if that answer has said so.
            Stage::Opening(_) if self.generation > 0 => {
                self.settle_opening();
                self.stage = Stage::Doubting;
            }
            // The marker may be among the missed messages, and a marker of another holder too.
            Stage::Opening(opening) => {
                *opening = Opening::default();
                self.drop_doubted();
            }
            Stage::Vacant | Stage::Over => {}
        }
    }

    /// Takes the kept commands.
    pub(super) fn take_kept(&mut self) -> Kept {
        std::mem::take(&mut self.kept)
    }

    /// Drops the kept commands, since it cannot be known whose they are. Their callers may get no answer.
    pub(super) fn drop_doubted(&mut self) {
        let kept = self.take_kept();
        self.counters.in_doubt.add(kept.commands.len() as u64);
    }

    fn end(&mut self, holder: Option<Uuid>) -> Verdict {
        match holder {
            Some(_) => {
                self.stage = Stage::Over;
                Verdict::Replaced
            }
            None => {
                self.stage = Stage::Vacant;
                Verdict::Released
            }
        }
    }

    fn own_marker(&mut self, generation: u64) -> Verdict {
        self.generation = self.generation.max(generation);
        match &mut self.stage {
            Stage::Opening(opening) => {
                opening.marked.get_or_insert(self.kept.commands.len());
                self.settle()
            }
            Stage::Doubting => {
                self.stage = Stage::Holding;
                Verdict::Settled
            }
            Stage::Holding | Stage::Vacant | Stage::Over => Verdict::Wait,
        }
    }

    /// Begins to hold the place, if nothing is missing.
    fn settle(&mut self) -> Verdict {
        let Stage::Opening(opening) = &self.stage else { return Verdict::Wait };
        if opening.marked.is_none() || opening.found_nobody.is_none() {
            return Verdict::Wait;
        }
        let is_replaced = opening.is_replaced;
        self.settle_opening();
        self.stage = if is_replaced { Stage::Over } else { Stage::Holding };
        if is_replaced { Verdict::Replaced } else { Verdict::Settled }
    }

    /// Drops the kept commands before the own marker, where another holder answers them.
    fn settle_opening(&mut self) {
        let Stage::Opening(opening) = &self.stage else { return };
        let nobody = opening.found_nobody.unwrap_or_default() || opening.is_released;
        if opening.is_foreign || !nobody {
            let before = opening.marked.unwrap_or(self.kept.commands.len());
            self.kept.drop_first(before);
        }
    }
}

impl Kept {
    /// Adds a command; returns whether there was room.
    fn push(&mut self, payload: &[u8]) -> bool {
        let has_room =
            self.commands.len() < KEPT_MAX && self.bytes + payload.len() <= KEPT_BYTES_MAX;
        if has_room {
            self.bytes += payload.len();
            self.commands.push_back(Bytes::copy_from_slice(payload));
        }
        has_room
    }

    fn drop_first(&mut self, count: usize) {
        let dropped = self.commands.drain(..count.min(self.commands.len()));
        self.bytes -= dropped.map(|command| command.len()).sum::<usize>();
    }
}

/// Iterates over the kept commands in their order. The first [`RUN_MAX`] have `true`: they are run. The others are
/// only answered.
impl IntoIterator for Kept {
    type Item = (bool, Bytes);
    type IntoIter = std::iter::Zip<
        std::iter::Chain<std::iter::RepeatN<bool>, std::iter::Repeat<bool>>,
        std::collections::vec_deque::IntoIter<Bytes>,
    >;

    fn into_iter(self) -> Self::IntoIter {
        let run = std::iter::repeat_n(true, RUN_MAX).chain(std::iter::repeat(false));
        run.zip(self.commands)
    }
}

/// Kept commands that are run. A connection that settles gets at most so many at once.
const RUN_MAX: usize = 64;

/// Upper bound of the kept commands.
const KEPT_MAX: usize = 1024;

/// Upper bound of their bytes.
const KEPT_BYTES_MAX: usize = 8 * 1024 * 1024;
