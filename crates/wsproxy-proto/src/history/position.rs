//! Positions in a history.

use std::fmt;

/// Position of an entry: its id, as Redis makes ids, and a tag that no other entry with this id has.
///
/// Ids alone repeat: after a moment with two masters, after a log was removed within a millisecond, after a clock was
/// set back. Two positions are one entry only if their tags are equal too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Position {
    /// Milliseconds since 1970 by the store's clock.
    pub milliseconds: u64,
    /// Number within the millisecond.
    pub sequence: u64,
    /// Tag that tells entries with the same id apart.
    pub tag: u32,
}

impl Position {
    /// Position before all entries.
    pub const START: Self = Self { milliseconds: 0, sequence: 0, tag: 0 };

    /// Returns whether no entry can be before it: the start, or the head of a log without entries (`1-0-tag`).
    #[must_use]
    pub const fn is_beginning(self) -> bool {
        self.milliseconds <= 1
    }

    /// Returns the id, by which positions are ordered. It is no identity.
    #[must_use]
    pub const fn id(self) -> (u64, u64) {
        (self.milliseconds, self.sequence)
    }

    /// Returns whether its id is lower than that of `other`.
    #[must_use]
    pub fn is_before(self, other: Self) -> bool {
        self.id() < other.id()
    }

    /// Returns the later one by id.
    #[must_use]
    pub fn later(self, other: Self) -> Self {
        if self.is_before(other) { other } else { self }
    }

    /// Reads `milliseconds-sequence-tag`: digits without leading zeros, and eight hexadecimal digits. The start is
    /// `0-0`.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text == b"0-0" {
            return Some(Self::START);
        }
        let mut words = text.splitn(3, |&byte| byte == b'-');
        let (milliseconds, sequence) = (number(words.next()?)?, number(words.next()?)?);
        let tag = tag(words.next()?)?;
        (milliseconds > 0).then_some(Self { milliseconds, sequence, tag })
    }

    /// Reads an id without a tag.
    #[must_use]
    pub fn parse_id(text: &[u8]) -> Option<(u64, u64)> {
        let dash = text.iter().position(|&byte| byte == b'-')?;
        Some((number(&text[..dash])?, number(&text[dash + 1..])?))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::START {
            return f.write_str("0-0");
        }
        write!(f, "{}-{}-{:08x}", self.milliseconds, self.sequence, self.tag)
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    match digits {
        [] => None,
        [b'0', _, ..] => None,
        digits => digits.iter().try_fold(0_u64, |number, &digit| {
            let digit = digit.is_ascii_digit().then_some(u64::from(digit & 15))?;
            number.checked_mul(10)?.checked_add(digit)
        }),
    }
}

fn tag(digits: &[u8]) -> Option<u32> {
    let is_tag =
        digits.len() == 8 && digits.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let text = is_tag.then(|| std::str::from_utf8(digits).ok())??;
    u32::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        for text in ["0-0", "1732190000000-0-00000000", "18446744073709551615-7-0a1b2c3d"] {
            assert_eq!(Position::parse(text.as_bytes()).unwrap().to_string(), text);
        }
        for bad in [
            "",
            "-",
            "1",
            "1-",
            "-1",
            "1-0",
            "01-0-00000000",
            "1-00-00000000",
            "+1-0-00000000",
            "1-1-1",
            "1-1-0000000A",
            "1-1-00000000-",
            "0-1-00000000",
            "18446744073709551616-0-00000000",
        ] {
            assert_eq!(Position::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn tags_are_identity_and_no_order() {
        let [a, b] = [1, 2].map(|tag| Position { milliseconds: 5, sequence: 0, tag });
        assert!(a != b && !a.is_before(b) && !b.is_before(a));
        assert!(Position::START.is_before(a));
    }
}
