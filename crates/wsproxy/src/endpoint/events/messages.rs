//! The messages between the gateway and event clients, as JSON.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;
use wsproxy_proto::{history::Position, json, names::Id};

use crate::{logic::upstream::JSON_DEPTH_MAX, telemetry::time};

/// Message from a client.
#[derive(Debug, PartialEq, Eq)]
pub enum FromClient<'a> {
    /// Answer to a ping.
    Pong,
    /// Ping, which the gateway answers.
    Ping,
    /// Acknowledgement of the message with this id.
    Ack(Cow<'a, str>),
    /// Newer token.
    Refresh(Cow<'a, str>),
    /// Wish to resume, which only the first message may state.
    Resume,
    /// Message for a worker.
    Other,
}

/// Error of a client's message.
#[derive(Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Code for programs.
    pub code: &'static str,
    /// Text for people.
    pub message: String,
}

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Ack<'a> {
    #[serde(borrow, default)]
    event_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    ack_id: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Refresh<'a> {
    #[serde(borrow)]
    token: Cow<'a, str>,
}

/// Parses a client's message.
///
/// # Errors
/// `invalid_json`: not a JSON object. `invalid_message`: a message to the gateway lacks a member.
pub fn parse(payload: &[u8]) -> Result<FromClient<'_>, Invalid> {
    json::validate(payload, JSON_DEPTH_MAX)
        .map_err(|error| Invalid { code: "invalid_json", message: error.to_string() })?;
    if payload.trim_ascii_start().first() != Some(&b'{') {
        let message = "A message must be a JSON object.".into();
        return Err(Invalid { code: "invalid_json", message });
    }
    // A message without a `type`, or with one that is not a string, is for a worker.
    let Ok(Head { kind }) = serde_json::from_slice::<Head<'_>>(payload) else {
        return Ok(FromClient::Other);
    };
    let lacks =
        |what: &str| Invalid { code: "invalid_message", message: format!("{kind} needs {what}.") };
    Ok(match &*kind {
        "pong" => FromClient::Pong,
        "ping" => FromClient::Ping,
        "resume" => FromClient::Resume,
        "ack" => {
            let ack = serde_json::from_slice::<Ack<'_>>(payload).ok();
            let id = ack.and_then(|ack| ack.event_id.or(ack.ack_id));
            FromClient::Ack(id.ok_or_else(|| lacks("an event_id"))?)
        }
        "refresh" => {
            let refresh = serde_json::from_slice::<Refresh<'_>>(payload);
            FromClient::Refresh(refresh.map_err(|_| lacks("a token"))?.token)
        }
        _ => FromClient::Other,
    })
}

/// Wraps a client's message with its sender, for workers. The message stays byte for byte.
#[must_use]
pub fn upstream(connection: Uuid, user: &Id, message: &[u8]) -> Bytes {
    // UUIDs and ids contain no byte that JSON escapes.
    let head = format!(r#"{{"connection_id":"{connection}","user_id":"{user}","message":"#);
    let mut wrapped = BytesMut::with_capacity(head.len() + message.len() + 1);
    wrapped.put_slice(head.as_bytes());
    wrapped.put_slice(message);
    wrapped.put_u8(b'}');
    wrapped.freeze()
}

/// Verdict on a newer token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenVerdict {
    /// The token is valid.
    Good {
        /// User of the token.
        user: String,
        /// The token's `exp` in unix seconds, without the leeway; `None`: never.
        expires_at: Option<u64>,
    },
    /// The token is not valid, or cannot be checked now.
    Bad {
        /// Code for programs.
        code: String,
        /// Text for people.
        message: String,
    },
}

/// First message to a client.
#[derive(Debug)]
pub struct Connected<'a> {
    /// Id of the connection.
    pub connection: Uuid,
    /// User of the client's token.
    pub user: &'a Id,
    /// Id of this instance.
    pub server_id: &'a str,
    /// The token's `exp` in unix seconds, without the leeway.
    pub expires_at: Option<u64>,
    /// Seconds between pings, and seconds of silence after which the connection is closed.
    pub heartbeat: (f64, f64),
}

