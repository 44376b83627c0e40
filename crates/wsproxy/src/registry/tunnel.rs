//! The lanes of cluster agents, here and on all instances. Knows neither sockets nor requests.
//!
//! The hash of a cluster alone decides which lane of an agent id is the newest; a script writes it before the handshake is
//! answered. Each instance follows the announcements of lanes, so that a request costs no command of Redis.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};
use wsproxy_proto::names::{Id, Names};

use crate::{
    bus::{
        Bus,
        publish::{Keep, Publish},
    },
    hub::Hub,
    registry::{
        commands::{Commands, SCAN_START},
        lease::Lease,
        tunnel::{
            keys::LaneKeys,
            local::{LocalLanes, Standing},
            table::{KnownCluster, LaneTable},
        },
        writer::WriterCounters,
    },
    store::command::StoreError,
    telemetry::{counter::Counter, throttle::Throttle},
};

mod events;
mod keys;
pub(super) mod leftovers;
mod local;
mod table;
mod writer;

/// The lanes of this instance, and access to those of all others.
pub struct LaneRegistry {
    server_id: Arc<str>,
    names: Names,
    /// Address at which other instances reach this one.
    peer: Option<Arc<str>>,
    lease: Arc<Lease>,
    hub: Arc<Hub>,
    bus: Bus,
    backend: LaneBackend,
    /// Guards the lanes here and the changes. Held for a few steps, or for one walk after an outage.
    local: Mutex<LocalLanes>,
    table: LaneTable,
    /// Signals the writer that there are changes.
    changed: Notify,
    /// Signals the writer that a handshake waits for a change.
    urgent: Notify,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: LaneCounters,
}

/// Storage of the shared registry.
enum LaneBackend {
    /// This process: there is no other instance.
    Embedded,
    /// Redis.
    Redis(Box<LaneKeys>),
}

/// Counters of the registry of lanes.
#[derive(Debug, Default)]
pub struct LaneCounters {
    /// Counters of the writing to Redis.
    pub writer: WriterCounters,
    /// Readings of a cluster's lanes.
    pub readings: Counter,
    /// Announcements and entries that could not be read.
    pub unreadable: Counter,
    /// Throttle of the log lines about these.
    unreadable_lines: Throttle,
}

/// A lane that opens.
#[derive(Debug, Clone)]
pub struct OpeningLane {
    /// The cluster.
    pub cluster: Id,
    /// Id of the cluster agent.
    pub agent: Id,
    /// Id of the agent's process.
    pub boot_id: Id,
    /// Number of the connection in that process, at most [`LANE_NUMBER_MAX`].
    pub number: u64,
    /// Bits of the agent's HELLO, or 0.
    pub capabilities: u64,
}

/// Record of a lane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneRecord {
    /// The instance that has the lane.
    pub server_id: Box<str>,
    /// Address at which other instances reach that instance; `None`: they do not.
    #[serde(default)]
    pub peer: Option<Box<str>>,
    /// Id of the agent's process.
    pub boot_id: Box<str>,
    /// Number of the connection in that process.
    pub number: u64,
    /// Bits of the agent's HELLO.
    #[serde(default)]
    pub capabilities: u64,
    /// The lane takes no further stream.
    #[serde(default)]
    pub draining: bool,
    /// Order in which Redis entered the lanes of an agent id: some microseconds of its clock.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub registration: u64,
}

/// A lane at another instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteLane {
    /// Id of the cluster agent.
    pub agent: Id,
    /// Record of the lane.
    pub record: LaneRecord,
}

/// The newer lane that took the place of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Successor {
    /// A later connection of the same process.
    SameProcess,
    /// A connection of another process with the same agent id.
    OtherProcess,
}

/// The reason why a lane got no entry.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// A newer lane of this process has the entry.
    #[error("a newer lane of the same agent is connected")]
    Superseded,
    /// The cluster has [`AGENTS_MAX`] agents.
    #[error("the cluster has {AGENTS_MAX} agents")]
    Full,
    /// The store did not answer, or refused.
    #[error(transparent)]
    Unavailable(#[from] StoreError),
}

