//! The calls of one agent against a plain model, in any order of events.

use proptest::prelude::*;
use wsproxy_proto::agents::{
    calls::{
        Begun, CALLERS_MAX, CallLimits, Calls, Ended, Left, REMEMBERED_FOR, REMEMBERED_MAX,
        Responded,
    },
    outcome::Outcome,
};
use wsproxy_proto::names::Id;

use crate::support::cases;

/// Event in the life of an agent. Requests and bodies are numbers.
#[derive(Debug, Clone)]
enum Step {
    Begin {
        request: u8,
        body: u8,
        timeout: u64,
    },
    Respond(u8),
    Cancel(u8),
    Leave {
        request: u8,
        caller: usize,
    },
    Wait(u64),
    Disconnect,
    Reconnect,
    /// More calls than are remembered come and end.
    Flood,
}

/// Number of a caller: the handle.
type Caller = usize;

#[derive(Debug, Clone)]
struct Running {
    request: u8,
    body: u8,
    deadline: u64,
    begun: u64,
    callers: Vec<Caller>,
}

#[derive(Debug, Clone)]
struct Past {
    request: u8,
    body: u8,
    at: u64,
    is_response: bool,
}

/// Calls and their model, and the outcome of each caller.
struct World {
    calls: Calls<Caller, u8>,
    running: Vec<Running>,
    past: Vec<Past>,
    now: u64,
    /// By caller: its outcome, once there is one; `Err` where the caller was refused.
    outcomes: Vec<Option<Result<Outcome, ()>>>,
}

