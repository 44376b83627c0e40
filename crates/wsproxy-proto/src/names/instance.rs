//! Channels and keys of the instances themselves: their leases, and the state that each leaves behind. Most of them
//! begin as the names of the event endpoint do.

use crate::names::Names;

impl Names {
    /// Channel of an instance's own, for the probe of the bus.
    #[must_use]
    pub fn probe(&self, server: &str) -> String {
        format!("{}wsproxy:probe:{server}", self.prefix)
    }

    /// Channel that announces which instances are lost.
    #[must_use]
    pub fn registry(&self) -> String {
        self.events("registry")
    }

    /// Channel of questions of operators to all instances.
    #[must_use]
    pub fn console(&self) -> String {
        self.events("console")
    }

    /// Channel of the answers to one instance's questions.
    #[must_use]
    pub fn console_answers(&self, server: &str) -> String {
        self.events(&format!("console:{server}"))
    }

    /// Index of all instances that are alive, or of which something is left.
    #[must_use]
    pub fn servers(&self) -> String {
        self.events("servers")
    }

    /// Lease of an instance.
    #[must_use]
    pub fn server_lease(&self, server: &str) -> String {
        self.events_server(server, "")
    }

    /// Claim of the instance that cleans up after `server`.
    #[must_use]
    pub fn server_reaper(&self, server: &str) -> String {
        self.events_server(server, ":reaper")
    }

    /// Hash of an instance's connections to the event endpoint.
    #[must_use]
    pub fn server_connections(&self, server: &str) -> String {
        self.events_server(server, ":connections")
    }

    /// Hash of an instance's open sessions.
    #[must_use]
    pub fn server_sessions(&self, server: &str) -> String {
        self.events_server(server, ":sessions")
    }

    /// Note that a reaper announces the sessions of a lost instance as closed.
    #[must_use]
    pub fn server_reaped(&self, server: &str) -> String {
        self.events_server(server, ":reaped")
    }

    fn events_server(&self, server: &str, what: &str) -> String {
        self.events(&format!("server:{server}{what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let names = Names::new("eu");
        assert_eq!(names.probe("i"), "eu:wsproxy:probe:i");
        assert_eq!(names.registry(), "eu:ws:registry");
        assert_eq!(names.console(), "eu:ws:console");
        assert_eq!(names.console_answers("i"), "eu:ws:console:i");
        assert_eq!(names.servers(), "eu:ws:servers");
        assert_eq!(names.server_lease("i"), "eu:ws:server:i");
        assert_eq!(names.server_reaper("i"), "eu:ws:server:i:reaper");
        assert_eq!(names.server_connections("i"), "eu:ws:server:i:connections");
        assert_eq!(names.server_sessions("i"), "eu:ws:server:i:sessions");
        assert_eq!(names.server_reaped("i"), "eu:ws:server:i:reaped");
    }
}