/// Guard of a lane's entry; dropping it removes the entry, unless a newer lane has it.
#[must_use = "dropping it takes the lane out of the registry"]
pub struct LaneEntry {
    registry: Arc<LaneRegistry>,
    key: Arc<str>,
    /// Number of the lane in this process.
    id: u64,
    standing: watch::Receiver<Standing>,
}

impl LaneRegistry {
    /// Starts the registry's tasks, which run until [`Self::close`]. The lease must outlive them. `peer` is the address at
    /// which other instances reach this one.
    #[must_use]
    pub fn start(
        lease: &Arc<Lease>,
        hub: &Arc<Hub>,
        bus: &Bus,
        peer: Option<Arc<str>>,
    ) -> Arc<Self> {
        let settings = lease.settings();
        let backend = match bus {
            Bus::Embedded(_) => LaneBackend::Embedded,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                LaneBackend::Redis(LaneKeys::new(commands, settings).into())
            }
        };
        let is_shared = matches!(backend, LaneBackend::Redis(_));
        let registry = Arc::new(Self {
            server_id: Arc::clone(&settings.server_id),
            names: settings.names.clone(),
            peer,
            lease: Arc::clone(lease),
            hub: Arc::clone(hub),
            bus: bus.clone(),
            backend,
            local: Mutex::new(LocalLanes::new(is_shared)),
            table: LaneTable::new(&settings.server_id),
            changed: Notify::new(),
            urgent: Notify::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: LaneCounters::default(),
        });
        if is_shared {
            registry.tasks.spawn(writer::run(Arc::clone(&registry)));
            registry.tasks.spawn(events::run(Arc::clone(&registry)));
        }
        registry
    }

    /// Enters a lane for as long as the returned guard lives, before its handshake is answered. An older lane of the same
    /// agent id gives way. Has the deadline `redis.response_timeout`.
    ///
    /// With `without_store` a lane is accepted though the store does not answer; its entry is written as soon as the store
    /// is back.
    ///
    /// # Errors
    /// See [`RegisterError`]. [`RegisterError::Unavailable`] also with `without_store` where the store refuses the entry.
    pub async fn register(
        self: &Arc<Self>,
        lane: OpeningLane,
        without_store: bool,
    ) -> Result<LaneEntry, RegisterError> {
        let joined = self.local.lock().join(lane);
        let Some((key, id, mut standing)) = joined else { return Err(RegisterError::Superseded) };
        let entry = LaneEntry {
            registry: Arc::clone(self),
            key: Arc::clone(&key),
            id,
            standing: standing.clone(),
        };
        if let LaneBackend::Embedded = self.backend {
            let entered = self.local.lock().enter_here(&self.server_id, &key, id);
            if let Some(announcement) = entered {
                self.announce(announcement);
            }
            return Ok(entry);
        }
        self.urgent.notify_one();
        self.changed.notify_one();
        let is_away = || !self.bus.status().connected;
        if without_store && is_away() {
            return Ok(entry);
        }
        let settled = standing.wait_for(|standing| *standing != Standing::Waiting);
        let deadline = self.lease.settings().response_timeout;
        let settled = match timeout(deadline, settled).await {
            Ok(Ok(standing)) => standing.clone(),
            Ok(Err(_)) | Err(_) => Standing::Waiting,
        };
        match settled {
            Standing::Entered => Ok(entry),
            Standing::Superseded(_) => Err(RegisterError::Superseded),
            Standing::Full => Err(RegisterError::Full),
            Standing::Refused(why) => Err(StoreError::Refused(why.to_string()).into()),
            Standing::Waiting | Standing::Failed if without_store => Ok(entry),
            Standing::Waiting | Standing::Failed => {
                Err(StoreError::Lost("the lane's entry was not written".into()).into())
            }
        }
    }

    /// Returns the lanes of a cluster at other instances, and follows them. Asks Redis at the first call for a cluster; the
    /// next ones take no time. A cluster whose receiver is held stays known.
    ///
    /// # Errors
    /// Redis did not answer: nothing is known of this cluster yet.
    pub async fn elsewhere(
        &self,
        cluster: &Id,
    ) -> Result<watch::Receiver<Arc<[RemoteLane]>>, StoreError> {
        let found = self.table.ask(cluster, Instant::now());
        if let LaneBackend::Redis(keys) = &self.backend
            && !found.is_read()
        {
            self.read_cluster(keys, cluster, &found, found.any_reading()).await?;
        }
        Ok(found.subscribe())
    }

    /// Returns the lanes of a cluster at other instances as they are known, without waiting; `None`: the cluster was never
    /// read.
    #[must_use]
    pub fn known_elsewhere(&self, cluster: &Id) -> Option<Arc<[RemoteLane]>> {
        self.table.known(cluster, Instant::now())
    }

    /// Returns the time since the last lane of a cluster at other instances left, as far as this instance knows.
    #[must_use]
    pub fn lost_elsewhere_for(&self, cluster: &Id) -> Option<Duration> {
        Some(self.table.find(cluster)?.lost()?.elapsed())
    }

    /// Tells `news` of each change of a cluster's lanes at other instances that a request has asked for. A second call has
    /// no effect.
    pub fn tell(&self, news: impl Fn(&Id) + Send + Sync + 'static) {
        self.table.tell(news);
    }

    /// Reads the lanes of a cluster again, since an instance did not have the lane `absent` that the table names.
    ///
    /// # Errors
    /// Redis did not answer; the table stays as it was, without that lane for [`DOUBTED_FOR`].
    pub async fn read_again(
        self: &Arc<Self>,
        cluster: &Id,
        absent: &RemoteLane,
    ) -> Result<Arc<[RemoteLane]>, StoreError> {
        let found = self.table.ask(cluster, Instant::now());
        let reading = found.fresh_reading();
        if found.doubt(absent) {
            self.doubt(&found, cluster, absent);
        }
        if let LaneBackend::Redis(keys) = &self.backend {
            self.read_cluster(keys, cluster, &found, reading).await?;
        }
        Ok(found.lanes())
    }

    /// Returns clusters behind `after` that have lanes at other instances, with the number of these, in the order of their
    /// ids and at most `max`. Reads the lanes of all instances from Redis.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn clusters_elsewhere(
        &self,
        after: &str,
        max: usize,
    ) -> Result<BTreeMap<Id, usize>, StoreError> {
        let mut clusters = BTreeMap::new();
        let LaneBackend::Redis(keys) = &self.backend else { return Ok(clusters) };
        for server in keys.living().await?.iter().filter(|server| ***server != *self.server_id) {
            let mut cursor = SCAN_START;
            loop {
                let (next, fields) = keys.scan(server, &cursor).await?;
                let lanes = fields.iter().filter_map(|(field, _)| Names::parse_tunnel_lane(field));
                for (cluster, _) in lanes.filter(|(cluster, _)| cluster.as_str() > after) {
                    *clusters.entry(cluster).or_default() += 1;
                    if clusters.len() > max {
                        clusters.pop_last();
                    }
                }
                cursor = next;
                if cursor == SCAN_START {
                    break;
                }
            }
        }
        Ok(clusters)
    }

    /// Names a lane again after a while, if Redis still has it or does not answer: while Redis is away, nothing else tells
    /// that the agent has come back to its instance.
    fn doubt(self: &Arc<Self>, found: &Arc<KnownCluster>, cluster: &Id, absent: &RemoteLane) {
        let (registry, found) = (Arc::clone(self), Arc::clone(found));
        let (cluster, absent) = (cluster.clone(), absent.clone());
        self.tasks.spawn(async move {
            let LaneBackend::Redis(keys) = &registry.backend else { return };
            let read = async {
                sleep(DOUBTED_FOR).await;
                found.trust(&absent);
                registry.read_cluster(keys, &cluster, &found, found.fresh_reading()).await
            };
            tokio::select! {
                () = registry.closing.cancelled() => {}
                read = read => if read.is_err() {
                    found.heard(LaneEvent::Connected, &absent.agent, &absent.record);
                },
            }
        });
    }

    /// Returns whether other instances live.
    ///
    /// # Errors
    /// The store did not answer.
    pub async fn has_peers(&self) -> Result<bool, StoreError> {
        let LaneBackend::Redis(keys) = &self.backend else { return Ok(false) };
        let living = keys.living().await?;
        Ok(living.iter().any(|server| **server != *self.server_id))
    }

    /// Returns the number of lanes here that have their agents' entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.local.lock().len()
    }

    /// Returns whether no lane here has an entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of lanes here that gave way to a newer lane of their agent id.
    #[must_use]
    pub fn superseded(&self) -> u64 {
        self.local.lock().superseded
    }

    /// Returns the number of clusters that the table knows. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn clusters_known(&self) -> usize {
        self.table.len()
    }

    /// Returns whether Redis has every lane here, as far as this instance knows. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.local.lock().changes.is_written()
    }

    /// Removes the lanes of this instance from Redis and ends. Guards must be dropped by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Publishes an announcement where no script does it.
    fn announce(&self, (event, lane): (LaneEvent, AnnouncedLane)) {
        let payload = match serde_json::to_vec(&Announcement { event, lane }) {
            Ok(payload) => payload.into(),
            Err(error) => return debug!(%error, "A lane cannot be announced."),
        };
        let channel = self.names.tunnel_events().into();
        let publish = Publish { channel, payload, keep: Keep::Nothing, receipt: None };
        if let Err(error) = self.hub.publish(publish) {
            debug!(%error, "A lane was not announced.");
        }
    }

    fn note(&self, changed: bool) {
        if changed {
            self.changed.notify_one();
        }
    }

    fn unreadable(&self, what: &'static str, cluster: Option<&str>) {
        self.counters.unreadable.add(1);
        if let Some(left_out) = self.counters.unreadable_lines.pass() {
            warn!(what, cluster, left_out, "An entry of the registry of lanes could not be read.");
        }
    }
}

