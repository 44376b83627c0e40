//! Validation of JSON (RFC 8259) that builds nothing; knows no schema.
//!
//! Every parser that a worker may use reads a valid text alike: escaped surrogates come in pairs, nesting is bounded,
//! and numbers follow the grammar. The range of numbers is not limited.

pub mod members;
mod strings;
pub mod text;

/// Error in a text, and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct JsonError {
    /// Index of the first byte that cannot stand there.
    pub offset: usize,
    /// Kind of the error.
    pub kind: JsonErrorKind,
}

/// Ways in which a text is no JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonErrorKind {
    /// The text ends inside the value.
    #[error("unexpected end")]
    End,
    /// A byte that cannot stand here.
    #[error("unexpected byte")]
    Unexpected,
    /// More levels of arrays and objects than are allowed.
    #[error("too deep")]
    TooDeep,
    /// A control character inside a string.
    #[error("control character in a string")]
    Control,
    /// An escape that does not exist.
    #[error("bad escape")]
    Escape,
    /// An escaped half of a surrogate pair.
    #[error("lone surrogate")]
    LoneSurrogate,
    /// Bytes after the value.
    #[error("trailing data")]
    Trailing,
    /// The text is not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
}

/// Checks that `text` is exactly one JSON value of at most `depth_max` levels of arrays and
/// objects (at most [`DEPTH_MAX`]; a scalar has none).
///
/// ```
/// use wsproxy_proto::json::validate;
///
/// assert!(validate(br#"{"type":"chat"}"#, 64).is_ok());
/// assert_eq!(validate(b"[1,]", 64).unwrap_err().offset, 3);
/// ```
///
/// # Errors
/// The first error.
pub fn validate(text: &[u8], depth_max: usize) -> Result<(), JsonError> {
    check_utf8(text)?;
    let mut reader = JsonScanner::<false> { text, at: 0 };
    reader.value(depth_max.min(DEPTH_MAX))?;
    reader.end()
}

fn check_utf8(text: &[u8]) -> Result<(), JsonError> {
    if simdutf8::basic::from_utf8(text).is_ok() {
        return Ok(());
    }
    let offset = simdutf8::compat::from_utf8(text).map_or_else(|e| e.valid_up_to(), str::len);
    Err(JsonError { offset, kind: JsonErrorKind::NotUtf8 })
}

/// Place in the text. There is one kind for each use, so that the scanner of clients' messages is compiled for them alone.
struct JsonScanner<'t, const TAKES_LONE_SURROGATES: bool> {
    text: &'t [u8],
    at: usize,
}

/// Stack of bits, one for each open container: whether it is an object.
struct Levels {
    bits: [u64; DEPTH_MAX / 64],
    depth: usize,
}

impl Levels {
    fn push(&mut self, object: bool) {
        let (word, bit) = (self.depth / 64, self.depth % 64);
        self.bits[word] = self.bits[word] & !(1 << bit) | u64::from(object) << bit;
        self.depth += 1;
    }

    /// Closes the innermost container. Returns whether the one around it is an object, if there is one.
    fn pop(&mut self) -> Option<bool> {
        self.depth -= 1;
        let top = self.depth.checked_sub(1)?;
        Some(self.bits[top / 64] >> (top % 64) & 1 == 1)
    }
}

