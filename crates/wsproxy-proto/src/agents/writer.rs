//! Messages of the gateway to users' agents: of version 1 with exactly the members that existing agents know. Knows
//! nothing of connections.

use std::{io::Write, time::Duration};

use uuid::Uuid;

use crate::{json, names::Id};

/// Further members of `connected` for agents of version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectedDetails {
    /// Id of the connection.
    pub connection: Uuid,
    /// Time after which an agent that says nothing else sends a heartbeat.
    pub interval: Duration,
    /// Time without a message after which the connection is closed.
    pub timeout: Duration,
}

/// Writes the first message of every connection. `timestamp_ms` is the gateway's wall clock.
#[must_use]
pub fn connected(
    user: &Id,
    timestamp_ms: u64,
    server: &str,
    details: Option<&ConnectedDetails>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(240);
    // Writing into a Vec cannot fail. Ids need no escapes.
    let _ = write!(
        out,
        r#"{{"type":"connected","userId":"{user}","timestamp":{timestamp_ms},"serverId":"#
    );
    json::text::write(server, &mut out);
    if let Some(ConnectedDetails { connection, interval, timeout }) = details {
        let (interval, timeout) = (interval.as_millis(), timeout.as_millis());
        let _ = write!(
            out,
            r#","connectionId":"{connection}","heartbeat":{{"interval":{interval},"timeout":{timeout}}}"#
        );
    }
    out.push(b'}');
    out
}

/// Writes the answer to a heartbeat. `timestamp_ms` is the gateway's wall clock.
#[must_use]
pub fn heartbeat_ack(timestamp_ms: u64) -> Vec<u8> {
    format!(r#"{{"type":"heartbeat_ack","timestamp":{timestamp_ms}}}"#).into_bytes()
}

/// Further members of `tool_call` for agents of version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallDetails<'a> {
    /// Time that remains until the outcome timeout, in milliseconds.
    pub deadline_ms: u64,
    /// Trace context of the caller.
    pub traceparent: Option<&'a str>,
}

/// Writes a call. `params` is JSON, and stays as it is.
#[must_use]
pub fn tool_call(
    request: &Id,
    tool: &str,
    params: &[u8],
    details: Option<&CallDetails<'_>>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(192 + tool.len() + params.len());
    let _ = write!(out, r#"{{"type":"tool_call","requestId":"{request}","tool":"#);
    json::text::write(tool, &mut out);
    out.extend_from_slice(br#","params":"#);
    out.extend_from_slice(params);
    if let Some(CallDetails { deadline_ms, traceparent }) = details {
        let _ = write!(out, r#","deadlineMs":{deadline_ms}"#);
        if let Some(traceparent) = traceparent {
            out.extend_from_slice(br#","traceparent":"#);
            json::text::write(traceparent, &mut out);
        }
    }
    out.push(b'}');
    out
}

/// Writes that a call has ended otherwise than by the agent's response, for an agent that said `cancel`. `reason` is a
/// label of an outcome.
#[must_use]
pub fn tool_cancel(request: &Id, reason: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(96);
    let _ = write!(out, r#"{{"type":"tool_cancel","requestId":"{request}","reason":"#);
    json::text::write(reason, &mut out);
    out.push(b'}');
    out
}

/// Writes that a message of the agent was invalid.
#[must_use]
pub fn error(code: &str, message: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + message.len());
    out.extend_from_slice(br#"{"type":"error","code":"#);
    json::text::write(code, &mut out);
    out.extend_from_slice(br#","message":"#);
    json::text::write(message, &mut out);
    out.push(b'}');
    out
}
