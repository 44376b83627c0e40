//! Notes of calls that ended, for the metrics and for the audit log. Knows neither connections nor callers.

use std::time::{Duration, SystemTime};

use wsproxy_conn::clock::Micros;
use wsproxy_proto::{
    agents::{
        command::ToolCall,
        message::ToolResponse,
        outcome::{Failure, Outcome},
    },
    names::Id,
};

use crate::{
    audit::row::{AuditRow, Stored},
    endpoint::agents::Agents,
    traces::{Kind, Span, Value},
};

/// Facts of a call that its end needs.
pub(super) struct CallRecord {
    pub(super) tool: Box<str>,
    pub(super) params: Stored,
    pub(super) begun: SystemTime,
    /// Name of the API key; `None`: a caller over Redis.
    pub(super) caller: Option<Box<str>>,
    pub(super) traceparent: Option<Box<str>>,
    pub(super) hash: [u8; 16],
    /// Ends with the record.
    pub(super) span: Span,
}

/// A call as its command states it.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallFacts<'a> {
    pub(super) request: &'a Id,
    pub(super) tool: &'a str,
    pub(super) params: &'a [u8],
    pub(super) caller: Option<&'a str>,
    pub(super) traceparent: Option<&'a str>,
    pub(super) hash: [u8; 16],
    /// A gateway that had left the place handed the call on.
    pub(super) again: bool,
}

impl<'a> From<&'a ToolCall<'_>> for CallFacts<'a> {
    fn from(call: &'a ToolCall<'_>) -> Self {
        Self {
            request: &call.request,
            tool: &call.tool,
            params: call.params,
            traceparent: call.traceparent.as_deref(),
            hash: call.body_hash,
            caller: call.caller.as_deref(),
            again: call.again,
        }
    }
}

impl Agents {
    /// Makes the record of a call that begins.
    pub(super) fn begin_record(&self, user: &Id, facts: &CallFacts<'_>) -> CallRecord {
        let mut span = self.traces.begin_alone(facts.traceparent, "tool call", Kind::Client);
        span.add("wsproxy.user_id", || Value::text(user.as_str()));
        span.add("wsproxy.request_id", || Value::text(facts.request.as_str()));
        span.add("wsproxy.tool", || Value::text(facts.tool));
        span.add("wsproxy.caller", || Value::text(facts.caller.unwrap_or("redis")));
        let own = span.context().map(ToString::to_string);
        let params = self.audit.as_ref().map(|audit| audit.params(facts.params));
        CallRecord {
            tool: facts.tool.into(),
            params: params.unwrap_or_default(),
            begun: SystemTime::now(),
            caller: facts.caller.map(Into::into),
            traceparent: own.as_deref().or(facts.traceparent).map(Into::into),
            hash: facts.hash,
            span,
        }
    }

    /// Notes the end of a call.
    pub(super) fn record(
        &self,
        (user, request): (&Id, &Id),
        mut record: CallRecord,
        outcome: Outcome,
        response: Option<&ToolResponse<'_>>,
        took: Option<Micros>,
    ) {
        self.counters.calls.count(outcome, took);
        record.span.add("wsproxy.outcome", || outcome.label().into());
        match response {
            Some(response) if response.success => {}
            Some(_) => record.span.fail("tool_error", true),
            None => record.span.fail(outcome.label(), outcome != Outcome::Cancelled),
        }
        let Some(audit) = &self.audit else { return };
        audit.record(AuditRow {
            user,
            request,
            tool: &record.tool,
            params: record.params,
            result: response.and_then(|response| response.result),
            error: response
                .and_then(|response| response.error.as_deref())
                .filter(|error| *error != b"null"),
            success: response.map(|response| response.success),
            outcome,
            execution_time: response.and_then(|response| response.execution_time),
            begun: record.begun,
            took: took.map_or(Duration::ZERO, Into::into),
            caller: record.caller.as_deref(),
            traceparent: record.traceparent.as_deref(),
        });
    }

    /// Notes that a call was taken and not sent. A caller whose call has run before is no call of its own.
    pub(super) fn record_refused(&self, user: &Id, facts: &CallFacts<'_>, failure: Failure) {
        if let Some(outcome) = failure.outcome() {
            let record = self.begin_record(user, facts);
            self.record((user, facts.request), record, outcome, None, None);
        }
    }
}
