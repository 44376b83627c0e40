//! The endpoint families as a label of metrics and logs; knows no family's logic.

/// An endpoint family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `/{agent_id}/ws/{session_id}`
    Sessions,
    /// `/ws`
    Events,
    /// `/ws/{room_id}`
    Rooms,
    /// Users' agents.
    Agents,
    /// Lanes of cluster agents, and requests over them.
    Tunnel,
    /// `/echo`
    Echo,
}

impl Family {
    /// All families, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Sessions, Self::Events, Self::Rooms, Self::Agents, Self::Tunnel, Self::Echo];

    /// Returns the value of the label `endpoint`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Events => "events",
            Self::Rooms => "rooms",
            Self::Agents => "agents",
            Self::Tunnel => "tunnel",
            Self::Echo => "echo",
        }
    }
}
