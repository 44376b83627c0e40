//! Whether a text is JSON (RFC 8259), found out without building anything and without recursion.

/// Why a text is not JSON, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct JsonError {
    /// The byte at which it cannot go on.
    pub offset: usize,
    /// What is wrong there.
    pub kind: JsonErrorKind,
}

/// What can be wrong with a JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonErrorKind {
    /// Neither text nor JSON.
    #[error("not UTF-8")]
    NotUtf8,
    /// The text ends before the value does.
    #[error("unexpected end")]
    Unfinished,
    /// A byte that cannot stand here.
    #[error("unexpected character")]
    Unexpected,
    /// More nesting than allowed.
    #[error("nested too deeply")]
    TooDeep,
    /// A number that the grammar does not know.
    #[error("malformed number")]
    Number,
    /// A string with a control character or an unknown escape.
    #[error("malformed string")]
    String,
    /// Half of a surrogate pair, which is no character.
    #[error("lone surrogate")]
    Surrogate,
}

use JsonErrorKind::{NotUtf8, Number, String, Surrogate, TooDeep, Unexpected, Unfinished};

/// Deepest nesting that can be asked for.
pub const DEPTH_MAX: usize = 256;

/// Checks that `text` is one JSON value, with at most `depth_max` (up to [`DEPTH_MAX`]) arrays and
/// objects inside each other. Numbers are judged by the grammar alone: any magnitude is fine.
///
/// # Errors
/// The first thing that is wrong.
pub fn validate(text: &[u8], depth_max: usize) -> Result<(), JsonError> {
    if let Err(error) = simdutf8::compat::from_utf8(text) {
        return Err(JsonError { offset: error.valid_up_to(), kind: NotUtf8 });
    }
    let depth_max = depth_max.min(DEPTH_MAX);
    Scanner { text, at: 0, depth: 0, depth_max, objects: [0; DEPTH_MAX / 64] }.run()
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
    depth_max: usize,
    /// A bit for each level: whether it is an object.
    objects: [u64; DEPTH_MAX / 64],
}

