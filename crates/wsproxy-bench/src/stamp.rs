//! The stamp of a measured message: its intended time of sending and its number, as JSON at fixed offsets.

use wsproxy_proto::history::Position;

/// Intended time of a message's sending, and its number within its channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Intended time of sending, in nanoseconds of the monotonic clock.
    pub sent_ns: u64,
    /// Number of the message within its channel.
    pub number: u32,
    /// Set for the channel that all clients share beside their own.
    pub shared: bool,
}

impl Stamp {
    /// Reads the stamp at the start of a payload; `None` where the payload has none.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
        let head = payload.get(..STAMP_BYTES)?;
        if &head[..6] != b"{\"t\":\"" || &head[26..33] != b"\",\"n\":\"" {
            return None;
        }
        let sent_ns = digits(&head[6..26])?;
        let number = digits(&head[33..43])?;
        let shared = number >= SHARED;
        let number = u32::try_from(if shared { number - SHARED } else { number }).ok()?;
        Some(Self { sent_ns, number, shared })
    }

    /// Reads the stamp of a payload to which the gateway may have added the message's position, as first member
    /// `event_id`.
    #[must_use]
    pub fn read_with_position(payload: &[u8]) -> Option<(Self, Option<Position>)> {
        if let Some(stamp) = Self::read(payload) {
            return Some((stamp, None));
        }
        let rest = payload.strip_prefix(POSITION_BEFORE)?;
        let end = rest.iter().position(|byte| *byte == b'"')?;
        let position = Position::parse(&rest[..end])?;
        let stamped = rest[end..].strip_prefix(POSITION_AFTER)?;
        // The brace that the stamp begins with now stands before the position.
        let mut head = [0u8; STAMP_BYTES];
        head[0] = b'{';
        head[1..].copy_from_slice(stamped.get(..STAMP_BYTES - 1)?);
        Some((Self::read(&head)?, Some(position)))
    }

    /// Appends a payload of `bytes` bytes (at least [`PAYLOAD_BYTES_MIN`]) with this stamp.
    pub fn write(self, bytes: usize, output: &mut Vec<u8>) {
        output.extend_from_slice(b"{\"t\":\"");
        push_digits(self.sent_ns, 20, output);
        output.extend_from_slice(b"\",\"n\":\"");
        let lane = if self.shared { SHARED } else { 0 };
        push_digits(u64::from(self.number) + lane, 10, output);
        output.extend_from_slice(b"\",\"p\":\"");
        let filling = bytes.saturating_sub(PAYLOAD_BYTES_MIN);
        output.resize(output.len() + filling, b'x');
        output.extend_from_slice(b"\"}");
    }
}

/// Stamp of a call, as its request id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallStamp {
    /// Intended time of the call, in nanoseconds of the monotonic clock.
    pub sent_ns: u64,
    /// Number of the call.
    pub number: u32,
}

impl CallStamp {
    /// Reads the request id near the start of a message; `None` where there is none of this form.
    #[must_use]
    pub fn read(message: &[u8]) -> Option<Self> {
        let at = memmem(message, REQUEST)? + REQUEST.len();
        Self::of_id(message.get(at..at + CALL_STAMP_BYTES)?)
    }

    /// Reads the request id in the name of the channel of its answer; `None` where the name has none of this form.
    #[must_use]
    pub fn of_channel(name: &[u8]) -> Option<Self> {
        let id = name.strip_prefix(b"response:")?;
        (id.len() == CALL_STAMP_BYTES).then(|| Self::of_id(id))?
    }

    fn of_id(id: &[u8]) -> Option<Self> {
        let sent_ns = digits(&id[1..21])?;
        let number = u32::try_from(digits(&id[22..])?).ok()?;
        (id[0] == b't' && id[21] == b'n').then_some(Self { sent_ns, number })
    }

    /// Appends the request id.
    pub fn write(self, output: &mut Vec<u8>) {
        output.push(b't');
        push_digits(self.sent_ns, 20, output);
        output.push(b'n');
        push_digits(u64::from(self.number), 10, output);
    }
}

