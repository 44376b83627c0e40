//! Spelling of all channels and keys; knows nothing of what they carry. What belongs to one family of endpoints is in
//! a file of its own.

use std::{borrow::Cow, fmt};

pub mod agents;
pub mod events;
pub mod instance;
pub mod rooms;
pub mod session;
pub mod tunnel;

/// Spells channels and keys, each behind the prefix that an operator chose, so that several deployments can share one
/// Redis.
///
/// ```
/// use wsproxy_proto::names::{Id, IdError, Names};
///
/// let session = Id::parse("s-1")?;
/// assert_eq!(Names::new("").session_down(&session), "session:s-1:down");
/// assert_eq!(Names::new("eu").session_down(&session), "eu:session:s-1:down");
/// assert_eq!(Id::parse("s:1"), Err(IdError::BadByte));
/// # Ok::<(), IdError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Names {
    prefix: String,
}

impl Names {
    /// Names with a `prefix`, given without the colon that follows it; empty for none.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}:") };
        Self { prefix }
    }

    /// Log of a channel's history.
    #[must_use]
    pub fn log(&self, channel: &str) -> String {
        self.kept(channel, "log")
    }

    /// Key that marks a message as published into a channel's log. `key` is the worker's idempotency key.
    #[must_use]
    pub fn published_once(&self, channel: &str, key: &str) -> String {
        self.kept(channel, &format!("once:{key}"))
    }

    /// Key of a log's head: the id of its last entry, which outlives the entries.
    #[must_use]
    pub fn head(log: &str) -> String {
        Self::beside(log, "head")
    }

    /// Index of a log's entries by the event ids that workers gave them.
    #[must_use]
    pub fn event_ids(log: &str) -> String {
        Self::beside(log, "ids")
    }

    /// Key that belongs to a log: the log's key with `what` instead of its last word.
    fn beside(log: &str, what: &str) -> String {
        format!("{}{what}", log.strip_suffix("log").unwrap_or(log))
    }

    /// Key whose node publishes the plain messages of a channel in a Redis Cluster, so that they keep their order with those
    /// that scripts publish.
    #[must_use]
    pub fn publishing_key<'c>(&self, channel: &'c str) -> Cow<'c, str> {
        let rest = channel.strip_prefix(&*self.prefix).unwrap_or_default();
        if rest.starts_with("ws:") {
            return format!("{}ws", self.prefix).into();
        }
        match channel.strip_suffix(":commands").filter(|_| rest.starts_with("agent:")) {
            Some(agent) => format!("{agent}:server").into(),
            None => channel.into(),
        }
    }

    /// Key that belongs to a channel: the channel in literal braces, so that a Redis Cluster keeps both in one
    /// slot. All channels of events share one slot, since they share one clock.
    fn kept(&self, channel: &str, what: &str) -> String {
        let events = channel.strip_prefix(&*self.prefix).and_then(|rest| rest.strip_prefix("ws:"));
        match events {
            Some(rest) => format!("{{{}ws}}:{rest}:{what}", self.prefix),
            None => format!("{{{channel}}}:{what}"),
        }
    }
}

/// Slot of a key in a Redis Cluster (<https://redis.io/docs/reference/cluster-spec>): CRC16 of what stands in its
/// first braces, or of all of it.
#[must_use]
pub fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|&byte| byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        let close = rest.iter().position(|&byte| byte == b'}')?;
        (close > 0).then_some(&rest[..close])
    });
    let step = |crc: u16, byte: &u8| {
        let shift = |crc: u16, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
        (0..8).fold(crc ^ (u16::from(*byte) << 8), shift)
    };
    tag.unwrap_or(key).iter().fold(0, step) % 16384
}

/// Id of a session, an agent, a room, …: safe inside a key, a channel, a path and a log line.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(Box<str>);

/// Reason why a string is not an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Without a byte.
    #[error("is empty")]
    Empty,
    /// More than [`ID_BYTES_MAX`] bytes.
    #[error("is longer than {ID_BYTES_MAX} bytes")]
    TooLong,
    /// A byte other than letters, digits and `-_.~@+=|`.
    #[error("may hold only letters, digits and -_.~@+=|")]
    BadByte,
}

impl Id {
    /// Accepts 1 to [`ID_BYTES_MAX`] bytes of `A-Z a-z 0-9 - _ . ~ @ + = |`.
    ///
    /// A colon would make one entity's channel spell another's, so it is not among them.
    ///
    /// # Errors
    /// The rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        match text.as_bytes() {
            [] => Err(IdError::Empty),
            bytes if bytes.len() > ID_BYTES_MAX => Err(IdError::TooLong),
            bytes if bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.~@+=|".contains(b)) => {
                Ok(Self(text.into()))
            }
            _ => Err(IdError::BadByte),
        }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Longest accepted id, in bytes.
pub const ID_BYTES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let names = Names::new("");
        assert_eq!(names.log("session:s-1:down"), "{session:s-1:down}:log");
        assert_eq!(names.log("ws:user:u-1"), "{ws}:user:u-1:log");
        assert_eq!(names.published_once("session:s-1:down", "k"), "{session:s-1:down}:once:k");
        assert_eq!(Names::head("{ws}:broadcast:log"), "{ws}:broadcast:head");
        assert_eq!(Names::event_ids("{ws}:broadcast:log"), "{ws}:broadcast:ids");
        assert_eq!(Names::new("eu").log("eu:ws:broadcast"), "{eu:ws}:broadcast:log");
    }

    #[test]
    fn plain_messages_are_published_at_the_node_of_their_logs() {
        let (names, user) = (Names::new("eu"), Id::parse("u-1").unwrap());
        let slot_of = |channel: &str| slot(names.publishing_key(channel).as_bytes());
        for channel in ["eu:ws:user:u-1", "eu:session:s-1:down", "eu:room:lobby"] {
            assert_eq!(slot_of(channel), slot(names.log(channel).as_bytes()), "{channel}");
        }
        let owner = names.agent_owner(&user);
        assert_eq!(slot_of(&names.agent_commands(&user)), slot(owner.as_bytes()));
        assert_eq!(names.publishing_key("agent:u:commands"), "agent:u:commands");
    }

    #[test]
    fn slots_are_those_of_redis() {
        // As `CLUSTER KEYSLOT` answers.
        assert_eq!((slot(b"123456789"), slot(b"foo")), (12739, 12182));
        assert_eq!(slot(b"{session:s-1:down}:log"), slot(b"session:s-1:down"));
        assert_eq!(slot(b"{}a"), slot(b"{}a"));
    }

    #[test]
    fn ids_refuse_what_could_spell_another_name() {
        assert_eq!(Id::parse(""), Err(IdError::Empty));
        assert_eq!(Id::parse(&"a".repeat(129)), Err(IdError::TooLong));
        for bad in ["a:b", "a/b", "a b", "a\n", "ä", "a\0", "*", "{x}"] {
            assert_eq!(Id::parse(bad), Err(IdError::BadByte), "{bad:?}");
        }
        assert!(Id::parse("Az09-_.~@+=|").is_ok());
    }
}
