//! Whole messages out of a stream of server frames that is cut anywhere; knows no contents.

use wsproxy_proto::ws::frame::{Opcode, decode_header};

use crate::frame::FrameError;

/// Event from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event<'a> {
    Text(&'a [u8]),
    Binary(&'a [u8]),
    /// A ping with the payload that its pong must carry.
    Ping(&'a [u8]),
    Pong,
    /// A close frame with its code, 1005 where it has none.
    Close(u16),
}

/// Reader of one connection. Holds an incomplete frame, and the frames of an incomplete message.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    held: Vec<u8>,
    parts: Vec<u8>,
    /// Opcode of the message whose first frames are in `parts`.
    begun: Option<Opcode>,
}

impl Inbox {
    /// Gives `take` all events that `input` completes.
    pub(super) fn read(
        &mut self,
        input: &[u8],
        mut take: impl FnMut(Event<'_>),
    ) -> Result<(), FrameError> {
        if self.held.is_empty() {
            let used = self.frames(input, &mut take)?;
            self.held.extend_from_slice(&input[used..]);
            return Ok(());
        }
        let mut held = std::mem::take(&mut self.held);
        held.extend_from_slice(input);
        let used = self.frames(&held, &mut take)?;
        if used < held.len() {
            held.drain(..used);
            self.held = held;
        }
        Ok(())
    }

    /// Reads all complete frames, and returns the number of their bytes.
    fn frames(
        &mut self,
        input: &[u8],
        take: &mut impl FnMut(Event<'_>),
    ) -> Result<usize, FrameError> {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            let header = decode_header(rest).map_err(|_| FrameError::Malformed)?;
            let Some((header, start)) = header else { return Ok(at) };
            if header.mask.is_some() {
                return Err(FrameError::Masked);
            }
            if header.compressed {
                return Err(FrameError::Compressed);
            }
            let length = usize::try_from(header.payload_len).map_err(|_| FrameError::Malformed)?;
            let Some(payload) = rest.get(start..start + length) else { return Ok(at) };
            at += start + length;
            match (header.opcode, self.begun) {
                (Opcode::Ping, _) => take(Event::Ping(payload)),
                (Opcode::Pong, _) => take(Event::Pong),
                (Opcode::Close, _) => {
                    let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                    take(Event::Close(code));
                }
                (Opcode::Text | Opcode::Binary, None) if header.fin => {
                    take(message(header.opcode, payload));
                }
                (Opcode::Text | Opcode::Binary, None) => {
                    self.begun = Some(header.opcode);
                    self.parts.extend_from_slice(payload);
                }
                (Opcode::Continuation, Some(opcode)) => {
                    self.parts.extend_from_slice(payload);
                    if header.fin {
                        self.begun = None;
                        take(message(opcode, &std::mem::take(&mut self.parts)));
                    }
                }
                (Opcode::Text | Opcode::Binary | Opcode::Continuation, _) => {
                    return Err(FrameError::Order);
                }
            }
        }
    }
}

fn message(opcode: Opcode, payload: &[u8]) -> Event<'_> {
    if opcode == Opcode::Text { Event::Text(payload) } else { Event::Binary(payload) }
}

#[cfg(test)]
mod tests {
    use wsproxy_proto::ws::frame::{Header, encode_header};

    use super::*;

    fn push(opcode: Opcode, fin: bool, payload: &[u8], out: &mut Vec<u8>) {
        let payload_len = payload.len() as u64;
        let header = Header { fin, compressed: false, opcode, mask: None, payload_len };
        out.extend_from_slice(encode_header(&header).as_ref());
        out.extend_from_slice(payload);
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_events() {
        let mut stream = Vec::new();
        push(Opcode::Binary, true, &[1; 300], &mut stream);
        push(Opcode::Text, false, b"ab", &mut stream);
        push(Opcode::Ping, true, b"you", &mut stream);
        push(Opcode::Continuation, true, b"cd", &mut stream);
        push(Opcode::Close, true, &1012u16.to_be_bytes(), &mut stream);
        for piece in [1, 2, 7, 100, stream.len()] {
            let (mut inbox, mut seen) = (Inbox::default(), Vec::new());
            for input in stream.chunks(piece) {
                inbox.read(input, |event| seen.push(format!("{event:?}"))).unwrap();
            }
            let expected = [
                Event::Binary(&[1; 300]),
                Event::Ping(b"you"),
                Event::Text(b"abcd"),
                Event::Close(1012),
            ];
            assert_eq!(seen, expected.map(|event| format!("{event:?}")));
        }
    }
}
