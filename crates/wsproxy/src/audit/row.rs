//! A row of the audit log, as callers state it and as it waits to be written. Knows no database.

use std::{
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use wsproxy_proto::{agents::outcome::Outcome, names::Id};

use crate::{
    audit::redaction::{Redaction, Sha256Hex, VALUE_BYTES_MAX, escape},
    database::sql::to_millis,
};

/// A call that ended, as the audit is told of it.
#[derive(Debug)]
pub struct AuditRow<'a> {
    /// User whose agent was called.
    pub user: &'a Id,
    /// Request id of the call.
    pub request: &'a Id,
    /// Name of the tool.
    pub tool: &'a str,
    /// Parameters: what [`params`](crate::audit::Audit::params) returned when the call began.
    pub params: Stored,
    /// Result as raw JSON, as the agent wrote it. `null` is none.
    pub result: Option<&'a [u8]>,
    /// Error as raw JSON: a string is stored as its text, any other value as its JSON; `null` is none. Of a call without
    /// a response the message of the outcome is stored.
    pub error: Option<&'a [u8]>,
    /// Success as the agent stated it; `None` is stored as false.
    pub success: Option<bool>,
    /// Outcome of the call.
    pub outcome: Outcome,
    /// The agent's `executionTime` in milliseconds as a raw JSON number. `None`: `took` is stored.
    pub execution_time: Option<&'a [u8]>,
    /// Time at which the gateway took the call.
    pub begun: SystemTime,
    /// Time from then until the outcome.
    pub took: Duration,
    /// Name of the API key that called; `None`: a caller over Redis.
    pub caller: Option<&'a str>,
    /// The caller's `traceparent`.
    pub traceparent: Option<&'a str>,
}

/// A value as the audit log stores it: JSON text that both databases take, without secrets if so configured.
#[derive(Debug, Default)]
pub struct Stored {
    /// The text; `None`: the value is not stored.
    pub(super) text: Option<Box<str>>,
    /// Bytes of the value as it came.
    pub(super) size: usize,
    /// Set if the text is not the whole value.
    pub(super) is_cut: bool,
    /// Share of the bound of parameters of calls that did not end yet.
    pub(super) _held: Option<Held>,
}

/// Guard of bytes that count towards a bound; dropping it gives them back.
#[derive(Debug)]
pub(super) struct Held {
    total: Arc<AtomicUsize>,
    bytes: usize,
}

/// A row as it waits to be written: all columns as both databases take them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) user: Id,
    pub(super) request: Id,
    pub(super) tool: Box<str>,
    pub(super) params: Option<Box<str>>,
    pub(super) result: Option<Box<str>>,
    pub(super) success: bool,
    pub(super) error: Option<Box<str>>,
    pub(super) execution_ms: i32,
    /// Milliseconds since the start of 1970, UTC.
    pub(super) begun: i64,
    pub(super) outcome: Outcome,
    /// A JSON object.
    pub(super) details: Box<str>,
}

impl Held {
    /// Takes bytes of what is left below `bytes_max`; `None`: there is not enough.
    pub(super) fn take(total: &Arc<AtomicUsize>, bytes: usize, bytes_max: usize) -> Option<Self> {
        let before = total.fetch_add(bytes, Relaxed);
        let held = Self { total: Arc::clone(total), bytes };
        // Dropped again where it is too much.
        (before + bytes <= bytes_max).then_some(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Relaxed);
    }
}

impl Waiting {
    /// Makes a row ready to be written. `results` is the form of results and errors.
    pub(super) fn new(row: AuditRow<'_>, results: &Redaction, server: &str) -> Self {
        // Agents write null for what there is not.
        let is_value = |raw: &&[u8]| raw.trim_ascii() != b"null";
        let result = row.result.filter(is_value).map(|raw| results.store(raw));
        let error = match (row.error.filter(is_value), row.outcome.failure()) {
            (Some(raw), _) => Some(results.error(raw)),
            (None, Some(failure)) => {
                Some(plain(&failure.message(row.user).to_string(), VALUE_BYTES_MAX))
            }
            (None, None) => None,
        };
        Self {
            user: row.user.clone(),
            request: row.request.clone(),
            tool: plain(row.tool, TOOL_BYTES_MAX),
            success: row.success.unwrap_or(false),
            error,
            execution_ms: row.execution_time.map_or_else(|| millis(row.took), number_of_millis),
            begun: to_millis(row.begun),
            outcome: row.outcome,
            details: details(&row, result.as_ref(), server),
            params: row.params.text,
            result: result.and_then(|result| result.text),
        }
    }

