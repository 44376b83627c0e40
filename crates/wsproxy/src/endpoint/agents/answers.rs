//! Answers to callers: on their channels, or in this process. Knows neither connections nor which outcome a call has.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use wsproxy_proto::{
    agents::{
        answer::{self, Form},
        command::{self, BadCommand, Command, ToolCall},
        message::{ToolProgress, ToolResponse},
        outcome::Failure,
    },
    names::Id,
};

use crate::{
    bus::publish::{BusError, Keep, Outcome, Publish, awaited},
    endpoint::agents::{
        Agents,
        api::kept,
        caller::{CallEnd, CallerHandle, LocalCall},
        record::CallFacts,
    },
    hub::Hub,
    telemetry::counter::Counter,
};

/// Caller of a call, and how it gets its answer.
#[derive(Debug)]
pub(super) enum Caller {
    /// A caller on the bus.
    Bus(BusCaller),
    /// A caller in this process, and whether it wants progress.
    Local(CallerHandle, bool),
}

/// Caller on the bus.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BusCaller {
    /// The caller's own channel; `None`: that of the request.
    pub(super) reply_to: Option<Id>,
    /// The caller wants progress.
    pub(super) progress: bool,
    /// The outcome is kept for a caller that asks later.
    pub(super) keep: bool,
}

/// The answer to a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer<'a> {
    /// The agent's response.
    Response(&'a ToolResponse<'a>),
    /// There is no response.
    Failure(Failure),
}

impl BusCaller {
    pub(super) fn of(call: &ToolCall<'_>) -> Self {
        Self { reply_to: call.reply_to.clone(), progress: call.progress, keep: call.keep }
    }
}

impl<'a> Answer<'a> {
    pub(super) const fn response(&self) -> Option<&'a ToolResponse<'a>> {
        match self {
            Self::Response(response) => Some(response),
            Self::Failure(_) => None,
        }
    }

    fn failure(&self) -> Option<Failure> {
        match self {
            Self::Response(_) => None,
            Self::Failure(failure) => Some(*failure),
        }
    }

    fn write(&self, user: &Id, request: &Id, form: Form) -> Bytes {
        match self {
            Self::Response(response) => answer::response(user, response, form).into(),
            Self::Failure(failure) => answer::failure(user, request, *failure, form).into(),
        }
    }
}

impl Agents {
    /// Tells a caller the only answer to its call.
    pub(super) fn answer(
        &self,
        user: &Id,
        (request, hash): (&Id, [u8; 16]),
        caller: Caller,
        answer: Answer<'_>,
    ) {
        match caller {
            Caller::Local(handle, _) => {
                let body = answer.write(user, request, Form::Caller);
                handle.end(CallEnd { failure: answer.failure(), body });
            }
            Caller::Bus(BusCaller { reply_to: Some(channel), .. }) => {
                self.outcomes.publish(
                    self.names.response(&channel).into(),
                    answer.write(user, request, Form::Caller),
                );
            }
            Caller::Bus(BusCaller { keep: true, .. }) => {
                self.keep(request, hash, answer.write(user, request, Form::Caller));
            }
            Caller::Bus(_) => {
                self.outcomes.publish(
                    self.names.response(request).into(),
                    answer.write(user, request, Form::Request),
                );
            }
        }
    }

    /// Passes progress to a caller that wants it. Progress that the bus does not take is dropped.
    pub(super) fn pass_progress(&self, user: &Id, caller: &Caller, progress: &ToolProgress<'_>) {
        match caller {
            Caller::Local(handle, true) => handle.progress(answer::progress_data(progress).into()),
            Caller::Bus(BusCaller { reply_to: Some(channel), progress: true, .. }) => {
                let publish = Publish {
                    channel: self.names.response(channel).into(),
                    payload: answer::progress(user, progress).into(),
                    keep: Keep::Nothing,
                    receipt: None,
                };
                if self.hub.publish(publish).is_err() {
                    self.counters.dropped.add(1);
                }
            }
            Caller::Local(..) | Caller::Bus(_) => {}
        }
    }

    /// Refuses a call that was not sent to the agent.
    pub(super) fn refuse(&self, user: &Id, call: &ToolCall<'_>, failure: Failure) {
        self.record_refused(user, &CallFacts::from(call), failure);
        let caller = Caller::Bus(BusCaller::of(call));
        self.answer(user, (&call.request, call.body_hash), caller, Answer::Failure(failure));
    }

    /// Refuses a command that no connection takes; a large one after the present turn of the task.
    pub(super) fn refuse_command(self: &Arc<Self>, user: &Id, payload: Bytes, failure: Failure) {
        let (agents, user) = (Arc::clone(self), user.clone());
        self.aside.run(payload.len(), move || match command::parse(&payload) {
            Ok(Command::Call(call)) => agents.refuse(&user, &call, failure),
            Ok(_) => agents.counters.dropped.add(1),
            Err(bad) => agents.refuse_bad(&user, &bad),
        });
    }

