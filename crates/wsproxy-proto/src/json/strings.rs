//! Strings of JSON: their end, and their escapes.

use super::{JsonError, JsonErrorKind, JsonScanner};

impl<const TAKES_LONE_SURROGATES: bool> JsonScanner<'_, TAKES_LONE_SURROGATES> {
    /// Reads a string behind its opening quote, with the closing quote.
    #[inline]
    pub(super) fn string(&mut self) -> Result<(), JsonError> {
        loop {
            self.skip_plain();
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(_) => return Err(self.here(JsonErrorKind::Control)),
                None => return Err(self.here(JsonErrorKind::End)),
            }
        }
    }

    /// Skips to the next quote, backslash or control character, eight bytes at a time.
    #[inline]
    fn skip_plain(&mut self) {
        let (words, _) = self.text[self.at..].as_chunks::<8>();
        for word in words {
            let special = special_bytes(u64::from_le_bytes(*word));
            if special != 0 {
                self.at += special.trailing_zeros() as usize / 8;
                return;
            }
            self.at += 8;
        }
        while self.peek().is_some_and(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
            self.at += 1;
        }
    }

    #[cold]
    fn escape(&mut self) -> Result<(), JsonError> {
        let from = self.at;
        self.at += 1;
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 1;
                return Ok(());
            }
            Some(b'u') => self.at += 1,
            Some(_) => return Err(self.here(JsonErrorKind::Escape)),
            None => return Err(self.here(JsonErrorKind::End)),
        }
        if TAKES_LONE_SURROGATES {
            return self.hex().map(|_| ());
        }
        let lone = JsonError { offset: from, kind: JsonErrorKind::LoneSurrogate };
        match self.hex()? {
            0xdc00..=0xdfff => Err(lone),
            0xd800..=0xdbff => {
                if !self.text[self.at..].starts_with(b"\\u") {
                    return Err(lone);
                }
                self.at += 2;
                if matches!(self.hex()?, 0xdc00..=0xdfff) { Ok(()) } else { Err(lone) }
            }
            _ => Ok(()),
        }
    }

    /// Reads four hexadecimal digits.
    fn hex(&mut self) -> Result<u32, JsonError> {
        let mut value = 0;
        for _ in 0..4 {
            let byte = self.peek().ok_or_else(|| self.here(JsonErrorKind::End))?;
            let digit =
                char::from(byte).to_digit(16).ok_or_else(|| self.here(JsonErrorKind::Escape))?;
            value = value << 4 | digit;
            self.at += 1;
        }
        Ok(value)
    }
}

/// Returns the highest bit of each byte of `word` that ends a run of plain characters. A borrow may mark bytes above
/// the lowest of them wrongly; the lowest is always right.
#[inline]
fn special_bytes(word: u64) -> u64 {
    const LOW: u64 = u64::MAX / 255;
    const HIGH: u64 = LOW << 7;
    let below_space = word.wrapping_sub(LOW * 0x20);
    let quote = (word ^ (LOW * b'"' as u64)).wrapping_sub(LOW);
    let backslash = (word ^ (LOW * b'\\' as u64)).wrapping_sub(LOW);
    (below_space | quote | backslash) & !word & HIGH
}

#[cfg(test)]
mod tests {
    use super::super::{JsonErrorKind, validate};
    use super::special_bytes;

    #[test]
    fn the_lowest_special_byte_is_found_in_every_place() {
        for byte in 0..=255_u8 {
            for place in 0..8 {
                for filler in [b'a', b' ', b'!', b'#', b'[', b']', 0x80, 0xff, 0x7f] {
                    let mut word = [filler; 8];
                    word[place] = byte;
                    let found = special_bytes(u64::from_le_bytes(word));
                    let special = byte < 0x20 || byte == b'"' || byte == b'\\';
                    assert_eq!(found != 0, special, "{byte} {place} {filler}");
                    assert!(!special || found.trailing_zeros() as usize / 8 == place);
                }
            }
        }
    }

    #[test]
    fn escapes_surrogates_and_control_characters() {
        use JsonErrorKind::*;
        for (text, offset, kind) in [
            (&br#""\x""#[..], 2, Escape),
            (br#""\u12g4""#, 5, Escape),
            (br#""\u12"#, 5, End),
            (br#""\"#, 2, End),
            (br#"""#, 1, End),
            (br#""\ud800""#, 1, LoneSurrogate),
            (br#""aa\udc00""#, 3, LoneSurrogate),
            (br#""\ud800\u0041""#, 1, LoneSurrogate),
            (br#""\ud800\ud800""#, 1, LoneSurrogate),
            (br#""\ud800\n""#, 1, LoneSurrogate),
            (b"\"a\nb\"", 2, Control),
            (b"\"0123456789\x1f\"", 11, Control),
            (b"{\"\x00\":1}", 2, Control),
        ] {
            let error = validate(text, 8).unwrap_err();
            assert_eq!((error.offset, error.kind), (offset, kind), "{text:?}");
        }
        assert!(validate(br#""\uD83D\uDE00\u0000""#, 8).is_ok());
    }
}
