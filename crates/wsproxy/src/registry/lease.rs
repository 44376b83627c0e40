//! The lease of an instance, which shows other instances that it lives. Knows no endpoint family.
//!
//! One task renews the lease and tells the parts that keep state in Redis ([`Beat`]). Another task looks for
//! instances whose lease has run out and has their [`LeasedState`] removed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error, info, warn};
use wsproxy_proto::names::Names;

use crate::{
    bus::Bus,
    config::Config,
    registry::{
        agents::{
            AgentEnds,
            leftovers::{AgentLeftovers, Told},
        },
        commands::Commands,
        lease::keys::LeaseKeys,
        members::RegistryMembers,
        rooms::leftovers::RoomLeftovers,
        sessions::Leftovers,
        tunnel::leftovers::LaneLeftovers,
    },
    store::command::StoreError,
    telemetry::counter::Counter,
};

pub(super) mod keys;
pub(super) mod reaper;

/// The lease of this instance, held while any part of the instance needs it.
pub struct Lease {
    settings: LeaseSettings,
    /// The keys in Redis; `None`: the embedded bus, so there is no other instance.
    keys: Option<LeaseKeys>,
    leased: Vec<Box<dyn LeasedState>>,
    /// Part of this instance that is told of lost agents.
    agent_ends: Told,
    beat: watch::Sender<Beat>,
    /// Guards the time since which the lease is held without a break, and the time until which it certainly runs.
    held: Mutex<Option<LeaseTerm>>,
    namesake: Namesake,
    /// Number of connections of the event endpoint, which the lease's value tells.
    connections: AtomicU64,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: LeaseCounters,
}

/// Parameters of a lease.
#[derive(Debug, Clone)]
pub struct LeaseSettings {
    /// Name of this instance.
    pub server_id: Arc<str>,
    /// Spelling of keys and channels.
    pub names: Names,
    /// Time within which Redis must answer.
    pub response_timeout: Duration,
    /// Longest time that an instance's leftovers stay in Redis; the index of instances lives as long.
    pub index_ttl: Duration,
    /// Bounds of the announcements' logs, into which the ends of lost sessions are written.
    pub announcements: super::sessions::SessionLogLimits,
    /// Time for which the generation of a released agent's place stays.
    pub offline_wait: Duration,
    /// Time for which the keys of a room without members stay.
    pub empty_room_ttl: Duration,
    /// Returns the durations of the lease.
    pub timing: Timing,
}

impl LeaseSettings {
    /// Returns the parameters of a configuration.
    #[must_use]
    pub fn new(config: &Config, server_id: &Arc<str>, names: &Names) -> Self {
        let announcements = super::sessions::SessionLogLimits::new(&config.sessions);
        Self {
            server_id: Arc::clone(server_id),
            names: names.clone(),
            response_timeout: config.redis.response_timeout,
            index_ttl: config.events.registry_ttl.max(announcements.ttl),
            announcements,
            offline_wait: config.agents.offline_wait,
            empty_room_ttl: config.rooms.empty_ttl,
            timing: Timing::default(),
        }
    }
}

/// Durations of a lease: together they say when an instance counts as dead.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Length of a lease: an instance that was silent for this long is dead.
    pub lease: Duration,
    /// Time between two renewals.
    pub refresh: Duration,
    /// Pause after a failure.
    pub retry: Duration,
    /// Time that a change waits for others: changes that cancel each other are never written.
    pub linger: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            refresh: Duration::from_secs(5),
            retry: Duration::from_secs(1),
            linger: Duration::from_millis(20),
        }
    }
}

/// Counters of a lease and its reaper.
#[derive(Debug, Default)]
pub struct LeaseCounters {
    /// Renewals that Redis refused or did not answer.
    pub failures: Counter,
    /// Lost instances that this one removed.
    pub servers_reaped: Counter,
    /// Connections of lost instances that this one removed.
    pub connections_reaped: Counter,
    /// Sessions of lost instances whose end this one announced.
    pub sessions_reaped: Counter,
    /// Agents of lost instances whose places this one released.
    pub agents_reaped: Counter,
    /// Members of lost instances that this one took out of their rooms.
    pub room_members_reaped: Counter,
    /// Lanes of lost instances that this one removed.
    pub lanes_reaped: Counter,
}

/// The latest renewal, for the parts of an instance that keep state in Redis under the lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Beat {
    /// Renewals so far.
    pub(super) renewals: u64,
    /// Renewals that found a break in the lease: the instance's state in Redis may have been removed. The first
    /// renewal is one of them.
    pub(super) lapses: u64,
    /// Lapses of which this instance's own clock shows that the lease ran out: the instance was frozen, or had no Redis
    /// for so long. Others may have taken it for dead.
    pub(super) expired: u64,
    /// Holder of the lease before this renewal.
    pub(super) holder: Holder,
}

