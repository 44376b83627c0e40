//! The connected agents of users, here and on all instances. Knows no family.
//!
//! The key of a place alone decides which connection holds it; this registry is for lists, counts, and the end of the
//! places of a lost instance. No handshake waits for it: one task writes changes in batches.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    bus::Bus,
    registry::{
        agents::{keys::AgentKeys, leftovers::AgentLeftovers, local::LocalAgents},
        commands::Commands,
        lease::Lease,
        writer::WriterCounters,
    },
    store::command::StoreError,
};

mod keys;
pub(crate) mod leftovers;
mod local;
pub(crate) mod release;
mod writer;

/// The connected agents of this instance, and access to those of all others.
pub struct AgentRegistry {
    server_id: Arc<str>,
    lease: Arc<Lease>,
    backend: AgentBackend,
    /// Guards the agents here and the changes. Held for a few steps, or for one walk after an outage.
    local: Mutex<LocalAgents>,
    /// Part of this instance that is told of ends.
    ends: Option<Arc<dyn AgentEnds>>,
    /// Signals the writer that there are changes.
    changed: Notify,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: WriterCounters,
}

/// Storage of the shared registry.
enum AgentBackend {
    /// This process: there is no other instance.
    Embedded,
    /// Redis.
    Redis(Box<AgentKeys>, Box<AgentLeftovers>),
}

/// Part of an instance that is told of ends: of agents whose instance is lost, and of connections here.
pub trait AgentEnds: Send + Sync {
    /// Notes that the agent of a user is not connected any more.
    fn disconnected(&self, user: &Id);
    /// Notes that a connection here has ended or was replaced at another instance. A sign of life that still waits
    /// to be written would be out of date.
    fn left(&self, user: &Id);
}

/// Record of a connected agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    /// Id of the connection.
    pub connection: Uuid,
    /// Time of the opening: RFC 3339. `None` in the moment before the registry has the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connected_at: Option<Box<str>>,
    /// Platform, as the agent named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Box<str>>,
    /// Version, as the agent named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Box<str>>,
}

/// A connected agent of any instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectedAgent {
    /// The user.
    pub user: Id,
    /// The instance of the connection.
    pub server: Box<str>,
    /// Record of the connection.
    pub record: AgentRecord,
}

/// A piece of the list of all connected agents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentPage {
    /// Agents. One that connects, leaves or moves while the list is read may be in two pieces or in none.
    pub agents: Vec<ConnectedAgent>,
    /// Cursor of the next piece; `None`: this was the last one.
    pub cursor: Option<String>,
}

/// Guard of an agent in the registry; dropping it removes the agent.
#[must_use = "dropping it takes the agent out of the registry"]
pub struct AgentMembership {
    registry: Arc<AgentRegistry>,
    user: Arc<str>,
    connection: Uuid,
}

