//! Channels and keys of the session endpoint and of its token streams.

use crate::names::{Id, Names};

impl Names {
    /// Channel from workers to the clients of a session.
    #[must_use]
    pub fn session_down(&self, session: &Id) -> String {
        self.session(session, "down")
    }

    /// Session of a channel that [`Self::session_down`] made.
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

    /// Stream of the messages that no worker received on [`Self::session_up`].
    #[must_use]
    pub fn session_up_log(&self, session: &Id) -> String {
        self.kept(&self.session_up(session), "log")
    }

    /// Name of [`Self::session_up_log`] in an earlier version: still read, never written.
    #[must_use]
    pub fn session_up_log_before(&self, session: &Id) -> String {
        self.session(session, "up:log")
    }

    /// Channel on which workers command the connections of a session.
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

    /// Log of the announcements on [`Self::agent_sessions`].
    #[must_use]
    pub fn agent_sessions_log(&self, agent: &Id) -> String {
        format!("{{{}}}:log", self.agent_sessions(agent))
    }

    /// Key of a token stream's state.
    #[must_use]
    pub fn token_stream(&self, session: &Id, stream: &Id) -> String {
        self.stream(session, stream, "")
    }

    /// Key of a token stream's text.
    #[must_use]
    pub fn token_stream_text(&self, session: &Id, stream: &Id) -> String {
        self.stream(session, stream, ":text")
    }

    fn stream(&self, session: &Id, stream: &Id, what: &str) -> String {
        self.kept(&self.session_down(session), &format!("stream:{stream}{what}"))
    }

    /// Start of the keys of a session's token streams; the stream's id follows.
    #[must_use]
    pub fn stream_prefix(&self, session: &Id) -> String {
        self.kept(&self.session_down(session), "stream:")
    }

    /// Index of a session's token streams.
    #[must_use]
    pub fn session_streams(&self, session: &Id) -> String {
        self.kept(&self.session_down(session), "streams")
    }

    /// Sorted set of the leases of all open token streams; see [`Self::stream_lease`].
    #[must_use]
    pub fn stream_leases(&self) -> String {
        format!("{}streams:leases", self.prefix)
    }

    /// Member of [`Self::stream_leases`] that stands for one token stream.
    #[must_use]
    pub fn stream_lease(session: &Id, stream: &Id) -> String {
        format!("{session}/{stream}")
    }

    /// Session and token stream of a member that [`Self::stream_lease`] made.
    #[must_use]
    pub fn parse_stream_lease(member: &[u8]) -> Option<(Id, Id)> {
        let (session, stream) = std::str::from_utf8(member).ok()?.split_once('/')?;
        Some((Id::parse(session).ok()?, Id::parse(stream).ok()?))
    }

    fn session(&self, session: &Id, what: &str) -> String {
        format!("{}session:{session}:{what}", self.prefix)
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
        assert_eq!(names.session_up_log_before(&id), "session:s-1:up:log");
        assert_eq!(names.session_control(&id), "session:s-1:control");
        assert_eq!(names.session_auth(&id), "session:s-1:auth");
        assert_eq!(names.agent_sessions(&id), "agent:s-1:sessions");
        assert_eq!(names.agent_sessions_log(&id), "{agent:s-1:sessions}:log");
        assert_eq!(Names::new("eu").agent_sessions_log(&id), "{eu:agent:s-1:sessions}:log");
        assert_eq!(Names::new("eu").session_up(&id), "eu:session:s-1:up");
        assert_eq!(Names::new("eu").session_of_down("eu:session:s-1:down"), Some(id));
        assert_eq!(names.session_of_down("ws:user:s-1"), None);
    }

    #[test]
    fn names_of_token_streams_are_those_of_the_contract() {
        let (session, stream) = (Id::parse("s-1").unwrap(), Id::parse("t").unwrap());
        let names = Names::new("");
        assert_eq!(names.token_stream(&session, &stream), "{session:s-1:down}:stream:t");
        assert_eq!(names.token_stream_text(&session, &stream), "{session:s-1:down}:stream:t:text");
        assert_eq!(names.stream_prefix(&session) + "t", names.token_stream(&session, &stream));
        assert_eq!(names.session_streams(&session), "{session:s-1:down}:streams");
        assert_eq!(Names::new("eu").stream_leases(), "eu:streams:leases");
        let lease = Names::stream_lease(&session, &stream);
        assert_eq!(lease, "s-1/t");
        assert_eq!(Names::parse_stream_lease(lease.as_bytes()), Some((session, stream)));
        assert_eq!(Names::parse_stream_lease(b"s-1"), None);
        assert_eq!(Names::parse_stream_lease(b"a/b/c"), None);
    }
}
