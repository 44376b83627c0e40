//! Where in a history an entry is or a reader has come to.

use std::fmt;

/// The id of an entry, as Redis makes them: time and a number that tells entries of one time apart.
///
/// Two kinds of positions belong to no entry: [`Self::START`], and [`Self::nothing_at`], which no entry
/// can have since no store's clock is at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// Milliseconds since 1970 by the store's clock.
    pub milliseconds: u64,
    /// Number within them.
    pub sequence: u64,
}

impl Position {
    /// Before everything.
    pub const START: Self = Self { milliseconds: 0, sequence: 0 };

    /// Where a reader is that found no log at this time (milliseconds of the store's clock).
    #[must_use]
    pub const fn nothing_at(milliseconds: u64) -> Self {
        Self { milliseconds: 0, sequence: milliseconds }
    }

    /// Whether it is the id of an entry.
    #[must_use]
    pub const fn is_entry(self) -> bool {
        self.milliseconds > 0
    }

    /// The time of the entry, or at which there was none.
    #[must_use]
    pub const fn time_ms(self) -> u64 {
        if self.is_entry() { self.milliseconds } else { self.sequence }
    }

    /// Reads `milliseconds-sequence`: digits only, without superfluous zeros.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let dash = text.iter().position(|&byte| byte == b'-')?;
        Some(Self { milliseconds: number(&text[..dash])?, sequence: number(&text[dash + 1..])? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.milliseconds, self.sequence)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        for text in ["0-0", "1732190000000-0", "0-1732190000000", "18446744073709551615-7"] {
            assert_eq!(Position::parse(text.as_bytes()).unwrap().to_string(), text);
        }
        for bad in
            ["", "-", "1", "1-", "-1", "01-0", "1-00", "+1-0", "1-1-1", "18446744073709551616-0"]
        {
            assert_eq!(Position::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn every_entry_is_behind_every_position_of_nothing() {
        let entry = Position { milliseconds: 1, sequence: 0 };
        assert!(
            Position::START < Position::nothing_at(5) && Position::nothing_at(u64::MAX) < entry
        );
    }
}
