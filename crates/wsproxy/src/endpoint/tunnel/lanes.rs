//! The lanes of this instance by cluster, and the choice among them. Knows no request and no other instance.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_conn::{
    clock::{self, Micros},
    lane::LaneHandle,
};
use wsproxy_proto::{
    names::Id,
    tunnel::{code::Code, frame::Reset},
};

/// The lanes of this instance.
///
/// Bound: a cluster has an entry while it has a lane or a stream, and for [`Limits::reconnect_grace`] behind its last one.
pub struct Lanes {
    limits: Limits,
    started: Instant,
    /// Guards the clusters. No other lock is taken under it but those of lanes.
    clusters: Mutex<HashMap<Id, Cluster>>,
    /// Told of each change that may let a waiting request go on: the cluster, and whether for all of its requests.
    news: OnceLock<News>,
}

/// Listener to changes of a cluster.
type News = Box<dyn Fn(&Id) + Send + Sync>;

/// Limits of streams and times.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most streams of a lane.
    pub lane: usize,
    /// Most streams of a cluster.
    pub cluster: usize,
    /// Time behind the loss of the last lane in which another one is expected.
    pub reconnect_grace: Duration,
}

struct Cluster {
    lanes: Vec<Arc<Lane>>,
    load: Arc<Load>,
    /// Time and reason of the last loss of a lane.
    lost: Option<(Instant, &'static str)>,
}

/// Streams of a cluster.
#[derive(Debug, Default)]
struct Load {
    streams: AtomicUsize,
    long: AtomicUsize,
}

/// The agent at the end of a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneName {
    /// Cluster of the agent.
    pub cluster: Id,
    /// Agent.
    pub agent: Id,
    /// Process of the agent.
    pub boot: [u8; 16],
    /// Number of the connection of that process, from 1.
    pub number: u64,
}

/// A lane, from its admission to its end.
#[derive(Debug)]
pub struct Lane {
    /// Agent at the other end.
    pub name: LaneName,
    /// Time of the admission.
    pub since: Instant,
    handle: OnceLock<LaneHandle>,
    long: AtomicUsize,
}

/// Admission of a lane. Dropping it removes the lane.
pub struct Admission {
    lanes: Arc<Lanes>,
    /// The lane.
    pub lane: Arc<Lane>,
    reason: &'static str,
}

/// A stream's place on a lane and in its cluster. Dropping it frees both.
pub struct Place {
    lanes: Arc<Lanes>,
    /// The lane.
    pub lane: Arc<Lane>,
    load: Arc<Load>,
    is_long: bool,
}

/// Reason why there is no lane for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoLane {
    /// A lane is expected, perhaps until a time: the last one was lost a moment ago, or the instance is young.
    Reconnecting(Option<tokio::time::Instant>),
    /// None is connected.
    Offline,
    /// All lanes, or the cluster, have as many streams as they may.
    Full,
}

/// The admission of a lane is refused: the agent's process has a newer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superseded;

