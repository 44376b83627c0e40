//! How keys and channels on the bus are spelled; knows nothing of what they carry.

use std::fmt;

/// Longest accepted id, in bytes.
pub const ID_BYTES_MAX: usize = 128;

/// The prefix that an operator puts before every key and channel, so that several
/// deployments can share one Redis; empty by default.
#[derive(Debug, Clone, Default)]
pub struct Names {
    prefix: String,
}

impl Names {
    /// `prefix` without the colon that separates it from the name; empty for none.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}:") };
        Self { prefix }
    }

    /// Channel from the workers to the clients of a session.
    #[must_use]
    pub fn session_down(&self, session: &Id) -> String {
        self.session(session, "down")
    }

    /// The session of a channel from the workers to its clients.
    #[must_use]
    pub fn session_of_down(&self, channel: &str) -> Option<Id> {
        let rest = channel.strip_prefix(&*self.prefix)?.strip_prefix("session:")?;
        Id::parse(rest.strip_suffix(":down")?).ok()
    }

    /// Channel from the clients of a session to its worker.
    #[must_use]
    pub fn session_up(&self, session: &Id) -> String {
        self.session(session, "up")
    }

    /// Stream that keeps what no worker was there to receive.
    #[must_use]
    pub fn session_up_log(&self, session: &Id) -> String {
        self.kept(&self.session_up(session), "log")
    }

    /// The name that this stream had in an earlier version; still read, never written.
    #[must_use]
    pub fn session_up_log_before(&self, session: &Id) -> String {
        self.session(session, "up:log")
    }

    /// Channel on which workers command a session's connections.
    #[must_use]
    pub fn session_control(&self, session: &Id) -> String {
        self.session(session, "control")
    }

    /// Key of a session's token.
    #[must_use]
    pub fn session_auth(&self, session: &Id) -> String {
        self.session(session, "auth")
    }

    /// Channel that announces opened and closed sessions of an agent.
    #[must_use]
    pub fn agent_sessions(&self, agent: &Id) -> String {
        format!("{}agent:{agent}:sessions", self.prefix)
    }

    /// Log of what is announced there.
    #[must_use]
    pub fn agent_sessions_log(&self, agent: &Id) -> String {
        format!("{{{}}}:log", self.agent_sessions(agent))
    }

    /// Channel of an instance's own, for the probe of the bus.
    #[must_use]
    pub fn probe(&self, server: &str) -> String {
        format!("{}wsproxy:probe:{server}", self.prefix)
    }

    /// The log of a channel's history.
    #[must_use]
    pub fn log(&self, channel: &str) -> String {
        self.kept(channel, "log")
    }

    /// A key that belongs to a channel: the channel in literal braces, so that a Redis Cluster keeps both in one
    /// slot. All channels of events share one slot, since they share one clock.
    #[must_use]
    pub fn kept(&self, channel: &str, what: &str) -> String {
        let events = channel.strip_prefix(&*self.prefix).and_then(|rest| rest.strip_prefix("ws:"));
        match events {
            Some(rest) => format!("{{{}ws}}:{rest}:{what}", self.prefix),
            None => format!("{{{channel}}}:{what}"),
        }
    }

    /// What remembers that a message was published into a channel's log, by the key that its worker gave it.
    #[must_use]
    pub fn published_once(&self, channel: &str, key: &str) -> String {
        self.kept(channel, &format!("once:{key}"))
    }

    /// A key beside a log: `what` in place of its last word.
    #[must_use]
    pub fn beside(log: &str, what: &str) -> String {
        format!("{}{what}", log.strip_suffix("log").unwrap_or(log))
    }

    /// Key of a token stream: its state, or its text where `what` is `:text`.
    #[must_use]
    pub fn stream(&self, session: &Id, stream: &Id, what: &str) -> String {
        self.kept(&self.session_down(session), &format!("stream:{stream}{what}"))
    }

    /// What the keys of a session's token streams begin with; the id follows.
    #[must_use]
    pub fn stream_prefix(&self, session: &Id) -> String {
        self.kept(&self.session_down(session), "stream:")
    }

    /// Index of a session's token streams.
    #[must_use]
    pub fn session_streams(&self, session: &Id) -> String {
        self.kept(&self.session_down(session), "streams")
    }

    /// Leases of all open token streams.
    #[must_use]
    pub fn stream_leases(&self) -> String {
        format!("{}streams:leases", self.prefix)
    }

    /// Channel to every client of the event endpoint.
    #[must_use]
    pub fn events_broadcast(&self) -> String {
        self.events("broadcast")
    }

    /// Channel to all connections of a user.
    #[must_use]
    pub fn events_user(&self, user: &Id) -> String {
        self.events(&format!("user:{user}"))
    }

    /// Channel to one connection; its id is a UUID.
    #[must_use]
    pub fn events_connection(&self, connection: &str) -> String {
        self.events(&format!("connection:{connection}"))
    }

    /// A key or channel of the event endpoint.
    #[must_use]
    pub fn events(&self, what: &str) -> String {
        format!("{}ws:{what}", self.prefix)
    }

    /// Stream that gives the ids of all events, so that they are in one order.
    #[must_use]
    pub fn events_clock(&self) -> String {
        format!("{{{}ws}}:clock", self.prefix)
    }

    /// A key of an instance that serves events: its lease, or what `what` adds.
    #[must_use]
    pub fn events_server(&self, server: &str, what: &str) -> String {
        self.events(&format!("server:{server}{what}"))
    }

    /// Hash of all connections of a user, over all instances.
    #[must_use]
    pub fn events_user_connections(&self, user: &str) -> String {
        self.events(&format!("user:{user}:connections"))
    }

    fn session(&self, session: &Id, what: &str) -> String {
        format!("{}session:{session}:{what}", self.prefix)
    }

    /// Key of a revocation in the event endpoint, of `what`: `user:{user}` or `jti:{jti}`. All of them are in one slot,
    /// so that one command reads several.
    #[must_use]
    pub fn events_revoked(&self, what: &str) -> String {
        format!("{{{}ws}}:revoked:{what}", self.prefix)
    }
}

