//! RESP3: finds the ends of frames, reads values and writes commands. No IO.
//!
//! [`Scanner`] finds the end of a frame in bytes that arrive in any pieces, and keeps its progress between calls. Only
//! whole, well-formed frames are given to [`RespValue::parse`].

use bytes::{BufMut, Bytes, BytesMut};

/// The reason why bytes are not RESP3; their connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Broken(pub(super) &'static str);

/// Finds the end of the first frame of a buffer.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// Position up to which the bytes belong to the frame and are well-formed.
    position: usize,
    /// Missing elements of each open aggregate.
    open: [u32; DEPTH_MAX],
    depth: usize,
}

impl Scanner {
    /// Returns the length of the frame that `buffer` begins with; `None` while it is incomplete. Call it again with
    /// the same buffer and further bytes.
    pub(super) fn scan(&mut self, buffer: &[u8]) -> Result<Option<usize>, Broken> {
        while let Some((head, after_head)) = Head::read(buffer, self.position)? {
            match head {
                Head::Line => self.position = after_head,
                Head::Blob(bytes) => {
                    let end = after_head + bytes + 2;
                    let Some(crlf) = buffer.get(end - 2..end) else { return Ok(None) };
                    if crlf != b"\r\n" {
                        return Err(Broken("a string does not end where it should"));
                    }
                    self.position = end;
                }
                Head::Aggregate(0) => self.position = after_head,
                Head::Aggregate(elements) => {
                    if self.depth == DEPTH_MAX {
                        return Err(Broken("too deeply nested"));
                    }
                    self.open[self.depth] = elements;
                    self.depth += 1;
                    self.position = after_head;
                    continue;
                }
            }
            while self.depth > 0 {
                self.open[self.depth - 1] -= 1;
                if self.open[self.depth - 1] > 0 {
                    break;
                }
                self.depth -= 1;
            }
            if self.depth == 0 {
                return Ok(Some(std::mem::take(&mut self.position)));
            }
        }
        Ok(None)
    }
}

/// The kind of an element, from its first line.
enum Head {
    /// The element is that line.
    Line,
    /// This number of bytes follows, and a line end.
    Blob(usize),
    /// This number of elements follows.
    Aggregate(u32),
}

impl Head {
    /// Reads the head at `position`, and returns its end; `None` while it is incomplete.
    fn read(buffer: &[u8], position: usize) -> Result<Option<(Self, usize)>, Broken> {
        let Some(&kind) = buffer.get(position) else { return Ok(None) };
        match kind {
            b'+' | b'-' | b',' | b'(' | b'#' | b'_' | b':' => {
                let Some(end) = line_end(buffer, position)? else { return Ok(None) };
                Ok(Some((Self::Line, end)))
            }
            b'$' | b'!' | b'=' | b'*' | b'~' | b'>' | b'%' => {
                let Some((number, end)) = length(buffer, position + 1)? else { return Ok(None) };
                let head = match (kind, number) {
                    (b'$' | b'*', None) => Self::Line,
                    (_, None) => return Err(Broken("a length below zero")),
                    (b'$' | b'!' | b'=', Some(bytes)) if bytes <= BLOB_BYTES_MAX => {
                        Self::Blob(bytes)
                    }
                    (b'$' | b'!' | b'=', Some(_)) => return Err(Broken("too long a string")),
                    (_, Some(elements)) => {
                        let elements = if kind == b'%' { elements * 2 } else { elements };
                        match u32::try_from(elements) {
                            Ok(elements) if elements <= ELEMENTS_MAX => Self::Aggregate(elements),
                            _ => return Err(Broken("too many elements")),
                        }
                    }
                };
                Ok(Some((head, end)))
            }
            _ => Err(Broken("an unknown kind of value")),
        }
    }
}

/// Reads `digits CRLF`; the number is `None` for `-1`, the null of RESP2. `None` while incomplete.
fn length(buffer: &[u8], start: usize) -> Result<Option<(Option<usize>, usize)>, Broken> {
    let mut number = 0usize;
    for (index, byte) in buffer[start..].iter().enumerate() {
        match byte {
            b'0'..=b'9' if index < LENGTH_DIGITS_MAX => {
                number = number * 10 + usize::from(byte - b'0');
            }
            b'\r' if index > 0 => {
                return match buffer.get(start + index + 1) {
                    None => Ok(None),
                    Some(b'\n') => Ok(Some((Some(number), start + index + 2))),
                    Some(_) => Err(Broken("a line does not end where it should")),
                };
            }
            b'-' if index == 0 => {
                let line = &buffer[start..buffer.len().min(start + 4)];
                return match line {
                    b"-1\r\n" => Ok(Some((None, start + 4))),
                    _ if b"-1\r\n".starts_with(line) => Ok(None),
                    _ => Err(Broken("a length below zero")),
                };
            }
            _ => return Err(Broken("a length is not a number")),
        }
    }
    Ok(None)
}

