//! The lanes of other instances, by cluster, as this instance knows them; without IO.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::watch, time::Instant};
use wsproxy_proto::names::Id;

use crate::registry::tunnel::{AGENTS_MAX, FAILURE_KEPT, LaneEvent, LaneRecord, RemoteLane};

/// The clusters that requests asked for.
///
/// Invariant: at most [`CLUSTERS_MAX`] clusters that no request follows. A further one takes the place of the one that no
/// request asked for longest.
pub(super) struct LaneTable {
    server_id: Arc<str>,
    /// Listener to changes of a cluster's lanes.
    news: Arc<OnceLock<News>>,
    /// Guards the clusters, not their lanes. Held for a few steps, or for one walk over the clusters.
    clusters: Mutex<HashMap<Id, Arc<KnownCluster>>>,
}

/// Listener to changes of a cluster's lanes.
type News = Box<dyn Fn(&Id) + Send + Sync>;

/// The lanes of one cluster.
pub(super) struct KnownCluster {
    cluster: Id,
    server_id: Arc<str>,
    news: Arc<OnceLock<News>>,
    /// Lanes at other instances, in the order of their agents.
    lanes: watch::Sender<Arc<[RemoteLane]>>,
    /// Guards what was read and heard. Held for a few steps.
    state: Mutex<ClusterState>,
    /// Turn to read the cluster: one reading at a time.
    pub(super) turn: tokio::sync::Mutex<()>,
}

struct ClusterState {
    /// Lanes by agent. At most [`AGENTS_MAX`].
    entries: BTreeMap<Box<str>, RemoteLane>,
    /// Set once the cluster was read.
    is_read: bool,
    /// Readings that have begun, and the last one that has ended.
    begun: u64,
    ended: u64,
    /// Time of the last reading's failure.
    failed: Option<Instant>,
    /// Announcements since the reading began that is on its way; they may be newer than its answer. At most
    /// [`RECORDED_MAX`]: beyond that the cluster is read again.
    recorded: Option<Vec<(LaneEvent, Id, LaneRecord)>>,
    /// Time of the last request.
    asked: Instant,
    /// Time at which the last lane left.
    lost: Option<Instant>,
    /// Agents and registrations of lanes that their instances did not have a moment ago.
    doubted: Vec<(Id, u64)>,
}

impl LaneTable {
    pub(super) fn new(server_id: &Arc<str>) -> Self {
        let (news, clusters) = Default::default();
        Self { server_id: Arc::clone(server_id), news, clusters }
    }

    /// Sets the listener to changes, once.
    pub(super) fn tell(&self, news: impl Fn(&Id) + Send + Sync + 'static) {
        let _ = self.news.set(Box::new(news));
    }

    /// Returns a cluster, which a request asks for.
    pub(super) fn ask(&self, cluster: &Id, now: Instant) -> Arc<KnownCluster> {
        let mut clusters = self.clusters.lock();
        if let Some(known) = clusters.get(cluster) {
            known.state.lock().asked = now;
            return Arc::clone(known);
        }
        if clusters.len() >= CLUSTERS_MAX {
            let idle = clusters.iter().filter(|(_, known)| !known.is_followed());
            let oldest = idle.min_by_key(|(_, known)| known.state.lock().asked);
            if let Some(oldest) = oldest.map(|(cluster, _)| cluster.clone()) {
                clusters.remove(&oldest);
            }
        }
        let known = Arc::new(KnownCluster::new(cluster, self, now));
        clusters.insert(cluster.clone(), Arc::clone(&known));
        known
    }

    /// Returns the lanes of a cluster that was read.
    pub(super) fn known(&self, cluster: &Id, now: Instant) -> Option<Arc<[RemoteLane]>> {
        let known = self.find(cluster)?;
        let mut state = known.state.lock();
        state.asked = now;
        let is_read = state.is_read;
        drop(state);
        is_read.then(|| known.lanes())
    }

    pub(super) fn find(&self, cluster: &Id) -> Option<Arc<KnownCluster>> {
        self.clusters.lock().get(cluster).cloned()
    }

    /// Returns the clusters that are known.
    pub(super) fn clusters(&self) -> Vec<Id> {
        self.clusters.lock().keys().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.clusters.lock().len()
    }