impl World {
    fn new() -> Self {
        let calls = Calls::default();
        Self { calls, running: Vec::new(), past: Vec::new(), now: SECOND, outcomes: Vec::new() }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Begin { request, body, timeout } => self.begin(request, body, timeout),
            Step::Respond(request) => self.respond(request),
            Step::Cancel(request) => {
                let ended = self.calls.cancel(&id(request), self.now);
                let wanted = self.take(request, Outcome::Cancelled);
                assert_eq!(ended.is_some(), wanted.is_some());
                self.ended(ended, wanted, Outcome::Cancelled);
            }
            Step::Leave { request, caller } => self.leave(request, caller),
            Step::Wait(time) => {
                self.now += time;
                self.expire();
            }
            Step::Disconnect => self.disconnect(),
            Step::Reconnect => {
                self.disconnect();
                self.calls = Calls::default();
                self.past.clear();
            }
            Step::Flood => {
                for request in 100..100 + REMEMBERED_MAX as u8 {
                    self.begin(request, 0, SECOND);
                    self.respond(request);
                }
            }
        }
        assert_eq!(self.calls.len(), self.running.len());
        assert_eq!(self.calls.is_empty(), self.running.is_empty());
        let next = self.running.iter().map(|call| call.deadline).min();
        // The bound may be early, never late, and is none without calls.
        let told = self.calls.next_deadline();
        assert!(told.is_some() == next.is_some() && told <= next, "{told:?} {next:?}");
    }

    fn begin(&mut self, request: u8, body: u8, timeout: u64) {
        let caller = self.outcomes.len();
        self.outcomes.push(None);
        let (deadline, limits) = (self.now + timeout, CallLimits { in_flight_max: IN_FLIGHT_MAX });
        let now = self.now;
        let begun = self.calls.begin(&id(request), [body; 16], deadline, caller, now, limits);
        let is_full = self.running.len() == IN_FLIGHT_MAX;
        let running = self.running.iter_mut().find(|call| call.request == request);
        let past = self.past.iter().find(|call| {
            call.request == request && now / SECOND - call.at / SECOND < REMEMBERED_FOR / SECOND
        });
        let wanted = match (running, past) {
            (Some(call), _) if call.body != body => Begun::Conflict(caller),
            (Some(call), _) if call.callers.len() == CALLERS_MAX => Begun::Busy(caller),
            (Some(call), _) => {
                call.callers.push(caller);
                Begun::Joined
            }
            (None, Some(call)) if call.body == body => Begun::Duplicate(caller),
            (None, Some(_)) => Begun::Conflict(caller),
            (None, None) if is_full => Begun::Busy(caller),
            (None, None) => {
                let callers = vec![caller];
                self.running.push(Running { request, body, deadline, begun: now, callers });
                self.calls.call_mut(&id(request)).unwrap().data = request;
                Begun::Run
            }
        };
        assert_eq!(begun, wanted);
        if !matches!(begun, Begun::Run | Begun::Joined) {
            self.told(caller, Err(()));
        }
    }

    fn respond(&mut self, request: u8) {
        let responded = self.calls.respond(&id(request), self.now);
        let seconds = self.now / SECOND;
        let past = self.past.iter().find(|call| {
            call.request == request && seconds - call.at / SECOND < REMEMBERED_FOR / SECOND
        });
        let past = past.map(|call| call.is_response);
        match (self.take(request, Outcome::Response), responded) {
            (Some(call), Responded::Finished(ended)) => {
                self.ended(Some(ended), Some(call), Outcome::Response);
            }
            (None, Responded::Duplicate) => assert_eq!(past, Some(true)),
            (None, Responded::Late) => assert_eq!(past, Some(false)),
            (None, Responded::Unknown) => assert_eq!(past, None),
            other => panic!("{other:?}"),
        }
    }

    fn leave(&mut self, request: u8, which: usize) {
        let running = self.running.iter_mut().find(|call| call.request == request);
        let Some(running) = running else {
            let left = self.calls.leave(&id(request), |_| true, self.now);
            assert_eq!(left, Left::Unknown);
            return;
        };
        assert_eq!(self.calls.leave(&id(request), |_| false, self.now), Left::Unknown);
        let at = which % running.callers.len();
        let caller = running.callers[at];
        match self.calls.leave(&id(request), |other| *other == caller, self.now) {
            Left::Stays(left) => {
                assert!(running.callers.len() > 1);
                assert_eq!(left, running.callers.remove(at));
                self.told(left, Ok(Outcome::Cancelled));
            }
            Left::Cancelled(ended) => {
                assert_eq!(running.callers, [caller]);
                let wanted = self.take(request, Outcome::Cancelled);
                self.ended(Some(ended), wanted, Outcome::Cancelled);
            }
            Left::Unknown => panic!("caller {caller} is one of the callers"),
        }
    }

    fn expire(&mut self) {
        for (request, ended) in self.calls.expire(self.now) {
            let wanted = self.take(number(&request), Outcome::Timeout).unwrap();
            assert!(wanted.deadline <= self.now);
            self.ended(Some(ended), Some(wanted), Outcome::Timeout);
        }
        assert!(self.running.iter().all(|call| call.deadline > self.now));
        let next = self.running.iter().map(|call| call.deadline).min();
        assert!(self.calls.next_deadline() <= next);
    }

    fn disconnect(&mut self) {
        for (request, ended) in self.calls.end(self.now) {
            let wanted = self.take(number(&request), Outcome::AgentGone);
            self.ended(Some(ended), wanted, Outcome::AgentGone);
        }
        assert!(self.running.is_empty());
    }

    /// Ends a call of the model.
    fn take(&mut self, request: u8, outcome: Outcome) -> Option<Running> {
        let at = self.running.iter().position(|call| call.request == request)?;
        let call = self.running.remove(at);
        if self.past.len() == REMEMBERED_MAX {
            self.past.remove(0);
        }
        let is_response = outcome == Outcome::Response;
        self.past.push(Past { request, body: call.body, at: self.now, is_response });
        Some(call)
    }

    #[track_caller]
    fn ended(&mut self, ended: Option<Ended<Caller, u8>>, wanted: Option<Running>, with: Outcome) {
        let (Some(ended), Some(wanted)) = (ended, wanted) else { return };
        assert_eq!((ended.outcome, ended.begun), (with, wanted.begun));
        assert_eq!(ended.data, wanted.request);
        assert_eq!(ended.callers.len(), wanted.callers.len());
        let callers: Vec<_> = ended.callers.into_iter().collect();
        assert_eq!(callers, wanted.callers);
        callers.into_iter().for_each(|caller| self.told(caller, Ok(with)));
    }

    #[track_caller]
    fn told(&mut self, caller: Caller, outcome: Result<Outcome, ()>) {
        let before = self.outcomes[caller].replace(outcome);
        assert_eq!(before, None, "caller {caller} was told twice");
    }
}