impl LaneEntry {
    /// Announces that the lane takes no further stream.
    pub fn drain(&self) {
        let LaneRegistry { local, backend, .. } = &*self.registry;
        let changed = local.lock().drain(&self.key, self.id);
        if let (LaneBackend::Embedded, true) = (backend, changed) {
            let announced = local.lock().announced(&self.registry.server_id, &self.key, self.id);
            if let Some(lane) = announced {
                self.registry.announce((LaneEvent::Draining, lane));
            }
        }
        self.registry.note(changed);
    }

    /// Waits until a newer lane of the agent id has taken the entry; for ever where none does.
    pub async fn superseded(&self) -> Successor {
        let mut standing = self.standing.clone();
        let is_over = |standing: &Standing| matches!(standing, Standing::Superseded(_));
        match standing.wait_for(is_over).await.map(|standing| standing.clone()) {
            Ok(Standing::Superseded(by)) => by,
            _ => std::future::pending().await,
        }
    }

    /// Returns whether Redis has the entry, as far as this instance knows.
    #[must_use]
    pub fn is_entered(&self) -> bool {
        *self.standing.borrow() == Standing::Entered
    }
}

impl Drop for LaneEntry {
    fn drop(&mut self) {
        let LaneRegistry { local, backend, .. } = &*self.registry;
        let mut lanes = local.lock();
        let announced = lanes.announced(&self.registry.server_id, &self.key, self.id);
        let changed = lanes.leave(&self.key, self.id);
        drop(lanes);
        if let (LaneBackend::Embedded, Some(lane)) = (backend, announced) {
            self.registry.announce((LaneEvent::Lost, lane));
        }
        self.registry.note(changed);
    }
}

/// Kind of an announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LaneEvent {
    Connected,
    Draining,
    Lost,
}

/// Announcement on the channel of lanes.
#[derive(Debug, Serialize, Deserialize)]
struct Announcement {
    event: LaneEvent,
    #[serde(flatten)]
    lane: AnnouncedLane,
}

/// A lane with its cluster and agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct AnnouncedLane {
    cluster_id: Box<str>,
    agent_id: Box<str>,
    #[serde(flatten)]
    record: LaneRecord,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Most agents of one cluster.
pub const AGENTS_MAX: usize = 1024;

/// Greatest number of a lane: the script tells it from the next one.
pub const LANE_NUMBER_MAX: u64 = crate::redis::script::EXACT_MAX - 1;

/// Time for which a lane is not named that its instance did not have, where Redis cannot be asked.
const DOUBTED_FOR: Duration = Duration::from_secs(1);

/// Time for which a failed reading of a cluster stands for further ones.
const FAILURE_KEPT: Duration = Duration::from_secs(1);
