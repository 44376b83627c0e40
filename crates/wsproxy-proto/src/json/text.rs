//! Strings of JSON into text and back; knows nothing of other values.

use std::borrow::Cow;

/// Returns the text of a JSON string that was validated; `None` where `json` is no string, or where an escaped half
/// of a surrogate pair stands for no character.
#[must_use]
pub fn decode(json: &[u8]) -> Option<Cow<'_, str>> {
    let inside = json.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if !inside.contains(&b'\\') {
        return std::str::from_utf8(inside).ok().map(Cow::Borrowed);
    }
    unescape(inside, || None).map(Cow::Owned)
}

/// Returns the text of a JSON string, with U+FFFD for each escaped half of a surrogate pair.
#[must_use]
pub fn decode_lossy(json: &[u8]) -> Cow<'_, str> {
    decode(json).unwrap_or_else(|| {
        let inside = json.get(1..json.len().saturating_sub(1)).unwrap_or_default();
        Cow::Owned(unescape(inside, || Some(char::REPLACEMENT_CHARACTER)).unwrap_or_default())
    })
}

/// Appends `text` as a JSON string, with the escapes that `JSON.stringify` of JavaScript writes.
pub fn write(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut plain = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        let short = match byte {
            b'"' | b'\\' => byte,
            0x08 => b'b',
            0x0c => b'f',
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0..=0x1f => 0,
            _ => continue,
        };
        out.extend_from_slice(&bytes[plain..at]);
        plain = at + 1;
        if short == 0 {
            let hex = |digit: u8| b"0123456789abcdef"[usize::from(digit)];
            out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(byte >> 4), hex(byte & 15)]);
        } else {
            out.extend_from_slice(&[b'\\', short]);
        }
    }
    out.extend_from_slice(&bytes[plain..]);
    out.push(b'"');
}

fn unescape(inside: &[u8], lone: impl Fn() -> Option<char>) -> Option<String> {
    let mut rest = std::str::from_utf8(inside).ok()?;
    let mut text = String::with_capacity(rest.len());
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let mut chars = escape.chars();
        let decoded = match chars.next()? {
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let first = unit(escape.get(1..5)?)?;
                chars = escape.get(5..)?.chars();
                let second = || unit(escape.get(5..)?.strip_prefix("\\u")?.get(..4)?);
                match (first, second()) {
                    (0xd800..=0xdbff, Some(low @ 0xdc00..=0xdfff)) => {
                        chars = escape.get(11..)?.chars();
                        char::from_u32(0x1_0000 + ((first - 0xd800) << 10) + (low - 0xdc00))?
                    }
                    _ => char::from_u32(first).or_else(&lone)?,
                }
            }
            same @ ('"' | '\\' | '/') => same,
            _ => return None,
        };
        text.push(decoded);
        rest = chars.as_str();
    }
    text.push_str(rest);
    Some(text)
}

fn unit(digits: &str) -> Option<u32> {
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(())?;
    u32::from_str_radix(digits, 16).ok()
}

/// Returns the texts of a JSON array that was validated; `None` where `json` is no array of strings.
#[must_use]
pub fn strings(json: &[u8]) -> Option<Vec<Cow<'_, str>>> {
    let mut rest = json.strip_prefix(b"[")?.strip_suffix(b"]")?.trim_ascii();
    let mut strings = Vec::new();
    while !rest.is_empty() {
        let mut end = 1;
        while *rest.get(end)? != b'"' {
            end += if rest[end] == b'\\' { 2 } else { 1 };
        }
        let (string, behind) = rest.split_at(end + 1);
        strings.push(decode(string)?);
        rest = behind.trim_ascii();
        rest = rest.strip_prefix(b",").unwrap_or(rest).trim_ascii();
    }
    Some(strings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_strings_have_a_text() {
        for other in ["1", "null", "[\"a\"]", "{}", "", "\""] {
            assert_eq!(decode(other.as_bytes()), None, "{other}");
        }
        assert!(matches!(decode(b"\"a\""), Some(Cow::Borrowed("a"))));
        assert_eq!(decode(br#""\b\f\n\r\t\/\\\"\u0041""#).unwrap(), "\u{8}\u{c}\n\r\t/\\\"A");
    }

    #[test]
    fn halves_of_surrogate_pairs_have_no_text() {
        for (json, lossy) in [
            (r#""\ud800""#, "\u{fffd}"),
            (r#""\udc00x""#, "\u{fffd}x"),
            (r#""\ud800\ud83d\ude00""#, "\u{fffd}\u{1f600}"),
            (r#""\ud800\n""#, "\u{fffd}\n"),
            (r#""\udc00\ud800""#, "\u{fffd}\u{fffd}"),
        ] {
            assert_eq!(decode(json.as_bytes()), None, "{json}");
            assert_eq!(decode_lossy(json.as_bytes()), lossy, "{json}");
        }
    }

    #[test]
    fn lists_hold_strings_alone() {
        assert_eq!(strings(b"[ ]"), Some(vec![]));
        assert_eq!(strings(br#"["a]", "\"," ]"#).unwrap(), ["a]", "\","]);
        for other in [&b"[1]"[..], b"[\"a\",1]", b"[[\"a\"]]", b"\"a\"", b"{}", b"[{\"a\":1}]"] {
            assert_eq!(strings(other), None, "{other:?}");
        }
    }
}
