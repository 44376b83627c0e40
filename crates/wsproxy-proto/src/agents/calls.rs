//! Calls in flight to one agent, and those that ended a moment ago: which outcome a call has, and who is told. Knows
//! neither messages nor how callers are reached.

use std::{collections::HashMap, mem};

use crate::{
    agents::{calls::remembered::Remembered, outcome::Outcome},
    names::Id,
};

mod remembered;

/// The calls of one agent. `C` is the handle of a caller, `D` the data of a call.
///
/// Each handle that [`Self::begin`] takes comes back exactly once: refused by `begin` itself, or with the end of its
/// call by one of [`Self::respond`], [`Self::cancel`], [`Self::leave`], [`Self::expire`] and [`Self::end`].
///
/// Bounds: [`CallLimits::in_flight_max`] calls of [`CALLERS_MAX`] callers, and [`REMEMBERED_MAX`] calls that ended
/// within [`REMEMBERED_FOR`]. The calls of an agent that has neither take one word and no allocation.
///
/// Times are microseconds of one clock that does not go back.
#[derive(Debug)]
pub struct Calls<C, D = ()> {
    state: Option<Box<State<C, D>>>,
}

#[derive(Debug)]
struct State<C, D> {
    in_flight: HashMap<Id, Call<C, D>>,
    remembered: Remembered,
    /// No deadline is before it. Ends of calls do not move it, so it may be too early.
    next_deadline: u64,
}

/// Call in flight.
#[derive(Debug)]
pub struct Call<C, D> {
    callers: Callers<C>,
    begun: u64,
    deadline: u64,
    hash: [u8; 16],
    /// Data of the call; its default when the call begins.
    pub data: D,
}

impl<C, D> Call<C, D> {
    /// Callers that get the outcome.
    #[must_use]
    pub const fn callers(&self) -> &Callers<C> {
        &self.callers
    }
}

/// Callers of one call, at least one; in the order in which they came.
#[derive(Debug, PartialEq, Eq)]
pub struct Callers<C> {
    first: C,
    // A second caller is rare.
    more: Vec<C>,
}

impl<C> Callers<C> {
    /// Returns the callers.
    pub fn iter(&self) -> impl Iterator<Item = &C> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// Returns the number of callers.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub const fn len(&self) -> usize {
        1 + self.more.len()
    }

    /// Removes one of several callers. `at` is below the length, which is above 1.
    fn remove(&mut self, at: usize) -> C {
        match at {
            0 => mem::replace(&mut self.first, self.more.remove(0)),
            _ => self.more.remove(at - 1),
        }
    }
}

impl<C> IntoIterator for Callers<C> {
    type Item = C;
    type IntoIter = std::iter::Chain<std::iter::Once<C>, std::vec::IntoIter<C>>;

    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.more)
    }
}

/// Bounds that an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Upper bound of the calls in flight.
    pub in_flight_max: usize,
}

/// Result of [`Calls::begin`].
#[derive(Debug, PartialEq, Eq)]
pub enum Begun<C> {
    /// The call is in flight: send it to the agent.
    Run,
    /// The same call is in flight already. Send nothing; the caller gets the outcome of that call. Callers that share
    /// a channel are to be told there once.
    Joined,
    /// The same call has ended, and is not run again.
    Duplicate(C),
    /// Another call with this id is in flight, or has ended.
    Conflict(C),
    /// Too many calls are in flight, or too many callers wait for this call.
    Busy(C),
}

/// Result of [`Calls::respond`].
#[derive(Debug, PartialEq, Eq)]
pub enum Responded<C, D = ()> {
    /// The call ends with this response.
    Finished(Ended<C, D>),
    /// The call has ended without a response.
    Late,
    /// The call has ended with an earlier response.
    Duplicate,
    /// No call with this id is remembered.
    Unknown,
}

/// Result of [`Calls::leave`].
#[derive(Debug, PartialEq, Eq)]
pub enum Left<C, D = ()> {
    /// No call with this id is in flight, or the caller is none of its callers.
    Unknown,
    /// The call goes on for its other callers.
    Stays(C),
    /// The call ends as cancelled, since its last caller left.
    Cancelled(Ended<C, D>),
}

/// Call that has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended<C, D = ()> {
    /// The only outcome of the call.
    pub outcome: Outcome,
    /// Callers that get the outcome.
    pub callers: Callers<C>,
    /// Time at which the call began.
    pub begun: u64,
    /// Data of the call.
    pub data: D,
}

impl<C, D> Default for Calls<C, D> {
    fn default() -> Self {
        Self { state: None }
    }
}

