//! The calls of one connection: sent to the agent, answered by it, or ended otherwise.

use std::{convert::Infallible, sync::atomic::Ordering::Relaxed, time::Duration};

use tracing::debug;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::{
    agents::{
        answer,
        calls::{Begun, Calls, Ended, Left, Responded},
        command::ToolCall,
        message::{self, AgentMessage, ToolProgress, ToolResponse},
        outcome::{Failure, Outcome},
        writer::{self, CallDetails},
    },
    names::Id,
    ws::frame::Kind,
};

use crate::{
    endpoint::agents::{
        IN_FLIGHT_MAX,
        answers::{Answer, BusCaller, Caller},
        caller::{CallerId, LocalCall},
        logic::AgentLogic,
        record::{CallFacts, CallRecord},
    },
    logic::Actions,
};

/// Calls of one connection.
#[derive(Default)]
pub(super) struct InFlight {
    calls: Calls<Caller, CallState>,
    /// Calls of which newer progress waits for its time.
    delayed: Vec<Id>,
    /// The agent understands `tool_cancel`.
    cancels: bool,
}

/// State of a call in flight.
#[derive(Default)]
struct CallState {
    /// Set as soon as the call has begun.
    record: Option<Box<CallRecord>>,
    /// Time at which progress was passed on last.
    passed: Micros,
    /// Newest progress, which waits for its time.
    waiting: Option<Box<[u8]>>,
}

impl InFlight {
    pub(super) fn set_abilities(&mut self, cancels: bool) {
        self.cancels = cancels;
    }

    /// Returns the time of the next deadline, or of the next progress.
    pub(super) fn next_deadline(&self) -> Micros {
        let deadline = self.calls.next_deadline().map_or(Micros::NEVER, Micros);
        // The timer's ticks are coarser than the interval of progress.
        if self.delayed.is_empty() { deadline } else { Micros(0) }
    }
}

impl AgentLogic {
    /// Takes a call of the bus.
    pub(super) fn begin(&mut self, call: &ToolCall<'_>, actions: &mut dyn Actions<Infallible>) {
        let bus_caller = BusCaller::of(call);
        if self.is_answered_there(call, &bus_caller) {
            // The channel gets one answer, even if the same call comes twice.
            return self.agents().counters.repeated.add(1);
        }
        let timeout = call.timeout_ms.map(Duration::from_millis);
        self.run(&CallFacts::from(call), timeout, Caller::Bus(bus_caller), actions);
    }

    /// Takes a call of this process.
    pub(super) fn begin_local(&mut self, call: LocalCall, actions: &mut dyn Actions<Infallible>) {
        if !self.place.turn.is_holding() {
            // Another connection may hold the place: the dropped handle sends the call over the bus.
            return;
        }
        let LocalCall {
            request,
            tool,
            params,
            timeout,
            traceparent,
            progress,
            caller,
            hash,
            answer,
        } = call;
        answer.taken();
        let facts = CallFacts {
            request: &request,
            tool: &tool,
            params: &params,
            traceparent: traceparent.as_deref(),
            hash,
            caller: Some(&caller),
            again: false,
        };
        self.run(&facts, Some(timeout), Caller::Local(answer, progress), actions);
    }

    /// Refuses a call of the bus for which there is no room.
    pub(super) fn refuse_busy(&self, call: &ToolCall<'_>) {
        self.agents().refuse(&self.place.inbox.user, call, Failure::AgentBusy);
    }

