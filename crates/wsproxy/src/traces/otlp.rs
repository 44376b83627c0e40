//! Requests and answers of OTLP as protobuf. Writes only the fields that the gateway uses.
//!
//! The messages are those of opentelemetry-proto, `trace/v1` and `collector/trace/v1`, which are stable.

use crate::traces::span::{SpanData, Value};

/// Encodes an `ExportTraceServiceRequest`. `resource` are the attributes of all spans.
pub(super) fn request(resource: &[(String, String)], spans: &[SpanData]) -> Vec<u8> {
    let mut request = Writer(Vec::with_capacity(spans.len() * SPAN_BYTES));
    request.message(1, |resource_spans| {
        resource_spans.message(1, |message| {
            for (name, value) in resource {
                message.attribute(1, name, |any| any.bytes(1, value.as_bytes()));
            }
        });
        resource_spans.message(2, |scope_spans| {
            scope_spans.message(1, |scope| {
                scope.bytes(1, b"wsproxy");
                scope.bytes(2, env!("CARGO_PKG_VERSION").as_bytes());
            });
            for span in spans {
                scope_spans.message(2, |message| message.span(span));
            }
        });
    });
    request.0
}

/// The part of a request that a collector did not take.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PartialSuccess {
    pub(super) rejected_spans: u64,
    pub(super) message: String,
}

/// Reads an `ExportTraceServiceResponse`. What cannot be read counts as a whole success.
pub(super) fn read_answer(body: &[u8]) -> PartialSuccess {
    let mut partial = PartialSuccess::default();
    for (number, field) in Fields(body) {
        if let (1, Field::Bytes(message)) = (number, field) {
            for (number, field) in Fields(message) {
                match (number, field) {
                    (1, Field::Number(rejected)) => partial.rejected_spans = rejected,
                    (2, Field::Bytes(text)) => {
                        partial.message = String::from_utf8_lossy(text).into_owned();
                    }
                    _ => {}
                }
            }
        }
    }
    partial
}

/// Writer of protobuf fields.
struct Writer(Vec<u8>);

impl Writer {
    fn span(&mut self, span: &SpanData) {
        self.bytes(1, &span.context.trace.to_be_bytes());
        self.bytes(2, &span.context.span.to_be_bytes());
        if let Some(state) = &span.state {
            self.bytes(3, state.as_bytes());
        }
        if let Some(parent) = span.parent {
            self.bytes(4, &parent.span.to_be_bytes());
        }
        self.bytes(5, span.name.as_bytes());
        self.number(6, span.kind as u64);
        self.fixed64(7, span.start);
        self.fixed64(8, span.end);
        for (name, value) in span.attributes.iter() {
            self.attribute(9, name, |any| match value {
                Value::Word(text) => any.bytes(1, text.as_bytes()),
                Value::Text(text) => any.bytes(1, text.as_bytes()),
                Value::Switch(switch) => any.number(2, u64::from(*switch)),
                Value::Number(number) => any.number(3, *number as u64),
            });
        }
        if span.has_failed {
            self.message(15, |status| status.number(3, STATUS_ERROR));
        }
        let is_remote = span.parent.is_some_and(|parent| parent.is_remote);
        let remote = if is_remote { FLAG_IS_REMOTE } else { 0 };
        self.fixed32(16, FLAG_SAMPLED | FLAG_KNOWS_REMOTE | remote);
    }

    fn attribute(&mut self, field: u32, name: &str, value: impl FnOnce(&mut Self)) {
        self.message(field, |pair| {
            pair.bytes(1, name.as_bytes());
            pair.message(2, value);
        });
    }

    /// Writes a message. Its length is known last, and put before it.
    fn message(&mut self, field: u32, write: impl FnOnce(&mut Self)) {
        self.tag(field, WIRE_BYTES);
        let start = self.0.len();
        write(self);
        let end = self.0.len();
        self.varint((end - start) as u64);
        self.0[start..].rotate_left(end - start);
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.tag(field, WIRE_BYTES);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn number(&mut self, field: u32, number: u64) {
        self.tag(field, WIRE_VARINT);
        self.varint(number);
    }

    fn fixed64(&mut self, field: u32, number: u64) {
        self.tag(field, WIRE_FIXED64);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn fixed32(&mut self, field: u32, number: u32) {
        self.tag(field, WIRE_FIXED32);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn tag(&mut self, field: u32, wire: u32) {
        self.varint(u64::from(field << 3 | wire));
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }
}

/// Reader of protobuf fields, which ends at the first malformed one.
struct Fields<'a>(&'a [u8]);

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let tag = self.varint()?;
        let field = match (tag & 7) as u32 {
            WIRE_VARINT => Field::Number(self.varint()?),
            WIRE_BYTES => {
                let count = self.varint()?;
                Field::Bytes(self.take(count)?)
            }
            WIRE_FIXED64 => self.take(8).map(|_| Field::Other)?,
            WIRE_FIXED32 => self.take(4).map(|_| Field::Other)?,
            _ => return None,
        };
        Some((tag >> 3, field))
    }
}

/// Usual size of a span, to allocate once.
const SPAN_BYTES: usize = 512;

const WIRE_VARINT: u32 = 0;
const WIRE_FIXED64: u32 = 1;
const WIRE_BYTES: u32 = 2;
const WIRE_FIXED32: u32 = 5;

const STATUS_ERROR: u64 = 2;

const FLAG_SAMPLED: u32 = 1;
const FLAG_KNOWS_REMOTE: u32 = 0x100;
const FLAG_IS_REMOTE: u32 = 0x200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_length_before_it() {
        let mut writer = Writer(Vec::new());
        writer.message(1, |inner| inner.bytes(2, &[7; 200]));
        assert_eq!(writer.0[..6], [0x0a, 0xcb, 0x01, 0x12, 0xc8, 0x01]);
        assert_eq!(writer.0.len(), 206);
    }

    #[test]
    fn a_partial_success_is_read() {
        let mut writer = Writer(Vec::new());
        writer.message(1, |partial| {
            partial.number(1, 300);
            partial.bytes(2, b"too old");
        });
        let expected = PartialSuccess { rejected_spans: 300, message: "too old".into() };
        assert_eq!(read_answer(&writer.0), expected);
        for end in 0..writer.0.len() {
            // Any beginning is read without a panic.
            read_answer(&writer.0[..end]);
        }
        assert_eq!(read_answer(b""), PartialSuccess::default());
        assert_eq!(read_answer(b"{\"a\":1}"), PartialSuccess::default());
    }
}