impl<C, D: Default> Calls<C, D> {
    /// Takes a call, or refuses its caller. `hash` is the [`body_hash`](crate::agents::body_hash) of the call;
    /// `deadline` is the time at which the call has the outcome timeout.
    pub fn begin(
        &mut self,
        request: &Id,
        hash: [u8; 16],
        deadline: u64,
        caller: C,
        now: u64,
        limits: CallLimits,
    ) -> Begun<C> {
        let state = self.state.get_or_insert_with(Box::default);
        if let Some(call) = state.in_flight.get_mut(request) {
            if call.hash != hash {
                return Begun::Conflict(caller);
            }
            if call.callers.len() >= CALLERS_MAX {
                return Begun::Busy(caller);
            }
            call.callers.more.push(caller);
            return Begun::Joined;
        }
        if let Some(ended) = state.remembered.find(request, now) {
            let is_same = ended.hash == hash;
            return if is_same { Begun::Duplicate(caller) } else { Begun::Conflict(caller) };
        }
        if state.in_flight.len() >= limits.in_flight_max {
            return Begun::Busy(caller);
        }
        let callers = Callers { first: caller, more: Vec::new() };
        let call = Call { callers, begun: now, deadline, hash, data: D::default() };
        state.in_flight.insert(request.clone(), call);
        state.next_deadline = state.next_deadline.min(deadline);
        Begun::Run
    }
}

impl<C, D> Calls<C, D> {
    /// Takes a response of the agent. The first one ends its call, also behind the deadline as long as
    /// [`Self::expire`] has not been called.
    pub fn respond(&mut self, request: &Id, now: u64) -> Responded<C, D> {
        if let Some(ended) = self.finish(request, Outcome::Response, now) {
            return Responded::Finished(ended);
        }
        let ended = self.state.as_mut().and_then(|state| state.remembered.find(request, now));
        match ended {
            None => Responded::Unknown,
            Some(ended) if ended.is_response => Responded::Duplicate,
            Some(_) => Responded::Late,
        }
    }

    /// Ends a call for all its callers. `None` where no such call is in flight.
    pub fn cancel(&mut self, request: &Id, now: u64) -> Option<Ended<C, D>> {
        self.finish(request, Outcome::Cancelled, now)
    }

    /// Removes one caller of a call, the first for which `is` holds. The call is cancelled when its last caller
    /// leaves.
    pub fn leave(&mut self, request: &Id, is: impl Fn(&C) -> bool, now: u64) -> Left<C, D> {
        let Some(call) = self.call_mut(request) else { return Left::Unknown };
        let Some(at) = call.callers.iter().position(is) else { return Left::Unknown };
        if call.callers.len() > 1 {
            return Left::Stays(call.callers.remove(at));
        }
        self.cancel(request, now).map_or(Left::Unknown, Left::Cancelled)
    }

    /// Ends the calls whose deadline is not above `now`, and forgets what is remembered no longer. Room that is not
    /// needed any more is given back here, so call it now and then for an agent without calls, too.
    pub fn expire(&mut self, now: u64) -> Vec<(Id, Ended<C, D>)> {
        let Some(state) = &mut self.state else { return Vec::new() };
        let mut ended = Vec::new();
        if state.next_deadline <= now {
            let late = state.in_flight.extract_if(|_, call| call.deadline <= now);
            ended.extend(late.map(|(request, call)| {
                state.remembered.add(&request, call.hash, false, now);
                (request, call.end(Outcome::Timeout))
            }));
            state.shrink();
            let deadlines = state.in_flight.values().map(|call| call.deadline);
            state.next_deadline = deadlines.min().unwrap_or(u64::MAX);
        }
        state.remembered.forget(now);
        if state.in_flight.is_empty() {
            state.in_flight = HashMap::new();
            if state.remembered.is_empty() {
                self.state = None;
            }
        }
        ended
    }