fn step() -> impl Strategy<Value = Step> {
    let request = 0..7_u8;
    let time = prop_oneof![0..3 * SECOND, Just(REMEMBERED_FOR), Just(REMEMBERED_FOR - SECOND)];
    let timeout = prop_oneof![Just(0), 0..4 * SECOND, Just(3600 * SECOND)];
    prop_oneof![
        8 => (request.clone(), 0..5_u8, timeout).prop_map(|(request, body, timeout)| {
            // Most callers of one request have the same body.
            Step::Begin { request, body: body / 4, timeout }
        }),
        4 => request.clone().prop_map(Step::Respond),
        1 => request.clone().prop_map(Step::Cancel),
        2 => (request, any::<usize>()).prop_map(|(request, caller)| Step::Leave { request, caller }),
        3 => time.prop_map(Step::Wait),
        1 => Just(Step::Disconnect),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Flood),
    ]
}

proptest! {
    #![proptest_config(cases(4096))]

    #[test]
    fn every_caller_is_told_exactly_one_outcome(
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        world.step(&Step::Disconnect);
        prop_assert!(world.outcomes.iter().all(Option::is_some), "{:?}", world.outcomes);
        prop_assert!(world.past.len() <= REMEMBERED_MAX);
    }
}

#[test]
fn ninth_caller_of_one_call_is_refused_and_the_first_may_leave() {
    let mut world = World::new();
    (0..=CALLERS_MAX).for_each(|_| world.begin(1, 1, SECOND));
    assert_eq!(world.outcomes[CALLERS_MAX], Some(Err(())));
    world.leave(1, 0);
    world.begin(1, 1, SECOND);
    world.respond(1);
    assert_eq!(
        world.outcomes.iter().filter(|told| **told == Some(Ok(Outcome::Response))).count(),
        8
    );
}

#[test]
fn response_behind_the_deadline_ends_a_call_that_has_not_expired() {
    let mut world = World::new();
    world.begin(1, 1, SECOND);
    world.now += 2 * SECOND;
    world.respond(1);
    assert_eq!(world.outcomes, [Some(Ok(Outcome::Response))]);
    world.expire();
    world.respond(1);
}

#[test]
fn late_duplicate_and_unknown_responses_differ() {
    let mut world = World::new();
    let (answered, expired) = (id(1), id(2));
    world.begin(1, 1, SECOND);
    world.begin(2, 2, SECOND);
    world.respond(1);
    world.step(&Step::Wait(SECOND));
    assert_eq!(world.calls.respond(&answered, world.now), Responded::Duplicate);
    assert_eq!(world.calls.respond(&expired, world.now), Responded::Late);
    assert_eq!(world.calls.respond(&id(3), world.now), Responded::Unknown);
    world.now += REMEMBERED_FOR;
    assert_eq!(world.calls.respond(&answered, world.now), Responded::Unknown);
    world.begin(1, 2, SECOND);
    assert_eq!(world.running.len(), 1, "a forgotten id may be used again");
}

#[test]
fn repeated_id_runs_once_as_long_as_it_is_remembered() {
    let mut world = World::new();
    world.begin(1, 1, SECOND);
    world.respond(1);
    let limits = CallLimits { in_flight_max: IN_FLIGHT_MAX };
    let mut again = |body, now| world.calls.begin(&id(1), [body; 16], now + 1, 77, now, limits);
    assert_eq!(again(1, 2 * SECOND), Begun::Duplicate(77));
    assert_eq!(again(2, 2 * SECOND), Begun::Conflict(77));
    assert_eq!(again(1, REMEMBERED_FOR), Begun::Duplicate(77));
    assert_eq!(again(2, REMEMBERED_FOR + SECOND), Begun::Run);
}

#[test]
fn calls_that_are_never_answered_do_not_pile_up() {
    let mut calls = Calls::<Caller>::default();
    let limits = CallLimits { in_flight_max: 256 };
    let mut refused = 0;
    for n in 0..10_000_u64 {
        let request = Id::parse(&n.to_string()).unwrap();
        match calls.begin(&request, [0; 16], n + 100 * SECOND, 0, n, limits) {
            Begun::Run => {}
            Begun::Busy(_) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((calls.len(), refused), (256, 10_000 - 256));
    assert_eq!(calls.expire(200 * SECOND).len(), 256);
    assert_eq!((calls.len(), calls.next_deadline()), (0, None));
}

fn id(request: u8) -> Id {
    Id::parse(&format!("q-{request}")).unwrap()
}

fn number(request: &Id) -> u8 {
    request.as_str()[2..].parse().unwrap()
}

const SECOND: u64 = 1_000_000;
const IN_FLIGHT_MAX: usize = 4;