    /// Forgets the clusters that no request has asked for lately.
    pub(super) fn forget_idle(&self, now: Instant) {
        self.clusters.lock().retain(|_, known| {
            known.is_followed() || now.duration_since(known.state.lock().asked) < IDLE_MAX
        });
    }
}

impl KnownCluster {
    fn new(cluster: &Id, table: &LaneTable, now: Instant) -> Self {
        let state = ClusterState {
            entries: BTreeMap::new(),
            is_read: false,
            begun: 0,
            ended: 0,
            failed: None,
            recorded: None,
            asked: now,
            lost: None,
            doubted: Vec::new(),
        };
        Self {
            cluster: cluster.clone(),
            server_id: Arc::clone(&table.server_id),
            news: Arc::clone(&table.news),
            lanes: watch::Sender::new([].into()),
            state: Mutex::new(state),
            turn: tokio::sync::Mutex::default(),
        }
    }

    /// Returns a receiver of the lanes.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<[RemoteLane]>> {
        self.lanes.subscribe()
    }

    /// Returns the lanes.
    pub(super) fn lanes(&self) -> Arc<[RemoteLane]> {
        Arc::clone(&self.lanes.borrow())
    }

    pub(super) fn is_read(&self) -> bool {
        self.state.lock().is_read
    }

    /// Returns the number of the next reading that may end: any answer will do.
    pub(super) fn any_reading(&self) -> u64 {
        self.state.lock().ended + 1
    }

    /// Returns the number of the next reading that begins.
    pub(super) fn fresh_reading(&self) -> u64 {
        self.state.lock().begun + 1
    }

    /// Returns the success of a reading that has ended, or of one that failed a moment ago; `None`: it has not ended, or has
    /// to be tried again.
    pub(super) fn outcome(&self, reading: u64, now: Instant) -> Option<bool> {
        let state = self.state.lock();
        match state.failed {
            Some(at) => (now.duration_since(at) < FAILURE_KEPT).then_some(false),
            None => (state.ended >= reading).then_some(true),
        }
    }

    /// Begins a reading: announcements that come meanwhile are kept.
    pub(super) fn begin(&self) {
        let mut state = self.state.lock();
        state.begun += 1;
        state.recorded = Some(Vec::new());
    }

    /// Ends a reading that failed.
    pub(super) fn fail(&self, now: Instant) {
        let mut state = self.state.lock();
        state.ended = state.begun;
        state.failed = Some(now);
        state.recorded = None;
    }

    /// Ends a reading with its entries. With `keeps_absent` lanes stay that it did not find: after an outage instances
    /// write theirs again.
    pub(super) fn complete(&self, entries: Vec<(Id, LaneRecord)>, keeps_absent: bool) {
        let mut state = self.state.lock();
        state.ended = state.begun;
        state.failed = None;
        if !keeps_absent {
            state.entries.clear();
        }
        for (agent, record) in entries.into_iter().take(AGENTS_MAX) {
            state.put(&agent, record);
        }
        let recorded = state.recorded.take().unwrap_or_default();
        state.is_read = recorded.len() < RECORDED_MAX;
        for (event, agent, record) in recorded {
            state.apply(event, &agent, record);
        }
        self.publish(state);
    }

    /// Notes an announcement. Returns whether it has changed the lanes at other instances.
    pub(super) fn heard(&self, event: LaneEvent, agent: &Id, record: &LaneRecord) -> bool {
        let mut state = self.state.lock();
        if let Some(recorded) = &mut state.recorded
            && recorded.len() < RECORDED_MAX
        {
            recorded.push((event, agent.clone(), record.clone()));
        }
        state.apply(event, agent, record.clone());
        self.publish(state)
    }

    /// Leaves out a lane that its instance does not have, whatever a reading or an announcement says. Returns whether it
    /// was there.
    pub(super) fn doubt(&self, lane: &RemoteLane) -> bool {
        let mut state = self.state.lock();
        if !state.is_doubted(&lane.agent, &lane.record) {
            state.doubted.push((lane.agent.clone(), lane.record.registration));
        }
        state.apply(LaneEvent::Lost, &lane.agent, lane.record.clone());
        self.publish(state)
    }

    /// Takes back [`Self::doubt`].
    pub(super) fn trust(&self, lane: &RemoteLane) {
        let of_lane = |(agent, registration): &(Id, u64)| {
            *agent == lane.agent && *registration == lane.record.registration
        };
        self.state.lock().doubted.retain(|doubted| !of_lane(doubted));
    }

    fn is_followed(&self) -> bool {
        self.lanes.receiver_count() > 0
    }

    /// Returns the time at which the last lane left, while there is none.
    pub(super) fn lost(&self) -> Option<Instant> {
        self.state.lock().lost
    }

    /// Tells those who follow the cluster of its lanes. Returns whether these have changed.
    fn publish(&self, mut state: MutexGuard<'_, ClusterState>) -> bool {
        let is_elsewhere = |lane: &&RemoteLane| *lane.record.server_id != *self.server_id;
        let lanes: Arc<[RemoteLane]> =
            state.entries.values().filter(is_elsewhere).cloned().collect();
        let is_empty = lanes.is_empty();
        let is_changed = self.lanes.send_if_modified(|before| {
            let is_new = *before != lanes;
            *before = lanes;
            is_new
        });
        if is_changed {
            state.lost = is_empty.then(Instant::now);
        }
        drop(state);
        if let Some(news) = self.news.get().filter(|_| is_changed) {
            news(&self.cluster);
        }
        is_changed
    }
}