    fn run(
        &mut self,
        call: &CallFacts<'_>,
        timeout: Option<Duration>,
        caller: Caller,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let agents = std::sync::Arc::clone(self.agents());
        let now = actions.now();
        if self.is_ending {
            // The connection takes no message any more, so that the call would never be sent.
            return self.turn_away(call, caller, Failure::AgentOffline);
        }
        if agents.is_closing() || agents.in_flight() >= IN_FLIGHT_MAX {
            return self.turn_away(call, caller, Failure::InstanceBusy);
        }
        let config = &agents.config;
        let timeout = timeout.unwrap_or(config.call_timeout).min(config.call_timeout_max);
        let deadline = now.after(timeout.into());
        let calls = &mut self.calls.calls;
        let begun =
            calls.begin(call.request, call.hash, deadline.0, caller, now.0, agents.call_limits());
        match begun {
            Begun::Run => {}
            Begun::Joined => return,
            // The holder had the call already when it was handed on.
            Begun::Duplicate(_) if call.again => return agents.counters.repeated.add(1),
            Begun::Duplicate(caller) => return self.turn_away(call, caller, Failure::Duplicate),
            Begun::Conflict(caller) => return self.turn_away(call, caller, Failure::Conflict),
            Begun::Busy(caller) => return self.turn_away(call, caller, Failure::AgentBusy),
        }
        let record = Box::new(agents.begin_record(&self.place.inbox.user, call));
        let traceparent = record.traceparent.clone();
        if let Some(begun) = calls.call_mut(call.request) {
            begun.data.record = Some(record);
        }
        self.place.inbox.set_in_flight(calls.len());
        agents.in_flight.fetch_add(1, Relaxed);
        debug!(user_id = %self.place.inbox.user, request_id = %call.request, tool = call.tool,
            bytes = call.params.len(), "A call is sent to the agent.");
        let details = self.is_v2.then_some(CallDetails {
            deadline_ms: timeout.as_millis() as u64,
            traceparent: traceparent.as_deref(),
        });
        let message = writer::tool_call(call.request, call.tool, call.params, details.as_ref());
        actions.send(Kind::Text, &message);
    }

    /// Takes a response of the agent.
    pub(super) fn on_response(
        &mut self,
        response: &ToolResponse<'_>,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let counters = &self.place.inbox.agents.counters;
        match self.calls.calls.respond(&response.request, actions.now().0) {
            Responded::Finished(ended) => {
                self.finish(&response.request, ended, Answer::Response(response), actions.now());
            }
            Responded::Late => counters.late.add(1),
            Responded::Duplicate => counters.duplicate.add(1),
            Responded::Unknown => counters.unknown.add(1),
        }
    }

    /// Passes progress on, at most some times a second: the newest wins.
    pub(super) fn on_progress(
        &mut self,
        progress: &ToolProgress<'_>,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let now = actions.now();
        let InFlight { calls, delayed, .. } = &mut self.calls;
        let inbox = &self.place.inbox;
        let Some(call) = calls.call_mut(&progress.request) else {
            return inbox.agents.counters.unknown.add(1);
        };
        if now.since(call.data.passed) < PROGRESS_EVERY {
            if call.data.waiting.is_none() {
                delayed.push(progress.request.clone());
            }
            call.data.waiting = Some(answer::progress(&inbox.user, progress).into());
            return;
        }
        (call.data.passed, call.data.waiting) = (now, None);
        for caller in call.callers().iter() {
            inbox.agents.pass_progress(&inbox.user, caller, progress);
        }
    }

    /// Cancels a call for all its callers.
    pub(super) fn cancel(&mut self, request: &Id, actions: &mut dyn Actions<Infallible>) {
        if let Some(ended) = self.calls.calls.cancel(request, actions.now().0) {
            self.tell_agent(request, Outcome::Cancelled, actions);
            self.finish(request, ended, Answer::Failure(Failure::Cancelled), actions.now());
        }
    }

    /// Removes a caller of this process from a call.
    pub(super) fn hang_up(
        &mut self,
        request: &Id,
        caller: CallerId,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let is =
            |other: &Caller| matches!(other, Caller::Local(handle, _) if handle.id() == caller);
        self.leave(request, is, actions);
    }

    /// Removes a caller on the bus from a call.
    pub(super) fn leave_bus(
        &mut self,
        request: &Id,
        channel: &Id,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let is = |other: &Caller| matches!(other, Caller::Bus(caller) if caller.reply_to.as_ref() == Some(channel));
        self.leave(request, is, actions);
    }

    fn leave(
        &mut self,
        request: &Id,
        is: impl Fn(&Caller) -> bool,
        actions: &mut dyn Actions<Infallible>,
    ) {
        let answer = Answer::Failure(Failure::Cancelled);
        match self.calls.calls.leave(request, is, actions.now().0) {
            Left::Unknown => {}
            Left::Stays(caller) => {
                let inbox = &self.place.inbox;
                inbox.agents.answer(&inbox.user, (request, [0; 16]), caller, answer);
            }
            Left::Cancelled(ended) => {
                self.tell_agent(request, Outcome::Cancelled, actions);
                self.finish(request, ended, answer, actions.now());
            }
        }
    }

