//! Commands on the channel of a user's agent: read from workers and gateways, written for other gateways. Knows
//! nothing of the agent's connection.

use std::{borrow::Cow, io::Write};

use uuid::Uuid;

use crate::{
    agents::{DEPTH_MAX, body_hash},
    json::{
        self,
        members::{Member, Members},
    },
    names::Id,
    trace_context::TraceContext,
};

/// Command on the channel of a user's agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command<'a> {
    /// Call of a tool, to be answered.
    Call(ToolCall<'a>),
    /// Wish of a caller to end a call.
    Cancel {
        /// Request id of the call.
        request: Id,
        /// Id of a caller's own channel: only the callers with that channel leave the call. `None`: the call ends
        /// for all its callers.
        reply_to: Option<Id>,
    },
    /// Marker of a gateway; never for the agent.
    Owner(Marker),
    /// Any other object, for the agent as it is: of another type, or a call without a request id.
    Other,
}

/// Call of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall<'a> {
    /// Request id.
    pub request: Id,
    /// Name of the tool.
    pub tool: Cow<'a, str>,
    /// Parameters as they were written; `{}` where there are none.
    pub params: &'a [u8],
    /// Time until the outcome timeout, at least 1, in milliseconds; a fraction is rounded up.
    pub timeout_ms: Option<u64>,
    /// Trace context of the caller. One that is malformed is ignored, as W3C asks.
    pub traceparent: Option<Cow<'a, str>>,
    /// Whether the caller wants progress; only with a channel of its own.
    pub progress: bool,
    /// Id of the caller's own channel `response:ID`, in place of that of the request.
    pub reply_to: Option<Id>,
    /// Whether the outcome is kept for a caller that asks later.
    pub keep: bool,
    /// A gateway that had left the place handed the call on, so that its holder may have it already.
    pub again: bool,
    /// Hash of tool and parameters.
    pub body_hash: [u8; 16],
    /// Name of the API key with which a call came over HTTP, written by a gateway.
    pub caller: Option<Cow<'a, str>>,
}

/// Marker on the commands channel: commands before it are for the former holder of the user's place, commands behind
/// it for the new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// Connection that holds the place; `None`: no connection holds it.
    pub connection: Option<Uuid>,
    /// Generation of the place.
    pub generation: u64,
    /// Connection that held the place until this marker, which may be the same one; `None`: no connection held it, or
    /// that is not known.
    pub former: Option<Uuid>,
}

/// Command that is dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}")]
pub struct BadCommand {
    /// Kind of the error.
    pub kind: BadCommandKind,
    /// Request id of a call that can be answered.
    pub request: Option<Id>,
    /// Id of the caller's own channel, where the call named a good one.
    pub reply_to: Option<Id>,
}

/// Ways in which a command is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCommandKind {
    /// The payload is not one JSON object of at most [`DEPTH_MAX`] levels.
    #[error("no JSON object")]
    NotAnObject,
    /// A member that the gateway reads stands twice.
    #[error("a member stands twice")]
    Repeated,
    /// The request id is no [`Id`], or a `tool_cancel` has none.
    #[error("bad requestId")]
    BadRequestId,
    /// The tool is no string.
    #[error("bad tool")]
    BadTool,
    /// The timeout is no positive number.
    #[error("bad timeout")]
    BadTimeout,
    /// The channel for the answer is no name `response:ID`.
    #[error("bad replyTo")]
    BadReplyTo,
    /// The marker names no connection or no generation.
    #[error("bad owner marker")]
    BadMarker,
}

/// Reads a command.
///
/// # Errors
/// [`BadCommand`], with the request id of a call whose other members are bad.
pub fn parse(payload: &[u8]) -> Result<Command<'_>, BadCommand> {
    let members = Read::of(payload)?;
    match members.kind.and_then(json::text::decode).as_deref() {
        Some("tool_call") => members.call(),
        Some("tool_cancel") => members.cancel(),
        Some("owner") => {
            members.marker().map(Command::Owner).ok_or_else(|| BadCommandKind::BadMarker.into())
        }
        _ => Ok(Command::Other),
    }
}