/// The slot of a key in a Redis Cluster (<https://redis.io/docs/reference/cluster-spec>): CRC16 of what stands in its
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

/// The id of a session, an agent, a room, …: safe inside a key, a channel, a path and a log line.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Id(Box<str>);

/// Why a string is no id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing between the slashes.
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
    /// Says which rule was broken.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let id = Id::parse("s-1").unwrap();
        let names = Names::new("");
        assert_eq!(names.session_down(&id), "session:s-1:down");
        assert_eq!(names.session_up(&id), "session:s-1:up");
        assert_eq!(names.session_up_log(&id), "{session:s-1:up}:log");
        assert_eq!(names.log("session:s-1:down"), "{session:s-1:down}:log");
        assert_eq!(names.log("ws:user:u-1"), "{ws}:user:u-1:log");
        assert_eq!(names.stream(&id, &id, ":text"), "{session:s-1:down}:stream:s-1:text");
        assert_eq!(names.published_once("session:s-1:down", "k"), "{session:s-1:down}:once:k");
        assert_eq!(Names::beside("{ws}:broadcast:log", "head"), "{ws}:broadcast:head");
        assert_eq!(Names::new("eu").log("eu:ws:broadcast"), "{eu:ws}:broadcast:log");
        assert_eq!(Names::new("eu").events_clock(), "{eu:ws}:clock");
        assert_eq!(names.session_control(&id), "session:s-1:control");
        assert_eq!(names.session_auth(&id), "session:s-1:auth");
        assert_eq!(names.agent_sessions(&id), "agent:s-1:sessions");
        assert_eq!(names.agent_sessions_log(&id), "{agent:s-1:sessions}:log");
        assert_eq!(Names::new("eu").agent_sessions_log(&id), "{eu:agent:s-1:sessions}:log");
        assert_eq!(Names::new("eu").session_up(&id), "eu:session:s-1:up");
        assert_eq!(Names::new("eu").session_of_down("eu:session:s-1:down"), Some(id));
        assert_eq!(names.session_of_down("ws:user:s-1"), None);
        assert_eq!(names.events_revoked("user:u"), "{ws}:revoked:user:u");
        assert_eq!(Names::new("eu").events_revoked("jti:t"), "{eu:ws}:revoked:jti:t");
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