    /// Returns this row in a form that any database takes: values that it may have refused are base64 in ASCII.
    pub(super) fn encoded(&self, code: &str) -> Self {
        let json = |text: &str| -> Box<str> {
            let base64 = STANDARD.encode(text);
            format!(r#"{{"note":"{NOTE} ({code})","base64":"{base64}"}}"#).into()
        };
        let text = |text: &str| -> Box<str> {
            format!("{NOTE} ({code}): base64 {}", STANDARD.encode(text)).into()
        };
        Self {
            // A short name of plain characters is not what the database refused.
            tool: if self.tool.len() <= 64 && self.tool.is_ascii() {
                self.tool.clone()
            } else {
                format!("base64 {}", STANDARD.encode(&*self.tool)).chars().take(64).collect()
            },
            params: self.params.as_deref().map(json),
            result: self.result.as_deref().map(json),
            error: self.error.as_deref().map(text),
            details: json(&self.details),
            ..self.clone()
        }
    }

    /// Returns the bytes that this row weighs in the queue.
    pub(super) fn bytes(&self) -> usize {
        let values = [&self.params, &self.result, &self.error];
        let values = values.into_iter().flatten().map(|text| text.len()).sum::<usize>();
        let ids = self.user.as_str().len() + self.request.as_str().len();
        size_of::<Self>() + values + ids + self.tool.len() + self.details.len()
    }
}

/// Returns a text that a column takes: PostgreSQL refuses NUL. A longer one is cut, and says so.
pub(super) fn plain(text: &str, bytes_max: usize) -> Box<str> {
    if text.len() <= bytes_max && !text.contains('\0') {
        return text.into();
    }
    let mut plain = text.replace('\0', "\u{fffd}");
    if plain.len() > bytes_max {
        let hash = Sha256Hex::of(text.as_bytes());
        let end = format!(" [truncated: {} bytes, sha256 {hash}]", text.len());
        plain.truncate(plain.floor_char_boundary(bytes_max.saturating_sub(end.len())));
        plain.push_str(&end);
    }
    plain.into()
}

/// Returns the agent's `executionTime` as the column takes it, an INT; 0 for what is no number.
fn number_of_millis(raw: &[u8]) -> i32 {
    let number = str::from_utf8(raw).ok().and_then(|text| text.trim().parse::<f64>().ok());
    // The conversion saturates, and makes 0 of NaN.
    number.map_or(0, |number| number.round().max(0.0) as i32)
}

fn millis(duration: Duration) -> i32 {
    duration.as_millis().try_into().unwrap_or(i32::MAX)
}

/// Returns the column `details`.
fn details(row: &AuditRow<'_>, result: Option<&Stored>, server: &str) -> Box<str> {
    let mut text = String::with_capacity(256);
    let mut member = |name: &str, value: &str| {
        let _ = write!(text, "{}\"{name}\":\"", if text.is_empty() { '{' } else { ',' });
        escape(value, usize::MAX, &mut text);
        text.push('"');
    };
    member("server", server);
    member("caller", row.caller.unwrap_or(CALLER_REDIS));
    if let Some(trace) = row.traceparent.and_then(trace_id) {
        member("trace_id", trace);
    }
    let _ = write!(text, r#","took_ms":{},"params_bytes":{}"#, millis(row.took), row.params.size);
    if let Some(result) = result {
        let _ = write!(text, r#","result_bytes":{}"#, result.size);
    }
    let cut = [("params", Some(&row.params)), ("result", result)];
    let mut cut = cut.into_iter().filter(|(_, value)| value.is_some_and(|value| value.is_cut));
    if let Some((first, _)) = cut.next() {
        let _ = write!(text, r#","truncated":["{first}""#);
        if let Some((second, _)) = cut.next() {
            let _ = write!(text, r#","{second}""#);
        }
        text.push(']');
    }
    text.push('}');
    text.into()
}

/// Returns the trace id of a `traceparent` header.
fn trace_id(traceparent: &str) -> Option<&str> {
    let id = traceparent.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

/// Begins a value that is stored as base64.
const NOTE: &str = "The database refused this value";

/// Caller in `details` of calls that came over Redis.
const CALLER_REDIS: &str = "redis";

/// Upper bound of a stored name of a tool.
const TOOL_BYTES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fit_into_an_int() {
        for (raw, millis) in [
            ("12", 12),
            ("12.6", 13),
            ("-5", 0),
            ("1e300", i32::MAX),
            ("2147483648", i32::MAX),
            ("null", 0),
            ("\"12\"", 0),
        ] {
            assert_eq!(number_of_millis(raw.as_bytes()), millis, "{raw}");
        }
        assert_eq!(millis(Duration::from_secs(u64::MAX)), i32::MAX);
    }

    #[test]
    fn trace_ids_are_those_of_the_header() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{id}-00f067aa0ba902b7-01")), Some(id));
        for bad in ["", "00", "00-x-y-z", &format!("00-{}\"-0-0", &id[1..])] {
            assert_eq!(trace_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn texts_lose_nul_and_what_is_too_long() {
        assert_eq!(&*plain("a\0b", 10), "a\u{fffd}b");
        let cut = plain(&"é".repeat(1000), 200);
        assert!(
            cut.len() <= 200
                && cut.ends_with(']')
                && cut.contains("[truncated: 2000 bytes, sha256 ")
        );
    }

    #[test]
    fn held_bytes_are_bounded_and_given_back() {
        let total = Arc::default();
        let first = Held::take(&total, 60, 100).unwrap();
        assert!(Held::take(&total, 60, 100).is_none());
        let second = Held::take(&total, 40, 100).unwrap();
        drop((first, second));
        assert_eq!(total.load(Relaxed), 0);
    }
}