impl Scanner<'_> {
    fn run(mut self) -> Result<(), JsonError> {
        loop {
            // Here a value begins.
            let opened = self.value()?;
            if opened {
                continue;
            }
            // Here a value has ended: it may end the arrays and objects around it.
            loop {
                self.space();
                if self.depth == 0 {
                    return if self.at == self.text.len() { Ok(()) } else { self.fail(Unexpected) };
                }
                match (self.peek()?, self.in_object()) {
                    (b',', false) => self.at += 1,
                    (b',', true) => {
                        self.at += 1;
                        self.key()?;
                    }
                    (b']', false) | (b'}', true) => {
                        self.at += 1;
                        self.depth -= 1;
                        continue;
                    }
                    _ => return self.fail(Unexpected),
                }
                break;
            }
        }
    }

    /// Reads a value; `true` where it is an array or object that is open, and not empty.
    fn value(&mut self) -> Result<bool, JsonError> {
        self.space();
        match self.peek()? {
            b'"' => self.string()?,
            b'-' | b'0'..=b'9' => self.number()?,
            b't' => self.word(b"true")?,
            b'f' => self.word(b"false")?,
            b'n' => self.word(b"null")?,
            b'[' => return self.open(false),
            b'{' => return self.open(true),
            _ => return self.fail(Unexpected),
        }
        Ok(false)
    }

    fn open(&mut self, object: bool) -> Result<bool, JsonError> {
        if self.depth == self.depth_max {
            return self.fail(TooDeep);
        }
        self.at += 1;
        self.space();
        if self.peek()? == if object { b'}' } else { b']' } {
            self.at += 1;
            return Ok(false);
        }
        let (word, bit) = (self.depth / 64, 1 << (self.depth % 64));
        if object {
            self.objects[word] |= bit;
        } else {
            self.objects[word] &= !bit;
        }
        self.depth += 1;
        if object {
            self.key()?;
        }
        Ok(true)
    }

    fn in_object(&self) -> bool {
        let level = self.depth - 1;
        self.objects[level / 64] & (1 << (level % 64)) != 0
    }

    /// A member's name and its colon.
    fn key(&mut self) -> Result<(), JsonError> {
        self.space();
        if self.peek()? != b'"' {
            return self.fail(Unexpected);
        }
        self.string()?;
        self.space();
        if self.peek()? != b':' {
            return self.fail(Unexpected);
        }
        self.at += 1;
        Ok(())
    }

    fn string(&mut self) -> Result<(), JsonError> {
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.iter().position(|&b| b == b'"' || b == b'\\' || b < 0x20);
            let Some(plain) = plain else {
                self.at = self.text.len();
                return self.fail(Unfinished);
            };
            self.at += plain;
            match self.text[self.at] {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => self.escape()?,
                _ => return self.fail(String),
            }
        }
    }

    fn escape(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        self.at += 1;
        match self.peek()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                self.at += 1;
                return Ok(());
            }
            b'u' => self.at += 1,
            _ => return self.fail(String),
        }
        let first = self.hex4()?;
        let pair = match first {
            0xd800..=0xdbff => {
                let follows = self.text[self.at..].starts_with(b"\\u");
                self.at += if follows { 2 } else { 0 };
                follows && (0xdc00..=0xdfff).contains(&self.hex4()?)
            }
            0xdc00..=0xdfff => false,
            _ => return Ok(()),
        };
        if pair { Ok(()) } else { Err(JsonError { offset: start, kind: Surrogate }) }
    }

    fn hex4(&mut self) -> Result<u32, JsonError> {
        let mut value = 0;
        for _ in 0..4 {
            let Some(digit) = char::from(self.peek()?).to_digit(16) else {
                return self.fail(String);
            };
            value = value << 4 | digit;
            self.at += 1;
        }
        Ok(value)
    }

    fn number(&mut self) -> Result<(), JsonError> {
        if self.text[self.at] == b'-' {
            self.at += 1;
        }
        match self.text.get(self.at) {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.text.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.text.get(self.at) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let rest = &self.text[self.at..];
        let count = rest.iter().position(|b| !b.is_ascii_digit()).unwrap_or(rest.len());
        self.at += count;
        if count == 0 { self.fail(Number) } else { Ok(()) }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), JsonError> {
        if !self.text[self.at..].starts_with(word) {
            return self.fail(Unexpected);
        }
        self.at += word.len();
        Ok(())
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.text.get(self.at) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Result<u8, JsonError> {
        self.text.get(self.at).copied().ok_or(JsonError { offset: self.at, kind: Unfinished })
    }

    fn fail<T>(&self, kind: JsonErrorKind) -> Result<T, JsonError> {
        Err(JsonError { offset: self.at, kind })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind(text: &str) -> Option<JsonErrorKind> {
        validate(text.as_bytes(), 4).err().map(|error| error.kind)
    }

    #[test]
    fn values_of_every_sort_pass() {
        for text in
            ["0", "-0.5e+7", "1e400", " [ ] ", "{}", r#"{"a":[1,{"b":null}],"":"\ud83d\ude00é"}"#]
        {
            assert_eq!(kind(text), None, "{text}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        assert_eq!(kind("[[[[[]]]]]"), Some(TooDeep));
        assert_eq!(validate(&[b'['; 5000], 128).unwrap_err().kind, TooDeep);
        assert_eq!(kind(r#""\ud800""#), Some(Surrogate));
        assert_eq!(kind(r#""\ude00""#), Some(Surrogate));
        assert_eq!(kind("\"\n\""), Some(String));
        assert_eq!(kind("01"), Some(Unexpected));
        assert_eq!(kind("1."), Some(Number));
        assert_eq!(kind("[1,]"), Some(Unexpected));
        assert_eq!(kind("{\"a\":1"), Some(Unfinished));
        assert_eq!(kind("{} {}"), Some(Unexpected));
        assert_eq!(kind("\u{feff}1"), Some(Unexpected));
        assert_eq!(kind(""), Some(Unfinished));
        assert_eq!(validate(b"\"\xff\"", 4).unwrap_err(), JsonError { offset: 1, kind: NotUtf8 });
    }

    fn agrees(text: &[u8]) {
        let theirs = serde_json::from_slice::<serde_json::Value>(text);
        let ours = validate(text, 100);
        // A number beyond f64 is the one thing that a tree cannot hold and the grammar can.
        let out_of_range = theirs.as_ref().is_err_and(|e| e.to_string().contains("out of range"));
        if !out_of_range {
            let text = std::string::String::from_utf8_lossy(text);
            assert_eq!(ours.is_ok(), theirs.is_ok(), "{text:?} {ours:?} {theirs:?}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_another_parser(text in r#"[\[\]{},:"\\eEu0-9+.a-f \-tnr]{0,12}"#) {
            agrees(text.as_bytes());
        }

        #[test]
        fn agrees_with_another_parser_on_damaged_json(
            at in 0_usize..100,
            with in any::<u8>(),
            value in r#"\{"a":\[[0-9]{1,3},"(\\u00e9|x|\\ud83d\\ude00)",true,\{"b":-0\.[0-9]e-[0-9]\}\],"c":null\}"#,
        ) {
            agrees(value.as_bytes());
            let mut damaged = value.into_bytes();
            let at = at % damaged.len();
            damaged[at] = with;
            agrees(&damaged);
        }
    }
}
