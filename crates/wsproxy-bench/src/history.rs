//! Publishes with history as a worker does: one script, called by its digest; knows no connections.

use crate::resp;

/// Names of one channel.
#[derive(Debug, Clone)]
pub struct Channel {
    name: String,
    log: String,
}

/// The publishing script by its digest, with the key that orders channels.
#[derive(Debug, Clone)]
pub struct Script {
    digest: String,
    /// Key of the clock that orders several channels; empty where each channel has its own order.
    clock: String,
}

/// A guard against publishing a message twice.
#[derive(Debug, Clone, Copy)]
pub struct Once<'a> {
    /// Key that names this message only.
    pub key: &'a str,
}

impl Channel {
    /// Creates the names of a channel and its log.
    #[must_use]
    pub fn new(name: String) -> Self {
        let log = match name.strip_prefix("ws:") {
            Some(rest) => format!("{{ws}}:{rest}:log"),
            None => format!("{{{name}}}:log"),
        };
        Self { name, log }
    }

    /// Appends a plain publish.
    pub fn push_plain(&self, payload: &[u8], output: &mut Vec<u8>) {
        resp::push_command(&[b"PUBLISH", self.name.as_bytes(), payload], output);
    }
}

impl Script {
    /// Creates the script from the digest that Redis gave it.
    #[must_use]
    pub fn new(digest: &[u8], clock: Option<String>) -> Self {
        let digest = String::from_utf8_lossy(digest).into_owned();
        Self { digest, clock: clock.unwrap_or_default() }
    }

    /// Appends the command that loads the script into Redis.
    pub fn push_load(output: &mut Vec<u8>) {
        resp::push_command(&[b"SCRIPT", b"LOAD", PUBLISH.as_bytes()], output);
    }

    /// Appends a publish with history.
    pub fn push(
        &self,
        channel: &Channel,
        payload: &[u8],
        once: Option<Once<'_>>,
        output: &mut Vec<u8>,
    ) {
        let keys: [&[u8]; 3] = [
            channel.log.as_bytes(),
            self.clock.as_bytes(),
            once.map_or(b"", |once| once.key.as_bytes()),
        ];
        // Absent keys are left out, as a worker would.
        let keys = match (once.is_some(), self.clock.is_empty()) {
            (true, _) => &keys[..],
            (false, false) => &keys[..2],
            (false, true) => &keys[..1],
        };
        let count = [b'0' + keys.len() as u8];
        let mut parts: Vec<&[u8]> = vec![b"EVALSHA", self.digest.as_bytes(), &count];
        parts.extend_from_slice(keys);
        let bounds: [&[u8]; 3] = [ENTRIES_MAX, BYTES_MAX, TTL_MS];
        parts.extend_from_slice(&[channel.name.as_bytes(), payload]);
        parts.extend_from_slice(&bounds);
        parts.push(b"");
        if once.is_some() {
            parts.push(ONCE_MS);
        }
        resp::push_command(&parts, output);
    }
}

const PUBLISH: &str = include_str!("../../../spec/scripts/publish.lua");
/// The gateway's own default.
const ENTRIES_MAX: &[u8] = b"1000";
const BYTES_MAX: &[u8] = b"1048576";
const TTL_MS: &[u8] = b"3600000";
/// Lifetime of the guard against doubles: longer than any outage that a publisher survives.
const ONCE_MS: &[u8] = b"120000";

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &[u8]) -> Vec<String> {
        let mut values = Vec::new();
        resp::read(command, &mut values).unwrap().unwrap();
        values.iter().map(|value| String::from_utf8_lossy(value.text()).into_owned()).collect()
    }

    #[test]
    fn keys_that_are_not_needed_are_left_out() {
        let channel = Channel::new("c".to_owned());
        let mut output = Vec::new();
        Script::new(b"d", None).push(&channel, b"p", None, &mut output);
        let rest = ["c", "p", "1000", "1048576", "3600000", ""];
        assert_eq!(words(&output), [&["EVALSHA", "d", "1", "{c}:log"], &rest[..]].concat());
        output.clear();
        Script::new(b"d", Some("k".to_owned())).push(&channel, b"p", None, &mut output);
        assert_eq!(words(&output)[2..5], ["2", "{c}:log", "k"]);
        output.clear();
        let once = Some(Once { key: "o" });
        Script::new(b"d", None).push(&channel, b"p", once, &mut output);
        assert_eq!(words(&output)[2..6], ["3", "{c}:log", "", "o"]);
        assert_eq!(words(&output).last().map(String::as_str), Some("120000"));
    }
}
