//! The lanes of this instance, and the changes that the shared registry does not have yet; without IO.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;
use wsproxy_proto::names::{Id, Names};

use crate::registry::{
    changes::Changes,
    tunnel::{AnnouncedLane, LaneEvent, LaneRecord, OpeningLane, Successor},
};

/// The state that the registry should have of this instance.
///
/// Invariant: of each agent id at most one lane, the newest that is known. `changes` names lanes that are here, and lanes
/// that are not but that Redis may know of. Both are bounded by the connections that an instance may hold.
pub(super) struct LocalLanes {
    /// Lanes by cluster and agent, so that a walk can go on where it stopped.
    lanes: BTreeMap<Arc<str>, Lane>,
    pub(super) changes: Changes<Arc<str>>,
    /// Number of the lane that came last.
    last_id: u64,
    /// The lane whose cluster was renewed last.
    renewed: Arc<str>,
    /// The last registration without a shared registry.
    registration: u64,
    /// Lanes that gave way to a newer lane of their agent id.
    pub(super) superseded: u64,
}

struct Lane {
    id: u64,
    opening: OpeningLane,
    draining: bool,
    /// Registration of the entry; `None`: it was never written.
    registration: Option<u64>,
    /// Set once Redis may have an entry.
    known: bool,
    /// Registration of the newest lane of another process that was announced before this lane had its own.
    rival: Option<u64>,
    standing: watch::Sender<Standing>,
}

/// Progress of a lane's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// No attempt has ended yet.
    Waiting,
    /// The last attempt had no answer.
    Failed,
    /// The registry has the lane.
    Entered,
    /// A newer lane has the entry.
    Superseded(Successor),
    /// The cluster has too many agents.
    Full,
    /// Redis refuses the entry, for this reason.
    Refused(Arc<str>),
}

/// A change on its way to Redis.
pub(super) struct Write {
    pub(super) key: Arc<str>,
    /// The lane; `None`: there is none here any more.
    pub(super) entry: Option<Entry>,
}

/// An entry that Redis should have.
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) opening: OpeningLane,
    pub(super) draining: bool,
    pub(super) registration: Option<u64>,
}

/// Answer of Redis to an entry.
#[derive(Debug, Clone)]
pub(super) enum Entered {
    /// Done, with this registration.
    Yes(u64),
    /// A newer lane has the entry.
    Superseded(Successor),
    /// The cluster has too many agents.
    Full,
    /// The key cannot be written.
    Refused(Arc<str>),
}

impl LocalLanes {
    pub(super) fn new(shared: bool) -> Self {
        Self {
            lanes: BTreeMap::new(),
            changes: Changes::new(shared),
            last_id: 0,
            renewed: "".into(),
            registration: 0,
            superseded: 0,
        }
    }

    /// Adds a lane in place of an older one, which is told. Returns the lane's key and number, and its standing; `None`: a
    /// newer connection of the same process is here.
    pub(super) fn join(
        &mut self,
        opening: OpeningLane,
    ) -> Option<(Arc<str>, u64, watch::Receiver<Standing>)> {
        let key: Arc<str> = Names::tunnel_lane(&opening.cluster, &opening.agent).into();
        // A removal that waits is of an entry that Redis has.
        let mut known = self.changes.contains(&key);
        if let Some(before) = self.lanes.get(&key) {
            let is_same = before.opening.boot_id == opening.boot_id;
            if is_same && before.opening.number > opening.number {
                return None;
            }
            let by = if is_same { Successor::SameProcess } else { Successor::OtherProcess };
            before.standing.send_replace(Standing::Superseded(by));
            self.superseded += 1;
            known = before.known;
        }
        self.last_id += 1;
        let (id, (standing, seen)) = (self.last_id, watch::channel(Standing::Waiting));
        let (draining, registration, rival) = (false, None, None);
        let lane = Lane { id, opening, draining, registration, known, rival, standing };
        self.lanes.insert(Arc::clone(&key), lane);
        self.changes.put(Arc::clone(&key), ());
        Some((key, id, seen))
    }

