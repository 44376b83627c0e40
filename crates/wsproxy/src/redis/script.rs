//! The scripts that Redis runs, and the words of their calls. Knows no connection.

use std::sync::LazyLock;

use bytes::BytesMut;
use wsproxy_proto::names;

use crate::redis::resp;

/// A script and its name in Redis once it was loaded.
pub(crate) struct Script {
    text: &'static str,
    sha: LazyLock<String>,
}

impl Script {
    const fn new(text: &'static str, sha: fn() -> String) -> Self {
        Self { text, sha: LazyLock::new(sha) }
    }

    /// Returns the first two words of a call: with the name of a loaded script, or with the whole text.
    pub(crate) fn call(&self, is_loaded: bool) -> [&[u8]; 2] {
        match is_loaded {
            true => [b"EVALSHA", self.sha.as_bytes()],
            false => [b"EVAL", self.text.as_bytes()],
        }
    }

    /// Writes the command that loads the script.
    pub(super) fn load(&self, out: &mut BytesMut) {
        resp::words(out, &[b"SCRIPT", b"LOAD", self.text.as_bytes()]);
    }
}

/// Checks, in debug builds, that all keys of a call have one slot of a Redis Cluster. One Redis runs a script on keys of
/// several slots without complaint, so that only this check finds one there.
pub(super) fn assert_one_slot<'k>(keys: impl Iterator<Item = &'k [u8]>) {
    if cfg!(debug_assertions) {
        let mut slots = keys.map(names::slot);
        let first = slots.next();
        assert!(slots.all(|slot| Some(slot) == first), "a script must touch one slot");
    }
}

/// Returns the keys of a call, whose `words` begin with the number of keys.
pub(super) fn keys<'k>(words: &[&'k [u8]]) -> impl Iterator<Item = &'k [u8]> {
    let count = words.first().and_then(|count| std::str::from_utf8(count).ok()?.parse().ok());
    words.iter().skip(1).take(count.unwrap_or(0)).copied()
}

fn sha(script: &Script) -> String {
    sha1_smol::Sha1::from(script.text).digest().to_string()
}

/// Largest number that a script can tell from the next one.
pub(crate) const EXACT_MAX: u64 = 1 << 53;

/// Script that publishes with history.
pub(crate) static PUBLISH: Script =
    Script::new(include_str!("../../../../spec/scripts/publish.lua"), || sha(&PUBLISH));

/// Script that reads logs and token streams.
pub(crate) static READ: Script =
    Script::new(include_str!("../../../../spec/scripts/read.lua"), || sha(&READ));

/// Script that changes a token stream.
pub(crate) static STREAM: Script =
    Script::new(include_str!("../../../../spec/scripts/stream.lua"), || sha(&STREAM));

/// Script that claims or keeps the place of a user's agent.
pub(crate) static AGENT_CLAIM: Script =
    Script::new(include_str!("../../../../spec/scripts/agent_claim.lua"), || sha(&AGENT_CLAIM));

/// Script that releases the place of a user's agent.
pub(crate) static AGENT_RELEASE: Script =
    Script::new(include_str!("../../../../spec/scripts/agent_release.lua"), || sha(&AGENT_RELEASE));

/// Script that enters a member into a room, or replaces the record of one.
pub(crate) static ROOM_JOIN: Script =
    Script::new(include_str!("../../../../spec/scripts/room_join.lua"), || sha(&ROOM_JOIN));

/// Script that removes members from a room.
pub(crate) static ROOM_LEAVE: Script =
    Script::new(include_str!("../../../../spec/scripts/room_leave.lua"), || sha(&ROOM_LEAVE));

/// Script that changes the state of a member of a room and publishes the message that tells of it.
pub(crate) static ROOM_STATE: Script =
    Script::new(include_str!("../../../../spec/scripts/room_state.lua"), || sha(&ROOM_STATE));

/// Script that writes positions of the members of a room.
pub(crate) static ROOM_POSITIONS: Script =
    Script::new(include_str!("../../../../spec/scripts/room_positions.lua"), || {
        sha(&ROOM_POSITIONS)
    });

/// Script that enters the lane of a cluster agent, or changes its entry.
pub(crate) static TUNNEL_REGISTER: Script =
    Script::new(include_str!("../../../../spec/scripts/tunnel_register.lua"), || {
        sha(&TUNNEL_REGISTER)
    });

/// Script that removes the lane of a cluster agent.
pub(crate) static TUNNEL_RELEASE: Script =
    Script::new(include_str!("../../../../spec/scripts/tunnel_release.lua"), || {
        sha(&TUNNEL_RELEASE)
    });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_one_call_have_one_slot() {
        let call: [&[u8]; 4] = [b"2", b"{room:a}:members", b"{room:a}:meta", b"{room:b}:meta"];
        assert_eq!(keys(&call).count(), 2);
        assert_one_slot(keys(&call));
        assert_one_slot(keys(&[b"0"]));
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "a script must touch one slot")]
    fn a_call_with_keys_of_two_slots_is_found() {
        assert_one_slot(keys(&[b"2", b"{room:a}:members", b"{room:b}:meta"]));
    }

    fn append_of(script: &Script) -> &'static str {
        let from = script.text.find("-- append begins").unwrap();
        let to = script.text.find("-- append ends").unwrap();
        &script.text[from..to]
    }

    /// Compares copies of code: scripts of Redis cannot share any.
    #[test]
    fn both_scripts_append_alike() {
        assert_eq!(append_of(&PUBLISH), append_of(&STREAM));
    }
}
