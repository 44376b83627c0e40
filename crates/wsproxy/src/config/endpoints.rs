//! `[endpoints]`: the switches of the endpoint families.

/// `[endpoints]`: the endpoint families that are served.
#[derive(Debug, Clone)]
pub struct EndpointsConfig {
    /// `/{agent_id}/ws/{session_id}`
    pub sessions: bool,
    /// `/ws`
    pub events: bool,
    /// `/ws/{room_id}`
    pub rooms: bool,
    /// Users' agents, at `agents.path`.
    pub agents: bool,
    /// `/clusters/{cluster_id}/…`
    pub tunnel: bool,
    /// `/echo`: answers every message with itself; for conformance suites.
    pub echo: bool,
}

impl EndpointsConfig {
    /// Returns whether a family is served.
    #[must_use]
    pub fn is_any(&self) -> bool {
        let Self { sessions, events, rooms, agents, tunnel, echo } = *self;
        [sessions, events, rooms, agents, tunnel, echo].contains(&true)
    }
}

impl Default for EndpointsConfig {
    fn default() -> Self {
        Self {
            sessions: true,
            events: false,
            rooms: false,
            agents: false,
            tunnel: false,
            echo: false,
        }
    }
}