impl ClusterState {
    fn apply(&mut self, event: LaneEvent, agent: &Id, record: LaneRecord) {
        match event {
            LaneEvent::Connected | LaneEvent::Draining => self.put(agent, record),
            LaneEvent::Lost => {
                let held = self.entries.get(agent.as_str());
                if held.is_some_and(|held| held.record.registration <= record.registration) {
                    self.entries.remove(agent.as_str());
                }
            }
        }
    }

    fn is_doubted(&self, agent: &Id, record: &LaneRecord) -> bool {
        let is_lane = |(name, registration): &(Id, u64)| {
            name == agent && *registration == record.registration
        };
        self.doubted.iter().any(is_lane)
    }

    /// Enters a lane, unless a newer one is known or it is doubted.
    fn put(&mut self, agent: &Id, record: LaneRecord) {
        if self.is_doubted(agent, &record) {
            return;
        }
        let held = self.entries.get(agent.as_str());
        let is_newer = held.is_none_or(|held| held.record.registration <= record.registration);
        if is_newer && (held.is_some() || self.entries.len() < AGENTS_MAX) {
            let lane = RemoteLane { agent: agent.clone(), record };
            self.entries.insert(agent.as_str().into(), lane);
        }
    }
}

/// Most clusters that no request follows.
const CLUSTERS_MAX: usize = 4096;

/// Time after which a cluster leaves that no request asked for.
const IDLE_MAX: Duration = Duration::from_secs(600);