/// Returns the position after the CRLF of the line at `start`; `None` while it is incomplete.
fn line_end(buffer: &[u8], start: usize) -> Result<Option<usize>, Broken> {
    let line = &buffer[start..buffer.len().min(start + LINE_BYTES_MAX)];
    match line.iter().position(|byte| *byte == b'\r') {
        Some(at) => match buffer.get(start + at + 1) {
            None => Ok(None),
            Some(b'\n') => Ok(Some(start + at + 2)),
            Some(_) => Err(Broken("a line does not end where it should")),
        },
        None if line.len() == LINE_BYTES_MAX => Err(Broken("too long a line")),
        None => Ok(None),
    }
}

/// One value of a frame, borrowed from it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RespValue<'a> {
    /// Strings of every kind, doubles, big numbers and booleans, as they are spelled.
    Text(&'a [u8]),
    /// An error that the server returned.
    Error(&'a [u8]),
    /// An integer.
    Integer(i64),
    /// Null.
    Null,
    /// Arrays, sets, and maps as keys and values in turn.
    Array(Vec<Self>),
    /// A message that the server sends without a request.
    Push(Vec<Self>),
}

impl<'a> RespValue<'a> {
    /// Reads the value that `bytes` begins with, and returns the rest. A [`Scanner`] must have found the value whole.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), Broken> {
        let Some((head, end)) = Head::read(bytes, 0)? else {
            return Err(Broken("an incomplete value"));
        };
        let (first, rest) = bytes.split_at(end);
        let (kind, line) = (first[0], &first[1..end - 2]);
        match head {
            Head::Line => {
                let value = match kind {
                    b'-' => Self::Error(line),
                    b':' => Self::Integer(integer(line)?),
                    b'_' | b'$' | b'*' => Self::Null,
                    _ => Self::Text(line),
                };
                Ok((value, rest))
            }
            Head::Blob(bytes) => {
                let Some((blob, rest)) = rest.split_at_checked(bytes + 2) else {
                    return Err(Broken("an incomplete value"));
                };
                let blob = &blob[..bytes];
                let value = match kind {
                    b'!' => Self::Error(blob),
                    // A verbatim string begins with its format: `txt:`.
                    b'=' => Self::Text(blob.get(4..).unwrap_or_default()),
                    _ => Self::Text(blob),
                };
                Ok((value, rest))
            }
            Head::Aggregate(elements) => {
                // The count is unproven: memory for many elements is only allocated as they are read.
                let mut values = Vec::with_capacity(elements.min(16) as usize);
                let mut rest = rest;
                for _ in 0..elements {
                    let (value, after) = Self::parse(rest)?;
                    values.push(value);
                    rest = after;
                }
                let value = if kind == b'>' { Self::Push(values) } else { Self::Array(values) };
                Ok((value, rest))
            }
        }
    }

    /// Returns the string, if it is one.
    pub(super) fn text(&self) -> Option<&'a [u8]> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// A push of three elements: a message, or the confirmation of a subscription.
pub(super) struct Push<'a> {
    /// `message`, `subscribe`, `unsubscribe`, …
    pub(super) kind: &'a [u8],
    /// The channel.
    pub(super) channel: &'a [u8],
    /// The payload of a message; empty otherwise.
    pub(super) payload: &'a [u8],
}

impl<'a> Push<'a> {
    /// Reads a whole frame without allocating; `None` if it is no such push.
    pub(super) fn parse(frame: &'a [u8]) -> Result<Option<Self>, Broken> {
        let Some(rest) = frame.strip_prefix(b">3\r\n") else { return Ok(None) };
        let (kind, rest) = RespValue::parse(rest)?;
        let (channel, rest) = RespValue::parse(rest)?;
        let (third, _) = RespValue::parse(rest)?;
        Ok(match (kind, channel, third) {
            (RespValue::Text(kind), RespValue::Text(channel), RespValue::Text(payload)) => {
                Some(Self { kind, channel, payload })
            }
            (RespValue::Text(kind), RespValue::Text(channel), RespValue::Integer(_)) => {
                Some(Self { kind, channel, payload: b"" })
            }
            _ => None,
        })
    }
}