impl ToolCall<'_> {
    /// Returns the command as it goes over the channel.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(160 + self.tool.len() + self.params.len());
        // Writing into a Vec cannot fail. Ids need no escapes.
        let _ = write!(out, r#"{{"type":"tool_call","requestId":"{}","tool":"#, self.request);
        json::text::write(&self.tool, &mut out);
        out.extend_from_slice(br#","params":"#);
        out.extend_from_slice(self.params);
        if let Some(timeout) = self.timeout_ms {
            let _ = write!(out, r#","timeout":{timeout}"#);
        }
        for (name, text) in [("traceparent", &self.traceparent), ("caller", &self.caller)] {
            if let Some(text) = text {
                let _ = write!(out, r#","{name}":"#);
                json::text::write(text, &mut out);
            }
        }
        if let Some(channel) = &self.reply_to {
            let _ = write!(out, r#","replyTo":"response:{channel}""#);
        }
        if self.progress {
            out.extend_from_slice(br#","progress":true"#);
        }
        if self.keep {
            out.extend_from_slice(br#","keep":true"#);
        }
        if self.again {
            out.extend_from_slice(br#","again":true"#);
        }
        out.push(b'}');
        out
    }
}

/// Returns the command of a call as a gateway hands it on that has left the place: marked, and with the members that
/// gateways read.
#[must_use]
pub fn hand_on(call: &ToolCall<'_>) -> Vec<u8> {
    ToolCall { again: true, ..call.clone() }.encode()
}

/// Returns the command that cancels a call, as it goes over the channel: for the callers with a channel of their own,
/// or for all.
#[must_use]
pub fn cancel(request: &Id, reply_to: Option<&Id>) -> Vec<u8> {
    let mut out = format!(r#"{{"type":"tool_cancel","requestId":"{request}""#).into_bytes();
    if let Some(channel) = reply_to {
        // Writing into a Vec cannot fail.
        let _ = write!(out, r#","replyTo":"response:{channel}""#);
    }
    out.push(b'}');
    out
}

impl Marker {
    /// Returns the marker as it goes over the channel.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let json = |connection: Option<Uuid>| match connection {
            Some(connection) => format!("\"{connection}\""),
            None => "null".into(),
        };
        let (connection, former) = (json(self.connection), json(self.former));
        let generation = self.generation;
        format!(
            r#"{{"type":"owner","connectionId":{connection},"generation":"{generation}","former":{former}}}"#
        )
        .into_bytes()
    }
}

impl From<BadCommandKind> for BadCommand {
    fn from(kind: BadCommandKind) -> Self {
        Self { kind, request: None, reply_to: None }
    }
}

/// Members of a command that the gateway reads, as they were written; without those that are `null`.
#[derive(Default)]
struct Read<'a> {
    kind: Option<&'a [u8]>,
    request: Option<&'a [u8]>,
    tool: Option<&'a [u8]>,
    params: Option<&'a [u8]>,
    timeout: Option<&'a [u8]>,
    traceparent: Option<&'a [u8]>,
    progress: Option<&'a [u8]>,
    reply_to: Option<&'a [u8]>,
    keep: Option<&'a [u8]>,
    again: Option<&'a [u8]>,
    caller: Option<&'a [u8]>,
    connection: Option<&'a [u8]>,
    generation: Option<&'a [u8]>,
    former: Option<&'a [u8]>,
    /// A member stands twice that does not say what the command is. It matters to calls and markers alone.
    is_repeated: bool,
}

impl<'a> Read<'a> {
    fn of(payload: &'a [u8]) -> Result<Self, BadCommand> {
        let not_an_object = |_| BadCommand::from(BadCommandKind::NotAnObject);
        let mut read = Self::default();
        let mut is_ambiguous = false;
        for member in Members::of(payload, DEPTH_MAX).map_err(not_an_object)? {
            let Member { name, value } = member.map_err(not_an_object)?;
            let slot = match &*name {
                "type" => &mut read.kind,
                "requestId" => &mut read.request,
                "tool" => &mut read.tool,
                "params" => &mut read.params,
                "timeout" => &mut read.timeout,
                "traceparent" => &mut read.traceparent,
                "progress" => &mut read.progress,
                "replyTo" => &mut read.reply_to,
                "keep" => &mut read.keep,
                "again" => &mut read.again,
                "caller" => &mut read.caller,
                "connectionId" => &mut read.connection,
                "generation" => &mut read.generation,
                "former" => &mut read.former,
                _ => continue,
            };
            if slot.replace(value).is_some() {
                is_ambiguous |= matches!(&*name, "type" | "requestId");
                read.is_repeated = true;
            }
        }
        if is_ambiguous { Err(BadCommandKind::Repeated.into()) } else { Ok(read) }
    }

    /// Reads the request id; `None` where there is none.
    fn request(&self) -> Result<Option<Id>, BadCommand> {
        let Some(json) = present(self.request) else { return Ok(None) };
        let id = json::text::decode(json).and_then(|text| Id::parse(&text).ok());
        id.map(Some).ok_or_else(|| BadCommandKind::BadRequestId.into())
    }

    /// Reads the id of the caller's own channel; `None` where there is none.
    fn reply_to(&self) -> Result<Option<Id>, BadCommandKind> {
        let Some(json) = present(self.reply_to) else { return Ok(None) };
        let text = json::text::decode(json);
        let id = text.and_then(|text| Id::parse(text.strip_prefix("response:")?).ok());
        id.map(Some).ok_or(BadCommandKind::BadReplyTo)
    }

    fn cancel(self) -> Result<Command<'a>, BadCommand> {
        let request = self.request()?.ok_or(BadCommandKind::BadRequestId)?;
        let reply_to = self.reply_to()?;
        if self.is_repeated {
            Err(BadCommandKind::Repeated.into())
        } else {
            Ok(Command::Cancel { request, reply_to })
        }
    }

    fn call(self) -> Result<Command<'a>, BadCommand> {
        let Some(request) = self.request()? else { return Ok(Command::Other) };
        let (reply_to, result) = match self.reply_to() {
            Ok(reply_to) => {
                let call = self.tool_call(&request, reply_to.as_ref());
                (reply_to, call)
            }
            Err(kind) => (None, Err(kind)),
        };
        let bad =
            |kind| BadCommand { kind, request: Some(request.clone()), reply_to: reply_to.clone() };
        result.map(Command::Call).map_err(bad)
    }

    fn tool_call(
        &self,
        request: &Id,
        reply_to: Option<&Id>,
    ) -> Result<ToolCall<'a>, BadCommandKind> {
        if self.is_repeated {
            return Err(BadCommandKind::Repeated);
        }
        let tool = self.tool.and_then(json::text::decode).ok_or(BadCommandKind::BadTool)?;
        let params = self.params.unwrap_or(b"{}");
        let timeout_ms = match present(self.timeout) {
            Some(json) => Some(milliseconds(json).ok_or(BadCommandKind::BadTimeout)?),
            None => None,
        };
        let traceparent = self.traceparent.and_then(json::text::decode);
        Ok(ToolCall {
            request: request.clone(),
            body_hash: body_hash(&tool, params),
            tool,
            params,
            timeout_ms,
            traceparent: traceparent.filter(|text| TraceContext::parse(text.as_bytes()).is_some()),
            progress: self.progress == Some(b"true") && reply_to.is_some(),
            reply_to: reply_to.cloned(),
            keep: self.keep == Some(b"true"),
            again: self.again == Some(b"true"),
            caller: self.caller.and_then(json::text::decode),
        })
    }

    fn marker(&self) -> Option<Marker> {
        let uuid = |json| Uuid::try_parse(&json::text::decode(json)?).ok();
        let connection = match self.connection? {
            b"null" => None,
            json => Some(uuid(json)?),
        };
        let former = self.former.and_then(uuid);
        // The script writes the generation as a string, since numbers of that size are not safe everywhere.
        let generation = self.generation?;
        let generation = generation.strip_prefix(b"\"").unwrap_or(generation);
        let generation = generation.strip_suffix(b"\"").unwrap_or(generation);
        let generation = std::str::from_utf8(generation).ok()?.parse().ok()?;
        (!self.is_repeated).then_some(Marker { connection, generation, former })
    }
}

fn present(member: Option<&[u8]>) -> Option<&[u8]> {
    member.filter(|json| *json != b"null")
}

/// Reads a positive number of milliseconds. Far too large ones are the largest.
fn milliseconds(json: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(json).ok()?;
    if let Ok(whole) = text.parse::<u64>() {
        return (whole > 0).then_some(whole);
    }
    // The text is JSON, so it is a number of JSON or something else that begins differently.
    let is_number = matches!(json.first(), Some(b'0'..=b'9'));
    let number = text.parse::<f64>().ok().filter(|_| is_number)?;
    // `as` saturates.
    (number > 0.0).then_some(number.ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_handed_on_has_each_member_once() {
        let payload = br#"{"type":"tool_call","requestId":"q","tool":"t","again":false,"other":1}"#;
        let Ok(Command::Call(call)) = parse(payload) else { panic!("no call") };
        let handed_on = hand_on(&call);
        let Ok(Command::Call(again)) = parse(&handed_on) else { panic!("no call any more") };
        assert_eq!(again, ToolCall { again: true, ..call });
    }
}
