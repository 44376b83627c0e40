//! Users' agents: one connection for each user, and calls of tools on it. State that all agents share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_conn::{Heartbeat, Profile};
use wsproxy_proto::{
    agents::calls::CallLimits,
    names::{Id, Names},
};

use crate::{
    audit::Audit,
    config::agents::AgentsConfig,
    core::{self, Core},
    database::Database,
    endpoint::agents::{
        answers::Outcomes,
        aside::Aside,
        connections::Connections,
        counters::AgentCounters,
        failures::Failures,
        inbox::AgentInbox,
        owner::Owners,
        presence::Presence,
        refreshes::Refreshes,
        relay::{Records, Relay},
        report::Reported,
    },
    hub::Hub,
    registry::agents::AgentMembership,
    store::Store,
    traces::Tracer,
};

mod answers;
pub mod api;
mod aside;
pub mod caller;
pub mod connections;
pub mod counters;
pub mod entrance;
mod failures;
pub mod inbox;
mod leaving;
mod logic;
mod metrics;
pub mod owner;
mod place;
pub mod presence;
mod record;
mod refreshes;
pub mod relay;
mod report;
mod turn;

/// The agents family of an instance.
pub struct Agents {
    /// Section `[agents]` of the configuration.
    pub config: AgentsConfig,
    /// Names of channels and keys.
    pub(self) names: Names,
    /// Id of this instance.
    pub(self) server_id: Arc<str>,
    hub: Arc<Hub>,
    store: Store,
    /// Traces, for the spans of calls.
    pub(self) traces: Tracer,
    /// Tasks that end before the instance does.
    tasks: TaskTracker,
    /// Settings and counters that all connections share.
    pub(super) profile: Arc<Profile>,
    /// Connections of this instance, handshakes included.
    pub connections: Arc<Connections>,
    /// The places of all users.
    pub owners: Arc<Owners>,
    /// Calls by HTTP on their way to other instances; `None` if agents are not served.
    pub relay: Option<Arc<Relay>>,
    /// Notes for others about this instance's agents; `None` if agents are not served.
    pub presence: Option<Arc<Presence>>,
    /// Credentials and the status of agents; `None` if agents are not served.
    pub database: Option<Arc<Database>>,
    /// The audit log; `None` if agents are not served.
    pub audit: Option<Arc<Audit>>,
    /// Counters that the metrics read.
    pub counters: Arc<AgentCounters>,
    /// Counts at the last log line that summed them up.
    reported: Mutex<Reported>,
    /// Time of the instance's start.
    started: Instant,
    failures: Failures,
    outcomes: Arc<Outcomes>,
    /// Large calls that are refused.
    aside: Arc<Aside>,
    /// Connections whose places are to be kept.
    refreshes: Arc<Refreshes>,
    /// Permits of releases that run at once, so that the end of an instance does not flood the store.
    releases: Semaphore,
    /// Calls in flight at this instance.
    in_flight: AtomicUsize,
    /// No further call is taken: connections are about to be closed.
    is_closing: AtomicBool,
}

