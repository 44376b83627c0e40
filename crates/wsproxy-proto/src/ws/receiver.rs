//! Bytes from the peer into messages: fragments, masks, control frames in between, limits.

use crate::{
    disconnect::{Disconnect, is_sendable},
    ws::{
        deflate::{Inflater, Inflaters, Params},
        frame::{CONTROL_BYTES_MAX, HEADER_BYTES_MAX, Header, Kind, Opcode, Role, apply_mask},
        utf8::Utf8,
    },
};

/// Bounds of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest message in bytes, compressed and inflated.
    pub message_bytes_max: usize,
    /// Most fragments, however small.
    pub fragments_max: u32,
}

/// What the peer said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'r> {
    /// A whole message. Text is UTF-8.
    Message(Kind, &'r [u8]),
    /// Wants to be answered with the same payload.
    Ping(&'r [u8]),
    /// An answer, or a sign of life.
    Pong(&'r [u8]),
    /// The close handshake: code and reason, where there is one. Nothing comes after it.
    Close(Option<(u16, &'r str)>),
}

/// Bytes that were read. They are unmasked in place.
#[derive(Debug)]
pub struct Input<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Input<'a> {
    /// Takes over what was read.
    #[must_use]
    pub const fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Whether all of it is used up.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// Takes up to `count` bytes.
    fn take(&mut self, count: usize) -> &mut [u8] {
        let end = self.at + count.min(self.bytes.len() - self.at);
        let taken = &mut self.bytes[self.at..end];
        self.at = end;
        taken
    }
}

/// The receiving half of a connection. Small: what a frame in progress needs is on the heap, and
/// only as long as it is in progress.
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    role: Role,
    /// Whether compression was negotiated.
    inflates: bool,
    /// The peer's context, where it keeps one.
    inflater: Option<Box<Inflater>>,
    progress: Option<Box<Progress>>,
}

/// A frame or a message of which a part has come.
#[derive(Debug, Default)]
struct Progress {
    /// The beginning of a header.
    header: [u8; HEADER_BYTES_MAX],
    header_bytes: usize,
    /// The frame of which the header has come, and how much of its payload.
    frame: Option<(Header, usize)>,
    /// The payload of a control frame.
    control: Vec<u8>,
    message: Option<Message>,
    /// The event that was handed out refers to this; it goes when the next one is asked for.
    delivered: Option<Opcode>,
}

/// A data message of which a part has come.
#[derive(Debug)]
struct Message {
    kind: Kind,
    compressed: bool,
    fragments: u32,
    bytes: Vec<u8>,
    utf8: Utf8,
}

/// Where the next event's bytes are.
enum Found {
    Input(Header, usize),
    Control(Opcode),
    Message,
}

impl Receiver {
    /// For our `role`; `deflate` is what was negotiated.
    #[must_use]
    pub fn new(role: Role, limits: Limits, deflate: Option<Params>) -> Self {
        let keeps_context = deflate.is_some_and(|params| match role {
            Role::Server => !params.client_no_context_takeover,
            Role::Client => !params.server_no_context_takeover,
        });
        Self {
            limits,
            role,
            inflates: deflate.is_some(),
            inflater: keeps_context.then(Box::default),
            progress: None,
        }
    }

    /// Bytes on the heap for what is in progress.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        let progress = self.progress.as_ref();
        progress.map_or(0, |progress| {
            let message = progress.message.as_ref().map_or(0, |message| message.bytes.capacity());
            size_of::<Progress>() + progress.control.capacity() + message
        })
    }

    /// The next event; `None` when the input is used up. Whatever is incomplete is kept.
    ///
    /// # Errors
    /// The peer broke a rule; nothing after that has a meaning.
    pub fn next<'r>(
        &'r mut self,
        input: &'r mut Input<'_>,
        inflaters: &'r mut Inflaters,
    ) -> Result<Option<Event<'r>>, &'static Disconnect> {
        self.forget_delivered();
        match self.find(input)? {
            None => Ok(None),
            Some(Found::Input(header, length)) => {
                let payload = input.take(length);
                if let Some(mask) = header.mask {
                    apply_mask(payload, mask, 0);
                }
                let kind = match header.opcode {
                    Opcode::Text => Kind::Text,
                    Opcode::Binary | Opcode::Continuation => Kind::Binary,
                    control => return control_event(control, payload).map(Some),
                };
                if header.compressed {
                    let own = self.inflater.as_deref_mut();
                    return inflate(own, inflaters, kind, payload, self.limits).map(Some);
                }
                if kind == Kind::Text && simdutf8::basic::from_utf8(payload).is_err() {
                    return Err(&Disconnect::NOT_UTF8);
                }
                Ok(Some(Event::Message(kind, payload)))
            }
            Some(Found::Control(opcode)) => {
                let Some(progress) = &mut self.progress else { return Ok(None) };
                progress.delivered = Some(opcode);
                control_event(opcode, &progress.control).map(Some)
            }
            Some(Found::Message) => {
                let Some(progress) = &mut self.progress else { return Ok(None) };
                progress.delivered = Some(Opcode::Continuation);
                let Some(message) = &progress.message else { return Ok(None) };
                if message.compressed {
                    let own = self.inflater.as_deref_mut();
                    let (kind, bytes) = (message.kind, &message.bytes);
                    return inflate(own, inflaters, kind, bytes, self.limits).map(Some);
                }
                if message.kind == Kind::Text && !message.utf8.is_complete() {
                    return Err(&Disconnect::NOT_UTF8);
                }
                Ok(Some(Event::Message(message.kind, &message.bytes)))
            }
        }
    }

    /// Frees what the last event referred to.
    fn forget_delivered(&mut self) {
        let Some(progress) = &mut self.progress else { return };
        match progress.delivered.take() {
            None => {}
            Some(opcode) if opcode.is_control() => progress.control = Vec::new(),
            Some(_) => progress.message = None,
        }
        let idle = progress.message.is_none() && progress.frame.is_none();
        if idle && progress.header_bytes == 0 {
            self.progress = None;
        }
    }

    /// Goes on until an event is complete or the input is used up.
    fn find(&mut self, input: &mut Input<'_>) -> Result<Option<Found>, &'static Disconnect> {
        loop {
            if let Some((header, got)) = self.progress.as_ref().and_then(|p| p.frame) {
                // A frame without payload is complete although there is nothing left to read.
                if input.is_empty() && (got as u64) < header.length {
                    return Ok(None);
                }
                if let Some(found) = self.continue_frame(header, got, input)? {
                    return Ok(Some(found));
                }
                continue;
            }
            let Some(header) = self.read_header(input)? else { return Ok(None) };
            self.check(&header)?;
            let length = header.length as usize;
            let in_message = self.progress.as_ref().is_some_and(|p| p.message.is_some());
            let whole = length <= input.rest().len();
            if whole && (header.opcode.is_control() || (header.fin && !in_message)) {
                return Ok(Some(Found::Input(header, length)));
            }
            self.begin_frame(header);
        }
    }

    /// The next header; `None` where it is incomplete, and then kept.
    fn read_header(
        &mut self,
        input: &mut Input<'_>,
    ) -> Result<Option<Header>, &'static Disconnect> {
        let kept = self.progress.as_ref().map_or(0, |progress| progress.header_bytes);
        if kept == 0 {
            if let Some((header, length)) = Header::decode(input.rest())? {
                input.take(length);
                return Ok(Some(header));
            }
            if input.is_empty() {
                return Ok(None);
            }
        }
        let progress = self.progress.get_or_insert_default();
        while !input.is_empty() {
            progress.header[progress.header_bytes] = input.take(1)[0];
            progress.header_bytes += 1;
            if let Some((header, _)) = Header::decode(&progress.header[..progress.header_bytes])? {
                progress.header_bytes = 0;
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// What a header may not say here and now.
    fn check(&self, header: &Header) -> Result<(), &'static Disconnect> {
        let must_mask = self.role == Role::Server;
        if header.mask.is_some() != must_mask {
            return Err(&Disconnect::PROTOCOL);
        }
        if header.opcode.is_control() {
            return Ok(());
        }
        let message = self.progress.as_ref().and_then(|progress| progress.message.as_ref());
        let continues = header.opcode == Opcode::Continuation;
        if continues != message.is_some() || (header.compressed && (continues || !self.inflates)) {
            return Err(&Disconnect::PROTOCOL);
        }
        let (fragments, bytes) = message.map_or((0, 0), |m| (m.fragments, m.bytes.len()));
        if fragments >= self.limits.fragments_max {
            return Err(&Disconnect::TOO_MANY_FRAGMENTS);
        }
        let bytes = (bytes as u64).saturating_add(header.length);
        if bytes > self.limits.message_bytes_max as u64 {
            return Err(&Disconnect::TOO_BIG);
        }
        Ok(())
    }

    fn begin_frame(&mut self, header: Header) {
        let progress = self.progress.get_or_insert_default();
        progress.frame = Some((header, 0));
        match header.opcode {
            Opcode::Text | Opcode::Binary => {
                let text = header.opcode == Opcode::Text;
                progress.message = Some(Message {
                    kind: if text { Kind::Text } else { Kind::Binary },
                    compressed: header.compressed,
                    fragments: 1,
                    bytes: Vec::new(),
                    utf8: Utf8::default(),
                });
            }
            Opcode::Continuation => {
                if let Some(message) = &mut progress.message {
                    message.fragments += 1;
                }
            }
            _ => progress.control.reserve_exact(CONTROL_BYTES_MAX),
        }
    }

    fn continue_frame(
        &mut self,
        header: Header,
        got: usize,
        input: &mut Input<'_>,
    ) -> Result<Option<Found>, &'static Disconnect> {
        let Some(progress) = &mut self.progress else { return Ok(None) };
        let length = header.length as usize;
        let part = input.take(length - got);
        if let Some(mask) = header.mask {
            apply_mask(part, mask, got);
        }
        let got = got + part.len();
        progress.frame = (got < length).then_some((header, got));
        if header.opcode.is_control() {
            progress.control.extend_from_slice(part);
            return Ok((got == length).then_some(Found::Control(header.opcode)));
        }
        let Some(message) = &mut progress.message else { return Ok(None) };
        let checked = message.kind == Kind::Text && !message.compressed;
        if checked && !message.utf8.feed(part) {
            return Err(&Disconnect::NOT_UTF8);
        }
        message.bytes.extend_from_slice(part);
        Ok((got == length && header.fin).then_some(Found::Message))
    }
}

fn control_event(opcode: Opcode, payload: &[u8]) -> Result<Event<'_>, &'static Disconnect> {
    match opcode {
        Opcode::Ping => return Ok(Event::Ping(payload)),
        Opcode::Pong => return Ok(Event::Pong(payload)),
        _ => {}
    }
    match payload {
        [] => Ok(Event::Close(None)),
        [_] => Err(&Disconnect::PROTOCOL),
        [a, b, reason @ ..] => {
            let code = u16::from_be_bytes([*a, *b]);
            let reason = std::str::from_utf8(reason).map_err(|_| &Disconnect::NOT_UTF8)?;
            if !is_sendable(code) {
                return Err(&Disconnect::PROTOCOL);
            }
            Ok(Event::Close(Some((code, reason))))
        }
    }
}

fn inflate<'r>(
    own: Option<&mut Inflater>,
    inflaters: &'r mut Inflaters,
    kind: Kind,
    message: &[u8],
    limits: Limits,
) -> Result<Event<'r>, &'static Disconnect> {
    inflaters.inflate(own, message, limits.message_bytes_max)?;
    let inflated = inflaters.inflated();
    if kind == Kind::Text && simdutf8::basic::from_utf8(inflated).is_err() {
        return Err(&Disconnect::NOT_UTF8);
    }
    Ok(Event::Message(kind, inflated))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ws::frame::client_frame;

    const LIMITS: Limits = Limits { message_bytes_max: 1000, fragments_max: 8 };

    /// What arrives when `bytes` come in pieces of `step`.
    fn heard(bytes: &[u8], step: usize) -> Vec<String> {
        let mut receiver = Receiver::new(Role::Server, LIMITS, None);
        let mut inflaters = Inflaters::default();
        let mut heard = Vec::new();
        for piece in bytes.to_vec().chunks_mut(step) {
            let mut input = Input::new(piece);
            loop {
                match receiver.next(&mut input, &mut inflaters) {
                    Ok(None) => break,
                    Ok(Some(event)) => heard.push(format!("{event:?}")),
                    Err(violation) => {
                        heard.push(violation.label.into());
                        return heard;
                    }
                }
            }
        }
        assert_eq!(receiver.heap_bytes(), 0, "nothing is kept once all is complete");
        heard
    }

    fn fragment(opcode: Opcode, fin: bool, payload: &[u8]) -> Vec<u8> {
        let mut frame = client_frame(opcode, payload, false, [9, 8, 7, 6]).to_vec();
        if !fin {
            frame[0] &= 0x7f;
        }
        frame
    }

    #[test]
    fn every_way_to_cut_the_input_gives_the_same_events() {
        let bytes = [
            fragment(Opcode::Text, false, "aä".as_bytes()),
            fragment(Opcode::Ping, true, b"p"),
            fragment(Opcode::Continuation, false, b""),
            fragment(Opcode::Ping, true, b""),
            fragment(Opcode::Continuation, true, b""),
            fragment(Opcode::Binary, true, &[7; 300]),
            fragment(Opcode::Close, true, &[3, 232, b'x']),
        ]
        .concat();
        let whole = heard(&bytes, bytes.len());
        assert_eq!(whole.len(), 5);
        for step in 1..bytes.len() {
            assert_eq!(heard(&bytes, step), whole, "{step}");
        }
    }

    #[test]
    fn fragments_count_however_small_they_are() {
        let mut bytes = fragment(Opcode::Binary, false, b"");
        for _ in 0..10 {
            bytes.extend(fragment(Opcode::Continuation, false, b""));
        }
        assert_eq!(heard(&bytes, bytes.len()), ["too_many_fragments"]);
    }

    #[test]
    fn a_text_is_refused_as_soon_as_it_cannot_become_one() {
        let bytes = fragment(Opcode::Text, false, b"ab\xf4\x90");
        assert_eq!(heard(&bytes, 1), ["not_utf8"]);
    }

    #[test]
    fn a_claimed_length_is_refused_before_its_bytes_come() {
        let bytes = fragment(Opcode::Binary, true, &[0; 2000]);
        assert_eq!(heard(&bytes[..8], 8), ["too_big"]);
    }

    #[test]
    fn unmasked_frames_are_refused() {
        assert_eq!(heard(&[0x81, 1, b'a'], 3), ["protocol_error"]);
    }
}
