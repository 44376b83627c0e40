//! The names that reach a server: paths, credentials and channels; knows no sockets.

use std::net::SocketAddr;

use clap::ValueEnum;
use wsproxy_proto::history::Position;
use wsproxy_proto::names::{Id, Names};

use crate::handshake;
use crate::issuer::Issuer;

/// The kind of server at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The gateway's session endpoint: one-time tokens, `session:{id}:down` and `:up` on Redis.
    Wsproxy,
    /// The gateway's event endpoint: a JSON Web Token for each user, a channel for each and one for all.
    Events,
    /// The gateway's agents: a user id and a secret for each, which the database has.
    Agents,
    /// A server without credentials that relays the same channels at a path of its own.
    Plain,
    /// nginx with Nchan: subscribers are WebSockets, publishing is an HTTP POST.
    Nchan,
    /// The raw limit of this tool.
    Raw,
}

/// The names of sessions for the server and on the bus.
#[derive(Debug, Clone)]
pub struct Target {
    kind: Kind,
    path: String,
    run: String,
    agent: String,
    shared: bool,
    resumes: bool,
    /// Signs the users' tokens.
    issuer: Option<Issuer>,
    /// Number of the first client; other processes have those before it.
    first: u32,
    names: Names,
}

impl Target {
    /// Creates the names. `path` has `{id}` and `{agent}` in it, and is empty for the kind's own. `run` keeps one
    /// run's ids apart from another's. With `shared`, all clients belong to one session.
    #[must_use]
    pub fn new(kind: Kind, path: &str, run: &str, shared: bool) -> Self {
        let path = match (path, kind) {
            ("", Kind::Wsproxy) => "/{agent}/ws/{id}",
            ("", Kind::Events) => "/ws",
            ("", Kind::Agents) => "/?userId={id}",
            ("", Kind::Nchan) => "/sub/{id}",
            ("", Kind::Plain | Kind::Raw) => "/ws/{id}",
            (path, _) => path,
        };
        Self {
            kind,
            path: path.to_owned(),
            run: run.to_owned(),
            agent: "bench".to_owned(),
            shared,
            resumes: false,
            issuer: None,
            first: 0,
            names: Names::default(),
        }
    }

    /// Makes clients continue at their position. Connections of one client are one after the other.
    #[must_use]
    pub fn resuming(self) -> Self {
        Self { resumes: true, ..self }
    }

    /// Makes clients users from number `first` on, whose tokens are signed with `secret`.
    #[must_use]
    pub fn with_users(self, secret: &str, first: u32) -> Self {
        Self { issuer: Some(Issuer::new(secret)), first, ..self }
    }

    /// Makes the first client number `first` of all; other processes have those before it.
    #[must_use]
    pub fn starting_at(self, first: u32) -> Self {
        Self { first, ..self }
    }

    /// Returns true where clients continue at their position.
    #[must_use]
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    /// Returns the kind of the server.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns true where all clients belong to one session.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Returns true where handshakes need a token that was stored before.
    #[must_use]
    pub fn needs_token(&self) -> bool {
        self.kind == Kind::Wsproxy
    }

    /// Returns the number of a client's session.
    #[must_use]
    pub fn session_of(&self, client: u32) -> u32 {
        if self.shared { 0 } else { client }
    }

    /// Returns the part of ids that is this run's own.
    #[must_use]
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Returns the id of a session.
    #[must_use]
    pub fn session_id(&self, session: u32) -> String {
        format!("{}-{session}", self.run)
    }

    /// Returns the bytes of a client's handshake; `position` is that of the client's last message.
    #[must_use]
    pub fn request(&self, server: &SocketAddr, client: u32, position: Option<Position>) -> Vec<u8> {
        let session = self.session_of(self.first + client);
        let id = self.session_id(session);
        let mut path = self.path.replace("{id}", &id).replace("{agent}", &self.agent);
        if self.resumes {
            path.push_str("?last_event_id=");
            path.push_str(&position.map(|position| position.to_string()).unwrap_or_default());
        }
        let token = match &self.issuer {
            Some(issuer) => Some(issuer.token(&id)),
            None if self.kind == Kind::Agents => Some(self.token(self.first + client)),
            None => self.needs_token().then(|| self.token(session)),
        };
        handshake::request(&server.to_string(), &path, token.as_deref())
    }

    /// Returns the token of a session.
    #[must_use]
    pub fn token(&self, session: u32) -> String {
        format!("token-{}-{session}", self.run)
    }

