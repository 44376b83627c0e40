//! Receiving half of a connection: from bytes in any pieces to whole messages. Knows nothing of sending.

use std::ops::Range;

use flate2::Decompress;

use super::deflate::{self, Inflaters, Params};
use super::frame::{self, Header, Kind, Opcode, Role};
use super::partial::{OpenFrame, Partial, PartialMessage};
use super::{mask, utf8};
use crate::disconnect::{Disconnect, is_sendable};

/// Bounds of one message of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Upper bound of a message, before and after inflating.
    pub message_bytes_max: usize,
    /// Upper bound of the frames of one message, empty ones included.
    pub fragments_max: u32,
}

/// Message or control frame of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'r> {
    /// Whole message. Text is valid UTF-8.
    Message(Kind, &'r [u8]),
    /// Ping, to be answered with a pong of the same payload.
    Ping(&'r [u8]),
    /// Pong, as the answer to a ping or unasked.
    Pong(&'r [u8]),
    /// Close frame, the last frame of the peer: code and reason where it gave them.
    Close(Option<(u16, &'r str)>),
}

/// Bytes of one read, which the receiver consumes and unmasks in place.
#[derive(Debug)]
pub struct Input<'a> {
    bytes: &'a mut [u8],
    at: usize,
    inflated: usize,
}

impl<'a> Input<'a> {
    /// Creates an input of which no byte is consumed.
    #[must_use]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, at: 0, inflated: 0 }
    }

    /// Returns the bytes by which the messages that ended in this input grew when they were inflated.
    #[must_use]
    pub const fn inflated(&self) -> usize {
        self.inflated
    }

    /// Returns whether all bytes are consumed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// Returns the bytes that are not consumed.
    #[must_use]
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// Consumes the next `length` bytes.
    fn take(&mut self, length: usize) -> Range<usize> {
        let from = self.at;
        self.at += length;
        from..self.at
    }
}

/// Receiving half of one connection.
///
/// Invariant: the receiver holds heap memory only while a frame or message is incomplete (at most twice the bytes
/// that came of it), and for the peer's window where context takeover was agreed on.
///
/// ```
/// use wsproxy_proto::ws::{
///     deflate::Inflaters,
///     frame::{Kind, Opcode, Role, client_frame},
///     receiver::{Event, Input, Limits, Receiver},
/// };
///
/// let limits = Limits { message_bytes_max: 1024, fragments_max: 16 };
/// let (mut receiver, mut inflaters) = (Receiver::new(Role::Server, limits, None), Inflaters::default());
/// let mut bytes = client_frame(Opcode::Text, b"hello", false, [1, 2, 3, 4]).to_vec();
/// let (first, rest) = bytes.split_at_mut(3);
/// assert_eq!(receiver.next(&mut Input::new(first), &mut inflaters), Ok(None));
/// let message = Event::Message(Kind::Text, b"hello");
/// assert_eq!(receiver.next(&mut Input::new(rest), &mut inflaters), Ok(Some(message)));
/// ```
#[derive(Debug)]
pub struct Receiver {
    partial: Option<Box<Partial>>,
    /// Inflater with context takeover, made for the first compressed message.
    inflater: Option<Box<Decompress>>,
    message_bytes_max: usize,
    fragments_max: u32,
    deflate: Option<Params>,
    role: Role,
    /// The peer has closed or broken the rules. Further bytes are ignored.
    ended: bool,
}

/// Location of an event's payload.
enum PayloadLocation {
    Input(Range<usize>),
    /// The output of the inflaters. It also takes over a message that was put together here, so that nothing stays
    /// with the connection.
    Output,
}

impl Receiver {
    /// Creates a receiver. `role` is our end; `deflate` was negotiated.
    #[must_use]
    pub fn new(role: Role, limits: Limits, deflate: Option<Params>) -> Self {
        Self {
            partial: None,
            inflater: None,
            message_bytes_max: limits.message_bytes_max,
            fragments_max: limits.fragments_max,
            deflate,
            role,
            ended: false,
        }
    }

    /// Returns the next event in `input`; `None` where all of it is consumed. Bytes of an incomplete frame or message
    /// are kept inside.
    ///
    /// # Errors
    /// The entry of the table with which the connection is to be ended. Bytes that come after an error, or after the
    /// peer's close frame, are ignored.
    #[inline]
    pub fn next<'r>(
        &'r mut self,
        input: &'r mut Input<'_>,
        inflaters: &'r mut Inflaters,
    ) -> Result<Option<Event<'r>>, Disconnect> {
        inflaters.trim();
        if self.ended {
            input.at = input.bytes.len();
        }
        if input.is_empty() {
            return Ok(None);
        }
        let (opcode, location) = match self.advance(input, inflaters) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(disconnect) => {
                self.end();
                return Err(disconnect);
            }
        };
        let payload = match location {
            PayloadLocation::Input(range) => &input.bytes[range],
            PayloadLocation::Output => inflaters.output(),
        };
        Ok(Some(match opcode {
            Opcode::Text => Event::Message(Kind::Text, payload),
            Opcode::Binary | Opcode::Continuation => Event::Message(Kind::Binary, payload),
            Opcode::Ping => Event::Ping(payload),
            Opcode::Pong => Event::Pong(payload),
            Opcode::Close => {
                self.end();
                Event::Close(read_close(payload)?)
            }
        }))
    }

    /// Returns whether messages may be compressed, so that few bytes can become many.
    #[must_use]
    pub const fn inflates(&self) -> bool {
        self.deflate.is_some()
    }

    /// Returns the number of bytes that this connection holds on the heap.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        let partial = self.partial.as_ref().map_or(0, |partial| partial.heap_bytes());
        let inflater = self.inflater.as_ref().map_or(0, |_| deflate::INFLATER_BYTES);
        partial + inflater
    }

    fn end(&mut self) {
        self.ended = true;
        self.partial = None;
        self.inflater = None;
    }

    /// Consumes input to the end of the next message or control frame.
    fn advance(
        &mut self,
        input: &mut Input<'_>,
        inflaters: &mut Inflaters,
    ) -> Result<Option<(Opcode, PayloadLocation)>, Disconnect> {
        loop {
            let mid_frame = self.partial.as_ref().is_some_and(|partial| partial.frame.is_some());
            if !mid_frame {
                let Some(header) = self.read_header(input)? else { return Ok(None) };
                self.check(&header)?;
                let mask = header.mask.unwrap_or_default();
                // No truncation on 32 bits: `check` compared the length with limits of type `usize`.
                let length = header.payload_len as usize;
                let alone = header.opcode.is_control()
                    || header.fin && header.opcode != Opcode::Continuation;
                if alone && length <= input.rest().len() {
                    let range = input.take(length);
                    mask::apply(&mut input.bytes[range.clone()], mask, 0);
                    return self.whole(&header, range, input, inflaters).map(Some);
                }
                self.open(&header, length, mask)?;
            }
            if let Some(opcode) = self.absorb(input)? {
                return self.finish(opcode, input, inflaters).map(Some);
            }
            if input.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Returns the header of the kept bytes and `input`; `None` where it is still incomplete.
    #[inline]
    fn read_header(&mut self, input: &mut Input<'_>) -> Result<Option<Header>, Disconnect> {
        let partial = match &mut self.partial {
            Some(partial) if !partial.header().is_empty() => partial,
            _ => match frame::decode_header(input.rest())? {
                Some((header, length)) => {
                    input.take(length);
                    return Ok(Some(header));
                }
                None => {
                    if !input.is_empty() {
                        let rest = input.take(input.rest().len());
                        self.partial.get_or_insert_default().keep_header(&input.bytes[rest]);
                    }
                    return Ok(None);
                }
            },
        };
        let kept = partial.header().len();
        let added = partial.keep_header(input.rest());
        let decoded = frame::decode_header(partial.header())?;
        let Some((header, length)) = decoded else {
            input.take(added);
            return Ok(None);
        };
        partial.forget_header();
        input.take(length - kept);
        self.give_back();
        Ok(Some(header))
    }

    /// Checks `header` against the frames before it and against the limits.
    #[inline]
    fn check(&self, header: &Header) -> Result<(), Disconnect> {
        let unnegotiated = header.compressed && self.deflate.is_none();
        if header.mask.is_some() != (self.role == Role::Server) || unnegotiated {
            return Err(Disconnect::PROTOCOL);
        }
        if header.opcode.is_control() {
            return Ok(());
        }
        let (message, size) = match &self.partial {
            Some(partial) => (partial.message, partial.data.len()),
            None => (None, 0),
        };
        if message.is_some() != (header.opcode == Opcode::Continuation) {
            return Err(Disconnect::PROTOCOL);
        }
        if message.map_or(0, |message| message.fragments) >= self.fragments_max {
            return Err(Disconnect::TOO_MANY_FRAGMENTS);
        }
        let compressed = message.map_or(header.compressed, |message| message.compressed);
        let max = if compressed {
            deflate::compressed_bytes_max(self.message_bytes_max)
        } else {
            self.message_bytes_max
        };
        // No overflow: the kept bytes are within the limit.
        if header.payload_len > (max - size) as u64 {
            return Err(Disconnect::TOO_BIG);
        }
        Ok(())
    }

    /// Returns a control frame, or a message of one frame, that is whole in `input`, after unmasking.
    #[inline]
    fn whole(
        &mut self,
        header: &Header,
        range: Range<usize>,
        input: &mut Input<'_>,
        inflaters: &mut Inflaters,
    ) -> Result<(Opcode, PayloadLocation), Disconnect> {
        let payload = &input.bytes[range.clone()];
        if header.compressed {
            self.inflate(payload, inflaters)?;
            input.inflated += inflaters.output().len().saturating_sub(range.len());
            if header.opcode == Opcode::Text && !utf8::is_valid(inflaters.output()) {
                return Err(Disconnect::NOT_UTF8);
            }
            return Ok((header.opcode, PayloadLocation::Output));
        }
        if header.opcode == Opcode::Text && !utf8::is_valid(payload) {
            return Err(Disconnect::NOT_UTF8);
        }
        Ok((header.opcode, PayloadLocation::Input(range)))
    }

    /// Starts to collect a frame whose payload is incomplete or a fragment.
    fn open(&mut self, header: &Header, length: usize, mask: [u8; 4]) -> Result<(), Disconnect> {
        let partial = self.partial.get_or_insert_default();
        let control = header.opcode.is_control().then_some(header.opcode);
        if control.is_none() {
            let message = partial.message.get_or_insert(PartialMessage {
                kind: if header.opcode == Opcode::Text { Kind::Text } else { Kind::Binary },
                compressed: header.compressed,
                fragments: 0,
            });
            message.fragments += 1;
        }
        partial.frame =
            Some(OpenFrame { control, fin: header.fin, mask, phase: 0, remaining: length });
        Ok(())
    }

    /// Moves payload of the open frame out of `input`. Returns the opcode where that completes a control frame or
    /// message.
    fn absorb(&mut self, input: &mut Input<'_>) -> Result<Option<Opcode>, Disconnect> {
        let Some(partial) = &mut self.partial else { return Ok(None) };
        let Some(frame) = &mut partial.frame else { return Ok(None) };
        let length = frame.remaining.min(input.rest().len());
        let range = input.take(length);
        let chunk = &mut input.bytes[range];
        mask::apply(chunk, frame.mask, usize::from(frame.phase));
        frame.phase = (usize::from(frame.phase) + length) as u8 % 4;
        frame.remaining -= length;
        let (control, fin, remaining) = (frame.control, frame.fin, frame.remaining);
        if remaining == 0 {
            partial.frame = None;
        }
        if let Some(opcode) = control {
            partial.control.extend_from_slice(chunk);
            return Ok((remaining == 0).then_some(opcode));
        }
        partial.append(chunk, fin.then_some(remaining))?;
        let complete = remaining == 0 && fin;
        Ok(partial.message.filter(|_| complete).map(|message| message.kind.into()))
    }

    /// Hands the collected payload over, so that the connection keeps nothing of it.
    fn finish(
        &mut self,
        opcode: Opcode,
        input: &mut Input<'_>,
        inflaters: &mut Inflaters,
    ) -> Result<(Opcode, PayloadLocation), Disconnect> {
        let Some(partial) = &mut self.partial else { return Ok((opcode, PayloadLocation::Output)) };
        if opcode.is_control() {
            inflaters.take_over(std::mem::take(&mut partial.control));
        } else {
            let (data, compressed) = partial.close_message()?;
            if compressed {
                self.inflate(&data, inflaters)?;
                input.inflated += inflaters.output().len().saturating_sub(data.len());
                if opcode == Opcode::Text && !utf8::is_valid(inflaters.output()) {
                    return Err(Disconnect::NOT_UTF8);
                }
            } else {
                inflaters.take_over(data);
            }
        }
        self.give_back();
        Ok((opcode, PayloadLocation::Output))
    }

    fn give_back(&mut self) {
        if self.partial.as_ref().is_some_and(|partial| partial.is_idle()) {
            self.partial = None;
        }
    }

    /// Inflates one message into the output of `inflaters`.
    fn inflate(&mut self, payload: &[u8], inflaters: &mut Inflaters) -> Result<(), Disconnect> {
        let (takeover, bits) = match (self.deflate, self.role) {
            (Some(params), Role::Server) => {
                (!params.client_no_context_takeover, params.client_max_window_bits)
            }
            (Some(params), Role::Client) => {
                (!params.server_no_context_takeover, params.server_max_window_bits)
            }
            (None, _) => return Err(Disconnect::PROTOCOL),
        };
        let own = takeover
            .then(|| &mut **self.inflater.get_or_insert_with(|| Box::new(deflate::inflater(bits))));
        inflaters.inflate(own, payload, self.message_bytes_max)
    }
}

/// Reads code and reason of a close frame (RFC 6455, section 5.5.1).
fn read_close(payload: &[u8]) -> Result<Option<(u16, &str)>, Disconnect> {
    let Some((code, reason)) = payload.split_first_chunk::<2>() else {
        return if payload.is_empty() { Ok(None) } else { Err(Disconnect::PROTOCOL) };
    };
    let code = u16::from_be_bytes(*code);
    if !is_sendable(code) {
        return Err(Disconnect::PROTOCOL);
    }
    let reason = std::str::from_utf8(reason).map_err(|_| Disconnect::NOT_UTF8)?;
    Ok(Some((code, reason)))
}
