//! Ends the places of agents whose instance is lost; done by another instance, or by a later run with the same name.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt, join_all};
use wsproxy_proto::names::{Id, Names};

use crate::{
    redis::words::milliseconds,
    registry::{
        agents::{
            AgentEnds, announcement,
            keys::{self, AgentKeys, Field},
            release::AgentPlaces,
        },
        commands::{Commands, SCAN_START},
        lease::{LeaseSettings, LeasedState, LostInstance},
    },
    store::command::StoreError,
};

/// Part of this instance that is told of lost agents, once it has started. Clones are one.
#[derive(Clone, Default)]
pub(in crate::registry) struct Told(Arc<OnceLock<Arc<dyn AgentEnds>>>);

impl Told {
    /// Sets the part. A second call has no effect.
    pub(in crate::registry) fn set(&self, part: Arc<dyn AgentEnds>) {
        let _ = self.0.set(part);
    }
}

/// Ends the places of a lost instance's agents.
pub(in crate::registry) struct AgentLeftovers {
    keys: AgentKeys,
    places: AgentPlaces,
    commands: Commands,
    names: Names,
    told: Told,
}

impl AgentLeftovers {
    pub(in crate::registry) fn new(
        commands: Commands,
        settings: &LeaseSettings,
        told: Told,
    ) -> Self {
        Self {
            keys: AgentKeys::new(commands.clone(), settings),
            places: AgentPlaces::new(commands.clone(), &settings.names, settings.offline_wait),
            names: settings.names.clone(),
            commands,
            told,
        }
    }

    /// Releases the places of agents that an instance no longer has, and tells others. Returns the number of agents
    /// that held their places, and the fields that are done.
    pub(super) async fn end(
        &self,
        server: &str,
        fields: Vec<Field>,
    ) -> Result<(u64, Vec<Field>), StoreError> {
        let ends = fields.iter().map(|field| self.end_one(server, field));
        let ended = join_all(ends).await;
        let (mut count, mut done, mut failed) = (0, Vec::with_capacity(fields.len()), None);
        for (field, ended) in fields.into_iter().zip(ended) {
            match ended {
                Ok(held) => {
                    count += u64::from(held);
                    done.push(field);
                }
                // A key of another type holds no place.
                Err(error) if error.is_of_one_key() => done.push(field),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok((count, done)), Err)
    }

    /// Ends the place of one agent. Returns whether the agent held it.
    async fn end_one(&self, server: &str, (user, record): &Field) -> Result<bool, StoreError> {
        let user = std::str::from_utf8(user).ok().and_then(|user| Id::parse(user).ok());
        // No gateway wrote another kind of field, so no agent was there.
        let (Some(user), Some(record)) = (user, keys::read(record)) else { return Ok(false) };
        let Some(generation) = self.places.release(&user, record.connection).await? else {
            return Ok(false);
        };
        if let Some(told) = self.told.0.get() {
            told.disconnected(&user);
        }
        let (key, ttl) = (self.names.agent_status(&user), milliseconds(STATUS_TTL).to_string());
        let event = announcement("disconnected", &user, server, generation);
        let (status, event) = (
            ["SET", &key, "disconnected", "PX", &ttl],
            ["PUBLISH", &self.names.agents_events(), &event],
        );
        // The place is free, so whatever fails now is not done again: others read the place.
        let told = tokio::join!(self.commands.call(&status), self.commands.call(&event));
        if let (Err(error), _) | (_, Err(error)) = told {
            tracing::debug!(%error, user_id = user.as_str(), "The end of a lost agent was not told.");
        }
        Ok(true)
    }

    async fn clean_up(&self, lost: &LostInstance<'_>) -> Result<bool, StoreError> {
        for _ in 0..WALKS_MAX {
            let mut cursor = SCAN_START;
            loop {
                let (next, fields) = self.keys.scan(lost.server, &cursor).await?;
                if !fields.is_empty() {
                    if !lost.is_certain().await? {
                        return Ok(false);
                    }
                    let (count, done) = self.end(lost.server, fields).await?;
                    lost.counters.agents_reaped.add(count);
                    self.keys.remove_equal(lost.server, done.into_iter()).await?;
                }
                if next == SCAN_START {
                    break;
                }
                cursor = next;
            }
            if self.keys.len(lost.server).await? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl LeasedState for AgentLeftovers {
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.clean_up(lost).boxed()
    }

    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>> {
        async move { Ok(self.keys.len(server).await? == 0) }.boxed()
    }
}

/// Time for which others can read that an agent is disconnected.
pub(crate) const STATUS_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Upper bound of walks over the agents of one instance: a walk may miss agents that move.
const WALKS_MAX: usize = 10;