impl Agents {
    /// Starts the family: the database, presence, and the queue of answers.
    ///
    /// # Errors
    /// A sentence for the operator: the database cannot be used.
    pub(super) fn start(
        core: &Arc<Core>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let config = &core.config;
        let connections: Arc<Connections> = Arc::default();
        let is_served = config.endpoints.agents;
        let database = match is_served {
            true => Some(Database::start(config, background, end)?),
            false => None,
        };
        let audit = database
            .as_ref()
            .map(|database| Audit::start(config, &core.server_id, database, background, end));
        let owners = Arc::new(Owners::new(core));
        let presence = database.as_ref().map(|database| {
            let controlled = Arc::clone(&connections);
            Presence::start(core, database, &owners, controlled, background, end)
        });
        let counters: Arc<AgentCounters> = Arc::default();
        let relay = is_served.then(|| {
            let records = Records { counters: Arc::clone(&counters), audit: audit.clone() };
            Relay::start(core, Arc::clone(&owners), records, background, end)
        });
        let hub = Arc::clone(&core.hub);
        let outcomes = Outcomes::new(Arc::clone(&hub), config.redis.publish_queue_bytes);
        if is_served {
            background.spawn(Arc::clone(&outcomes).run(core.bus.clone(), end.clone()));
        }
        let refreshes: Arc<Refreshes> = Arc::default();
        if let Some(presence) = &presence {
            let (owners, presence) = (Arc::clone(&owners), Arc::clone(presence));
            background.spawn(Arc::clone(&refreshes).run(owners, presence, end.clone()));
        }
        Ok(Arc::new(Self {
            config: config.agents.clone(),
            names: core.names.clone(),
            server_id: Arc::clone(&core.server_id),
            hub,
            store: core.store.clone(),
            traces: core.traces.clone(),
            tasks: core.tasks.clone(),
            profile: Arc::new(Profile {
                // An agent answers as fast as it is called, so it is read more slowly rather than closed.
                rate: None.into(),
                message_bytes: MESSAGE_BYTES,
                heartbeat: Heartbeat::Messages,
                heartbeat_timeout: config.heartbeat.timeout_or(HEARTBEAT_TIMEOUT).into(),
                ..core::profile(config)
            }),
            connections,
            owners,
            relay,
            presence,
            database,
            audit,
            counters,
            reported: Mutex::default(),
            started: core.started,
            failures: Failures::default(),
            outcomes,
            aside: Aside::new(core.tasks.clone()),
            refreshes,
            releases: Semaphore::new(RELEASES_MAX),
            in_flight: AtomicUsize::new(0),
            is_closing: AtomicBool::new(false),
        }))
    }

    /// Refuses a configuration that the tables of the database do not allow, where the database answers in time.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub(super) async fn check(&self, core: &Core) -> Result<(), String> {
        match &self.database {
            Some(database) => Audit::check(&core.config, database).await,
            None => Ok(()),
        }
    }

    /// Returns the inbox of the connection that holds a user's place, if it is at this instance.
    #[must_use]
    pub fn local(&self, user: &Id) -> Option<Arc<AgentInbox>> {
        let mut inboxes = self.connections.of(user);
        // Ids grow with time: the newest connection has the place.
        inboxes.sort_unstable_by_key(|inbox| inbox.connection);
        inboxes.into_iter().rev().find(|inbox| inbox.is_holding())
    }

    /// Returns the number of calls in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Relaxed)
    }

    /// Takes no further calls: connections are about to be closed.
    pub fn stop_calls(&self) {
        self.is_closing.store(true, Relaxed);
    }

    /// Returns whether calls are taken no more.
    pub fn is_closing(&self) -> bool {
        self.is_closing.load(Relaxed)
    }

    /// Leaves the registry, writes what waits, and closes the database. Connections are gone by then.
    pub(super) async fn close(&self) {
        if let Some(presence) = &self.presence {
            presence.close().await;
        }
        if let Some(audit) = &self.audit {
            audit.close().await;
        }
        if let Some(database) = &self.database {
            database.close().await;
        }
    }

    /// Returns a channel of a connection on which nothing is published. Gateways may subscribe to its like.
    fn fence(&self, connection: Uuid) -> Arc<str> {
        let id = Id::parse(&connection.to_string());
        id.map_or_else(|_| Arc::default(), |id| self.names.response(&id).into())
    }

    /// Tells others that an agent is connected. Dropping the guard takes it out of the registry.
    fn tell_connected(
        &self,
        user: &Id,
        connection: Uuid,
        generation: u64,
    ) -> Option<AgentMembership> {
        let presence = self.presence.as_ref()?;
        Some(presence.connected(user, connection, generation))
    }

    /// Tells others that an agent is gone, whose place is released.
    fn tell_disconnected(&self, user: &Id, generation: u64) {
        if let Some(presence) = &self.presence {
            presence.disconnected(user, generation);
        }
    }

    /// Tells others that an agent keeps its place.
    fn tell_kept(&self, user: &Id) {
        if let Some(presence) = &self.presence {
            presence.kept(user);
        }
    }

    const fn call_limits(&self) -> CallLimits {
        CallLimits { in_flight_max: self.config.in_flight_max as usize }
    }
}

/// Time without a message after which a connection ends, while `heartbeat.timeout` is not set.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(90);

/// Bytes that a message of an agent counts beside its own: with 4 MiB per second, some 1,000 messages.
const MESSAGE_BYTES: usize = 4096;

/// Upper bound of the releases that run at once.
const RELEASES_MAX: usize = 256;

/// Upper bound of the calls in flight at an instance.
const IN_FLIGHT_MAX: usize = 200_000;
