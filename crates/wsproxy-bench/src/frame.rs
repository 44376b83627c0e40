//! The client's side of WebSocket framing, reduced to what a load generator needs: it reads stamps and skips payloads.

use crate::stamp::{STAMP_BYTES, Stamp};

/// What arrived from the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A whole message; its stamp is `None` where the server spoke for itself.
    Message {
        /// The stamp its first frame began with.
        stamp: Option<Stamp>,
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

/// A server that breaks the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// Servers must not mask.
    Masked,
    /// No extension was negotiated, yet a reserved bit is set.
    Reserved,
    /// An opcode that does not exist, or a continuation of nothing.
    Opcode,
    /// A control frame that is fragmented or too long.
    Control,
}

/// Reads server frames from a byte stream, however it is cut.
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
    stamp: Option<Stamp>,
    bytes: u64,
}

struct Header {
    opcode: u8,
    fin: bool,
    bytes: usize,
    payload: u64,
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
    /// Takes bytes from the front of `input`; `None` once all of it is used up.
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

    /// What the last control frame carried.
    #[must_use]
    pub fn control_payload(&self) -> &[u8] {
        let start = usize::from(self.control_at);
        &self.held[start..start + usize::from(self.control_bytes)]
    }

    /// The common case: header and stamp lie in the input, nothing is copied.
    fn take_whole(&mut self, input: &mut &[u8]) -> Result<Option<Step>, FrameError> {
        let Some(header) = header(input)? else { return Ok(None) };
        let wanted = header.bytes + header.wanted();
        if header.opcode >= 8 || input.len() < wanted {
            return Ok(None);
        }
        let (frame, rest) = input.split_at(wanted);
        *input = rest;
        self.begin(&header, &frame[header.bytes..]).map(Some)
    }

