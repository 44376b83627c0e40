//! UTF-8 of text that arrives in pieces; knows no frames.

/// Returns the end of the complete characters of `text`, which are known to reach to `from`. `None` as soon as no
/// continuation can make the text valid.
pub(crate) fn advance(text: &[u8], from: usize) -> Option<usize> {
    match simdutf8::compat::from_utf8(&text[from..]) {
        Ok(_) => Some(text.len()),
        Err(error) if error.error_len().is_none() => Some(from + error.valid_up_to()),
        Err(_) => None,
    }
}

/// Returns whether `text` is UTF-8 and ends with a complete character.
#[inline]
pub(crate) fn is_valid(text: &[u8]) -> bool {
    simdutf8::basic::from_utf8(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn utf8_byte_by_byte_equals_the_whole() {
        let text = "aä€\u{10ffff}z".as_bytes();
        let mut known = 0;
        for end in 0..=text.len() {
            known = advance(&text[..end], known).unwrap();
            assert_eq!(known == end, std::str::from_utf8(&text[..end]).is_ok());
        }
        for bad in [&b"\x80"[..], b"\xc0", b"\xed\xa0", b"\xf4\x90", b"\xf5", b"a\xe2\x28"] {
            assert_eq!(advance(bad, 0), None, "{bad:?}");
            assert!(advance(&bad[..bad.len() - 1], 0).is_some(), "{bad:?}");
            assert!(!is_valid(bad));
        }
        assert!(!is_valid(b"\xe2\x82"));
    }
}
