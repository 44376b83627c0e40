//! What a measured message carries: when it was to be sent and its number; a JSON object at fixed offsets.

/// When a message should have left its sender, and its number within its channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Intended time of sending, in nanoseconds of the monotonic clock.
    pub sent_ns: u64,
    /// Number of the message within its channel.
    pub number: u32,
}

impl Stamp {
    /// Reads the stamp at the start of a payload; `None` where the payload is not one of ours.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<Self> {
        let head = payload.get(..STAMP_BYTES)?;
        if &head[..6] != b"{\"t\":\"" || &head[26..33] != b"\",\"n\":\"" {
            return None;
        }
        let sent_ns = digits(&head[6..26])?;
        let number = u32::try_from(digits(&head[33..43])?).ok()?;
        Some(Self { sent_ns, number })
    }

    /// Appends a payload of `bytes` bytes (at least [`PAYLOAD_BYTES_MIN`]) with this stamp.
    pub fn write(self, bytes: usize, output: &mut Vec<u8>) {
        output.extend_from_slice(b"{\"t\":\"");
        push_digits(self.sent_ns, 20, output);
        output.extend_from_slice(b"\",\"n\":\"");
        push_digits(u64::from(self.number), 10, output);
        output.extend_from_slice(b"\",\"p\":\"");
        let filling = bytes.saturating_sub(PAYLOAD_BYTES_MIN);
        output.resize(output.len() + filling, b'x');
        output.extend_from_slice(b"\"}");
    }
}

/// Bytes at the start of a payload that hold its stamp.
pub const STAMP_BYTES: usize = 43;

/// The shortest payload that can carry a stamp.
pub const PAYLOAD_BYTES_MIN: usize = STAMP_BYTES + 9;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_survives_the_way_and_the_payload_is_json_of_the_asked_size() {
        let stamp = Stamp { sent_ns: 1_234_567_890_123, number: 4_000_000_001 };
        for bytes in [PAYLOAD_BYTES_MIN, 64, 200, 65_536] {
            let mut payload = Vec::new();
            stamp.write(bytes, &mut payload);
            assert_eq!(payload.len(), bytes);
            assert_eq!(Stamp::read(&payload), Some(stamp));
            serde_json::from_slice::<serde_json::Value>(&payload).unwrap();
        }
    }

    #[test]
    fn foreign_payloads_have_no_stamp() {
        assert_eq!(Stamp::read(b"{}"), None);
        assert_eq!(Stamp::read(&[b'x'; 100]), None);
    }
}
