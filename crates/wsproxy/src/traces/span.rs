//! A finished part of a trace, as it waits for the collector. Knows neither the queue nor the form on the wire.

use std::{borrow::Cow, sync::Arc};

use wsproxy_proto::trace_context::TraceContext;

/// A span that has ended.
#[derive(Debug)]
pub(super) struct SpanData {
    pub(super) context: TraceContext,
    pub(super) parent: Option<Parent>,
    /// `tracestate` of the caller.
    pub(super) state: Option<Arc<str>>,
    pub(super) name: Cow<'static, str>,
    pub(super) kind: Kind,
    /// Nanoseconds since the start of 1970.
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) attributes: Attributes,
    /// The work failed through a fault of the gateway or of a server behind it.
    pub(super) has_failed: bool,
}

/// The span above another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    pub(super) span: u64,
    /// The span belongs to another process.
    pub(super) is_remote: bool,
}

/// Relation of a span to other processes, with the number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A part of the gateway's own work.
    Internal = 1,
    /// The answer to a request.
    Server = 2,
    /// A request to another process, with its answer.
    Client = 3,
    /// A message to other processes.
    Producer = 4,
}

/// Attributes of a span.
///
/// Invariant: at most [`ATTRIBUTES_MAX`], each with at most [`TEXT_BYTES_MAX`] bytes of text, so that the queue's bound
/// in spans is one in bytes.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<(&'static str, Value)>);

/// Value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Text that the program has.
    Word(&'static str),
    /// Text of a request: an id, an address, a path.
    Text(Box<str>),
    /// A number.
    Number(i64),
    /// A switch.
    Switch(bool),
}

impl Attributes {
    pub(super) fn add(&mut self, name: &'static str, value: impl Into<Value>) {
        if self.0.len() < ATTRIBUTES_MAX {
            self.0.push((name, value.into()));
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(&'static str, Value)> {
        self.0.iter()
    }
}

impl From<&'static str> for Value {
    fn from(word: &'static str) -> Self {
        Self::Word(word)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<bool> for Value {
    fn from(switch: bool) -> Self {
        Self::Switch(switch)
    }
}

impl Value {
    /// Makes the value of a text, which is cut to [`TEXT_BYTES_MAX`].
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self::Text(text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into())
    }
}

/// Upper bound of a text.
const TEXT_BYTES_MAX: usize = 256;

/// Upper bound of the attributes of a span.
const ATTRIBUTES_MAX: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_bounded() {
        let mut attributes = Attributes::default();
        for _ in 0..100 {
            attributes.add("a", Value::text(&"\u{e4}".repeat(1000)));
        }
        assert_eq!(attributes.iter().count(), ATTRIBUTES_MAX);
        assert!(attributes.iter().all(|(_, value)| *value == Value::text(&"\u{e4}".repeat(128))));
    }
}