/// Most announcements that are kept during one reading.
const RECORDED_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    fn lane(server: &str, registration: u64) -> LaneRecord {
        LaneRecord {
            server_id: server.into(),
            peer: None,
            boot_id: "b".into(),
            number: 1,
            capabilities: 0,
            draining: false,
            registration,
        }
    }

    fn seen(cluster: &KnownCluster) -> Vec<(String, u64)> {
        let lanes = cluster.lanes();
        lanes.iter().map(|lane| (lane.agent.to_string(), lane.record.registration)).collect()
    }

    fn cluster() -> KnownCluster {
        KnownCluster::new(&id("c1"), &LaneTable::new(&"here".into()), Instant::now())
    }

    #[test]
    fn a_lane_that_is_doubted_comes_back_by_nothing_but_trust() {
        let cluster = cluster();
        let record = lane("s2", 3);
        cluster.heard(LaneEvent::Connected, &id("a"), &record);
        let absent = RemoteLane { agent: id("a"), record: record.clone() };
        assert!(cluster.doubt(&absent) && !cluster.doubt(&absent));
        cluster.heard(LaneEvent::Draining, &id("a"), &record);
        cluster.begin();
        cluster.complete(vec![(id("a"), record.clone())], false);
        assert!(seen(&cluster).is_empty());
        // A newer lane of the agent is another one.
        cluster.heard(LaneEvent::Connected, &id("a"), &lane("s2", 4));
        assert_eq!(seen(&cluster), [("a".to_owned(), 4)]);
        cluster.heard(LaneEvent::Lost, &id("a"), &lane("s2", 4));
        cluster.trust(&absent);
        cluster.heard(LaneEvent::Connected, &id("a"), &record);
        assert_eq!(seen(&cluster), [("a".to_owned(), 3)]);
    }

    #[test]
    fn announcements_during_a_reading_are_not_lost() {
        let cluster = cluster();
        cluster.begin();
        // The answer was made before these.
        cluster.heard(LaneEvent::Connected, &id("new"), &lane("s2", 9));
        cluster.heard(LaneEvent::Lost, &id("gone"), &lane("s2", 3));
        cluster.heard(LaneEvent::Connected, &id("stale"), &lane("s2", 4));
        let read = [("gone", 3), ("stale", 5), ("stays", 1)];
        let read = read.map(|(agent, registration)| (id(agent), lane("s3", registration)));
        cluster.complete(read.into(), false);
        assert_eq!(seen(&cluster), [("new".into(), 9), ("stale".into(), 5), ("stays".into(), 1)]);
        assert!(cluster.is_read());
    }

    #[test]
    fn an_old_end_removes_no_newer_lane() {
        let cluster = cluster();
        cluster.complete(vec![(id("a"), lane("s2", 5))], false);
        cluster.heard(LaneEvent::Lost, &id("a"), &lane("s2", 4));
        assert_eq!(seen(&cluster), [("a".into(), 5)]);
        cluster.heard(LaneEvent::Lost, &id("a"), &lane("s2", 5));
        assert_eq!(seen(&cluster), []);
    }

    #[test]
    fn lanes_of_this_instance_are_not_elsewhere() {
        let cluster = cluster();
        cluster.complete(vec![(id("a"), lane("s2", 5)), (id("b"), lane("here", 5))], false);
        assert_eq!(seen(&cluster), [("a".into(), 5)]);
        cluster.heard(LaneEvent::Connected, &id("a"), &lane("here", 6));
        assert_eq!(seen(&cluster), []);
    }

    #[test]
    fn after_an_outage_absent_lanes_stay() {
        let cluster = cluster();
        cluster.complete(vec![(id("a"), lane("s2", 5))], false);
        cluster.complete(vec![(id("b"), lane("s2", 6))], true);
        assert_eq!(seen(&cluster), [("a".into(), 5), ("b".into(), 6)]);
        cluster.complete(vec![(id("b"), lane("s2", 6))], false);
        assert_eq!(seen(&cluster), [("b".into(), 6)]);
    }

    #[test]
    fn the_table_forgets_clusters_that_no_request_asks_for() {
        let (table, start) = (LaneTable::new(&"here".into()), Instant::now());
        let held = table.ask(&id("held"), start).subscribe();
        for number in 0..CLUSTERS_MAX + 10 {
            table.ask(&id(&format!("c{number}")), start + Duration::from_millis(number as u64));
        }
        assert_eq!(table.len(), CLUSTERS_MAX);
        assert!(table.find(&id("held")).is_some() && table.find(&id("c0")).is_none());
        let later = start + IDLE_MAX * 2;
        table.ask(&id("asked"), later);
        table.forget_idle(later);
        assert_eq!(table.len(), 2);
        drop(held);
        table.forget_idle(later);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_failure_stands_for_a_moment() {
        let (cluster, now) = (cluster(), Instant::now());
        assert_eq!(cluster.outcome(cluster.any_reading(), now), None);
        cluster.begin();
        let fresh = cluster.fresh_reading();
        cluster.fail(now);
        assert_eq!(cluster.outcome(cluster.any_reading(), now), Some(false));
        assert_eq!(cluster.outcome(fresh, now + FAILURE_KEPT), None);
        cluster.begin();
        cluster.fail(now);
        assert_eq!(cluster.outcome(fresh, now + FAILURE_KEPT), None);
        cluster.begin();
        cluster.complete(vec![], false);
        assert_eq!(cluster.outcome(fresh, now), Some(true));
    }
}