/// Returns the position of a short text.
fn memmem(message: &[u8], text: &[u8]) -> Option<usize> {
    message.windows(text.len()).position(|window| window == text)
}

fn digits(text: &[u8]) -> Option<u64> {
    text.iter().try_fold(0u64, |value, byte| {
        let digit = byte.wrapping_sub(b'0');
        (digit < 10).then(|| value.wrapping_mul(10).wrapping_add(u64::from(digit)))
    })
}

fn push_digits(mut value: u64, width: usize, output: &mut Vec<u8>) {
    let start = output.len();
    output.resize(start + width, b'0');
    for byte in output[start..].iter_mut().rev() {
        *byte = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Bytes at the start of a payload that hold its stamp.
pub const STAMP_BYTES: usize = 43;

/// Added to the numbers of the shared channel when they are written, so that they are told apart.
const SHARED: u64 = 5_000_000_000;

/// Bytes at the start of a payload that hold its stamp and, before it, its position.
pub const POSITION_AND_STAMP_BYTES: usize =
    POSITION_BEFORE.len() + 50 + POSITION_AFTER.len() + STAMP_BYTES - 1;

const POSITION_BEFORE: &[u8] = b"{\"event_id\":\"";
const POSITION_AFTER: &[u8] = b"\",";

/// Member before the request id.
const REQUEST: &[u8] = b"\"requestId\":\"";

/// Bytes of a request id.
const CALL_STAMP_BYTES: usize = 32;

/// The shortest payload that can carry a stamp.
pub const PAYLOAD_BYTES_MIN: usize = STAMP_BYTES + 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_survive_the_way_as_json_of_right_size() {
        let stamp = Stamp { sent_ns: 1_234_567_890_123, number: 4_000_000_001, shared: false };
        for bytes in [PAYLOAD_BYTES_MIN, 64, 200, 65_536] {
            let mut payload = Vec::new();
            stamp.write(bytes, &mut payload);
            assert_eq!(payload.len(), bytes);
            assert_eq!(Stamp::read(&payload), Some(stamp));
            serde_json::from_slice::<serde_json::Value>(&payload).unwrap();
        }
        let shared = Stamp { shared: true, ..stamp };
        let mut payload = Vec::new();
        shared.write(64, &mut payload);
        assert_eq!(Stamp::read(&payload), Some(shared));
    }

    #[test]
    fn position_in_front_is_read_with_the_stamp() {
        let stamp = Stamp { sent_ns: 77, number: 9, shared: false };
        let mut payload = Vec::new();
        stamp.write(60, &mut payload);
        assert_eq!(Stamp::read_with_position(&payload), Some((stamp, None)));
        for text in
            ["1763729000000-12-0a1b2c3d", "18446744073709551615-18446744073709551615-ffffffff"]
        {
            let mut spliced = format!("{{\"event_id\":\"{text}\",").into_bytes();
            spliced.extend_from_slice(&payload[1..]);
            let position = Position::parse(text.as_bytes());
            assert!(position.is_some());
            let start = &spliced[..POSITION_AND_STAMP_BYTES.min(spliced.len())];
            assert_eq!(Stamp::read_with_position(start), Some((stamp, position)));
        }
        assert_eq!(Stamp::read_with_position(b"{\"event_id\":\"own\",\"t\":1}"), None);
    }

    #[test]
    fn request_ids_survive_the_way() {
        let stamp = CallStamp { sent_ns: 1_234_567_890_123, number: 4_000_000_001 };
        let mut id = Vec::new();
        stamp.write(&mut id);
        assert_eq!(id.len(), CALL_STAMP_BYTES);
        let message = [br#"{"type":"tool_call","requestId":""#, &id[..], b"\"}"].concat();
        assert_eq!(CallStamp::read(&message), Some(stamp));
        assert_eq!(CallStamp::read(br#"{"requestId":"short"}"#), None);
    }

    #[test]
    fn foreign_payloads_have_no_stamp() {
        assert_eq!(Stamp::read(b"{}"), None);
        assert_eq!(Stamp::read(&[b'x'; 100]), None);
    }
}
