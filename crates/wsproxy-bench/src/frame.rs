//! The client's side of WebSocket framing, reduced to what a load generator needs: it reads stamps and skips payloads.

use wsproxy_proto::ws::{
    frame::{CONTROL_BYTES_MAX, HEADER_BYTES_MAX, Header, Opcode, decode_header, encode_header},
    mask,
};

use wsproxy_proto::history::Position;

use crate::stamp::{CallStamp, POSITION_AND_STAMP_BYTES, Stamp};

/// An event from the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A whole message.
    Message {
        /// The start of its first frame.
        content: Content,
        /// Payload bytes over all its frames.
        bytes: u64,
    },
    /// A ping; [`FrameReader::control_payload`] is what the pong must carry.
    Ping,
    /// A pong.
    Pong,
    /// A close frame with its code, 1005 where it has none.
    Close(u16),
}

/// Origin of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A published message, with its position where it has one.
    Stamped(Stamp, Option<Position>),
    /// A call of a tool.
    Call(CallStamp),
    /// A message of the server itself.
    Notice(Notice),
}

/// A message of the server itself that clients must act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// The server asks for a pong as a message.
    Ping,
    /// The missed messages follow.
    Resumed,
    /// Some of the missed messages are lost.
    HistoryLost,
    /// Messages may have been missed.
    BusRecovered,
    /// Anything else.
    Other,
}

/// A server that breaks the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// No frame at all: reserved bits, unknown opcodes, broken control frames.
    Malformed,
    /// Servers must not mask.
    Masked,
    /// No compression was negotiated.
    Compressed,
    /// A continuation of nothing, or a new message inside another.
    Order,
}

/// Reads server frames from a byte stream that is cut anywhere.
///
/// Invariant: holds at most one header and one control payload, never a message.
#[derive(Debug)]
pub struct FrameReader {
    held: [u8; HELD_BYTES_MAX],
    held_bytes: u8,
    control_at: u8,
    control_bytes: u8,
    skip: u64,
    message: Option<Partial>,
    fin: bool,
}

#[derive(Debug, Clone, Copy)]
struct Partial {
    content: Content,
    bytes: u64,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self {
            held: [0; HELD_BYTES_MAX],
            held_bytes: 0,
            control_at: 0,
            control_bytes: 0,
            skip: 0,
            message: None,
            fin: false,
        }
    }
}

impl FrameReader {
    /// Takes bytes from the front of `input`; `None` once the input is used up.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Event>, FrameError> {
        loop {
            if self.skip > 0 {
                let taken = self.skip.min(input.len() as u64);
                *input = &input[taken as usize..];
                self.skip -= taken;
                if self.skip > 0 {
                    return Ok(None);
                }
                if let Some(event) = self.finish_frame() {
                    return Ok(Some(event));
                }
                continue;
            }
            if input.is_empty() {
                return Ok(None);
            }
            let step = if self.held_bytes == 0 { self.take_whole(input)? } else { None };
            let step = match step {
                Some(event) => event,
                None => self.take_pieces(input)?,
            };
            match step {
                Step::Event(event) => return Ok(Some(event)),
                Step::More => {}
                Step::Starved => return Ok(None),
            }
        }
    }

    /// Returns the payload of the last control frame.
    #[must_use]
    pub fn control_payload(&self) -> &[u8] {
        let start = usize::from(self.control_at);
        &self.held[start..start + usize::from(self.control_bytes)]
    }

    /// Reads the common case without copying: header and stamp lie in the input.
    fn take_whole(&mut self, input: &mut &[u8]) -> Result<Option<Step>, FrameError> {
        let Some((header, at)) = header(input)? else { return Ok(None) };
        let wanted = at + wanted(&header);
        if header.opcode.is_control() || input.len() < wanted {
            return Ok(None);
        }
        let (frame, rest) = input.split_at(wanted);
        *input = rest;
        self.begin(&header, &frame[at..]).map(Some)
    }

    /// Collects a header or a stamp that is cut, byte by byte.
    fn take_pieces(&mut self, input: &mut &[u8]) -> Result<Step, FrameError> {
        loop {
            let held = usize::from(self.held_bytes);
            let wanted = match header(&self.held[..held])? {
                Some((header, at)) => {
                    let wanted = at + wanted(&header);
                    if held >= wanted {
                        self.held_bytes = 0;
                        self.control_at = at as u8;
                        self.control_bytes = (wanted - at) as u8;
                        let payload = self.held;
                        return self.begin(&header, &payload[at..wanted]);
                    }
                    wanted
                }
                None => held + 1,
            };
            let taken = (wanted - held).min(input.len());
            if taken == 0 {
                return Ok(Step::Starved);
            }
            self.held[held..held + taken].copy_from_slice(&input[..taken]);
            self.held_bytes += taken as u8;
            *input = &input[taken..];
        }
    }

    fn begin(&mut self, header: &Header, start: &[u8]) -> Result<Step, FrameError> {
        match (header.opcode, &mut self.message) {
            (Opcode::Continuation, Some(message)) => message.bytes += header.payload_len,
            (Opcode::Text | Opcode::Binary, message @ None) => {
                *message = Some(Partial { content: content(start), bytes: header.payload_len });
            }
            (Opcode::Continuation | Opcode::Text | Opcode::Binary, _) => {
                return Err(FrameError::Order);
            }
            (Opcode::Ping, _) => return Ok(Step::Event(Event::Ping)),
            (Opcode::Pong, _) => return Ok(Step::Event(Event::Pong)),
            (Opcode::Close, _) => {
                let code = start.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                return Ok(Step::Event(Event::Close(code)));
            }
        }
        self.fin = header.fin;
        self.skip = header.payload_len - start.len() as u64;
        if self.skip > 0 {
            return Ok(Step::More);
        }
        Ok(self.finish_frame().map_or(Step::More, Step::Event))
    }

    fn finish_frame(&mut self) -> Option<Event> {
        if !self.fin {
            return None;
        }
        let message = self.message.take()?;
        Some(Event::Message { content: message.content, bytes: message.bytes })
    }
}