    /// The header or the stamp is cut: collect it byte by byte.
    fn take_pieces(&mut self, input: &mut &[u8]) -> Result<Step, FrameError> {
        loop {
            let held = usize::from(self.held_bytes);
            let wanted = match header(&self.held[..held])? {
                Some(header) => {
                    let wanted = header.bytes + header.wanted();
                    if held >= wanted {
                        self.held_bytes = 0;
                        let payload = self.held;
                        return self.begin(&header, &payload[header.bytes..wanted]);
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
        match header.opcode {
            0 => {
                let message = self.message.as_mut().ok_or(FrameError::Opcode)?;
                message.bytes += header.payload;
            }
            1 | 2 if self.message.is_none() => {
                self.message = Some(Partial { stamp: Stamp::read(start), bytes: header.payload });
            }
            8..=10 => {
                let at = header.bytes;
                self.held[at..at + start.len()].copy_from_slice(start);
                self.control_at = at as u8;
                self.control_bytes = start.len() as u8;
                return Ok(Step::Event(match header.opcode {
                    8 if start.len() >= 2 => Event::Close(u16::from_be_bytes([start[0], start[1]])),
                    8 => Event::Close(1005),
                    9 => Event::Ping,
                    _ => Event::Pong,
                }));
            }
            _ => return Err(FrameError::Opcode),
        }
        self.fin = header.fin;
        self.skip = header.payload - start.len() as u64;
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
        Some(Event::Message { stamp: message.stamp, bytes: message.bytes })
    }
}

enum Step {
    Event(Event),
    More,
    Starved,
}

impl Header {
    /// How much of the payload must lie together before the frame is looked at.
    fn wanted(&self) -> usize {
        let wanted = if self.opcode >= 8 { CONTROL_BYTES_MAX } else { STAMP_BYTES };
        wanted.min(usize::try_from(self.payload).unwrap_or(usize::MAX))
    }
}

fn header(input: &[u8]) -> Result<Option<Header>, FrameError> {
    let [first, second, rest @ ..] = input else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err(FrameError::Reserved);
    }
    if second & 0x80 != 0 {
        return Err(FrameError::Masked);
    }
    let (opcode, fin) = (first & 0x0f, first & 0x80 != 0);
    let (bytes, payload) = match (second & 0x7f, rest) {
        (126, [a, b, ..]) => (4, u64::from(u16::from_be_bytes([*a, *b]))),
        (127, [a, b, c, d, e, f, g, h, ..]) => {
            (10, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]))
        }
        (126 | 127, _) => return Ok(None),
        (short, _) => (2, u64::from(short)),
    };
    if opcode >= 8 && (!fin || payload > CONTROL_BYTES_MAX as u64) {
        return Err(FrameError::Control);
    }
    Ok(Some(Header { opcode, fin, bytes, payload }))
}

/// Appends a masked frame, as clients must send them.
pub fn push_client_frame(opcode: u8, payload: &[u8], output: &mut Vec<u8>) {
    push_header(opcode, 0x80, payload.len(), output);
    output.extend_from_slice(&MASK);
    output.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

/// Appends an unmasked frame, as servers send them.
pub fn push_server_frame(opcode: u8, payload: &[u8], output: &mut Vec<u8>) {
    push_header(opcode, 0, payload.len(), output);
    output.extend_from_slice(payload);
}

fn push_header(opcode: u8, mask_bit: u8, payload: usize, output: &mut Vec<u8>) {
    output.push(0x80 | opcode);
    match payload {
        0..=125 => output.push(mask_bit | payload as u8),
        126..=0xffff => {
            output.push(mask_bit | 126);
            output.extend_from_slice(&(payload as u16).to_be_bytes());
        }
        _ => {
            output.push(mask_bit | 127);
            output.extend_from_slice(&(payload as u64).to_be_bytes());
        }
    }
}

/// Opcode of a text frame.
pub const TEXT: u8 = 1;
/// Opcode of a close frame.
pub const CLOSE: u8 = 8;
/// Opcode of a pong frame.
pub const PONG: u8 = 10;

const CONTROL_BYTES_MAX: usize = 125;
const HELD_BYTES_MAX: usize = 10 + CONTROL_BYTES_MAX;
/// Any key is legal; a fixed one saves a random number per frame and still makes the server unmask.
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
            let stamp = Stamp { sent_ns: 77 + number as u64, number: number as u32 };
            let mut payload = Vec::new();
            stamp.write(bytes, &mut payload);
            push_server_frame(TEXT, &payload, &mut stream);
            push_server_frame(9, b"are you there", &mut stream);
            expected.push(Event::Message { stamp: Some(stamp), bytes: bytes as u64 });
            expected.push(Event::Ping);
        }
        push_server_frame(TEXT, b"{}", &mut stream);
        expected.push(Event::Message { stamp: None, bytes: 2 });
        push_server_frame(TEXT, b"", &mut stream);
        expected.push(Event::Message { stamp: None, bytes: 0 });
        push_server_frame(CLOSE, &1012u16.to_be_bytes(), &mut stream);
        expected.push(Event::Close(1012));
        for piece in [1, 2, 3, 7, 44, 64, 1_000, stream.len()] {
            assert_eq!(read_in_pieces(&stream, piece), expected, "pieces of {piece}");
        }
    }

    #[test]
    fn fragments_make_one_message_with_a_control_frame_in_between() {
        let stamp = Stamp { sent_ns: 5, number: 6 };
        let mut payload = Vec::new();
        stamp.write(200, &mut payload);
        let mut stream = vec![0x01, 100];
        stream.extend_from_slice(&payload[..100]);
        push_server_frame(9, b"are you there", &mut stream);
        stream.extend_from_slice(&[0x80, 100]);
        stream.extend_from_slice(&payload[100..]);
        for piece in [1, 13, stream.len()] {
            let message = Event::Message { stamp: Some(stamp), bytes: 200 };
            assert_eq!(read_in_pieces(&stream, piece), [Event::Ping, message]);
        }
    }

    #[test]
    fn broken_servers_are_noticed() {
        let cases: [(&[u8], FrameError); 5] = [
            (&[0x81, 0x80], FrameError::Masked),
            (&[0xc1, 0x00], FrameError::Reserved),
            (&[0x80, 0x00], FrameError::Opcode),
            (&[0x83, 0x00], FrameError::Opcode),
            (&[0x09, 0x00], FrameError::Control),
        ];
        for (bytes, error) in cases {
            assert_eq!(FrameReader::default().next(&mut &bytes[..]), Err(error));
        }
    }

    #[test]
    fn client_frames_are_masked() {
        let mut frame = Vec::new();
        push_client_frame(TEXT, b"abc", &mut frame);
        assert_eq!(&frame[..2], [0x81, 0x83]);
        let unmasked: Vec<u8> =
            frame[6..].iter().zip(frame[2..6].iter().cycle()).map(|(a, b)| a ^ b).collect();
        assert_eq!(unmasked, b"abc");
    }
}
