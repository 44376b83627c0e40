//! Form of a message of a history on its channel.
//!
//! The form is `FF` `H2 <id> <prev> <event id or nothing>`, a line feed, and the payload. No text begins with `FF`,
//! so a plain message has this form only on purpose.

use std::io::Write;

use crate::history::{EVENT_ID_BYTES_MAX, Position};

/// Returns whether a message begins like one of a history, of this or another version. A plain message that does is
/// refused when it is published, since readers would take it for one of a history.
#[must_use]
pub fn is_reserved(message: &[u8]) -> bool {
    matches!(message, [0xff, b'H', b'0'..=b'9', ..])
}

/// Message of a history, borrowed from the bytes that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// Id of the message.
    pub id: Position,
    /// Id of the entry before it.
    pub prev: Position,
    /// Event id that the worker gave it. The payload carries it already.
    pub event_id: Option<&'a str>,
    /// Payload that was published.
    pub payload: &'a [u8],
}

impl<'a> Envelope<'a> {
    /// Reads a message; `None` where it is a plain message.
    #[must_use]
    pub fn parse(message: &'a [u8]) -> Option<Self> {
        let rest = message.strip_prefix(MAGIC)?;
        let end = rest.iter().take(HEAD_BYTES_MAX).position(|&byte| byte == b'\n')?;
        let mut words = rest[..end].splitn(3, |&byte| byte == b' ');
        let id = Position::parse(words.next()?)?;
        let prev = Position::parse(words.next()?)?;
        let event_id = std::str::from_utf8(words.next()?).ok()?;
        let event_id = (!event_id.is_empty()).then_some(event_id);
        Some(Self { id, prev, event_id, payload: &rest[end + 1..] })
    }

    /// Returns the message as it goes over the channel.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut message = Vec::with_capacity(HEAD_BYTES_MAX / 2 + self.payload.len());
        message.extend_from_slice(MAGIC);
        // Writing into a Vec cannot fail.
        let _ =
            writeln!(message, "{} {} {}", self.id, self.prev, self.event_id.unwrap_or_default());
        message.extend_from_slice(self.payload);
        message
    }
}

const MAGIC: &[u8] = b"\xffH2 ";

/// Upper bound of the head: four marks, two positions, an event id, blanks.
const HEAD_BYTES_MAX: usize = 4 + 2 * 51 + EVENT_ID_BYTES_MAX + 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_messages_stay_plain() {
        for plain in [
            &b""[..],
            b"{}",
            b"\xff",
            b"\xffH2 ",
            b"\xffH2 1-0-00000001 0-0\n",
            b"\xffH2 1-0-00000001 x \n",
            b"\xffH1 1-0 0-0 \n",
            b"\xffH2 1-0 0-0 \n",
        ] {
            assert_eq!(Envelope::parse(plain), None, "{plain:?}");
        }
        let long = [MAGIC, b"1-0-00000001 0-0 ", &[b'a'; 4096], b"\n"].concat();
        assert_eq!(Envelope::parse(&long), None);
    }

    #[test]
    fn reads_what_it_writes() {
        let (id, prev) = (Position { milliseconds: 17, sequence: 3, tag: 9 }, Position::START);
        for event_id in [None, Some("0b5e-ä")] {
            for payload in [&b""[..], b"{\"a\":1}", b"\n\n", b"\xffH2 "] {
                let envelope = Envelope { id, prev, event_id, payload };
                assert_eq!(Envelope::parse(&envelope.encode()), Some(envelope));
            }
        }
    }
}