    /// Hands on a call that perhaps no other connection has: the holder of the place gets the call, or the caller learns
    /// that there is no holder.
    pub(super) async fn hand_on(&self, user: &Id, payload: &[u8]) {
        let Ok(Command::Call(call)) = command::parse(payload) else { return };
        let (receipt, outcome) = awaited();
        let publish = Publish {
            channel: self.names.agent_commands(user).into(),
            payload: command::hand_on(&call).into(),
            keep: Keep::Nothing,
            receipt: Some(receipt),
        };
        let outcome = match self.hub.publish(publish) {
            Ok(()) => outcome.await.unwrap_or(Outcome::Lost),
            Err(_) => Outcome::Received(0),
        };
        match outcome {
            Outcome::Received(0) | Outcome::Refused(_) => {
                self.refuse(user, &call, Failure::AgentOffline);
            }
            // The holder answers. Of a lost publish it is unknown whether a holder has the call.
            _ => self.counters.handed_on.add(1),
        }
    }

    /// Refuses a command that is no call, where the caller can be told.
    pub(super) fn refuse_bad(&self, user: &Id, bad: &BadCommand) {
        self.counters.bad_commands.add(1);
        if let Some(request) = &bad.request {
            let caller = BusCaller { reply_to: bad.reply_to.clone(), progress: false, keep: false };
            let answer = Answer::Failure(Failure::BadRequest);
            self.answer(user, (request, [0; 16]), Caller::Bus(caller), answer);
        }
    }

    /// Refuses a call of this process that was not sent to the agent.
    pub(super) fn refuse_local(&self, user: &Id, call: LocalCall, failure: Failure) {
        let facts = CallFacts {
            request: &call.request,
            tool: &call.tool,
            params: &call.params,
            traceparent: call.traceparent.as_deref(),
            hash: call.hash,
            caller: Some(&call.caller),
            again: false,
        };
        self.record_refused(user, &facts, failure);
        let caller = Caller::Local(call.answer, call.progress);
        self.answer(user, (&call.request, call.hash), caller, Answer::Failure(failure));
    }

    /// Keeps an outcome for a caller that asks later, then tells one that may wait for it.
    fn keep(&self, request: &Id, hash: [u8; 16], body: Bytes) {
        let (store, names, request) = (self.store.clone(), self.names.clone(), request.clone());
        let outcomes = Arc::clone(&self.outcomes);
        self.tasks.spawn(async move {
            for pause in KEEP_PAUSES {
                match kept::store((&store, &names), &request, hash, &body).await {
                    Ok(()) => break,
                    Err(error) => {
                        warn!(request_id = %request, %error, "An outcome is not kept yet.");
                        tokio::time::sleep(pause).await;
                    }
                }
            }
            outcomes.publish(names.response(&request).into(), body);
        });
    }
}

/// Answers on their way to the bus. Those that do not fit into its queue wait here.
///
/// Invariant: at most `bytes_max` bytes wait. An answer beyond that is lost, and counted.
pub(super) struct Outcomes {
    hub: Arc<Hub>,
    bytes_max: usize,
    /// Guards the answers that wait.
    waiting: Mutex<Waiting>,
    wanted: Notify,
    /// Answers that are lost.
    pub(super) lost: Counter,
}

#[derive(Default)]
struct Waiting {
    answers: VecDeque<(Arc<str>, Bytes)>,
    bytes: usize,
}

impl Outcomes {
    pub(super) fn new(hub: Arc<Hub>, bytes_max: usize) -> Arc<Self> {
        let (waiting, wanted) = (Mutex::default(), Notify::new());
        Arc::new(Self { hub, bytes_max, waiting, wanted, lost: Counter::default() })
    }

    /// Publishes an answer, at once or as soon as the bus takes it.
    pub(super) fn publish(&self, channel: Arc<str>, payload: Bytes) {
        match self.offer(&channel, &payload) {
            Ok(()) => return,
            Err(BusError::Full) => {}
            Err(_) => return self.lost.add(1),
        }
        let bytes = payload.len() + ANSWER_BYTES;
        let mut waiting = self.waiting.lock();
        if waiting.bytes + bytes > self.bytes_max {
            return self.lost.add(1);
        }
        waiting.bytes += bytes;
        waiting.answers.push_back((channel, payload));
        drop(waiting);
        self.wanted.notify_one();
    }

    /// Publishes the answers that wait, until `end`.
    pub(super) async fn run(self: Arc<Self>, bus: crate::bus::Bus, end: CancellationToken) {
        loop {
            tokio::select! {
                () = end.cancelled() => break,
                () = self.wanted.notified() => {}
            }
            while !self.waiting.lock().answers.is_empty() {
                tokio::select! {
                    () = end.cancelled() => break,
                    () = bus.publishable() => self.publish_waiting(),
                }
            }
        }
        self.publish_waiting();
        self.lost.add(self.waiting.lock().answers.len() as u64);
    }

    fn publish_waiting(&self) {
        loop {
            let front = {
                let waiting = self.waiting.lock();
                waiting.answers.front().cloned()
            };
            let Some((channel, payload)) = front else { return };
            match self.offer(&channel, &payload) {
                Ok(()) => {}
                Err(BusError::Full) => return,
                Err(_) => self.lost.add(1),
            }
            let mut waiting = self.waiting.lock();
            waiting.bytes -= payload.len() + ANSWER_BYTES;
            waiting.answers.pop_front();
        }
    }

    fn offer(&self, channel: &Arc<str>, payload: &Bytes) -> Result<(), BusError> {
        self.hub.publish(Publish {
            channel: Arc::clone(channel),
            payload: payload.clone(),
            keep: Keep::Nothing,
            receipt: None,
        })
    }
}

/// Estimate of an answer's cost beside its payload.
const ANSWER_BYTES: usize = 256;

/// Pauses between the attempts to keep an outcome.
const KEEP_PAUSES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];
