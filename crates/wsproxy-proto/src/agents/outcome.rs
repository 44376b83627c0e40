//! The six outcomes of a call, and what else a caller may be told; knows no status of HTTP.

use std::fmt;

use crate::names::Id;

/// Outcome of a call. Every call that the gateway took has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The agent answered, with success or with an error of the tool.
    Response,
    /// The deadline passed. The tool may have run.
    Timeout,
    /// No agent of the user was connected. The call was never sent.
    AgentOffline,
    /// The agent's connection ended while the call was in flight. The tool may have run.
    AgentGone,
    /// The caller cancelled the call, or hung up. The tool may have run.
    Cancelled,
    /// The agent had too many calls in flight, or the instance takes none. The call was never sent.
    Busy,
}

impl Outcome {
    /// All outcomes, for metrics and documentation.
    pub const ALL: [Self; 6] = [
        Self::Response,
        Self::Timeout,
        Self::AgentOffline,
        Self::AgentGone,
        Self::Cancelled,
        Self::Busy,
    ];

    /// Returns the word that callers, metrics and the audit log see.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Response => "response",
            Self::Timeout => "timeout",
            Self::AgentOffline => "agent_offline",
            Self::AgentGone => "agent_gone",
            Self::Cancelled => "cancelled",
            Self::Busy => "busy",
        }
    }

    /// Returns the outcome with this label.
    #[must_use]
    pub fn parse(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.label() == label)
    }

    /// Returns the failure that callers are told; `None` where the agent answered.
    #[must_use]
    pub const fn failure(self) -> Option<Failure> {
        match self {
            Self::Response => None,
            Self::Timeout => Some(Failure::Timeout),
            Self::AgentOffline => Some(Failure::AgentOffline),
            Self::AgentGone => Some(Failure::AgentGone),
            Self::Cancelled => Some(Failure::Cancelled),
            Self::Busy => Some(Failure::AgentBusy),
        }
    }
}

/// Reason for which a caller gets no response of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// [`Outcome::Timeout`].
    Timeout,
    /// [`Outcome::AgentOffline`].
    AgentOffline,
    /// [`Outcome::AgentGone`].
    AgentGone,
    /// [`Outcome::Cancelled`].
    Cancelled,
    /// [`Outcome::Busy`]: too many calls are in flight to this agent, or too many callers wait for this one call.
    AgentBusy,
    /// [`Outcome::Busy`]: the instance takes no calls, since it drains or is full.
    InstanceBusy,
    /// A call with this request id has ended already. This caller's call was not run.
    Duplicate,
    /// Another call has this request id. This caller's call was not run.
    Conflict,
    /// The command names a request id, but is no call that the gateway understands.
    BadRequest,
}

impl Failure {
    /// All failures, for documentation and tests.
    pub const ALL: [Self; 9] = [
        Self::Timeout,
        Self::AgentOffline,
        Self::AgentGone,
        Self::Cancelled,
        Self::AgentBusy,
        Self::InstanceBusy,
        Self::Duplicate,
        Self::Conflict,
        Self::BadRequest,
    ];

    /// Returns the word by which callers tell failures apart.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::AgentOffline => "agent_offline",
            Self::AgentGone => "agent_gone",
            Self::Cancelled => "cancelled",
            Self::AgentBusy | Self::InstanceBusy => "busy",
            Self::Duplicate => "duplicate",
            Self::Conflict => "conflict",
            Self::BadRequest => "bad_request",
        }
    }

    /// Returns the outcome of the call; `None` where the call was not taken.
    #[must_use]
    pub const fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Timeout => Some(Outcome::Timeout),
            Self::AgentOffline => Some(Outcome::AgentOffline),
            Self::AgentGone => Some(Outcome::AgentGone),
            Self::Cancelled => Some(Outcome::Cancelled),
            Self::AgentBusy | Self::InstanceBusy => Some(Outcome::Busy),
            Self::Duplicate | Self::Conflict | Self::BadRequest => None,
        }
    }

    /// Returns the sentence for the caller of a tool on the agent of `user`.
    #[must_use]
    pub const fn message(self, user: &Id) -> FailureMessage<'_> {
        FailureMessage { failure: self, user }
    }
}

/// Sentence of a [`Failure`], to be written.
#[derive(Debug, Clone, Copy)]
pub struct FailureMessage<'a> {
    failure: Failure,
    user: &'a Id,
}

impl fmt::Display for FailureMessage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user;
        match self.failure {
            Failure::Timeout => write!(f, "The agent of {user} did not answer in time."),
            Failure::AgentOffline => write!(f, "No agent of {user} is connected."),
            Failure::AgentGone => write!(f, "The agent of {user} left before it answered."),
            Failure::Cancelled => f.write_str("The call was cancelled."),
            Failure::AgentBusy => write!(f, "The agent of {user} has too many calls in flight."),
            Failure::InstanceBusy => f.write_str("The instance takes no calls at the moment."),
            Failure::Duplicate => f.write_str("A call with this request id has ended already."),
            Failure::Conflict => f.write_str("Another call has this request id."),
            Failure::BadRequest => f.write_str("The command is no call that the gateway takes."),
        }
    }
}
