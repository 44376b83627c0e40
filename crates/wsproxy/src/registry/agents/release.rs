//! Releases the place of a user's agent in Redis: for the instance that held it, and for the reaper of a lost instance.

use std::time::Duration;

use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    redis::{
        reply::{odd_reply, text},
        resp::Reply,
        script,
        words::milliseconds,
    },
    registry::commands::Commands,
    store::command::StoreError,
};

/// The places of users' agents in Redis.
#[derive(Clone)]
pub(crate) struct AgentPlaces {
    commands: Commands,
    names: Names,
    /// Milliseconds for which the generation of a released place stays.
    kept_ms: String,
}

impl AgentPlaces {
    pub(crate) fn new(commands: Commands, names: &Names, offline_wait: Duration) -> Self {
        let kept_ms = milliseconds(offline_wait).to_string();
        Self { commands, names: names.clone(), kept_ms }
    }

    /// Releases a place, unless another connection holds it. Returns the generation with which this connection held
    /// it.
    pub(crate) async fn release(
        &self,
        user: &Id,
        connection: Uuid,
    ) -> Result<Option<u64>, StoreError> {
        let words = [
            "2",
            &self.names.agent_owner(user),
            &self.names.agent_server(user),
            &connection.to_string(),
            &self.kept_ms,
            &self.names.agent_commands(user),
        ];
        let reply = self.commands.run_script(&script::AGENT_RELEASE, &words).await?;
        let Reply::Array(parts) = reply else { return Err(odd_reply()) };
        match &parts[..] {
            [Reply::Integer(0)] => Ok(None),
            [Reply::Integer(1), generation] => {
                let generation = text(generation).and_then(|text| text.parse().ok());
                generation.map(Some).ok_or_else(odd_reply)
            }
            _ => Err(odd_reply()),
        }
    }
}
