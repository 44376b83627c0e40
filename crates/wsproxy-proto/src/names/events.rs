//! Channels and keys of the event endpoint.

use crate::names::{Id, Names};

/// Subject of a revocation in the event endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked<'a> {
    /// Every token of a user.
    User(&'a str),
    /// The token with this name (`jti`).
    Token(&'a str),
}

impl Names {
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

    /// Channel from the clients to workers.
    #[must_use]
    pub fn events_up(&self) -> String {
        self.events("up")
    }

    /// Channel of the reports on messages that clients had to acknowledge.
    #[must_use]
    pub fn events_acks(&self) -> String {
        self.events("acks")
    }

    /// Channel of the commands that instances give each other.
    #[must_use]
    pub fn events_control(&self) -> String {
        self.events("control")
    }

    /// Stream that gives the ids of all events, so that they are in one order.
    #[must_use]
    pub fn events_clock(&self) -> String {
        format!("{{{}ws}}:clock", self.prefix)
    }

    /// Hash of all connections of a user, over all instances.
    #[must_use]
    pub fn events_user_connections(&self, user: &str) -> String {
        self.events(&format!("user:{user}:connections"))
    }

    /// Key of a revocation. All of them are in one slot of a Redis Cluster, so that one command reads several.
    #[must_use]
    pub fn events_revocation(&self, revoked: Revoked<'_>) -> String {
        self.events_revoked(&revoked.name())
    }

    /// Name of [`Self::events_revocation`] in an earlier version: still read, never written.
    #[must_use]
    pub fn events_revocation_before(&self, revoked: Revoked<'_>) -> String {
        self.events(&format!("revoked:{}", revoked.name()))
    }

    fn events_revoked(&self, what: &str) -> String {
        format!("{{{}ws}}:revoked:{what}", self.prefix)
    }

    /// A key or channel of the event endpoint.
    pub(super) fn events(&self, what: &str) -> String {
        format!("{}ws:{what}", self.prefix)
    }
}

impl Revoked<'_> {
    fn name(self) -> String {
        match self {
            Self::User(user) => format!("user:{user}"),
            Self::Token(token) => format!("jti:{token}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let id = Id::parse("u").unwrap();
        let names = Names::new("");
        assert_eq!(names.events_broadcast(), "ws:broadcast");
        assert_eq!(names.events_user(&id), "ws:user:u");
        assert_eq!(names.events_connection("c"), "ws:connection:c");
        assert_eq!(names.events_up(), "ws:up");
        assert_eq!(names.events_acks(), "ws:acks");
        assert_eq!(Names::new("eu").events_control(), "eu:ws:control");
        assert_eq!(Names::new("eu").events_clock(), "{eu:ws}:clock");
        assert_eq!(names.events_user_connections("u"), "ws:user:u:connections");
        assert_eq!(names.events_revocation(Revoked::User("u")), "{ws}:revoked:user:u");
        let token = Revoked::Token("t");
        assert_eq!(Names::new("eu").events_revocation(token), "{eu:ws}:revoked:jti:t");
        assert_eq!(Names::new("eu").events_revocation_before(token), "eu:ws:revoked:jti:t");
    }
}
