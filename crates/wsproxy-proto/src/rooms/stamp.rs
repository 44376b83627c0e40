//! Puts the gateway's word behind a client's envelope, whose bytes stay as they are.
//!
//! Of a field that stands twice every protobuf decoder takes the last one, so a client's own `sender` loses and nothing is
//! encoded again.

use super::v1::MessageType;

/// Fields that a stamp adds to an envelope beside its sender. The default adds none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp {
    /// Type of the message, where the envelope has none.
    pub message_type: Option<MessageType>,
    /// Whether the envelope came with a `seq`, which only a gateway may set.
    pub overrules_seq: bool,
}

/// Appends to `out` the envelope of `sender` (empty: a worker) with its stamp, and with `seq` if there is one.
pub fn stamp(envelope: &[u8], stamp: Stamp, sender: &str, seq: Option<u64>, out: &mut Vec<u8>) {
    out.reserve(envelope.len() + STAMP_BYTES_MAX + sender.len());
    out.extend_from_slice(envelope);
    if let Some(message_type) = stamp.message_type {
        out.push(TYPE);
        varint(message_type as u64, out);
    }
    out.extend_from_slice(&SENDER);
    varint(sender.len() as u64, out);
    out.extend_from_slice(sender.as_bytes());
    if let Some(seq) = seq.or_else(|| stamp.overrules_seq.then_some(0)) {
        append_seq(seq, out);
    }
}

/// Appends the number of a reliable message, which overrules one that stands before it, to the envelope in `out`.
pub fn append_seq(seq: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&SEQ);
    varint(seq, out);
}

/// Appends the client that the envelope in `out` is for, which overrules one that stands before it.
pub fn append_to(client: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&TO);
    varint(client.len() as u64, out);
    out.extend_from_slice(client.as_bytes());
}

pub(super) fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Tag of field 3, a number.
const TYPE: u8 = 3 << 3;
/// Tag of field 60, a string.
const SENDER: [u8; 2] = [0xE2, 0x03];
/// Tag of field 62, a number.
const SEQ: [u8; 2] = [0xF0, 0x03];
/// Tag of field 64, a string.
const TO: [u8; 2] = [0x82, 0x04];
/// Upper bound of a stamp without the sender's id: type 2, sender 2 + 5, seq 2 + 10.
const STAMP_BYTES_MAX: usize = 21;