    /// Enters a lane where there is no shared registry. Returns its announcement.
    pub(super) fn enter_here(
        &mut self,
        server: &str,
        key: &str,
        id: u64,
    ) -> Option<(LaneEvent, AnnouncedLane)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.registration = (self.registration + 1).max(now.as_micros() as u64);
        self.entered(key, id, Entered::Yes(self.registration));
        Some((LaneEvent::Connected, self.announced(server, key, id)?))
    }

    /// Notes that a lane takes no further stream. Returns whether that is new.
    pub(super) fn drain(&mut self, key: &Arc<str>, id: u64) -> bool {
        let lane = self.lanes.get_mut(key).filter(|lane| lane.id == id && !lane.draining);
        let Some(lane) = lane else { return false };
        lane.draining = true;
        self.changes.put(Arc::clone(key), ());
        true
    }

    /// Removes a lane, and returns whether there is something to write.
    pub(super) fn leave(&mut self, key: &Arc<str>, id: u64) -> bool {
        let Some(lane) = self.lanes.get(key).filter(|lane| lane.id == id) else { return false };
        let known = lane.known;
        self.lanes.remove(key);
        if known {
            return self.changes.put(Arc::clone(key), ());
        }
        self.changes.cancel(key);
        false
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    /// Returns whether a lane is here.
    pub(super) fn has(&self, key: &str) -> bool {
        self.lanes.contains_key(key)
    }

    /// Takes at most `count` changes, which Redis may have from now on.
    pub(super) fn take(&mut self, count: usize) -> Vec<Write> {
        let write = |(key, ()): (Arc<str>, ())| {
            let entry = self.lanes.get_mut(&key).map(|lane| {
                lane.known = true;
                Entry {
                    id: lane.id,
                    opening: lane.opening.clone(),
                    draining: lane.draining,
                    registration: lane.registration,
                }
            });
            Write { key, entry }
        };
        self.changes.take(count).into_iter().map(write).collect()
    }

    /// Notes the answer to an entry.
    pub(super) fn entered(&mut self, key: &str, id: u64, entered: Entered) {
        let Some(lane) = self.lanes.get_mut(key).filter(|lane| lane.id == id) else { return };
        let is_first = lane.registration.is_none();
        match entered {
            Entered::Yes(registration) => {
                lane.registration = Some(registration);
                if lane.rival.is_some_and(|rival| rival > registration) {
                    return self.give_way(key, Standing::Superseded(Successor::OtherProcess));
                }
                lane.standing.send_if_modified(|standing| {
                    let is_new = *standing != Standing::Entered;
                    *standing = Standing::Entered;
                    is_new
                });
            }
            Entered::Superseded(by) => self.give_way(key, Standing::Superseded(by)),
            // A lane that had an entry goes on without one.
            Entered::Full | Entered::Refused(_) if !is_first => {}
            Entered::Full => self.give_way(key, Standing::Full),
            Entered::Refused(why) => self.give_way(key, Standing::Refused(why)),
        }
    }

    /// Notes a lane of any instance. Returns whether a lane here gives way to it.
    pub(super) fn observe(
        &mut self,
        server: &str,
        cluster: &Id,
        agent: &Id,
        seen: &LaneRecord,
    ) -> bool {
        let key = Names::tunnel_lane(cluster, agent);
        let Some(lane) = self.lanes.get_mut(&*key) else { return false };
        let OpeningLane { boot_id, number, .. } = &lane.opening;
        let by = if *seen.boot_id != *boot_id.as_str() {
            let Some(registration) = lane.registration else {
                lane.rival = lane.rival.max(Some(seen.registration));
                return false;
            };
            if seen.registration <= registration || *seen.server_id == *server {
                return false;
            }
            Successor::OtherProcess
        } else if seen.number > *number && *seen.server_id != *server {
            Successor::SameProcess
        } else {
            return false;
        };
        self.give_way(&key, Standing::Superseded(by));
        true
    }

    /// Removes a lane that has no entry any more. Its own field leaves Redis; the newer lane's entry stays.
    fn give_way(&mut self, key: &str, standing: Standing) {
        let Some((key, lane)) = self.lanes.remove_entry(key) else { return };
        self.superseded += u64::from(matches!(standing, Standing::Superseded(_)));
        lane.standing.send_replace(standing);
        if lane.known {
            self.changes.put(key, ());
        } else {
            self.changes.cancel(&key);
        }
    }

    /// Puts back changes that may or may not have been written.
    pub(super) fn give_back(&mut self, writes: impl Iterator<Item = Write>) {
        let lanes = &self.lanes;
        let failed = |write: Write| {
            if let Some(lane) = lanes.get(&write.key) {
                lane.standing.send_if_modified(|standing| {
                    let is_first = *standing == Standing::Waiting;
                    if is_first {
                        *standing = Standing::Failed;
                    }
                    is_first
                });
            }
            (write.key, ())
        };
        self.changes.give_back(writes.map(failed));
    }

    /// Marks every lane to be written again, since Redis has lost its data.
    pub(super) fn rewrite_all(&mut self) {
        for key in self.lanes.keys() {
            self.changes.put(Arc::clone(key), ());
        }
    }

    /// Marks the lanes of a cluster to be written again.
    pub(super) fn rewrite(&mut self, cluster: &Id) {
        let start = format!("{cluster}/");
        let from = (Bound::Included(&*start), Bound::Unbounded);
        for (key, _) in self.lanes.range::<str, _>(from) {
            if !key.starts_with(&start) {
                break;
            }
            self.changes.put(Arc::clone(key), ());
        }
    }

    /// Marks entries for removal that Redis has under this instance's name without a lane here.
    pub(super) fn remove_strays(&mut self, keys: impl Iterator<Item = Arc<str>>) {
        for key in keys {
            self.changes.put(key, ());
        }
    }

    /// Returns the clusters with a lane here, each once.
    pub(super) fn clusters(&self) -> Vec<Id> {
        let mut clusters: Vec<_> =
            self.lanes.values().map(|lane| lane.opening.cluster.clone()).collect();
        clusters.dedup();
        clusters
    }

    /// Returns the next clusters, in turn, whose keys are to be kept from expiring: all of them in [`ROUND`] calls.
    pub(super) fn clusters_to_renew(&mut self) -> Vec<Id> {
        let count = self.lanes.len().div_ceil(ROUND);
        let from = (Bound::Excluded(&*self.renewed), Bound::Unbounded);
        let (mut last, mut clusters) = (None, Vec::new());
        for (key, lane) in self.lanes.range::<str, _>(from).take(count) {
            clusters.push(lane.opening.cluster.clone());
            last = Some(Arc::clone(key));
        }
        // The walk begins again at its end.
        self.renewed = last.unwrap_or_else(|| "".into());
        clusters.dedup();
        clusters
    }

    /// Returns a lane as announcements name it.
    pub(super) fn announced(&self, server: &str, key: &str, id: u64) -> Option<AnnouncedLane> {
        let lane = self.lanes.get(key).filter(|lane| lane.id == id)?;
        let OpeningLane { cluster, agent, boot_id, number, capabilities } = &lane.opening;
        let record = LaneRecord {
            server_id: server.into(),
            peer: None,
            boot_id: boot_id.as_str().into(),
            number: *number,
            capabilities: *capabilities,
            draining: lane.draining,
            registration: lane.registration.unwrap_or_default(),
        };
        let (cluster_id, agent_id) = (cluster.as_str().into(), agent.as_str().into());
        Some(AnnouncedLane { cluster_id, agent_id, record })
    }
}

/// Renewals in which the keys of all clusters are renewed once: some ten minutes, of the hour that keys live.
const ROUND: usize = 120;
