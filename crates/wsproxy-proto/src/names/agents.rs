//! Channels and keys of users' agents.

use crate::names::{Id, Names};

impl Names {
    /// Channel of commands to a user's agent.
    #[must_use]
    pub fn agent_commands(&self, user: &Id) -> String {
        self.agent(user, "commands")
    }

    /// Channel on which an instance where a call waits for an absent agent hears that the call is cancelled.
    #[must_use]
    pub fn agent_waiting(&self, user: &Id, request: &Id) -> String {
        self.agent(user, &format!("waiting:{request}"))
    }

    /// Key that names the instance to which a user's agent is connected.
    #[must_use]
    pub fn agent_server(&self, user: &Id) -> String {
        self.agent(user, "server")
    }

    /// Key of the fence of [`Self::agent_server`]: a hash that names the connection which holds the user's place.
    #[must_use]
    pub fn agent_owner(&self, user: &Id) -> String {
        self.kept(&self.agent_server(user), "owner")
    }

    /// Key that says whether a user's agent is connected.
    #[must_use]
    pub fn agent_status(&self, user: &Id) -> String {
        self.agent(user, "status")
    }

    /// Channel of commands to all instances.
    #[must_use]
    pub fn agents_control(&self) -> String {
        format!("{}agents:control", self.prefix)
    }

    /// Channel that announces connected and disconnected agents.
    #[must_use]
    pub fn agents_events(&self) -> String {
        format!("{}agents:events", self.prefix)
    }

    /// Channel of the answer to a call.
    #[must_use]
    pub fn response(&self, request: &Id) -> String {
        format!("{}response:{request}", self.prefix)
    }

    /// Key of the outcome of a call whose caller asked to keep it.
    #[must_use]
    pub fn response_outcome(&self, request: &Id) -> String {
        self.kept(&self.response(request), "outcome")
    }

    /// Hash of the agents that are connected to an instance, by user.
    #[must_use]
    pub fn server_agents(&self, server: &str) -> String {
        format!("{}ws:server:{server}:agents", self.prefix)
    }

    fn agent(&self, user: &Id, what: &str) -> String {
        format!("{}agent:{user}:{what}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::slot;

    #[test]
    fn names_are_those_of_the_contract() {
        let (names, user) = (Names::new("eu"), Id::parse("u-1").unwrap());
        assert_eq!(names.agent_commands(&user), "eu:agent:u-1:commands");
        let request = Id::parse("q-1").unwrap();
        assert_eq!(names.agent_waiting(&user, &request), "eu:agent:u-1:waiting:q-1");
        assert_eq!(names.agent_server(&user), "eu:agent:u-1:server");
        assert_eq!(names.agent_owner(&user), "{eu:agent:u-1:server}:owner");
        assert_eq!(names.agent_status(&user), "eu:agent:u-1:status");
        assert_eq!(
            (names.agents_control(), names.agents_events()),
            ("eu:agents:control".into(), "eu:agents:events".into())
        );
        assert_eq!(names.response(&user), "eu:response:u-1");
        assert_eq!(names.response_outcome(&user), "{eu:response:u-1}:outcome");
        let keys = [names.agent_owner(&user), names.agent_server(&user)];
        assert_eq!(slot(keys[0].as_bytes()), slot(keys[1].as_bytes()));
    }
}
