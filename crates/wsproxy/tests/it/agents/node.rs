//! The parts of an instance below the agents family, on a bus of the test's choice.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::Value;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy::{
    bus::Bus,
    config::{LimitsConfig, RedisConfig},
    endpoint::agents::owner::{Claim, Claimed, Owner, OwnerSettings, Owners},
    hub::{Hub, delivery::Delivery, inbox::Inbox, sink::Sink, subscription::Subscription},
    registry::{
        agents::{AgentEnds, AgentMembership, AgentRegistry, ConnectedAgent},
        lease::{Lease, LeaseSettings},
        sessions::SessionLogLimits,
    },
    store::command::StoreError,
};
use wsproxy_proto::names::{Id, Names};

use crate::support::{
    FAST_LEASE,
    bus::config,
    eventually, eventually_ok,
    gateway::{Backend, id},
    soon,
};

/// An instance without its endpoints.
pub struct Node {
    pub name: Arc<str>,
    pub owners: Owners,
    pub registry: Arc<AgentRegistry>,
    pub lease: Arc<Lease>,
    /// Users of lost agents that this instance was told of.
    pub lost: Arc<Lost>,
    pub hub: Arc<Hub>,
    pub bus: Bus,
    pub names: Names,
    end: CancellationToken,
}

/// Users whose agents were lost, and users whose connection here has ended.
#[derive(Default)]
pub struct Lost(pub Mutex<Vec<String>>, pub Mutex<Vec<String>>);

impl AgentEnds for Lost {
    fn disconnected(&self, user: &Id) {
        self.0.lock().push(user.to_string());
    }

    fn left(&self, user: &Id) {
        self.1.lock().push(user.to_string());
    }
}

/// Messages and states that an inbox was told.
#[derive(Debug, Default)]
pub struct Heard(Mutex<Vec<String>>);

impl Inbox for Heard {
    fn message(&self, payload: &[u8]) {
        self.0.lock().push(String::from_utf8(payload.to_vec()).unwrap());
    }

    fn lost(&self) {
        self.0.lock().push("lost".to_owned());
    }

    fn recovered(&self) {
        self.0.lock().push("recovered".to_owned());
    }
}

impl Heard {
    pub fn all(&self) -> Vec<String> {
        self.0.lock().clone()
    }

    /// Waits until so many messages have come.
    pub async fn wait(&self, count: usize) -> Vec<String> {
        eventually("messages have come", || self.0.lock().len() >= count).await;
        self.all()
    }
}

impl Node {
    /// Starts an instance of this name.
    pub async fn on(backend: &Backend, name: &str) -> Self {
        Self::with(config(backend.url().as_deref()), name, |_| {}).await
    }

    /// Starts an instance with changed parameters of places.
    pub async fn with(
        config: RedisConfig,
        name: &str,
        change: impl FnOnce(&mut OwnerSettings),
    ) -> Self {
        let names = Names::new(&config.channel_prefix);
        let (hub, tasks, end) = (Hub::new(), TaskTracker::new(), CancellationToken::new());
        let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
        let stop = end.clone();
        let bus = match config.url {
            Some(_) => Bus::redis(&config, name, &names, delivery, &tasks, stop).unwrap(),
            None => Bus::embedded(&config, &LimitsConfig::default(), delivery, &tasks, stop),
        };
        hub.connect(bus.clone());
        let mut settings = OwnerSettings {
            server_id: name.into(),
            names: names.clone(),
            response_timeout: config.response_timeout,
            replacements_per_minute: 20,
            offline_wait: Duration::from_secs(5),
        };
        change(&mut settings);
        let lease = LeaseSettings {
            server_id: name.into(),
            names: names.clone(),
            response_timeout: config.response_timeout,
            index_ttl: HOUR,
            announcements: SessionLogLimits { entries_max: 100, ttl: HOUR },
            offline_wait: settings.offline_wait,
            empty_room_ttl: Duration::from_secs(60),
            timing: FAST_LEASE,
        };
        let lease = Lease::start(lease, &bus);
        let lost = Arc::new(Lost::default());
        let told = Arc::clone(&lost) as Arc<dyn AgentEnds>;
        let registry = AgentRegistry::start(&lease, &bus, Some(told));
        let owners = Owners::on(settings, &hub, &bus);
        let name = name.into();
        let node = Self { name, owners, registry, lease, lost, hub, bus, names, end };
        node.ready().await;
        node
    }

    /// Waits until the bus is connected.
    pub async fn ready(&self) {
        eventually("the bus is ready", || {
            let status = self.bus.status();
            status.connected && status.subscribed
        })
        .await;
    }

