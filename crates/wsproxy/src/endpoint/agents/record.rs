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
};

/// Facts of a call that its end needs.
#[derive(Debug)]
pub(super) struct CallRecord {
    pub(super) tool: Box<str>,
    pub(super) params: Stored,
    pub(super) begun: SystemTime,
    /// Name of the API key; `None`: a caller over Redis.
    pub(super) caller: Option<Box<str>>,
    pub(super) traceparent: Option<Box<str>>,
    pub(super) hash: [u8; 16],
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
    pub(super) fn begin_record(&self, facts: &CallFacts<'_>) -> CallRecord {
        let params = self.audit.as_ref().map(|audit| audit.params(facts.params));
        CallRecord {
            tool: facts.tool.into(),
            params: params.unwrap_or_default(),
            begun: SystemTime::now(),
            caller: facts.caller.map(Into::into),
            traceparent: facts.traceparent.map(Into::into),
            hash: facts.hash,
        }
    }

    /// Notes the end of a call.
    pub(super) fn record(
        &self,
        (user, request): (&Id, &Id),
        record: CallRecord,
        outcome: Outcome,
        response: Option<&ToolResponse<'_>>,
        took: Option<Micros>,
    ) {
        self.counters.calls.count(outcome, took);
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
            let record = self.begin_record(facts);
            self.record((user, facts.request), record, outcome, None, None);
        }
    }
}