impl Lanes {
    /// Makes an empty table.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Self> {
        let (clusters, news) = Default::default();
        Arc::new(Self { limits, started: Instant::now(), clusters, news })
    }

    /// Sets the listener to changes, once.
    pub fn tell(&self, news: impl Fn(&Id) + Send + Sync + 'static) {
        let _ = self.news.set(Box::new(news));
    }

    /// Admits a lane. It takes no streams before [`Admission::ready`].
    ///
    /// # Errors
    /// [`Superseded`]
    pub fn admit(self: &Arc<Self>, name: LaneName) -> Result<Admission, Superseded> {
        let lane = Arc::new(Lane {
            name,
            since: Instant::now(),
            handle: OnceLock::new(),
            long: AtomicUsize::new(0),
        });
        let mut clusters = self.clusters.lock();
        let cluster = clusters.entry(lane.name.cluster.clone()).or_insert_with(Cluster::new);
        let is_newer = |other: &Arc<Lane>| {
            other.name.agent == lane.name.agent
                && other.name.boot == lane.name.boot
                && other.name.number >= lane.name.number
        };
        if cluster.lanes.iter().any(is_newer) {
            return Err(Superseded);
        }
        cluster.lanes.push(Arc::clone(&lane));
        drop(clusters);
        Ok(Admission { lanes: Arc::clone(self), lane, reason: "lost" })
    }

    /// Chooses a lane: one whose upstream is healthy before others, then the one with the fewest streams. `tried` are
    /// lanes that come last.
    ///
    /// # Errors
    /// [`NoLane`]
    pub fn choose(
        self: &Arc<Self>,
        cluster: &Id,
        is_long: bool,
        tried: &[Arc<Lane>],
    ) -> Result<Place, NoLane> {
        let clusters = self.clusters.lock();
        let Some(known) = clusters.get(cluster) else { return Err(self.absence(None)) };
        let mut is_full = false;
        let mut best = None;
        for lane in &known.lanes {
            let Some(found) = lane.choice() else { continue };
            if !lane.has_place(&found, is_long, self.limits.lane) {
                is_full = true;
                continue;
            }
            let is_tried = tried.iter().any(|tried| Arc::ptr_eq(tried, lane));
            let rank = (is_tried, !found.is_healthy, found.streams);
            if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                best = Some((rank, lane));
            }
        }
        let Some((_, lane)) = best else {
            return Err(if is_full { NoLane::Full } else { self.absence(Some(known)) });
        };
        let load = Arc::clone(&known.load);
        if !load.take(is_long, self.limits.cluster) {
            return Err(NoLane::Full);
        }
        if is_long {
            lane.long.fetch_add(1, Relaxed);
        }
        Ok(Place { lanes: Arc::clone(self), lane: Arc::clone(lane), load, is_long })
    }

    /// Returns whether a cluster has lanes here, of which none takes streams, and one is not ready yet.
    #[must_use]
    pub fn is_opening(&self, cluster: &Id) -> bool {
        let clusters = self.clusters.lock();
        clusters.get(cluster).is_some_and(|known| {
            known.lanes.iter().all(|lane| lane.choice().is_none())
                && known.lanes.iter().any(|lane| lane.handle.get().is_none())
        })
    }

    /// Returns whether a lane here has a place for a request, and a healthy upstream; `None`: there is no lane that takes
    /// streams and was not tried.
    #[must_use]
    pub fn serves_well(&self, cluster: &Id, is_long: bool, tried: &[Arc<Lane>]) -> Option<bool> {
        let clusters = self.clusters.lock();
        let known = clusters.get(cluster)?;
        let is_tried = |lane: &Arc<Lane>| tried.iter().any(|tried| Arc::ptr_eq(tried, lane));
        let lanes = known.lanes.iter().filter(|lane| !is_tried(lane));
        let has_place = known.load.has_place(is_long, self.limits.cluster);
        let serves = |lane: &Arc<Lane>| {
            let found = lane.choice()?;
            let has_place = has_place && lane.has_place(&found, is_long, self.limits.lane);
            Some(found.is_healthy && has_place)
        };
        lanes.filter_map(serves).max()
    }

    /// Ends the stream that is longest without progress, of all lanes, if that is long enough. Returns whether there was
    /// one.
    #[must_use]
    pub fn end_slowest(&self) -> bool {
        let slowest = self
            .all()
            .into_iter()
            .filter_map(|lane| {
                let handle = lane.handle.get()?.clone();
                let (number, at) = handle.slowest()?;
                Some((at, number, handle))
            })
            .min_by_key(|(at, ..)| *at);
        let Some((at, number, handle)) = slowest else { return false };
        if clock::now().since(at) < SLOW_READER {
            return false;
        }
        handle.reset(number, &Reset::new(Code::SlowReader));
        true
    }

    /// Returns all lanes.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Lane>> {
        self.clusters.lock().values().flat_map(|cluster| &cluster.lanes).map(Arc::clone).collect()
    }

    /// Returns the lanes of a cluster, the time and reason of its last loss, and the number of its streams.
    #[must_use]
    pub fn of(&self, cluster: &Id) -> Option<ClusterLanes> {
        let clusters = self.clusters.lock();
        let cluster = clusters.get(cluster)?;
        Some(ClusterLanes {
            lanes: cluster.lanes.clone(),
            lost: cluster.lost,
            streams: cluster.load.streams.load(Relaxed),
        })
    }

    /// Returns whether a cluster has an entry.
    #[must_use]
    pub fn knows(&self, cluster: &Id) -> bool {
        self.clusters.lock().contains_key(cluster)
    }

    /// Returns the clusters that have an entry, in the order of their ids.
    #[must_use]
    pub fn clusters(&self) -> Vec<Id> {
        let mut clusters: Vec<_> = self.clusters.lock().keys().cloned().collect();
        clusters.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
        clusters
    }

    /// Returns the streams of all clusters.
    #[must_use]
    pub fn streams(&self) -> usize {
        let clusters = self.clusters.lock();
        clusters.values().map(|cluster| cluster.load.streams.load(Relaxed)).sum()
    }

    /// Drains all lanes within `within`.
    pub fn drain(&self, within: Micros) {
        for lane in self.all() {
            if let Some(handle) = lane.handle.get() {
                handle.drain(Code::Restarting, within);
            }
            self.changed(&lane.name.cluster);
        }
    }

    /// Tells the listener that a cluster changed.
    pub fn changed(&self, cluster: &Id) {
        if let Some(news) = self.news.get() {
            news(cluster);
        }
    }

    /// Returns the reason for which a cluster has no lane.
    fn absence(&self, cluster: Option<&Cluster>) -> NoLane {
        let lost = cluster.and_then(|cluster| cluster.lost).map_or(self.started, |(at, _)| at);
        let until = lost.max(self.started) + self.limits.reconnect_grace;
        // A lane in its handshake, or one that drains, is no reason to give up.
        let is_opening = cluster.is_some_and(|cluster| !cluster.lanes.is_empty());
        if Instant::now() < until {
            NoLane::Reconnecting((!is_opening).then(|| until.into()))
        } else if is_opening {
            NoLane::Reconnecting(None)
        } else {
            NoLane::Offline
        }
    }

    /// Removes a lane, and the entries of clusters that nothing needs any more.
    fn remove(&self, lane: &Arc<Lane>, reason: &'static str) {
        let mut clusters = self.clusters.lock();
        if let Some(cluster) = clusters.get_mut(&lane.name.cluster) {
            cluster.lanes.retain(|other| !Arc::ptr_eq(other, lane));
            if lane.handle.get().is_some() {
                cluster.lost = Some((Instant::now(), reason));
            }
        }
        let grace = self.limits.reconnect_grace;
        clusters.retain(|_, cluster| {
            let is_remembered = cluster.lost.is_some_and(|(at, _)| at.elapsed() < grace);
            !cluster.lanes.is_empty() || is_remembered || Arc::strong_count(&cluster.load) > 1
        });
        drop(clusters);
        self.changed(&lane.name.cluster);
    }
}