    /// Listens to the commands of a user's agent.
    pub async fn listen(&self, user: &str) -> (Arc<Heard>, Subscription) {
        self.follow(&self.names.agent_commands(&id(user))).await
    }

    /// Listens to a channel.
    pub async fn follow(&self, channel: &str) -> (Arc<Heard>, Subscription) {
        let heard = Arc::new(Heard::default());
        let sinks = [(channel.into(), Sink::Inbox(Arc::clone(&heard) as Arc<dyn Inbox>))];
        let subscription = soon("a subscription", self.hub.subscribe(sinks)).await.unwrap();
        (heard, subscription)
    }

    /// Claims a place.
    pub async fn try_claim(&self, user: &str, claim: Claim) -> Result<Claimed, StoreError> {
        soon("a claim", self.owners.claim(&id(user), claim)).await
    }

    /// Claims a place as a newcomer. Returns the generation and the holder before.
    pub async fn take(&self, user: &str, connection: Uuid) -> (u64, Option<Owner>) {
        let claim = Claim { connection, held: None, announce: false };
        match self.try_claim(user, claim).await.unwrap() {
            Claimed::Held { generation, replaced, .. } => (generation, replaced),
            other => panic!("{other:?}"),
        }
    }

    /// Refreshes a place.
    pub async fn refresh(&self, user: &str, connection: Uuid, held: u64) -> Claimed {
        let claim = Claim { connection, held: Some(held), announce: false };
        self.try_claim(user, claim).await.unwrap()
    }

    /// Releases a place.
    pub async fn release(&self, user: &str, connection: Uuid) -> bool {
        soon("a release", self.owners.release(&id(user), connection)).await.unwrap()
    }

    /// Connects an agent as a handshake does. Returns its connection, its generation and its entry.
    pub async fn connect(&self, user: &str) -> (Uuid, u64, AgentMembership) {
        let connection = Uuid::now_v7();
        let (generation, _) = self.take(user, connection).await;
        (connection, generation, self.registry.join(&id(user), connection))
    }

    /// Waits until Redis has the agents here.
    pub async fn written(&self) {
        eventually("all is written", || self.registry.is_written()).await;
    }

    /// Waits until the agent of a user is found at an instance; `None`: until it is not found.
    pub async fn wait_found(&self, user: &str, server: Option<&str>) {
        let found = eventually_ok("the agent is where it should be", async || {
            let found = self.registry.find(&id(user)).await;
            let is_at = |agent: &Option<ConnectedAgent>| {
                agent.as_ref().map(|agent| &*agent.server) == server
                    && agent.as_ref().is_none_or(|agent| agent.record.connected_at.is_some())
            };
            if found.as_ref().is_ok_and(is_at) { Ok(()) } else { Err(found) }
        });
        found.await;
    }

    /// Waits until the instances have so many agents.
    pub async fn wait_counts(&self, wanted: &[(&str, u64)]) {
        let counted = eventually_ok("there are so many agents", async || {
            let counts = self.registry.counts().await;
            let is_wanted = counts.as_ref().is_ok_and(|counts| {
                counts.iter().map(|(server, count)| (&**server, *count)).eq(wanted.iter().copied())
            });
            if is_wanted { Ok(()) } else { Err(counts) }
        });
        counted.await;
    }

    /// Ends the instance politely.
    pub async fn close(self) {
        soon("the end", self.registry.close()).await;
        soon("the end of the lease", self.lease.close()).await;
    }

    /// Whether a place has a holder or a generation.
    pub async fn is_awaited(&self, user: &str) -> bool {
        soon("an answer", self.owners.is_awaited(&id(user))).await.unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// The holder that a connection of this instance is.
pub fn owner(connection: Uuid, node: &Node) -> Owner {
    Owner { connection, server: (*node.name).into() }
}

/// The connection and the generation of a marker.
pub fn marker(text: &str) -> (Option<Uuid>, u64) {
    let marker: Value = serde_json::from_str(text).unwrap();
    assert_eq!(marker["type"], "owner", "{text}");
    let connection = marker["connectionId"].as_str().map(|id| Uuid::parse_str(id).unwrap());
    (connection, marker["generation"].as_str().unwrap().parse().unwrap())
}

/// The connections that held the place until these markers.
pub fn former(markers: &[String]) -> Vec<Option<Uuid>> {
    let former = |text: &String| {
        let marker: Value = serde_json::from_str(text).unwrap();
        marker["former"].as_str().map(|id| Uuid::parse_str(id).unwrap())
    };
    markers.iter().map(former).collect()
}

const HOUR: Duration = Duration::from_secs(3600);
