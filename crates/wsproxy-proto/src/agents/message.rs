//! Messages of users' agents to the gateway; knows nothing of the calls that they answer.

use std::borrow::Cow;

use crate::{
    agents::DEPTH_MAX,
    json::{
        self,
        members::{Member, Members},
    },
    names::Id,
};

/// Message of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentMessage<'a> {
    /// Sign of life.
    Heartbeat,
    /// Description of the agent; sent by agents of version 2.
    Hello(Hello<'a>),
    /// Answer to a call.
    Response(ToolResponse<'a>),
    /// Progress of a call; of agents of version 2.
    Progress(ToolProgress<'a>),
}

/// Description of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hello<'a> {
    /// Version of the agent's program.
    pub version: Option<Cow<'a, str>>,
    /// Platform on which the agent runs.
    pub platform: Option<Cow<'a, str>>,
    /// Whether the agent understands `tool_cancel`.
    pub cancel: bool,
}

/// Answer to a call. Its members are those that callers get, as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolResponse<'a> {
    /// Request id of the call.
    pub request: Id,
    /// Whether the tool succeeded.
    pub success: bool,
    /// Result; any JSON value.
    pub result: Option<&'a [u8]>,
    /// Error: a JSON string, or `null`. Of another value, its JSON text in a string.
    pub error: Option<Cow<'a, [u8]>>,
    /// Time that the tool took: a number, or `null`. Another value is left out.
    pub execution_time: Option<&'a [u8]>,
}

/// Progress of a call. Its members are those that callers get, as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolProgress<'a> {
    /// Request id of the call.
    pub request: Id,
    /// Progress made; a number.
    pub progress: &'a [u8],
    /// Progress at the end: a number, or `null`.
    pub total: Option<&'a [u8]>,
    /// Message for people: a string, or `null`.
    pub message: Option<&'a [u8]>,
}

/// Invalid message of an agent: a strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// The message is not one JSON object of at most [`DEPTH_MAX`] levels.
    #[error("no JSON object")]
    NotAnObject,
    /// A member that the gateway reads stands twice.
    #[error("a member stands twice")]
    Repeated,
    /// The type is none that agents send.
    #[error("unknown type")]
    UnknownType,
    /// The request id is absent or no [`Id`].
    #[error("bad requestId")]
    BadRequestId,
    /// `success` is absent or no boolean.
    #[error("bad success")]
    BadSuccess,
    /// Progress or total is no number, or the message of a progress no string.
    #[error("bad progress")]
    BadProgress,
    /// The hello is larger than [`HELLO_BYTES_MAX`], or has a version, platform or capabilities of another form.
    #[error("bad hello")]
    BadHello,
}

impl BadMessage {
    /// Returns the word for the agent and for metrics.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NotAnObject => "invalid_json",
            Self::Repeated => "repeated_member",
            Self::UnknownType => "unknown_type",
            Self::BadRequestId => "bad_request_id",
            Self::BadSuccess => "bad_success",
            Self::BadProgress => "bad_progress",
            Self::BadHello => "bad_hello",
        }
    }
}

/// Reads a message of an agent.
///
/// # Errors
/// [`BadMessage`].
pub fn parse(payload: &[u8]) -> Result<AgentMessage<'_>, BadMessage> {
    let read = Read::of(payload)?;
    match read.kind.and_then(json::text::decode).as_deref() {
        Some("heartbeat") => Ok(AgentMessage::Heartbeat),
        Some("tool_response") => read.response().map(AgentMessage::Response),
        Some("tool_progress") => read.progress().map(AgentMessage::Progress),
        Some("hello") if payload.len() > HELLO_BYTES_MAX => Err(BadMessage::BadHello),
        Some("hello") => read.hello().map(AgentMessage::Hello).ok_or(BadMessage::BadHello),
        _ => Err(BadMessage::UnknownType),
    }
}