/// Lanes of one cluster.
#[derive(Default)]
pub struct ClusterLanes {
    /// Lanes.
    pub lanes: Vec<Arc<Lane>>,
    /// Time and reason of the last loss.
    pub lost: Option<(Instant, &'static str)>,
    /// Streams.
    pub streams: usize,
}

impl Cluster {
    fn new() -> Self {
        Self { lanes: Vec::new(), load: Arc::default(), lost: None }
    }
}

impl Load {
    fn has_place(&self, is_long: bool, max: usize) -> bool {
        let is_within = |taken: &AtomicUsize, max| taken.load(Relaxed) < max;
        is_within(&self.streams, max) && (!is_long || is_within(&self.long, three_quarters(max)))
    }

    fn take(&self, is_long: bool, max: usize) -> bool {
        let free = |max: usize| move |taken| (taken < max).then_some(taken + 1);
        if self.streams.fetch_update(Relaxed, Relaxed, free(max)).is_err() {
            return false;
        }
        let quota = three_quarters(max);
        if is_long && self.long.fetch_update(Relaxed, Relaxed, free(quota)).is_err() {
            self.streams.fetch_sub(1, Relaxed);
            return false;
        }
        true
    }
}

/// State of a lane, for the choice.
struct Choice {
    is_healthy: bool,
    streams: usize,
    streams_max: usize,
}

impl Lane {
    /// Returns the handle, once the lane is ready.
    #[must_use]
    pub fn handle(&self) -> Option<&LaneHandle> {
        self.handle.get()
    }

