//! UTF-8 that arrives in pieces: wrong as soon as it cannot become right.

/// The check of one text in progress.
#[derive(Debug, Default, Clone, Copy)]
pub struct Utf8 {
    /// The beginning of a character that is not complete.
    pending: [u8; 4],
    length: u8,
}

impl Utf8 {
    /// Looks at the next bytes; `false` where the text can no longer be UTF-8.
    #[must_use]
    pub fn feed(&mut self, mut bytes: &[u8]) -> bool {
        while self.length > 0 {
            let Some((&next, rest)) = bytes.split_first() else { return true };
            self.pending[usize::from(self.length)] = next;
            self.length += 1;
            bytes = rest;
            match std::str::from_utf8(&self.pending[..usize::from(self.length)]) {
                Ok(_) => self.length = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return false,
            }
        }
        let Err(error) = simdutf8::compat::from_utf8(bytes) else { return true };
        if error.error_len().is_some() {
            return false;
        }
        let rest = &bytes[error.valid_up_to()..];
        self.pending[..rest.len()].copy_from_slice(rest);
        self.length = rest.len() as u8;
        true
    }

    /// Whether the text may end here.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.length == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_two_cuts_give_the_same_verdict_as_the_whole() {
        let texts: [&[u8]; 8] = [
            "aäß€𝄞z".as_bytes(),
            b"\xf4\x90\x80\x80",
            b"\xed\xa0\x80",
            b"\xc0\x80",
            b"ab\xff",
            b"\xe2\x82",
            b"\xf0\x9d\x84",
            b"",
        ];
        for text in texts {
            let expected = std::str::from_utf8(text).is_ok();
            for a in 0..=text.len() {
                for b in a..=text.len() {
                    let mut check = Utf8::default();
                    let fed = [&text[..a], &text[a..b], &text[b..]].iter().all(|p| check.feed(p));
                    assert_eq!(fed && check.is_complete(), expected, "{text:x?} {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_wrong_second_byte_is_wrong_at_once() {
        let mut check = Utf8::default();
        assert!(check.feed(b"\xf4"));
        assert!(!check.feed(b"\x90"));
    }
}