    /// Returns a time before which no call reaches its deadline; `None` without calls. The time may be that of a call
    /// which has ended; [`Self::expire`] finds the next one then.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let state = self.state.as_ref()?;
        (!state.in_flight.is_empty()).then_some(state.next_deadline)
    }

    /// Ends all calls, since the agent's connection has ended.
    pub fn end(&mut self, now: u64) -> Vec<(Id, Ended<C, D>)> {
        let Some(state) = &mut self.state else { return Vec::new() };
        let calls = mem::take(&mut state.in_flight);
        state.next_deadline = u64::MAX;
        let end = |(request, call): (Id, Call<C, D>)| {
            state.remembered.add(&request, call.hash, false, now);
            (request, call.end(Outcome::AgentGone))
        };
        calls.into_iter().map(end).collect()
    }

    /// Returns a call in flight.
    #[must_use]
    pub fn call_mut(&mut self, request: &Id) -> Option<&mut Call<C, D>> {
        self.state.as_mut()?.in_flight.get_mut(request)
    }

    /// Returns the number of calls in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.as_ref().map_or(0, |state| state.in_flight.len())
    }

    /// Returns whether no call is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn finish(&mut self, request: &Id, outcome: Outcome, now: u64) -> Option<Ended<C, D>> {
        let state = self.state.as_mut()?;
        let call = state.in_flight.remove(request)?;
        state.remembered.add(request, call.hash, outcome == Outcome::Response, now);
        if state.in_flight.is_empty() {
            state.next_deadline = u64::MAX;
        }
        state.shrink();
        Some(call.end(outcome))
    }
}

impl<C, D> Default for State<C, D> {
    fn default() -> Self {
        Self {
            in_flight: HashMap::new(),
            remembered: Remembered::default(),
            next_deadline: u64::MAX,
        }
    }
}

impl<C, D> State<C, D> {
    /// Gives back the room of calls that came all at once.
    fn shrink(&mut self) {
        let capacity = self.in_flight.capacity();
        if capacity > CAPACITY_KEPT && self.in_flight.len() < capacity / 4 {
            self.in_flight.shrink_to_fit();
        }
    }
}

impl<C, D> Call<C, D> {
    fn end(self, outcome: Outcome) -> Ended<C, D> {
        Ended { outcome, callers: self.callers, begun: self.begun, data: self.data }
    }
}

/// Upper bound of the callers of one call.
pub const CALLERS_MAX: usize = 8;

/// Upper bound of the calls that are remembered after their end.
pub const REMEMBERED_MAX: usize = 64;

/// Time for which a call is remembered after its end, in microseconds.
pub const REMEMBERED_FOR: u64 = 600_000_000;

/// Room for calls in flight that is kept while there are some.
const CAPACITY_KEPT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> Id {
        Id::parse(&number.to_string()).unwrap()
    }

    #[test]
    fn idle_agent_costs_one_word_and_no_allocation() {
        let mut calls = Calls::<String, [u64; 20]>::default();
        assert_eq!(size_of_val(&calls), size_of::<usize>());
        assert!(calls.expire(0).is_empty() && calls.end(0).is_empty());
        assert_eq!(calls.respond(&id(1), 0), Responded::Unknown);
        assert_eq!(calls.cancel(&id(1), 0), None);
        assert!(calls.call_mut(&id(1)).is_none() && calls.state.is_none());
    }

    #[test]
    fn room_of_many_calls_is_given_back() {
        let (limits, many) = (CallLimits { in_flight_max: 5_000 }, 5_000);
        let mut calls = Calls::<u8>::default();
        for n in 0..many {
            assert_eq!(calls.begin(&id(n), [0; 16], n as u64, 0, 0, limits), Begun::Run);
        }
        for n in 0..many - 1 {
            assert!(matches!(calls.respond(&id(n), 0), Responded::Finished(_)));
        }
        let state = calls.state.as_ref().unwrap();
        assert!(state.in_flight.capacity() <= 2 * CAPACITY_KEPT);
        assert_eq!(state.remembered.len(), REMEMBERED_MAX);
        assert_eq!(calls.expire(many as u64).len(), 1);
        assert_eq!(calls.state.as_ref().unwrap().in_flight.capacity(), 0);
        assert!(calls.expire(REMEMBERED_FOR + many as u64).is_empty());
        assert!(calls.state.is_none(), "nothing is left after ten minutes");
    }

    #[test]
    fn deadlines_are_found_behind_calls_that_have_ended() {
        let limits = CallLimits { in_flight_max: 8 };
        let mut calls = Calls::<u8>::default();
        for deadline in [30, 10, 20] {
            calls.begin(&id(deadline), [0; 16], deadline as u64, 0, 0, limits);
        }
        calls.cancel(&id(10), 1).unwrap();
        assert_eq!(calls.next_deadline(), Some(10), "early, not late");
        assert!(calls.expire(10).is_empty());
        assert_eq!(calls.next_deadline(), Some(20));
        assert_eq!(calls.expire(19), []);
        let ended = calls.expire(20);
        assert_eq!((ended.len(), &ended[0].0, ended[0].1.outcome), (1, &id(20), Outcome::Timeout));
        calls.cancel(&id(30), 21).unwrap();
        assert_eq!(calls.next_deadline(), None);
    }
}