impl AgentRegistry {
    /// Starts the registry's task, which runs until [`Self::close`]. The lease must outlive it. Ends of
    /// connections here, and of agents whose lost instance this one removes, are told to `ends`.
    #[must_use]
    pub fn start(lease: &Arc<Lease>, bus: &Bus, ends: Option<Arc<dyn AgentEnds>>) -> Arc<Self> {
        let settings = lease.settings();
        if let Some(ends) = &ends {
            lease.tell_agent_ends(Arc::clone(ends));
        }
        let backend = match bus {
            Bus::Embedded(_) => AgentBackend::Embedded,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                let leftovers = AgentLeftovers::new(commands.clone(), settings, lease.agent_ends());
                AgentBackend::Redis(AgentKeys::new(commands, settings).into(), leftovers.into())
            }
        };
        let registry = Arc::new(Self {
            server_id: Arc::clone(&settings.server_id),
            lease: Arc::clone(lease),
            local: Mutex::new(LocalAgents::new(matches!(backend, AgentBackend::Redis(..)))),
            backend,
            ends,
            changed: Notify::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: WriterCounters::default(),
        });
        if matches!(registry.backend, AgentBackend::Redis(..)) {
            registry.tasks.spawn(writer::run(Arc::clone(&registry)));
        }
        registry
    }

    /// Adds an agent for as long as the returned guard lives. A newer connection of the same user replaces an older
    /// one. Never waits.
    pub fn join(self: &Arc<Self>, user: &Id, connection: Uuid) -> AgentMembership {
        let user: Arc<str> = user.as_str().into();
        let changed = self.local.lock().join(Arc::clone(&user), connection);
        self.note(changed);
        AgentMembership { registry: Arc::clone(self), user, connection }
    }

    /// Returns the number of agents here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.local.lock().len()
    }

    /// Returns whether no agent is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether Redis has every agent here, as far as this instance knows. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.local.lock().changes.is_written()
    }

    /// Returns the agent of a user, wherever it is connected.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn find(&self, user: &Id) -> Result<Option<ConnectedAgent>, StoreError> {
        match &self.backend {
            AgentBackend::Embedded => {
                let record = self.local.lock().record(user.as_str());
                Ok(record.map(|record| ConnectedAgent {
                    user: user.clone(),
                    server: (*self.server_id).into(),
                    record,
                }))
            }
            AgentBackend::Redis(keys, _) => keys.find(user).await,
        }
    }

    /// Returns some `count` agents of all living instances, from a cursor on; `None`: from the start. A piece may have
    /// more agents than that, or fewer.
    ///
    /// # Errors
    /// The store did not answer. [`StoreError::Refused`]: no gateway made this cursor.
    pub async fn list(&self, cursor: Option<&str>, count: usize) -> Result<AgentPage, StoreError> {
        match &self.backend {
            AgentBackend::Embedded => Ok(self.list_here(cursor.unwrap_or_default(), count.max(1))),
            AgentBackend::Redis(keys, _) => keys.list(cursor, count.max(1)).await,
        }
    }

    /// Returns the number of connected agents of each living instance.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn counts(&self) -> Result<BTreeMap<Box<str>, u64>, StoreError> {
        match &self.backend {
            AgentBackend::Embedded => {
                Ok(BTreeMap::from([((*self.server_id).into(), self.len() as u64)]))
            }
            AgentBackend::Redis(keys, _) => keys.counts().await,
        }
    }

    /// Removes the entries of this instance from Redis and ends. Connections must be gone by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Lists the agents here, in the order of their users; a cursor is the last user of the piece before.
    fn list_here(&self, after: &str, count: usize) -> AgentPage {
        let mut found = self.local.lock().records(after, count + 1);
        let cursor = (found.len() > count).then(|| {
            found.truncate(count);
            found.last().map(|(user, _)| user.to_string()).unwrap_or_default()
        });
        let server = &*self.server_id;
        let agent = |(user, record): (Arc<str>, AgentRecord)| {
            Some(ConnectedAgent { user: Id::parse(&user).ok()?, server: server.into(), record })
        };
        AgentPage { agents: found.into_iter().filter_map(agent).collect(), cursor }
    }

    fn note(&self, changed: bool) {
        if changed {
            self.changed.notify_one();
        }
    }
}

impl AgentMembership {
    /// Sets what the agent says about itself.
    pub fn describe(&self, platform: Option<&str>, version: Option<&str>) {
        let changed =
            self.registry.local.lock().describe(&self.user, self.connection, platform, version);
        self.registry.note(changed);
    }
}

impl Drop for AgentMembership {
    fn drop(&mut self) {
        let left = self.registry.local.lock().leave(&self.user, self.connection);
        let Some(changed) = left else { return };
        self.registry.note(changed);
        if let (Some(ends), Ok(user)) = (&self.registry.ends, Id::parse(&self.user)) {
            ends.left(&user);
        }
    }
}

/// Returns the announcement of a connected or disconnected agent.
pub(crate) fn announcement(event: &str, user: &Id, server_id: &str, generation: u64) -> String {
    serde_json::json!({
        "event": event,
        "userId": user.as_str(),
        "serverId": server_id,
        "generation": generation.to_string(),
    })
    .to_string()
}
