//! Builds the words of commands in the form that Redis needs. Knows no command.

use std::time::Duration;

use bytes::Bytes;

/// The words of a command.
#[derive(Default)]
pub(super) struct Words(Vec<Bytes>);

impl Words {
    pub(super) fn text(&mut self, word: &str) {
        self.0.push(Bytes::copy_from_slice(word.as_bytes()));
    }

    pub(super) fn texts(&mut self, words: &[&str]) {
        words.iter().for_each(|word| self.text(word));
    }

    pub(super) fn bytes(&mut self, word: &Bytes) {
        self.0.push(word.clone());
    }

    pub(super) fn number(&mut self, number: u64) {
        self.0.push(number.to_string().into());
    }

    pub(super) fn slices(&self) -> Vec<&[u8]> {
        self.0.iter().map(|word| &word[..]).collect()
    }
}

/// Returns milliseconds for Redis: a whole number above zero that it can add to its clock.
pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).clamp(1, MILLISECONDS_MAX)
}

/// Longest time: a hundred years.
const MILLISECONDS_MAX: u64 = 100 * 365 * 24 * 3600 * 1000;