impl Connected<'_> {
    /// Returns the message as JSON. `position` is that of a client that does not resume.
    #[must_use]
    pub fn to_json(&self, position: Option<Position>) -> String {
        let (interval, timeout) = self.heartbeat;
        let mut message = json!({
            "type": "connected",
            "connection_id": self.connection,
            "user_id": self.user.as_str(),
            "server_id": self.server_id,
            "timestamp": time::rfc3339(),
            "expires_at": self.expires_at,
            "heartbeat": { "interval": number(interval), "timeout": number(timeout) },
        });
        if let Some(position) = position {
            message["event_id"] = position.to_string().into();
        }
        message.to_string()
    }
}

/// Writes whole seconds without a fraction.
fn number(seconds: f64) -> serde_json::Value {
    if seconds.fract() == 0.0 { json!(seconds as u64) } else { json!(seconds) }
}

/// Makes a `ping` or `pong`.
#[must_use]
pub fn beat(kind: &str) -> String {
    json!({ "type": kind, "timestamp": time::rfc3339() }).to_string()
}

/// Makes the reply to an accepted newer token.
#[must_use]
pub fn refreshed(expires_at: Option<u64>) -> String {
    json!({ "type": "refreshed", "expires_at": expires_at }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_understood_and_all_else_is_an_applications() {
        for (text, expected) in [
            (r#"{"type":"pong","event_id":"x","timestamp":"t"}"#, FromClient::Pong),
            (r#" {"a":1,"type":"ping"}"#, FromClient::Ping),
            (r#"{"type":"p\u0069ng"}"#, FromClient::Ping),
            (r#"{"type":"ack","event_id":"1-2"}"#, FromClient::Ack("1-2".into())),
            (r#"{"type":"ack","ack_id":"\u0031-2"}"#, FromClient::Ack("1-2".into())),
            (r#"{"type":"ack","ack_id":"a","event_id":"e"}"#, FromClient::Ack("e".into())),
            (r#"{"type":"refresh","token":"a.b.c"}"#, FromClient::Refresh("a.b.c".into())),
            (r#"{"type":"resume","last_event_id":""}"#, FromClient::Resume),
            (r#"{"type":"subscribe"}"#, FromClient::Other),
            (r#"{"type":5}"#, FromClient::Other),
            (r#"{"type":"ping","type":"pong"}"#, FromClient::Other),
            ("{}", FromClient::Other),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_object_or_lacks_something_is_refused() {
        for (text, code) in [
            ("", "invalid_json"),
            ("[]", "invalid_json"),
            ("5", "invalid_json"),
            (r#""{}""#, "invalid_json"),
            (r#"{"type":"ping""#, "invalid_json"),
            (r#"{"type":"ack"}"#, "invalid_message"),
            (r#"{"type":"ack","event_id":7}"#, "invalid_message"),
            (r#"{"type":"refresh"}"#, "invalid_message"),
            (r#"{"type":"refresh","token":null}"#, "invalid_message"),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap_err().code, code, "{text}");
        }
        assert_eq!(parse(b"{\"a\":\"\xff\"}").unwrap_err().code, "invalid_json");
        let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(128), "]".repeat(128));
        assert_eq!(parse(deep.as_bytes()).unwrap_err().code, "invalid_json");
    }

    #[test]
    fn the_deepest_message_that_is_valid_is_understood() {
        let deep = format!(r#"{{"a":{}{},"type":"pong"}}"#, "[".repeat(127), "]".repeat(127));
        assert_eq!(parse(deep.as_bytes()), Ok(FromClient::Pong));
    }

    #[test]
    fn a_message_goes_up_byte_for_byte() {
        let user = Id::parse("u|1").unwrap();
        let message = "{ \"b\":1.50,\n\"a\":\"\u{e9}\\u00e9\" }";
        let wrapped = upstream(Uuid::nil(), &user, message.as_bytes());
        let text = std::str::from_utf8(&wrapped).unwrap();
        assert!(text.ends_with(&format!(r#""message":{message}}}"#)), "{text}");
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(value["user_id"], "u|1");
        assert_eq!(value["connection_id"], Uuid::nil().to_string());
    }
}