/// A reply that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    /// A string.
    Text(Bytes),
    /// An integer.
    Integer(i64),
    /// Null.
    Null,
    /// Several replies.
    Array(Vec<Self>),
    /// An error inside of an aggregate.
    Error,
}

impl From<&RespValue<'_>> for Reply {
    fn from(value: &RespValue<'_>) -> Self {
        match value {
            RespValue::Text(text) => Self::Text(Bytes::copy_from_slice(text)),
            RespValue::Error(_) => Self::Error,
            RespValue::Integer(number) => Self::Integer(*number),
            RespValue::Null => Self::Null,
            RespValue::Array(values) | RespValue::Push(values) => {
                Self::Array(values.iter().map(Self::from).collect())
            }
        }
    }
}

/// Appends the head of a command of `words` words.
pub(super) fn command(out: &mut BytesMut, words: usize) {
    head(out, b'*', words as u64);
}

/// Appends one word of a command.
pub(super) fn word(out: &mut BytesMut, bytes: &[u8]) {
    head(out, b'$', bytes.len() as u64);
    out.reserve(bytes.len() + 2);
    out.put_slice(bytes);
    out.put_slice(b"\r\n");
}

/// Appends a number as one word of a command.
pub(super) fn number(out: &mut BytesMut, number: u64) {
    let mut digits = [0; DIGITS];
    word(out, decimal(number, &mut digits));
}

/// Appends a whole command.
pub(super) fn words(out: &mut BytesMut, words: &[&[u8]]) {
    command(out, words.len());
    words.iter().for_each(|bytes| word(out, bytes));
}

fn head(out: &mut BytesMut, kind: u8, count: u64) {
    let mut digits = [0; DIGITS];
    let digits = decimal(count, &mut digits);
    out.reserve(digits.len() + 3);
    out.put_u8(kind);
    out.put_slice(digits);
    out.put_slice(b"\r\n");
}

fn decimal(mut number: u64, digits: &mut [u8; DIGITS]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}

fn integer(line: &[u8]) -> Result<i64, Broken> {
    // Numbers of receivers nearly always have one digit.
    if let [digit @ b'0'..=b'9'] = line {
        return Ok(i64::from(digit - b'0'));
    }
    let number = std::str::from_utf8(line).ok().and_then(|text| text.parse().ok());
    number.ok_or(Broken("an integer is not a number"))
}

/// Longest string that is read. Redis allows 512 MiB; messages of a gateway are far smaller.
const BLOB_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most elements of an aggregate.
const ELEMENTS_MAX: u32 = 1 << 20;

/// Most aggregates within each other.
const DEPTH_MAX: usize = 8;

/// Longest simple string, error or number.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// Longest number of a length: enough for every allowed length, and too short to overflow.
const LENGTH_DIGITS_MAX: usize = 10;

