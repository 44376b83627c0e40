//! One pass over a JSON text that replaces what is secret, and what a database would refuse. Knows neither bounds of
//! values nor configuration.
//!
//! Everything else is copied as it was written: numbers, escapes, order, white space. A text in which nothing is
//! replaced is not copied at all.

use crate::audit::redaction::words::SecretNames;

/// Text after the pass.
#[derive(Debug)]
pub(super) struct Rewritten {
    /// The new text of what was read; `None`: nothing was replaced, or the text is no JSON.
    pub(super) text: Option<String>,
    /// Bytes of the old text that were read.
    pub(super) read: usize,
    /// Reason for which the pass ended.
    pub(super) end: End,
}

/// Reason for which a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The text is one JSON value.
    Whole,
    /// The text ends within the value: it may be the start of a longer one.
    Start,
    /// The text is no JSON.
    NotJson,
}

/// Rewrites one JSON value. Members that `secrets` has lose their values.
pub(super) fn rewrite(text: &str, secrets: Option<&SecretNames>) -> Rewritten {
    let bytes = text.as_bytes();
    let mut pass = Pass { text, bytes, at: 0, copied: 0, new: String::new(), secrets };
    let end = match pass.value() {
        Ok(()) if pass.token().is_err() => End::Whole,
        Ok(()) => End::NotJson,
        Err(end) => end,
    };
    let read = pass.at;
    let is_changed = pass.copied > 0;
    let text = (is_changed && end != End::NotJson).then(|| {
        pass.new.push_str(&text[pass.copied..read]);
        pass.new
    });
    Rewritten { text, read, end }
}

struct Pass<'t> {
    text: &'t str,
    bytes: &'t [u8],
    at: usize,
    /// Everything before this place is in the new text, or was replaced.
    copied: usize,
    new: String,
    secrets: Option<&'t SecretNames>,
}

/// Open containers, innermost last: a bit for each, set for objects.
struct Levels {
    objects: u128,
    depth: u32,
}

impl Levels {
    const fn push(&mut self, is_object: bool) {
        self.objects = self.objects << 1 | is_object as u128;
        self.depth += 1;
    }

    const fn pop(&mut self) {
        self.objects >>= 1;
        self.depth -= 1;
    }
}