/// Members of a message that the gateway reads, as they were written.
#[derive(Default)]
struct Read<'a> {
    kind: Option<&'a [u8]>,
    request: Option<&'a [u8]>,
    success: Option<&'a [u8]>,
    result: Option<&'a [u8]>,
    error: Option<&'a [u8]>,
    execution_time: Option<&'a [u8]>,
    progress: Option<&'a [u8]>,
    total: Option<&'a [u8]>,
    message: Option<&'a [u8]>,
    version: Option<&'a [u8]>,
    platform: Option<&'a [u8]>,
    capabilities: Option<&'a [u8]>,
}

impl<'a> Read<'a> {
    fn of(payload: &'a [u8]) -> Result<Self, BadMessage> {
        let not_an_object = |_| BadMessage::NotAnObject;
        let mut read = Self::default();
        let mut is_repeated = false;
        for member in Members::of(payload, DEPTH_MAX).map_err(not_an_object)? {
            let Member { name, value } = member.map_err(not_an_object)?;
            let slot = match &*name {
                "type" => &mut read.kind,
                "requestId" => &mut read.request,
                "success" => &mut read.success,
                "result" => &mut read.result,
                "error" => &mut read.error,
                "executionTime" => &mut read.execution_time,
                "progress" => &mut read.progress,
                "total" => &mut read.total,
                "message" => &mut read.message,
                "version" => &mut read.version,
                "platform" => &mut read.platform,
                "capabilities" => &mut read.capabilities,
                _ => continue,
            };
            is_repeated |= slot.replace(value).is_some();
        }
        if is_repeated { Err(BadMessage::Repeated) } else { Ok(read) }
    }

    fn request(&self) -> Result<Id, BadMessage> {
        let text = self.request.and_then(json::text::decode).ok_or(BadMessage::BadRequestId)?;
        Id::parse(&text).map_err(|_| BadMessage::BadRequestId)
    }

    fn response(self) -> Result<ToolResponse<'a>, BadMessage> {
        let request = self.request()?;
        let success = match self.success {
            Some(b"true") => true,
            Some(b"false") => false,
            _ => return Err(BadMessage::BadSuccess),
        };
        let error = self.error.map(|json| match json {
            b"null" | [b'"', ..] => Cow::Borrowed(json),
            other => {
                let mut text = Vec::with_capacity(other.len() + 16);
                json::text::write(&String::from_utf8_lossy(other), &mut text);
                Cow::Owned(text)
            }
        });
        let execution_time = self.execution_time.filter(|json| *json == b"null" || is_number(json));
        Ok(ToolResponse { request, success, result: self.result, error, execution_time })
    }

    fn progress(self) -> Result<ToolProgress<'a>, BadMessage> {
        let request = self.request()?;
        let progress = self.progress.filter(|json| is_number(json));
        let is_good = self.total.is_none_or(|json| json == b"null" || is_number(json))
            && self.message.is_none_or(|json| json == b"null" || json.starts_with(b"\""));
        let progress = progress.filter(|_| is_good).ok_or(BadMessage::BadProgress)?;
        Ok(ToolProgress { request, progress, total: self.total, message: self.message })
    }

    fn hello(self) -> Option<Hello<'a>> {
        let mut hello = Hello {
            version: word(self.version)?,
            platform: word(self.platform)?,
            ..Hello::default()
        };
        if let Some(capabilities) = self.capabilities.filter(|json| *json != b"null") {
            hello.cancel = json::text::strings(capabilities)?.iter().any(|word| word == "cancel");
        }
        Some(hello)
    }
}

fn is_number(json: &[u8]) -> bool {
    matches!(json.first(), Some(b'-' | b'0'..=b'9'))
}

/// Reads a short word for lists and logs, which may be absent.
fn word(json: Option<&[u8]>) -> Option<Option<Cow<'_, str>>> {
    let Some(json) = json.filter(|json| *json != b"null") else { return Some(None) };
    let text = json::text::decode(json)?;
    let is_plain = text.len() <= HELLO_WORD_BYTES_MAX && !text.chars().any(char::is_control);
    is_plain.then_some(Some(text))
}

/// Upper bound of a hello, in bytes.
pub const HELLO_BYTES_MAX: usize = 4096;

/// Upper bound of the version and of the platform in a hello, in bytes.
pub const HELLO_WORD_BYTES_MAX: usize = 64;
