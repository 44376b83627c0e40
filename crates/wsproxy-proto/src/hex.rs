//! Numbers as hexadecimal digits. The formatter of the standard library takes some ten times as long, which counts where
//! each request has several ids. Knows no ids.

use std::fmt;

/// The `N` lowest digits of a number, in lower case, from the highest.
///
/// ```
/// assert_eq!(wsproxy_proto::hex::Digits::<4>::of(0xa5).as_str(), "00a5");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digits<const N: usize>([u8; N]);

impl<const N: usize> Digits<N> {
    /// Writes the digits of a number.
    #[must_use]
    pub fn of(mut number: u128) -> Self {
        let mut digits = [b'0'; N];
        for digit in digits.iter_mut().rev() {
            *digit = DIGITS[(number & 0xf) as usize];
            number >>= 4;
        }
        Self(digits)
    }

    /// Returns the digits as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Digits are ASCII.
        str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl<const N: usize> fmt::Display for Digits<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

const DIGITS: [u8; 16] = *b"0123456789abcdef";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_standard_library() {
        for number in [0, 1, 0xf, 0x1234_5678_9abc_def0, u64::MAX.into(), u128::MAX] {
            assert_eq!(Digits::<32>::of(number).to_string(), format!("{number:032x}"));
        }
        assert_eq!(Digits::<2>::of(0x1a5).as_str(), "a5");
    }
}