/// Digits of the largest `u64`.
const DIGITS: usize = 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the frames of bytes that arrive at once.
    fn frames(bytes: &[u8]) -> Result<Vec<Vec<u8>>, Broken> {
        pieces(&[bytes])
    }

    /// Returns the frames of bytes that arrive in these pieces.
    fn pieces(pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>, Broken> {
        let (mut scanner, mut buffer, mut found) = (Scanner::default(), Vec::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            while let Some(length) = scanner.scan(&buffer)? {
                let rest = buffer.split_off(length);
                let (_, left) = RespValue::parse(&buffer)?;
                assert!(left.is_empty());
                found.push(std::mem::replace(&mut buffer, rest));
            }
        }
        Ok(found)
    }

    fn value(bytes: &[u8]) -> RespValue<'_> {
        assert_eq!(frames(bytes).unwrap(), [bytes]);
        RespValue::parse(bytes).unwrap().0
    }

    #[test]
    fn values_of_every_kind_are_read() {
        assert_eq!(value(b"+OK\r\n"), RespValue::Text(b"OK"));
        assert_eq!(value(b"-ERR no\r\n"), RespValue::Error(b"ERR no"));
        assert_eq!(value(b"!6\r\nERR no\r\n"), RespValue::Error(b"ERR no"));
        assert_eq!(value(b":-12\r\n"), RespValue::Integer(-12));
        assert_eq!(value(b"$0\r\n\r\n"), RespValue::Text(b""));
        assert_eq!(value(b"$4\r\na\r\nb\r\n"), RespValue::Text(b"a\r\nb"));
        assert_eq!(value(b"=6\r\ntxt:ab\r\n"), RespValue::Text(b"ab"));
        assert_eq!(value(b",1.5\r\n"), RespValue::Text(b"1.5"));
        assert_eq!(value(b"#t\r\n"), RespValue::Text(b"t"));
        assert_eq!(value(b"(123456789012345678901234567890\r\n").text().unwrap().len(), 30);
        for null in [&b"_\r\n"[..], b"$-1\r\n", b"*-1\r\n"] {
            assert_eq!(value(null), RespValue::Null);
        }
        assert_eq!(value(b"*0\r\n"), RespValue::Array(vec![]));
        let map = RespValue::Array(vec![
            RespValue::Text(b"role"),
            RespValue::Array(vec![RespValue::Integer(7)]),
        ]);
        assert_eq!(value(b"%1\r\n+role\r\n*1\r\n:7\r\n"), map);
        let push = Push::parse(b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n").unwrap().unwrap();
        assert_eq!(
            (push.kind, push.channel, push.payload),
            (&b"message"[..], &b"c"[..], &b"hi"[..])
        );
    }

    #[test]
    fn what_is_not_resp_or_too_large_is_refused() {
        for bad in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"$5\r\nhelloXX",
            b"$-2\r\n",
            b"$\r\n",
            b"$1x\r\n",
            b"$99999999999999999999\r\n",
            b"$67108865\r\n",
            b"*1048577\r\n",
            b"%9999999999\r\n",
            b">-1\r\n",
            b"+a\rb",
            b":\r\n\0",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
            b"$?\r\n",
            b"|1\r\n",
        ] {
            assert!(frames(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(frames(&[b'+'; LINE_BYTES_MAX]).is_err());
        assert!(RespValue::parse(b":12a\r\n").is_err());
    }

    #[test]
    fn commands_are_spelled_as_arrays_of_strings() {
        let mut out = BytesMut::new();
        words(&mut out, &[b"SET", b"k", b""]);
        number(&mut out, 1_234_567);
        assert_eq!(out, "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n$7\r\n1234567\r\n");
    }

    fn encoded() -> impl Strategy<Value = Vec<u8>> {
        let blob = |kind: char| {
            prop::collection::vec(any::<u8>(), 0..40).prop_map(move |bytes| {
                [format!("{kind}{}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat()
            })
        };
        let leaf = prop_oneof![
            blob('$'),
            blob('!'),
            any::<i64>().prop_map(|n| format!(":{n}\r\n").into_bytes()),
            "[-+][ -~]{0,20}".prop_map(|line| format!("{line}\r\n").into_bytes()),
            Just(b"_\r\n".to_vec()),
            Just(b"$-1\r\n".to_vec()),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            (prop::sample::select(vec!['*', '~', '>']), prop::collection::vec(inner, 0..6))
                .prop_map(|(kind, values)| {
                    [format!("{kind}{}\r\n", values.len()).as_bytes(), &values.concat()].concat()
                })
        })
    }

    proptest! {
        #[test]
        fn frames_are_the_same_in_whatever_pieces_they_arrive(
            sent in prop::collection::vec(encoded(), 1..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let all = sent.concat();
            prop_assert_eq!(&frames(&all).unwrap(), &sent);
            let single: Vec<&[u8]> = all.chunks(1).collect();
            prop_assert_eq!(&pieces(&single).unwrap(), &sent);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(all.len())).collect();
            cuts.extend([0, all.len()]);
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|cut| &all[cut[0]..cut[1]]).collect();
            prop_assert_eq!(&pieces(&parts).unwrap(), &sent);
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), prop::sample::select(b"$*>%:+-\r\n0123".to_vec())], 0..200),
        ) {
            let mut scanner = Scanner::default();
            if let Ok(Some(length)) = scanner.scan(&bytes) {
                let _ = RespValue::parse(&bytes[..length]);
                let _ = Push::parse(&bytes[..length]);
            }
        }

        #[test]
        fn a_damaged_frame_never_makes_it_panic(
            frame in encoded(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = frame;
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(Some(length)) = Scanner::default().scan(&bytes) {
                let _ = RespValue::parse(&bytes[..length]);
            }
        }
    }
}
