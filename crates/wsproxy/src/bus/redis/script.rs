//! The scripts that Redis runs, and how their calls are spelled. Knows no connection.

use std::sync::LazyLock;

use bytes::BytesMut;
use wsproxy_proto::names;

use crate::bus::{
    History, HistoryLimits,
    redis::{milliseconds, resp},
};

/// A script and the name by which Redis knows it once it was loaded.
pub(crate) struct Script {
    text: &'static str,
    sha: LazyLock<String>,
}

/// Publishes with history.
pub(crate) static PUBLISH: Script =
    Script::new(include_str!("../../../../../spec/scripts/publish.lua"), || sha(&PUBLISH));

/// Reads logs and token streams.
pub(crate) static READ: Script =
    Script::new(include_str!("../../../../../spec/scripts/read.lua"), || sha(&READ));

/// Changes a token stream.
pub(crate) static STREAM: Script =
    Script::new(include_str!("../../../../../spec/scripts/stream.lua"), || sha(&STREAM));

impl Script {
    const fn new(text: &'static str, sha: fn() -> String) -> Self {
        Self { text, sha: LazyLock::new(sha) }
    }

    /// The command and the word with which it is called: loaded already, or with its whole text.
    pub(crate) fn call(&self, is_loaded: bool) -> [&[u8]; 2] {
        match is_loaded {
            true => [b"EVALSHA", self.sha.as_bytes()],
            false => [b"EVAL", self.text.as_bytes()],
        }
    }

    /// Spells the command that loads it.
    pub(super) fn load(&self, out: &mut BytesMut) {
        resp::words(out, &[b"SCRIPT", b"LOAD", self.text.as_bytes()]);
    }
}

fn sha(script: &Script) -> String {
    sha1_smol::Sha1::from(script.text).digest().to_string()
}

/// Spells a publish with history.
pub(super) fn spell_publish(
    channel: &str,
    payload: &[u8],
    history: &History,
    is_loaded: bool,
    out: &mut BytesMut,
) {
    let HistoryLimits { entries_max, bytes_max, ttl } = history.limits;
    let (clock, dedup) = (history.clock.as_deref(), history.dedup.as_ref());
    // Only the last ones may be left out.
    let keys = if dedup.is_some() { 3 } else { 1 + usize::from(clock.is_some()) };
    resp::command(out, 11 + keys);
    for word in PUBLISH.call(is_loaded) {
        resp::word(out, word);
    }
    resp::number(out, keys as u64);
    resp::word(out, history.log.as_bytes());
    if keys > 1 {
        // An empty key would have a slot of its own.
        resp::word(out, clock.unwrap_or(&history.log).as_bytes());
    }
    if let Some((key, _)) = dedup {
        resp::word(out, key.as_bytes());
    }
    resp::word(out, channel.as_bytes());
    resp::word(out, payload);
    resp::number(out, entries_max.clamp(1, EXACT_MAX));
    resp::number(out, bytes_max.min(EXACT_MAX));
    resp::number(out, milliseconds(ttl));
    resp::word(out, history.event_id.as_deref().unwrap_or_default().as_bytes());
    resp::number(out, dedup.map_or(0, |(_, ttl)| milliseconds(*ttl)));
    resp::number(out, u64::from(history.unique));
    debug_assert!(
        [clock, dedup.map(|(key, _)| &**key)].into_iter().flatten().all(|key| {
            key.is_empty() || names::slot(key.as_bytes()) == names::slot(history.log.as_bytes())
        }),
        "a script must touch one slot"
    );
}

/// The largest number that a script can tell from its neighbours.
pub(crate) const EXACT_MAX: u64 = 1 << 53;

#[cfg(test)]
mod tests {
    use super::*;

    fn append_of(script: &Script) -> &'static str {
        let from = script.text.find("-- append begins").unwrap();
        let to = script.text.find("-- append ends").unwrap();
        &script.text[from..to]
    }

    /// Lua of Redis cannot share code between scripts.
    #[test]
    fn both_scripts_append_alike() {
        assert_eq!(append_of(&PUBLISH), append_of(&STREAM));
    }
}