/// Reads the start of a message.
fn content(start: &[u8]) -> Content {
    if let Some((stamp, position)) = Stamp::read_with_position(start) {
        return Content::Stamped(stamp, position);
    }
    if let Some(stamp) = CallStamp::read(start) {
        return Content::Call(stamp);
    }
    let told = |text: &str| start.windows(text.len()).any(|window| window == text.as_bytes());
    Content::Notice(match () {
        () if told("\"type\":\"ping\"") => Notice::Ping,
        () if told("\"resumed\"") => Notice::Resumed,
        () if told("\"history_lost\"") => Notice::HistoryLost,
        () if told("\"bus_recovered\"") => Notice::BusRecovered,
        () => Notice::Other,
    })
}

enum Step {
    Event(Event),
    More,
    Starved,
}

/// Returns the number of payload bytes that must lie together before the frame is read.
fn wanted(header: &Header) -> usize {
    let wanted =
        if header.opcode.is_control() { CONTROL_BYTES_MAX } else { POSITION_AND_STAMP_BYTES };
    wanted.min(usize::try_from(header.payload_len).unwrap_or(usize::MAX))
}

fn header(input: &[u8]) -> Result<Option<(Header, usize)>, FrameError> {
    let Some((header, at)) = decode_header(input).map_err(|_| FrameError::Malformed)? else {
        return Ok(None);
    };
    match header {
        Header { mask: Some(_), .. } => Err(FrameError::Masked),
        Header { compressed: true, .. } => Err(FrameError::Compressed),
        _ => Ok(Some((header, at))),
    }
}

/// Appends a masked frame, as clients must send them.
pub fn push_client_frame(opcode: Opcode, payload: &[u8], output: &mut Vec<u8>) {
    push_header(opcode, Some(MASK), payload, output);
    let start = output.len();
    output.extend_from_slice(payload);
    mask::apply(&mut output[start..], MASK, 0);
}

/// Appends an unmasked frame, as servers send them.
pub fn push_server_frame(opcode: Opcode, payload: &[u8], output: &mut Vec<u8>) {
    push_header(opcode, None, payload, output);
    output.extend_from_slice(payload);
}

fn push_header(opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8], output: &mut Vec<u8>) {
    let payload_len = payload.len() as u64;
    let header = Header { fin: true, compressed: false, opcode, mask, payload_len };
    output.extend_from_slice(encode_header(&header).as_ref());
}

