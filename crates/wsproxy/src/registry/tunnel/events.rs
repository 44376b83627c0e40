//! Follows the announcements of lanes on all instances: for the table, and for lanes here that have to give way.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tracing::{debug, warn};
use wsproxy_proto::names::Id;

use crate::{
    hub::{
        follower::{Followed, FollowerQueue},
        sink::Sink,
    },
    registry::tunnel::{
        Announcement, LaneBackend, LaneEvent, LaneRecord, LaneRegistry, keys::LaneKeys,
        table::KnownCluster,
    },
    store::command::StoreError,
};

/// Follows the announcements until the registry closes.
pub(super) async fn run(registry: Arc<LaneRegistry>) {
    let LaneBackend::Redis(keys) = &registry.backend else { return };
    loop {
        tokio::select! {
            () = registry.closing.cancelled() => return,
            () = follow(&registry, keys) => sleep(RETRY).await,
        }
    }
}

/// Follows the announcements until messages may have been missed.
async fn follow(registry: &LaneRegistry, keys: &LaneKeys) {
    let queue = FollowerQueue::new(QUEUE_BYTES);
    let channel = registry.names.tunnel_events().into();
    let sinks = [(channel, Sink::Follower(Arc::clone(&queue)))];
    let _subscription = match registry.hub.subscribe(sinks).await {
        Ok(subscription) => subscription,
        Err(error) => return debug!(%error, "Announcements of lanes cannot be followed now."),
    };
    let mut idle = interval(LOOK_FOR_IDLE_EVERY);
    idle.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Announcements before the subscription may have been missed.
    let mut recheck = Some(Instant::now());
    loop {
        tokio::select! {
            entry = queue.next() => match entry {
                Some(Followed::Message(payload)) => registry.heard(&payload),
                Some(Followed::Gap(_)) => recheck = Some(Instant::now()),
                None => return warn!("There are more announcements of lanes than this instance can follow."),
            },
            () = sleep_until(recheck.unwrap_or_else(Instant::now)), if recheck.is_some() => {
                recheck = match registry.recheck(keys).await {
                    Ok(true) => None,
                    // By then instances that lost their leases have written their lanes again, or are lost.
                    Ok(false) => Some(Instant::now() + registry.lease.timing().lease),
                    Err(error) => {
                        debug!(%error, "The lanes of clusters cannot be read now.");
                        Some(Instant::now() + RETRY)
                    }
                };
            }
            _ = idle.tick() => registry.table.forget_idle(Instant::now()),
        }
    }
}

impl LaneRegistry {
    /// Reads a cluster, unless the reading with this number has ended by the time that it is this caller's turn.
    pub(super) async fn read_cluster(
        &self,
        keys: &LaneKeys,
        cluster: &Id,
        known: &KnownCluster,
        reading: u64,
    ) -> Result<(), StoreError> {
        let _turn = known.turn.lock().await;
        match known.outcome(reading, Instant::now()) {
            Some(true) => return Ok(()),
            Some(false) => return Err(StoreError::Lost("the cluster could not be read".into())),
            None => {}
        }
        known.begin();
        self.counters.readings.add(1);
        // After an outage of Redis all leases have run out, and their instances are not lost.
        let judges = self.lease.may_judge();
        let (fields, living) = match keys.read(cluster).await {
            Ok(read) => read,
            Err(error) => {
                known.fail(Instant::now());
                return Err(error);
            }
        };
        let mut entries = Vec::with_capacity(fields.len());
        for (agent, record) in fields {
            let agent = std::str::from_utf8(&agent).ok().and_then(|agent| Id::parse(agent).ok());
            let record = serde_json::from_slice::<LaneRecord>(&record);
            let (Some(agent), Ok(record)) = (agent, record) else {
                self.unreadable("a lane of a cluster", Some(cluster.as_str()));
                continue;
            };
            self.observe(cluster, &agent, &record);
            if !judges || living.contains(&record.server_id) {
                entries.push((agent, record));
            }
        }
        known.complete(entries, !judges);
        Ok(())
    }

    /// Reads all clusters of the table and of the lanes here. Returns whether the answers are certain: lanes that they do
    /// not name are gone.
    async fn recheck(&self, keys: &LaneKeys) -> Result<bool, StoreError> {
        let is_certain = self.lease.may_judge();
        let mut clusters = self.table.clusters();
        let own = self.local.lock().clusters();
        clusters.extend(own.into_iter().filter(|cluster| self.table.find(cluster).is_none()));
        for clusters in clusters.chunks(READ_AT_ONCE) {
            let readings = clusters.iter().map(async |cluster| match self.table.find(cluster) {
                Some(known) => {
                    let reading = known.fresh_reading();
                    self.read_cluster(keys, cluster, &known, reading).await
                }
                None => self.look_at(keys, cluster).await,
            });
            for read in join_all(readings).await {
                match read {
                    // A key of another type has no lane.
                    Err(error) if error.is_of_one_key() => {
                        debug!(%error, "A cluster cannot be read.")
                    }
                    read => read?,
                }
            }
        }
        Ok(is_certain)
    }

    /// Reads a cluster of lanes here that no request asks for.
    async fn look_at(&self, keys: &LaneKeys, cluster: &Id) -> Result<(), StoreError> {
        let (fields, _) = keys.read(cluster).await?;
        for (agent, record) in fields {
            let agent = std::str::from_utf8(&agent).ok().and_then(|agent| Id::parse(agent).ok());
            if let (Some(agent), Ok(record)) = (agent, serde_json::from_slice(&record)) {
                self.observe(cluster, &agent, &record);
            }
        }
        Ok(())
    }

    /// Notes an announcement.
    fn heard(&self, payload: &[u8]) {
        let Ok(Announcement { event, lane }) = serde_json::from_slice(payload) else {
            return self.unreadable("an announcement", None);
        };
        let (Ok(cluster), Ok(agent)) = (Id::parse(&lane.cluster_id), Id::parse(&lane.agent_id))
        else {
            return self.unreadable("an announcement", None);
        };
        if event != LaneEvent::Lost {
            self.observe(&cluster, &agent, &lane.record);
        }
        if let Some(known) = self.table.find(&cluster) {
            known.heard(event, &agent, &lane.record);
        }
    }

    fn observe(&self, cluster: &Id, agent: &Id, record: &LaneRecord) {
        let gives_way = self.local.lock().observe(&self.server_id, cluster, agent, record);
        self.note(gives_way);
    }
}

/// Upper bound of waiting announcements, in bytes: some ten thousand.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Clusters that are read at a time.
const READ_AT_ONCE: usize = 32;

const LOOK_FOR_IDLE_EVERY: Duration = Duration::from_secs(60);

const RETRY: Duration = Duration::from_millis(500);