    /// Ends the calls whose deadline is over, and passes on the progress whose time has come.
    pub(super) fn expire(&mut self, actions: &mut dyn Actions<Infallible>) {
        let now = actions.now();
        for (request, ended) in self.calls.calls.expire(now.0) {
            self.tell_agent(&request, Outcome::Timeout, actions);
            self.finish(&request, ended, Answer::Failure(Failure::Timeout), now);
        }
        let InFlight { calls, delayed, .. } = &mut self.calls;
        let inbox = &self.place.inbox;
        for request in std::mem::take(delayed) {
            let Some(call) = calls.call_mut(&request) else { continue };
            let Some(waiting) = call.data.waiting.take() else { continue };
            call.data.passed = now;
            if let Some(progress) = decode(&waiting) {
                for caller in call.callers().iter() {
                    inbox.agents.pass_progress(&inbox.user, caller, &progress);
                }
            }
        }
    }

    /// Ends all calls, since the connection ends.
    pub(super) fn end_calls(&mut self, now: Micros) {
        for (request, ended) in self.calls.calls.end(now.0) {
            self.finish(&request, ended, Answer::Failure(Failure::AgentGone), now);
        }
    }

    /// Tells an agent that no caller waits for its response, if the agent understands that.
    fn tell_agent(&self, request: &Id, outcome: Outcome, actions: &mut dyn Actions<Infallible>) {
        if self.calls.cancels && !self.is_ending {
            actions.send(Kind::Text, &writer::tool_cancel(request, outcome.label()));
        }
    }

    /// Tells the callers of an ended call, and notes its end.
    fn finish(
        &mut self,
        request: &Id,
        ended: Ended<Caller, CallState>,
        answer: Answer<'_>,
        now: Micros,
    ) {
        let inbox = &self.place.inbox;
        let agents = &inbox.agents;
        let Ended { outcome, callers, begun, data } = ended;
        let took = now.since(Micros(begun));
        agents.in_flight.fetch_sub(1, Relaxed);
        inbox.set_in_flight(self.calls.calls.len());
        debug!(user_id = %inbox.user, request_id = %request, outcome = outcome.label(), took_ms = took.0 / 1000, "A call has ended.");
        let hash = data.record.as_ref().map_or([0; 16], |record| record.hash);
        for caller in callers {
            agents.answer(&inbox.user, (request, hash), caller, answer);
        }
        if let Some(record) = data.record {
            let id = (&inbox.user, request);
            agents.record(id, *record, outcome, answer.response(), Some(took));
        }
    }

    /// Refuses a caller whose call is not sent.
    fn turn_away(&self, call: &CallFacts<'_>, caller: Caller, failure: Failure) {
        let inbox = &self.place.inbox;
        inbox.agents.record_refused(&inbox.user, call, failure);
        let id = (call.request, call.hash);
        inbox.agents.answer(&inbox.user, id, caller, Answer::Failure(failure));
    }

    /// Returns whether a call in flight will be answered on the channel of a further caller.
    fn is_answered_there(&mut self, again: &ToolCall<'_>, caller: &BusCaller) -> bool {
        let Some(call) = self.calls.calls.call_mut(&again.request) else { return false };
        let hash = call.data.record.as_ref().map(|record| record.hash);
        let is_same = hash == Some(again.body_hash);
        is_same
            && call.callers().iter().any(|other| {
                // A kept outcome has a form of its own, and is stored.
                matches!(other, Caller::Bus(other)
                    if (&other.reply_to, other.keep) == (&caller.reply_to, caller.keep))
            })
    }
}

/// Reads progress that waited as callers get it: it has the agent's members beside others.
fn decode(payload: &[u8]) -> Option<ToolProgress<'_>> {
    match message::parse(payload) {
        Ok(AgentMessage::Progress(progress)) => Some(progress),
        _ => None,
    }
}

/// Least interval between two progress messages of one call.
const PROGRESS_EVERY: Micros = Micros(50_000);