const HELD_BYTES_MAX: usize = HEADER_BYTES_MAX + CONTROL_BYTES_MAX;
/// Fixed mask. There is no proxy to protect here; a fixed key saves a random number per frame and
/// still makes the server unmask.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

#[cfg(test)]
mod tests {
    use super::*;

    fn read_in_pieces(stream: &[u8], piece: usize) -> Vec<Event> {
        let mut reader = FrameReader::default();
        let mut events = Vec::new();
        for mut input in stream.chunks(piece) {
            while let Some(event) = reader.next(&mut input).unwrap() {
                if event == Event::Ping {
                    assert_eq!(reader.control_payload(), b"are you there");
                }
                events.push(event);
            }
        }
        events
    }

    #[test]
    fn any_split_of_the_stream_gives_the_same_events() {
        let mut stream = Vec::new();
        let mut expected = Vec::new();
        for (number, bytes) in [52usize, 64, 125, 126, 200, 65_535, 65_536].into_iter().enumerate()
        {
            let stamp = Stamp { sent_ns: 77 + number as u64, number: number as u32, shared: false };
            let mut payload = Vec::new();
            stamp.write(bytes, &mut payload);
            push_server_frame(Opcode::Text, &payload, &mut stream);
            push_server_frame(Opcode::Ping, b"are you there", &mut stream);
            expected.push(Event::Message {
                content: Content::Stamped(stamp, None),
                bytes: bytes as u64,
            });
            expected.push(Event::Ping);
        }
        let lost = br#"{"code":"history_lost","reason":"trimmed","type":"error"}"#;
        let notices: [(&[u8], Notice); 4] = [
            (b"{}", Notice::Other),
            (b"", Notice::Other),
            (lost, Notice::HistoryLost),
            (br#"{"type":"ping","timestamp":1}"#, Notice::Ping),
        ];
        for (payload, notice) in notices {
            push_server_frame(Opcode::Text, payload, &mut stream);
            let content = Content::Notice(notice);
            expected.push(Event::Message { content, bytes: payload.len() as u64 });
        }
        push_server_frame(Opcode::Close, &1012u16.to_be_bytes(), &mut stream);
        expected.push(Event::Close(1012));
        for piece in [1, 2, 3, 7, 44, 64, 1_000, stream.len()] {
            assert_eq!(read_in_pieces(&stream, piece), expected, "pieces of {piece}");
        }
    }

    #[test]
    fn fragments_make_one_message_with_a_control_frame_in_between() {
        let stamp = Stamp { sent_ns: 5, number: 6, shared: false };
        let mut payload = Vec::new();
        stamp.write(200, &mut payload);
        let mut stream = vec![0x01, 100];
        stream.extend_from_slice(&payload[..100]);
        push_server_frame(Opcode::Ping, b"are you there", &mut stream);
        stream.extend_from_slice(&[0x80, 100]);
        stream.extend_from_slice(&payload[100..]);
        for piece in [1, 13, stream.len()] {
            let content = Content::Stamped(stamp, None);
            let message = Event::Message { content, bytes: 200 };
            assert_eq!(read_in_pieces(&stream, piece), [Event::Ping, message]);
        }
    }

    #[test]
    fn broken_servers_are_noticed() {
        let cases: [(&[u8], FrameError); 5] = [
            (&[0x81, 0x80, 1, 2, 3, 4], FrameError::Masked),
            (&[0xc1, 0x00], FrameError::Compressed),
            (&[0x80, 0x00], FrameError::Order),
            (&[0x83, 0x00], FrameError::Malformed),
            (&[0x09, 0x00], FrameError::Malformed),
        ];
        for (bytes, error) in cases {
            assert_eq!(FrameReader::default().next(&mut &bytes[..]), Err(error));
        }
    }

    #[test]
    fn client_frames_are_masked() {
        let mut frame = Vec::new();
        push_client_frame(Opcode::Text, b"abc", &mut frame);
        assert_eq!(&frame[..2], [0x81, 0x83]);
        let unmasked: Vec<u8> =
            frame[6..].iter().zip(frame[2..6].iter().cycle()).map(|(a, b)| a ^ b).collect();
        assert_eq!(unmasked, b"abc");
    }
}
