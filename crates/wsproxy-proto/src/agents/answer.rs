//! Answers to callers on their channels: written by the instance of the agent, read by instances that relay calls.
//! Knows nothing of how callers are reached.

use std::io::Write;

use crate::{
    agents::{
        DEPTH_MAX,
        message::{ToolProgress, ToolResponse},
        outcome::{Failure, Outcome},
    },
    json::{
        self,
        members::{Member, Members},
    },
    names::Id,
};

/// Form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// For the channel of the request, as existing callers know it.
    Request,
    /// For a caller's own channel, where calls of many requests are answered: with `requestId` and `outcome`.
    Caller,
}

/// Writes the agent's response. The members of the agent stay as they are; absent ones are absent.
#[must_use]
pub fn response(user: &Id, response: &ToolResponse<'_>, form: Form) -> Vec<u8> {
    let ToolResponse { request, success, result, error, execution_time } = response;
    let (result, error) = (result.unwrap_or_default(), error.as_deref().unwrap_or_default());
    let mut out = Vec::with_capacity(256 + result.len() + error.len());
    // Writing into a Vec cannot fail. Ids need no escapes.
    let _ = write!(out, r#"{{"userId":"{user}","success":{success}"#);
    let execution_time = execution_time.unwrap_or_default();
    for (name, json) in [("result", result), ("error", error), ("executionTime", execution_time)] {
        if !json.is_empty() {
            let _ = write!(out, r#","{name}":"#);
            out.extend_from_slice(json);
        }
    }
    end(out, request, Some(Outcome::Response), form)
}

/// Writes that there is no response of the agent, and the reason. The two kinds of `busy` differ by `scope`. A call
/// that was not taken has no `outcome`.
#[must_use]
pub fn failure(user: &Id, request: &Id, failure: Failure, form: Form) -> Vec<u8> {
    let (code, message) = (failure.code(), failure.message(user));
    let mut out = Vec::with_capacity(400);
    // Neither codes nor messages have characters that need escapes.
    let _ = write!(
        out,
        r#"{{"userId":"{user}","success":false,"result":null,"error":"{code}: {message}","executionTime":null,"code":"{code}""#
    );
    if let Some(scope) = scope(failure) {
        let _ = write!(out, r#","scope":"{scope}""#);
    }
    end(out, request, failure.outcome(), form)
}

fn end(mut out: Vec<u8>, request: &Id, outcome: Option<Outcome>, form: Form) -> Vec<u8> {
    if form == Form::Caller {
        let _ = write!(out, r#","requestId":"{request}""#);
        if let Some(outcome) = outcome {
            let _ = write!(out, r#","outcome":"{}""#, outcome.label());
        }
    }
    out.push(b'}');
    out
}

const fn scope(failure: Failure) -> Option<&'static str> {
    match failure {
        Failure::AgentBusy => Some("agent"),
        Failure::InstanceBusy => Some("instance"),
        _ => None,
    }
}

/// Writes progress for a caller's own channel.
#[must_use]
pub fn progress(user: &Id, progress: &ToolProgress<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    let request = &progress.request;
    let _ = write!(out, r#"{{"type":"tool_progress","requestId":"{request}","userId":"{user}","#);
    out.extend_from_slice(&progress_data(progress)[1..]);
    out
}

/// Writes the members of progress alone, for an event stream.
#[must_use]
pub fn progress_data(progress: &ToolProgress<'_>) -> Vec<u8> {
    let ToolProgress { progress, total, message, .. } = progress;
    let mut out = Vec::with_capacity(64);
    out.extend_from_slice(br#"{"progress":"#);
    out.extend_from_slice(progress);
    for (name, json) in [("total", total), ("message", message)] {
        if let Some(json) = json {
            let _ = write!(out, r#","{name}":"#);
            out.extend_from_slice(json);
        }
    }
    out.push(b'}');
    out
}

/// Answer as it comes on a caller's own channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The only answer to a call.
    Ended(CallAnswer<'a>),
    /// Progress of a call.
    Progress {
        /// User of the agent.
        user: Id,
        /// Progress.
        progress: ToolProgress<'a>,
    },
}

/// The only answer to a call. Members of the agent are as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallAnswer<'a> {
    /// User of the agent.
    pub user: Id,
    /// Request id of the call.
    pub request: Id,
    /// Reason for which there is no response of the agent.
    pub failure: Option<Failure>,
    /// Whether the tool succeeded.
    pub success: bool,
    /// Result; any JSON value.
    pub result: Option<&'a [u8]>,
    /// Error: a JSON string, or `null`.
    pub error: Option<&'a [u8]>,
    /// Time that the tool took: a number, or `null`.
    pub execution_time: Option<&'a [u8]>,
}

impl<'a> Answer<'a> {
    /// Reads an answer; `None` where the payload is none of a gateway.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let read = Read::of(payload)?;
        let (user, request) = (id(read.user?)?, id(read.request?)?);
        if read.kind == Some(br#""tool_progress""#) {
            let Read { progress, total, message, .. } = read;
            let progress = ToolProgress { request, progress: progress?, total, message };
            return Some(Self::Progress { user, progress });
        }
        let failure = match read.code {
            Some(code) => Some(failure_of(&json::text::decode(code)?, read.scope)),
            None if read.outcome == Some(br#""response""#) => None,
            None => return None,
        };
        let success = read.success? == b"true";
        let Read { result, error, execution_time, .. } = read;
        Some(Self::Ended(CallAnswer {
            user,
            request,
            failure,
            success,
            result,
            error,
            execution_time,
        }))
    }
}

/// Members of an answer, as they were written.
#[derive(Default)]
struct Read<'a> {
    kind: Option<&'a [u8]>,
    user: Option<&'a [u8]>,
    request: Option<&'a [u8]>,
    outcome: Option<&'a [u8]>,
    code: Option<&'a [u8]>,
    scope: Option<&'a [u8]>,
    success: Option<&'a [u8]>,
    result: Option<&'a [u8]>,
    error: Option<&'a [u8]>,
    execution_time: Option<&'a [u8]>,
    progress: Option<&'a [u8]>,
    total: Option<&'a [u8]>,
    message: Option<&'a [u8]>,
}

impl<'a> Read<'a> {
    fn of(payload: &'a [u8]) -> Option<Self> {
        let mut read = Self::default();
        for member in Members::of(payload, DEPTH_MAX).ok()? {
            let Member { name, value } = member.ok()?;
            let slot = match &*name {
                "type" => &mut read.kind,
                "userId" => &mut read.user,
                "requestId" => &mut read.request,
                "outcome" => &mut read.outcome,
                "code" => &mut read.code,
                "scope" => &mut read.scope,
                "success" => &mut read.success,
                "result" => &mut read.result,
                "error" => &mut read.error,
                "executionTime" => &mut read.execution_time,
                "progress" => &mut read.progress,
                "total" => &mut read.total,
                "message" => &mut read.message,
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return None;
            }
        }
        Some(read)
    }
}

fn id(json: &[u8]) -> Option<Id> {
    Id::parse(&json::text::decode(json)?).ok()
}

/// Returns the failure with a code, and with a scope where several have that code.
fn failure_of(code: &str, scope_told: Option<&[u8]>) -> Failure {
    let scope_told = scope_told.and_then(json::text::decode);
    let mut of_code = Failure::ALL.into_iter().filter(|failure| failure.code() == code);
    // A gateway of a later version may have a code of its own. Then the tool may have run.
    let first = of_code.next().unwrap_or(Failure::AgentGone);
    of_code.find(|failure| scope(*failure) == scope_told.as_deref()).unwrap_or(first)
}