/// Holder of a lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Holder {
    /// No instance: the first start, a lease that has run out, or a Redis that lost its data.
    #[default]
    None,
    /// This instance.
    Us,
    /// Another instance, or an earlier run of this one, with the same name.
    Other,
}

/// Tells another instance with the same name from an old value of the lease. A Redis that was rolled back, or a
/// replica that took over, has an old value once; another instance takes the lease again and again.
#[derive(Debug, Default)]
struct Namesake(AtomicBool);

impl Namesake {
    /// Notes the holder that a renewal found; returns whether two renewals in a row found another one.
    fn is_alive(&self, holder: Holder) -> bool {
        let is_another = holder == Holder::Other;
        self.0.swap(is_another, Relaxed) && is_another
    }
}

#[derive(Debug, Clone, Copy)]
struct LeaseTerm {
    since: Instant,
    until: Instant,
}

/// A kind of state that instances keep in Redis under their own names. Every instance removes the state of lost
/// instances, even kinds that it does not keep itself.
pub(super) trait LeasedState: Send + Sync {
    /// Removes the state of a lost instance, and returns whether all of it is gone. Checks
    /// [`LostInstance::is_certain`] before every piece of work, since a frozen instance may come back at any time. May
    /// be called again for the same instance.
    fn clean<'a>(&'a self, lost: &'a LostInstance<'a>) -> BoxFuture<'a, Result<bool, StoreError>>;
    /// Returns whether no state of an instance is left.
    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>>;
}

/// An instance that is lost, as far as its reaper knows.
pub(super) struct LostInstance<'a> {
    /// Name of the lost instance.
    pub(super) server: &'a str,
    keys: &'a LeaseKeys,
    /// Counters of the reaper.
    pub(super) counters: &'a LeaseCounters,
    /// Time until which the claim is used, before its end.
    until: Instant,
}

impl LostInstance<'_> {
    /// Returns whether the instance is still dead and this one its only reaper.
    pub(super) async fn is_certain(&self) -> Result<bool, StoreError> {
        Ok(Instant::now() < self.until && !self.keys.is_alive(self.server).await?)
    }
}

