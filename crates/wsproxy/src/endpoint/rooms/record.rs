//! Records of members: connection, user, and a JSON object that the gateway writes.

use base64::{Engine, engine::general_purpose::STANDARD};
use buffa::Message as _;
use serde::{Deserialize, Serialize};
use wsproxy_proto::{
    names::Id,
    rooms::{
        v1::{PlayerSnapshot, PresenceData},
        wire::{Connection, Record},
    },
};

/// JSON part of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemberRecord {
    /// The instance of the connection.
    pub(super) server: Box<str>,
    /// Time of the join: RFC 3339.
    pub(super) since: Box<str>,
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<Box<str>>,
    /// The name is the token's, so presence data cannot change it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_name_of_token: bool,
    /// `PresenceData` that the client gave, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    presence: Option<Box<str>>,
}

impl MemberRecord {
    /// Makes the record of a member that is about to join.
    pub(super) fn new(
        server: &str,
        since: String,
        (name, is_name_of_token): (Option<String>, bool),
    ) -> Self {
        Self {
            server: server.into(),
            since: since.into(),
            name: name.map(Into::into),
            is_name_of_token,
            presence: None,
        }
    }

    /// Reads the JSON of a record; `None` if no gateway wrote it.
    pub(super) fn parse(json: &str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// Reads the JSON part of a whole record.
    pub(super) fn of_line(line: &str) -> Option<Self> {
        Self::parse(Record::parse(line)?.json)
    }

    /// Returns the JSON of the record.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Sets the presence data, a `PresenceData`.
    pub(super) fn set_presence(&mut self, presence: &[u8]) {
        self.presence = (!presence.is_empty()).then(|| STANDARD.encode(presence).into());
    }

    /// Returns the name that others see.
    pub(super) fn shown_name(&self) -> Option<String> {
        Some(self.presence_data().display_name).filter(|name| !name.is_empty())
    }

    /// Returns the presence data, with the name of the record.
    pub(super) fn presence_data(&self) -> PresenceData {
        let bytes = self.presence.as_deref().and_then(|text| STANDARD.decode(text).ok());
        let data = bytes.and_then(|bytes| PresenceData::decode_from_slice(&bytes).ok());
        let mut data = data.unwrap_or_default();
        // The token knows the name better than the client does. That of the handshake holds until there is another one.
        let is_better = self.is_name_of_token || data.display_name.is_empty();
        if let Some(name) = self.name.as_ref().filter(|_| is_better) {
            data.display_name = name.to_string();
        }
        data
    }

    /// Returns the member as it stands in the state of a room.
    pub(super) fn player(&self, client: &str) -> PlayerSnapshot {
        let data = self.presence_data();
        PlayerSnapshot {
            client_id: client.to_owned(),
            display_name: data.display_name,
            avatar_url: data.avatar_url,
            position: data.position,
            rotation: data.rotation,
            avatar_config: data.avatar_config,
        }
    }
}

/// Returns a whole record.
pub(super) fn line(connection: Connection, user: &Id, json: &str) -> String {
    let connection = connection.to_string();
    Record { connection: &connection, user: user.as_str(), json }.to_string()
}

/// Returns the connection of a whole record.
pub(super) fn connection(line: &str) -> Option<Connection> {
    Record::parse(line)?.connection()
}

/// Returns the JSON of a record with other presence data. `None` if no gateway wrote it.
pub(super) fn with_presence(json: &str, presence: &[u8]) -> Option<String> {
    let mut record = MemberRecord::parse(json)?;
    record.set_presence(presence);
    Some(record.to_json())
}

/// Returns the PlayerSnapshot of a member for the state of a room. `None` if no gateway wrote the record.
pub(super) fn shown(client: &str, record: &Record<'_>) -> Option<Vec<u8>> {
    Some(MemberRecord::parse(record.json)?.player(client).encode_to_vec())
}

/// Returns presence data with a name in front of it, which one in the data overrules. A name that is too long or has
/// control characters is left out.
pub(super) fn named(name: &str, presence: &[u8]) -> Vec<u8> {
    let is_good = name.len() <= NAME_BYTES_MAX && !name.contains(char::is_control);
    let name = PresenceData {
        display_name: if is_good { name.to_owned() } else { String::new() },
        ..PresenceData::default()
    };
    [&name.encode_to_vec(), presence].concat()
}

/// Longest name, in bytes.
const NAME_BYTES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: Option<&str>, is_of_token: bool, presence: &str) -> String {
        let mut record =
            MemberRecord::new("s", "now".into(), (name.map(str::to_owned), is_of_token));
        let data = PresenceData { display_name: presence.into(), ..PresenceData::default() };
        record.set_presence(&data.encode_to_vec());
        MemberRecord::parse(&record.to_json()).unwrap().presence_data().display_name
    }

    #[test]
    fn a_member_changes_its_name_unless_the_token_has_it() {
        for (name, is_of_token, presence, expected) in [
            (Some("Ann"), false, "", "Ann"),
            (Some("Ann"), false, "Bea", "Bea"),
            (Some("Ann"), true, "Bea", "Ann"),
            (None, false, "Bea", "Bea"),
            (None, true, "", ""),
        ] {
            assert_eq!(shown(name, is_of_token, presence), expected, "{name:?} {presence}");
        }
    }
}
