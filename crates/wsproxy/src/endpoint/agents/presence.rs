//! Tells others which agents are connected: status keys, announcements, the registry and the database. Follows the
//! commands to all instances. Knows no connection and no call.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    bus::{
        Bus,
        publish::{BusError, Keep, Publish},
    },
    core::Core,
    database::{Database, error::DatabaseError, secrets::SecretId},
    endpoint::agents::{
        owner::Owners,
        presence::{
            control::{Controlled, Opened, Order},
            status::Statuses,
        },
    },
    hub::Hub,
    registry::agents::{AgentEnds, AgentMembership, AgentRegistry, announcement},
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
        throttle::Throttle,
    },
};

pub mod control;
mod stale;
mod status;

/// Knowledge of other programs about this instance's agents.
pub struct Presence {
    /// The connected agents of all instances.
    pub registry: Arc<AgentRegistry>,
    hub: Arc<Hub>,
    names: Names,
    server_id: Arc<str>,
    /// Status keys that wait to be written; `None`: the embedded bus, where no other program could read them.
    statuses: Option<Arc<Statuses>>,
    database: Arc<Database>,
    controlled: Arc<dyn Controlled>,
    /// Counters that the metrics read.
    pub counters: PresenceCounters,
}

/// Counters of presence and of commands.
#[derive(Debug, Default)]
pub struct PresenceCounters {
    /// Announcements that the bus did not take.
    pub unannounced: Counter,
    /// Connections and handshakes that a command ended.
    pub disconnected: Counter,
    /// Times that the secrets of connections were read again, since commands may have been missed.
    pub rechecks: Counter,
    /// Commands that could not be read.
    pub bad_commands: Counter,
    /// Throttle of the log lines about these.
    bad_command_lines: Throttle,
}

impl Presence {
    /// Starts presence: its tasks run on `background` until `end`. Commands to all instances reach `controlled`.
    #[must_use]
    pub fn start(
        core: &Core,
        database: &Arc<Database>,
        owners: &Arc<Owners>,
        controlled: Arc<dyn Controlled>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let statuses = match &core.bus {
            Bus::Embedded(_) => None,
            Bus::Redis(_) => {
                let timeout = core.config.redis.response_timeout;
                Some(Arc::new(Statuses::new(core.store.clone(), core.names.clone(), timeout)))
            }
        };
        if let Some(statuses) = &statuses {
            background.spawn(Arc::clone(statuses).run(end.clone()));
        }
        background.spawn(stale::run(Arc::clone(database), Arc::clone(owners), end.clone()));
        let lost = Arc::clone(database) as Arc<dyn AgentEnds>;
        let presence = Arc::new(Self {
            registry: AgentRegistry::start(core.lease(), &core.bus, Some(lost)),
            hub: Arc::clone(&core.hub),
            names: core.names.clone(),
            server_id: Arc::clone(&core.server_id),
            statuses,
            database: Arc::clone(database),
            controlled,
            counters: PresenceCounters::default(),
        });
        background.spawn(control::run(Arc::clone(&presence), end.clone()));
        presence
    }

    /// Notes that an agent is connected: its claim was answered, and its own marker was seen. Dropping the returned
    /// guard takes the agent out of the registry; [`Self::disconnected`] does the rest.
    pub fn connected(&self, user: &Id, connection: Uuid, generation: u64) -> AgentMembership {
        // First of all: the end of an older connection here then forgets nothing of what follows.
        let membership = self.registry.join(user, connection);
        self.database.connected(user);
        self.set_status(user, true);
        self.announce("connected", user, generation);
        membership
    }

    /// Notes that an agent keeps its place: a refresh was answered.
    pub fn kept(&self, user: &Id) {
        self.database.seen(user);
        self.set_status(user, true);
    }

    /// Notes that an agent is gone. Call it only where the release of its place has returned `true`.
    pub fn disconnected(&self, user: &Id, generation: u64) {
        self.database.disconnected(user);
        self.set_status(user, false);
        self.announce("disconnected", user, generation);
    }

    /// Ends connections on every instance. Returns the number of instances that received the command.
    ///
    /// # Errors
    /// Connections here are ended, but other instances may not have the command.
    pub async fn order(&self, order: &Order) -> Result<u64, BusError> {
        // Connections here do not wait for the bus.
        self.execute(order);
        control::tell_all(&self.hub, self.names.agents_control().into(), order).await
    }

    /// Writes what waits, and leaves the registry. Connections must be gone by then.
    pub async fn close(&self) {
        if let Some(statuses) = &self.statuses {
            statuses.flush().await;
        }
        self.registry.close().await;
    }

    fn set_status(&self, user: &Id, connected: bool) {
        if let Some(statuses) = &self.statuses {
            statuses.set(user, connected);
        }
    }

    fn announce(&self, event: &str, user: &Id, generation: u64) {
        let payload = announcement(event, user, &self.server_id, generation).into();
        let channel = self.names.agents_events().into();
        let publish = Publish { channel, payload, keep: Keep::Nothing, receipt: None };
        if self.hub.publish(publish).is_err() {
            self.counters.unannounced.add(1);
        }
    }

    fn execute(&self, order: &Order) {
        self.counters.disconnected.add(self.controlled.execute(order) as u64);
    }

    /// Ends the connections whose secret was revoked or whose user was removed: the command may have been missed.
    /// Returns whether handshakes have a secret that is not judged yet.
    async fn recheck(&self) -> Result<bool, DatabaseError> {
        let Opened { secrets, is_judging } = self.controlled.opened();
        self.counters.rechecks.add(1);
        if !secrets.is_empty() {
            for (user, secret) in self.database.revoked_since(&secrets).await? {
                let secret = match secret {
                    SecretId::Stored(id) => Some(id),
                    SecretId::Clear => None,
                };
                self.execute(&Order::revoke(user, secret));
            }
        }
        Ok(is_judging)
    }
}

impl AgentEnds for Database {
    fn disconnected(&self, user: &Id) {
        Self::disconnected(self, user);
    }

    fn left(&self, user: &Id) {
        self.forget(user);
    }
}

impl Source for Presence {
    fn collect(&self, scrape: &mut Scrape) {
        self.registry.collect(scrape);
        self.counters.collect(scrape);
    }
}

impl Source for PresenceCounters {
    fn collect(&self, scrape: &mut Scrape) {
        scrape.section(Section::Families);
        for (name, help, counter) in [
            (
                "agent_control_disconnects",
                "Connections and handshakes of agents that a command ended",
                &self.disconnected,
            ),
            (
                "agent_control_rechecks",
                "Times that the secrets of connected agents were read again, because commands may have been missed",
                &self.rechecks,
            ),
            (
                "agent_control_errors",
                "Commands for agents that could not be read",
                &self.bad_commands,
            ),
            (
                "agent_announcements_lost",
                "Announcements of connected and disconnected agents that the bus did not take",
                &self.unannounced,
            ),
        ] {
            scrape.counter(name, help, counter.value());
        }
    }
}