    /// Returns the key that holds a session's token.
    #[must_use]
    pub fn token_key(&self, session: u32) -> String {
        self.named(session, Names::session_auth)
    }

    /// Returns the channel to a session's clients.
    #[must_use]
    pub fn down(&self, session: u32) -> String {
        match self.kind {
            Kind::Events => return self.named(session, Names::events_user),
            Kind::Agents => return self.named(session, Names::agent_commands),
            _ => {}
        }
        self.named(session, Names::session_down)
    }

    /// Returns the keys of one agent.
    #[must_use]
    pub fn agent_keys(&self, agent: u32) -> [String; 3] {
        [
            self.named(agent, Names::agent_owner),
            self.agent_server(agent),
            self.named(agent, Names::agent_status),
        ]
    }

    /// Returns the key that names the instance of an agent.
    #[must_use]
    pub fn agent_server(&self, agent: u32) -> String {
        self.named(agent, Names::agent_server)
    }

    /// Returns the key of the hash of an instance's agents.
    #[must_use]
    pub fn agents_of(&self, server: &str) -> String {
        self.names.server_agents(server)
    }

    /// Returns the channel to all users.
    #[must_use]
    pub fn broadcast(&self) -> String {
        self.names.events_broadcast()
    }

    /// Returns the key of the clock that orders all channels; `None` where each channel has an order of its own.
    #[must_use]
    pub fn clock(&self) -> Option<String> {
        (self.kind == Kind::Events).then(|| self.names.events_clock())
    }

    /// Returns a pattern that matches the channels from all clients of this run.
    #[must_use]
    pub fn up_pattern(&self) -> String {
        format!("session:{}-*:up", self.run)
    }

    /// Returns the path for posting a message, for servers that take messages over HTTP.
    #[must_use]
    pub fn publish_path(&self, session: u32) -> String {
        format!("/pub/{}", self.session_id(session))
    }

    fn named(&self, session: u32, name: impl Fn(&Names, &Id) -> String) -> String {
        let id = self.session_id(session);
        Id::parse(&id).map_or_else(|_| id, |id| name(&self.names, &id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_differ_in_path_and_credential() {
        let server: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let text = |kind| {
            String::from_utf8(Target::new(kind, "", "r1", false).request(&server, 7, None)).unwrap()
        };
        assert!(text(Kind::Wsproxy).starts_with("GET /bench/ws/r1-7 HTTP/1.1\r\n"));
        assert!(text(Kind::Wsproxy).contains("\r\nAuthorization: Bearer token-r1-7\r\n"));
        assert!(text(Kind::Nchan).starts_with("GET /sub/r1-7 "));
        assert!(!text(Kind::Plain).contains("Authorization"));
    }

    #[test]
    fn who_resumes_says_where_it_was() {
        let server: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let target = Target::new(Kind::Wsproxy, "", "r1", false).resuming();
        let text = |position| String::from_utf8(target.request(&server, 7, position)).unwrap();
        assert!(text(None).starts_with("GET /bench/ws/r1-7?last_event_id= HTTP/1.1\r\n"));
        let position = Position { milliseconds: 5, sequence: 1, tag: 9 };
        assert!(
            text(Some(position)).starts_with("GET /bench/ws/r1-7?last_event_id=5-1-00000009 HTTP")
        );
    }

    #[test]
    fn agents_have_a_user_id_and_a_secret() {
        let server: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let target = Target::new(Kind::Agents, "", "r1", false);
        let text = String::from_utf8(target.request(&server, 7, None)).unwrap();
        assert!(text.starts_with("GET /?userId=r1-7 HTTP/1.1\r\n"));
        assert!(text.contains("\r\nAuthorization: Bearer token-r1-7\r\n"));
        assert_eq!(target.down(7), "agent:r1-7:commands");
    }

    #[test]
    fn users_of_the_event_endpoint_have_signed_tokens() {
        let server: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let target = Target::new(Kind::Events, "", "r1", false).with_users("secret", 5);
        let text = String::from_utf8(target.request(&server, 2, None)).unwrap();
        assert!(text.starts_with("GET /ws HTTP/1.1\r\n"));
        let token = text.split("Bearer ").nth(1).unwrap().lines().next().unwrap();
        assert_eq!(token.split('.').count(), 3);
        assert_eq!(target.down(7), "ws:user:r1-7");
    }

    #[test]
    fn clients_of_a_shared_target_have_one_session() {
        let target = Target::new(Kind::Plain, "/x/{id}", "r1", true);
        assert_eq!(target.session_of(9), 0);
        assert_eq!(target.down(0), "session:r1-0:down");
    }
}
