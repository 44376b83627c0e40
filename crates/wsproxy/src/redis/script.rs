//! The scripts that Redis runs, and the words of their calls. Knows no connection.

use std::sync::LazyLock;

use bytes::BytesMut;

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