impl<const TAKES_LONE_SURROGATES: bool> JsonScanner<'_, TAKES_LONE_SURROGATES> {
    /// Reads one value.
    fn value(&mut self, depth_max: usize) -> Result<(), JsonError> {
        let mut levels = Levels { bits: [0; DEPTH_MAX / 64], depth: 0 };
        // Whether the innermost open container is an object, if there is one.
        let mut inside: Option<bool> = None;
        loop {
            // A value begins here.
            match self.token()? {
                b'"' => self.string()?,
                open @ (b'[' | b'{') => {
                    if levels.depth == depth_max {
                        return Err(self.previous(JsonErrorKind::TooDeep));
                    }
                    let object = open == b'{';
                    levels.push(object);
                    inside = Some(object);
                    if self.peek_token() == Some(open + 2) {
                        self.at += 1;
                        inside = levels.pop();
                    } else {
                        if object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                b't' => self.word(b"rue")?,
                b'f' => self.word(b"alse")?,
                b'n' => self.word(b"ull")?,
                first => self.number(first)?,
            }
            // A value has ended here.
            loop {
                let Some(object) = inside else { return Ok(()) };
                match self.token()? {
                    b',' => {
                        if object {
                            self.key()?;
                        }
                        break;
                    }
                    b'}' if object => inside = levels.pop(),
                    b']' if !object => inside = levels.pop(),
                    _ => return Err(self.previous(JsonErrorKind::Unexpected)),
                }
            }
        }
    }

    /// Reads a key and its colon.
    #[inline]
    fn key(&mut self) -> Result<(), JsonError> {
        if self.token()? != b'"' {
            return Err(self.previous(JsonErrorKind::Unexpected));
        }
        self.string()?;
        if self.token()? != b':' {
            return Err(self.previous(JsonErrorKind::Unexpected));
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), JsonError> {
        match self.peek_token() {
            Some(_) => Err(self.here(JsonErrorKind::Trailing)),
            None => Ok(()),
        }
    }

    /// Returns the next byte that is no white space.
    #[inline]
    fn peek_token(&mut self) -> Option<u8> {
        while let Some(&byte) = self.text.get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Consumes the next byte that is no white space.
    #[inline]
    fn token(&mut self) -> Result<u8, JsonError> {
        let byte = self.peek_token().ok_or_else(|| self.here(JsonErrorKind::End))?;
        self.at += 1;
        Ok(byte)
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn word(&mut self, rest: &[u8]) -> Result<(), JsonError> {
        for expected in rest {
            if self.peek() != Some(*expected) {
                return Err(self.here_or_end());
            }
            self.at += 1;
        }
        Ok(())
    }

    #[inline]
    fn number(&mut self, first: u8) -> Result<(), JsonError> {
        let mut first = first;
        if first == b'-' {
            first = self.peek().ok_or_else(|| self.here(JsonErrorKind::End))?;
            self.at += 1;
        }
        match first {
            b'0' => {}
            b'1'..=b'9' => self.skip_digits(),
            _ => return Err(self.previous(JsonErrorKind::Unexpected)),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    #[inline]
    fn skip_digits(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
    }

    /// Reads one digit or more.
    fn digits(&mut self) -> Result<(), JsonError> {
        let from = self.at;
        self.skip_digits();
        if self.at == from { Err(self.here_or_end()) } else { Ok(()) }
    }

    /// Returns the error that the byte here is wrong.
    fn here(&self, kind: JsonErrorKind) -> JsonError {
        JsonError { offset: self.at, kind }
    }

    /// Returns the error that the byte consumed last is wrong.
    fn previous(&self, kind: JsonErrorKind) -> JsonError {
        JsonError { offset: self.at - 1, kind }
    }

    fn here_or_end(&self) -> JsonError {
        let end = self.at == self.text.len();
        self.here(if end { JsonErrorKind::End } else { JsonErrorKind::Unexpected })
    }
}

/// Upper bound of `depth_max`: each level takes one bit of the stack.
pub const DEPTH_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn fails(text: &[u8], offset: usize, kind: JsonErrorKind) {
        assert_eq!(validate(text, 64), Err(JsonError { offset, kind }));
    }

    #[test]
    fn every_kind_of_value() {
        for good in [
            "0",
            "-0",
            "-1.5e+10",
            "1E400",
            "10",
            "true",
            "false",
            "null",
            "\"\"",
            "[]",
            "{}",
            " [ ] ",
            "\t{ }\r\n",
            "[1,2,[3,{}],\"a\"]",
            r#"{"a":{"b":[{}, null]},"a":1}"#,
            r#""\"\\\/\b\f\n\r\t\u00e4\ud83d\ude00""#,
            "\"ä\u{10ffff}\u{7f}\"",
        ] {
            assert_eq!(validate(good.as_bytes(), 64), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_is_wrong_and_where() {
        use JsonErrorKind::*;
        fails(b"", 0, End);
        fails(b"  ", 2, End);
        fails(b"[", 1, End);
        fails(b"{\"a\"", 4, End);
        fails(b"{\"a\":", 5, End);
        fails(b"tru", 3, End);
        fails(b"trux", 3, Unexpected);
        fails(b"-", 1, End);
        fails(b"-x", 1, Unexpected);
        fails(b"01", 1, Trailing);
        fails(b"1.", 2, End);
        fails(b"1.e5", 2, Unexpected);
        fails(b"1e", 2, End);
        fails(b".5", 0, Unexpected);
        fails(b"+1", 0, Unexpected);
        fails(b"NaN", 0, Unexpected);
        fails(b"[1,]", 3, Unexpected);
        fails(b"[,1]", 1, Unexpected);
        fails(b"[1 2]", 3, Unexpected);
        fails(b"[1}", 2, Unexpected);
        fails(b"{1:2}", 1, Unexpected);
        fails(b"{\"a\" 1}", 5, Unexpected);
        fails(b"{\"a\":1,}", 7, Unexpected);
        fails(b"{\"a\":1]", 6, Unexpected);
        fails(b"1 1", 2, Trailing);
        fails(b"{}}", 2, Trailing);
        fails(b"\xef\xbb\xbf1", 0, Unexpected);
        fails(b"\"\xff\"", 1, NotUtf8);
        fails(b"[1]\x00", 3, Trailing);
        fails(b"[1,\x0c1]", 3, Unexpected);
    }

    #[test]
    fn depth_is_bounded_and_costs_no_stack() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert_eq!(validate(nested(3).as_bytes(), 3), Ok(()));
        let too_deep = JsonError { offset: 3, kind: JsonErrorKind::TooDeep };
        assert_eq!(validate(nested(4).as_bytes(), 3), Err(too_deep));
        assert_eq!(validate(b"1", 0), Ok(()));
        assert!(validate(b"[]", 0).is_err());
        assert_eq!(validate(nested(DEPTH_MAX).as_bytes(), usize::MAX), Ok(()));
        assert!(validate(nested(1_000_000).as_bytes(), usize::MAX).is_err());
        let mixed = "[{\"a\":".repeat(100) + "1" + &"}]".repeat(100);
        assert_eq!(validate(mixed.as_bytes(), 200), Ok(()));
        let crossed = "[{\"a\":".repeat(100) + "1" + &"]}".repeat(100);
        assert!(validate(crossed.as_bytes(), 200).is_err());
    }
}