impl Pass<'_> {
    /// Passes one value and all in it.
    fn value(&mut self) -> Result<(), End> {
        let mut levels = Levels { objects: 0, depth: 0 };
        loop {
            match self.token()? {
                b'{' | b'[' if levels.depth == DEPTH_MAX => {
                    let from = self.at - 1;
                    self.at = from;
                    let skipped = self.skip();
                    self.replace(from, TOO_DEEP);
                    skipped?;
                }
                b'{' if self.peek()? == b'}' => self.at += 1,
                b'[' if self.peek()? == b']' => self.at += 1,
                b'{' => {
                    levels.push(true);
                    if !self.member()? {
                        continue;
                    }
                }
                b'[' => {
                    levels.push(false);
                    continue;
                }
                b'"' => self.string()?,
                b't' => self.literal(b"rue")?,
                b'f' => self.literal(b"alse")?,
                b'n' => self.literal(b"ull")?,
                b'-' | b'0'..=b'9' => self.number()?,
                _ => return Err(End::NotJson),
            }
            // A value has ended here.
            loop {
                if levels.depth == 0 {
                    return Ok(());
                }
                match (self.token()?, levels.objects & 1 == 1) {
                    (b'}', true) | (b']', false) => levels.pop(),
                    (b',', true) if self.member()? => {}
                    (b',', _) => break,
                    _ => return Err(End::NotJson),
                }
            }
        }
    }

    /// Passes the name of a member and the colon. Returns whether the value was passed too, since it is secret.
    fn member(&mut self) -> Result<bool, End> {
        if self.token()? != b'"' {
            return Err(End::NotJson);
        }
        let from = self.at;
        self.string()?;
        let name = &self.bytes[from..self.at - 1];
        let is_secret = self.secrets.is_some_and(|secrets| match memchr::memchr(b'\\', name) {
            None => secrets.have(name),
            Some(_) => secrets.have(&unescaped(name)),
        });
        if self.token()? != b':' {
            return Err(End::NotJson);
        }
        if is_secret {
            self.peek()?;
            let from = self.at;
            // A secret of which only the start is here is replaced as well.
            let skipped = self.skip();
            self.replace(from, REDACTED);
            skipped?;
        }
        Ok(is_secret)
    }

    /// Passes a string, behind its opening quote.
    fn string(&mut self) -> Result<(), End> {
        loop {
            let rest = &self.bytes[self.at..];
            let Some(len) = memchr::memchr2(b'"', b'\\', rest) else { return self.ran_out() };
            if rest[..len].iter().fold(false, |has, byte| has | (*byte < b' ')) {
                return Err(End::NotJson);
            }
            self.at += len;
            if rest[len] == b'"' {
                self.at += 1;
                return Ok(());
            }
            self.escape()?;
        }
    }

    /// Passes an escape. PostgreSQL takes neither an escaped NUL nor half of a surrogate pair.
    fn escape(&mut self) -> Result<(), End> {
        let from = self.at;
        match self.bytes.get(from + 1) {
            Some(b'u') => {}
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                return Ok(());
            }
            Some(_) => return Err(End::NotJson),
            None => return self.ran_out(),
        }
        let unit = self.hex(from + 2)?;
        self.at = from + 6;
        let is_pair = matches!(unit, 0xd800..=0xdbff)
            && self.bytes[self.at..].starts_with(b"\\u")
            && matches!(self.hex(self.at + 2), Ok(0xdc00..=0xdfff));
        match unit {
            0xd800..=0xdbff if is_pair => self.at += 6,
            0 | 0xd800..=0xdfff => self.replace(from, REPLACEMENT),
            _ => {}
        }
        Ok(())
    }

    /// Returns the number of the four digits at `from`.
    fn hex(&mut self, from: usize) -> Result<u16, End> {
        let Some(digits) = self.bytes.get(from..from + 4) else { return self.ran_out() };
        let digits = digits.iter().map(|digit| char::from(*digit).to_digit(16));
        let unit = digits.reduce(|unit, digit| Some(unit? << 4 | digit?)).flatten();
        unit.map(|unit| unit as u16).ok_or(End::NotJson)
    }

    /// Passes the rest of a literal.
    fn literal(&mut self, rest: &[u8]) -> Result<(), End> {
        let there = &self.bytes[self.at..];
        if there.starts_with(rest) {
            self.at += rest.len();
            return Ok(());
        }
        if rest.starts_with(there) { self.ran_out() } else { Err(End::NotJson) }
    }

    /// Passes a number, behind its first byte. One beyond what PostgreSQL computes with becomes a string.
    fn number(&mut self) -> Result<(), End> {
        let from = self.at - 1;
        let first = match self.bytes[from] {
            b'-' => self.next()?,
            digit => digit,
        };
        match first {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return Err(End::NotJson),
        }
        if self.bytes.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.some_digits()?;
        }
        let mut is_sane = self.at - from <= NUMBER_BYTES_MAX;
        if let Some(b'e' | b'E') = self.bytes.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.bytes.get(self.at) {
                self.at += 1;
            }
            let exponent = self.at;
            self.some_digits()?;
            let exponent = self.text[exponent..self.at].trim_start_matches('0');
            is_sane &= exponent.len() <= EXPONENT_DIGITS_MAX;
        }
        if !is_sane {
            let number = format!("\"{}\"", &self.text[from..self.at]);
            self.replace(from, &number);
        }
        Ok(())
    }

    fn some_digits(&mut self) -> Result<(), End> {
        if !self.next()?.is_ascii_digit() {
            return Err(End::NotJson);
        }
        self.digits();
        Ok(())
    }

    fn digits(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
    }

    /// Passes a value that is replaced. Only its end matters, not its grammar.
    fn skip(&mut self) -> Result<(), End> {
        let mut depth = 0_usize;
        loop {
            match self.next()? {
                b'"' => self.skip_string()?,
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.checked_sub(1).ok_or(End::NotJson)?,
                b',' | b':' if depth == 0 => return Err(End::NotJson),
                _ if depth == 0 => {
                    let is_end = |byte: &u8| b",:]}{[\" \t\r\n".contains(byte);
                    let rest = &self.bytes[self.at..];
                    self.at += rest.iter().position(is_end).unwrap_or(rest.len());
                }
                _ => {}
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn skip_string(&mut self) -> Result<(), End> {
        loop {
            match memchr::memchr2(b'"', b'\\', &self.bytes[self.at..]) {
                Some(len) if self.bytes[self.at + len] == b'"' => {
                    self.at += len + 1;
                    return Ok(());
                }
                Some(len) if self.at + len + 2 <= self.bytes.len() => self.at += len + 2,
                _ => return self.ran_out(),
            }
        }
    }

    /// Returns the next byte that is no white space, and passes it.
    fn token(&mut self) -> Result<u8, End> {
        let byte = self.peek()?;
        self.at += 1;
        Ok(byte)
    }

    /// Passes white space, and returns the byte behind it.
    fn peek(&mut self) -> Result<u8, End> {
        loop {
            match self.bytes.get(self.at) {
                Some(b' ' | b'\t' | b'\r' | b'\n') => self.at += 1,
                Some(byte) => return Ok(*byte),
                None => return Err(End::Start),
            }
        }
    }

    /// Returns the next byte, and passes it.
    fn next(&mut self) -> Result<u8, End> {
        let byte = self.bytes.get(self.at).ok_or(End::Start)?;
        self.at += 1;
        Ok(*byte)
    }

    fn ran_out<T>(&mut self) -> Result<T, End> {
        self.at = self.bytes.len();
        Err(End::Start)
    }

    /// Puts `with` in the place of everything from `from` up to here.
    fn replace(&mut self, from: usize, with: &str) {
        self.new.push_str(&self.text[self.copied..from]);
        self.new.push_str(with);
        self.copied = self.at;
    }
}

/// Returns a name without escapes. Letters beyond ASCII become some letter, since no secret name has one.
fn unescaped(name: &[u8]) -> Vec<u8> {
    let mut bytes = name.iter().copied();
    let mut plain = Vec::with_capacity(name.len());
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            plain.push(byte);
            continue;
        }
        if bytes.next() != Some(b'u') {
            plain.push(b' ');
            continue;
        }
        let unit = bytes
            .by_ref()
            .take(4)
            .fold(0, |unit, digit| unit << 4 | char::from(digit).to_digit(16).unwrap_or_default());
        plain.push(u8::try_from(unit).ok().filter(u8::is_ascii).unwrap_or(u8::MAX));
    }
    plain
}

/// Stands for the value of a secret member.
const REDACTED: &str = "\"[redacted]\"";

/// Stands for a container below [`DEPTH_MAX`] others.
const TOO_DEEP: &str = "\"[too deep]\"";

/// Stands for an escape that no database takes.
const REPLACEMENT: &str = "\\ufffd";

/// Levels of arrays and objects that are kept: as many as [`Levels`] has bits. PostgreSQL refuses several thousand.
const DEPTH_MAX: u32 = u128::BITS;

/// Bytes of a number without its exponent. PostgreSQL refuses 16,384 digits behind the point.
const NUMBER_BYTES_MAX: usize = 1000;

/// Digits of an exponent: so the number has fewer than 2,000 digits when PostgreSQL writes it.
const EXPONENT_DIGITS_MAX: usize = 3;