impl Lease {
    /// Takes the lease and renews it in the background, until [`Self::close`].
    #[must_use]
    pub fn start(settings: LeaseSettings, bus: &Bus) -> Arc<Self> {
        let mut leased: Vec<Box<dyn LeasedState>> = Vec::new();
        let agent_ends = Told::default();
        let keys = match bus {
            Bus::Embedded(_) => None,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                leased.push(Box::new(RegistryMembers::new(commands.clone(), &settings)));
                leased.push(Box::new(Leftovers::new(commands.clone(), &settings)));
                let told = agent_ends.clone();
                leased.push(Box::new(AgentLeftovers::new(commands.clone(), &settings, told)));
                leased.push(Box::new(RoomLeftovers::new(commands.clone(), &settings)));
                leased.push(Box::new(LaneLeftovers::new(commands.clone(), &settings)));
                Some(LeaseKeys::new(commands, &settings))
            }
        };
        let lease = Arc::new(Self {
            settings,
            keys,
            leased,
            agent_ends,
            beat: watch::Sender::default(),
            held: Mutex::default(),
            namesake: Namesake::default(),
            connections: AtomicU64::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: LeaseCounters::default(),
        });
        if lease.keys.is_some() {
            lease.tasks.spawn(keep(Arc::clone(&lease)));
            lease.tasks.spawn(reaper::run(Arc::clone(&lease)));
        }
        lease
    }

    /// Returns a receiver of renewals, beginning with the latest.
    pub(super) fn beats(&self) -> watch::Receiver<Beat> {
        let mut beats = self.beat.subscribe();
        beats.mark_changed();
        beats
    }

    /// Returns whether the lease certainly runs. Otherwise this instance must not write its state: a reaper may be
    /// removing it at this moment.
    pub(super) fn is_held(&self) -> bool {
        self.held.lock().is_some_and(|held| Instant::now() < held.until)
    }

    /// Returns whether a reaper is removing the state of this instance.
    pub(super) async fn is_claimed(&self) -> Result<bool, StoreError> {
        match &self.keys {
            Some(keys) => keys.is_claimed().await,
            None => Ok(false),
        }
    }

    /// Tells `told` from now on of agents whose instances this one removes. A second call has no effect.
    pub(super) fn tell_agent_ends(&self, told: Arc<dyn AgentEnds>) {
        self.agent_ends.set(told);
    }

    /// Returns the part that is told of lost agents.
    pub(super) fn agent_ends(&self) -> Told {
        self.agent_ends.clone()
    }

    /// Sets the number of connections that the lease tells from its next renewal on.
    pub(super) fn tell_connections(&self, connections: usize) {
        self.connections.store(connections as u64, Relaxed);
    }

    /// Returns the parameters of the lease.
    pub(super) const fn settings(&self) -> &LeaseSettings {
        &self.settings
    }

    /// Returns the durations of the lease.
    pub(super) const fn timing(&self) -> &Timing {
        &self.settings.timing
    }

    /// Releases the lease. All parts that keep state under it must have ended.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let Some(keys) = &self.keys else { return };
        match timeout(RELEASE_TIMEOUT, self.release(keys)).await {
            Ok(Ok(())) => debug!("The lease is released."),
            Ok(Err(error)) => warn!(%error, "The lease cannot be released; it will run out."),
            Err(_) => warn!("There was no time to release the lease; it will run out."),
        }
    }

    async fn release(&self, keys: &LeaseKeys) -> Result<(), StoreError> {
        let mut clean = true;
        for state in &self.leased {
            clean &= state.is_clean(&self.settings.server_id).await?;
        }
        keys.release(clean).await
    }

    /// Notes a renewal that began at this time.
    fn renewed(&self, holder: Holder, begun: Instant) {
        // The answer to an earlier renewal may have been lost: then the key is ours although the lease ran out in
        // between, which only our own clock shows. Redis may have renewed the lease as late as now.
        let (held, now) = (*self.held.lock(), Instant::now());
        let unbroken = held.filter(|held| holder == Holder::Us && now < held.until);
        let lapsed = unbroken.is_none();
        let expired = held.is_some_and(|held| now >= held.until);
        let before = *self.beat.borrow();
        let server_id = &*self.settings.server_id;
        if before.renewals > 0 {
            if self.namesake.is_alive(holder) {
                error!(server_id, "Another instance has the same SERVER_ID.");
            } else if lapsed {
                info!(server_id, "The lease was lost and is taken again.");
            }
        }
        self.beat.send_replace(Beat {
            renewals: before.renewals + 1,
            lapses: before.lapses + u64::from(lapsed),
            expired: before.expired + u64::from(expired),
            holder,
        });
        // Set last, so that a writer that sees the lease held also sees the lapse before it.
        let since = unbroken.map_or(begun, |held| held.since);
        let until = begun + self.settings.timing.lease;
        *self.held.lock() = Some(LeaseTerm { since, until });
    }

    /// Returns whether this instance may remove others: it has held its own lease for the length of one. After an
    /// outage of Redis all leases have run out, and the first instance that is back must not remove all others.
    pub(super) fn may_judge(&self) -> bool {
        let (now, lease) = (Instant::now(), self.settings.timing.lease);
        self.held.lock().is_some_and(|held| now < held.until && now >= held.since + lease)
    }
}

/// Renews the lease until it is closed.
async fn keep(lease: Arc<Lease>) {
    let Some(keys) = &lease.keys else { return };
    let timing = lease.settings.timing;
    let (mut due, mut linked) = (Instant::now(), true);
    loop {
        tokio::select! {
            () = lease.closing.cancelled() => return,
            () = sleep_until(due) => {}
        }
        // Measured from before the request: Redis may have renewed the lease at any time since.
        let begun = Instant::now();
        let renewal = tokio::select! {
            () = lease.closing.cancelled() => return,
            renewal = keys.renew(lease.connections.load(Relaxed)) => renewal,
        };
        match renewal {
            Ok(holder) => {
                linked = true;
                due = begun + timing.refresh;
                lease.renewed(holder, begun);
            }
            Err(error) => {
                lease.counters.failures.add(1);
                if std::mem::replace(&mut linked, false) {
                    warn!(%error, "The lease cannot be renewed now; it is tried again.");
                }
                due = Instant::now() + timing.retry;
            }
        }
    }
}

/// Shortest time to live of the hashes that name an instance's entries: an outage of all instances may last as long, and
/// the first one that is back still finds the entries of the others.
pub(super) const HASH_TTL_MIN: Duration = Duration::from_secs(3600);

/// Time for the release of the lease at the end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rolled_back_lease_is_no_namesake() {
        let namesake = Namesake::default();
        let seen = [Holder::Other, Holder::Us, Holder::Other, Holder::None, Holder::Us];
        assert!(!seen.into_iter().any(|holder| namesake.is_alive(holder)));
        let seen = [Holder::Other; 3].map(|holder| namesake.is_alive(holder));
        assert_eq!(seen, [false, true, true]);
    }
}