    /// Returns whether the agent says nothing else of its upstream than that it is well.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let health = self.handle.get().and_then(|handle| handle.status().health);
        health.is_none_or(|health| health.upstream_ok)
    }

    /// Returns whether the lane has a place for a further stream. `max`: most streams of a lane.
    fn has_place(&self, found: &Choice, is_long: bool, max: usize) -> bool {
        let max = found.streams_max.min(max);
        found.streams < max && (!is_long || self.long.load(Relaxed) < three_quarters(max))
    }

    /// Returns the state of a lane that takes streams.
    fn choice(&self) -> Option<Choice> {
        let handle = self.handle.get()?;
        let status = handle.status();
        let peer = status.peer.as_ref()?;
        if status.is_draining || status.go_away.is_some() || status.end.is_some() {
            return None;
        }
        Some(Choice {
            is_healthy: status.health.as_ref().is_none_or(|health| health.upstream_ok),
            streams: handle.streams(),
            streams_max: peer.hello.streams_max as usize,
        })
    }
}

impl Admission {
    /// Lets the lane take streams, and drains the agent's older ones.
    pub fn ready(&self, handle: LaneHandle) {
        let LaneName { cluster, agent, .. } = &self.lane.name;
        let _ = self.lane.handle.set(handle);
        let others = self.lanes.of(cluster).map(|found| found.lanes).unwrap_or_default();
        for other in others {
            let is_older = other.name.agent == *agent && !Arc::ptr_eq(&other, &self.lane);
            if let Some(handle) = other.handle.get().filter(|_| is_older) {
                handle.drain(Code::Superseded, SUPERSEDED_DRAIN);
            }
        }
        self.lanes.changed(cluster);
    }

    /// Removes the lane, for a reason that operators see.
    pub fn end(mut self, reason: &'static str) {
        self.reason = reason;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.lanes.remove(&self.lane, self.reason);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.streams.fetch_sub(1, Relaxed);
        if self.is_long {
            self.load.long.fetch_sub(1, Relaxed);
            self.lane.long.fetch_sub(1, Relaxed);
        }
        self.lanes.changed(&self.lane.name.cluster);
    }
}

const fn three_quarters(of: usize) -> usize {
    of - of / 4
}

/// Time without progress after which a stream may have to leave for another one.
const SLOW_READER: Micros = Micros(30_000_000);

/// Time that the streams of a lane get once the agent has a newer one.
pub(super) const SUPERSEDED_DRAIN: Micros = Micros(5_000_000);

#[cfg(test)]
mod tests {
    use super::*;

    fn name(agent: &str, boot: u8, number: u64) -> LaneName {
        let id = |text| Id::parse(text).unwrap();
        LaneName { cluster: id("c1"), agent: id(agent), boot: [boot; 16], number }
    }

    fn lanes(reconnect_grace: Duration) -> Arc<Lanes> {
        Lanes::new(Limits { lane: 4, cluster: 8, reconnect_grace })
    }

    #[test]
    fn the_lower_number_of_a_process_is_refused() {
        let lanes = lanes(Duration::ZERO);
        let admit = |agent, boot, number| lanes.admit(name(agent, boot, number));
        let _first = admit("a", 1, 2).unwrap();
        assert!(admit("a", 1, 2).is_err() && admit("a", 1, 1).is_err());
        assert!(admit("a", 1, 3).is_ok() && admit("a", 2, 1).is_ok() && admit("b", 1, 1).is_ok());
    }

    #[test]
    fn entries_of_clusters_go_with_their_last_lane() {
        let lanes = lanes(Duration::ZERO);
        let cluster = Id::parse("c1").unwrap();
        assert_eq!(lanes.choose(&cluster, false, &[]).err(), Some(NoLane::Offline));
        let admission = lanes.admit(name("a", 1, 1)).unwrap();
        assert_eq!(lanes.choose(&cluster, false, &[]).err(), Some(NoLane::Reconnecting(None)));
        assert_eq!(lanes.clusters().len(), 1);
        drop(admission);
        assert!(lanes.clusters().is_empty());
    }

    #[test]
    fn long_streams_take_three_quarters() {
        let load = Load::default();
        let taken = |is_long| (0..9).filter(|_| load.take(is_long, 8)).count();
        assert_eq!((taken(true), taken(false)), (6, 2));
    }
}
