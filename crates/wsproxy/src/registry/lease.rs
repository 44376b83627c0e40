//! The lease of an instance: others know by it that the instance lives. Knows no endpoint family.
//!
//! One task renews the lease and tells those who keep state in Redis ([`Beat`]). Another one looks for
//! instances whose lease has run out and has each [`Family`] remove what they left.

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
    registry::{commands::Commands, lease::keys::LeaseKeys, members::Members, sessions::Leftovers},
    store::StoreError,
    telemetry::counter::Counter,
};

pub(super) mod keys;
pub(super) mod reaper;

/// The lease of this instance. It runs while any family needs it.
pub struct Lease {
    settings: Settings,
    /// `None`: the embedded bus, so there is no other instance.
    keys: Option<LeaseKeys>,
    families: Vec<Box<dyn Family>>,
    beat: watch::Sender<Beat>,
    /// Guards when the lease was taken up without a break, and until when it runs for certain.
    held: Mutex<Option<Held>>,
    namesake: Namesake,
    /// Connections of the event endpoint, which the lease tells.
    connections: AtomicU64,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: LeaseCounters,
}

/// Parameters of a lease.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this instance.
    pub server_id: Arc<str>,
    /// How keys and channels are spelled.
    pub names: Names,
    /// Time within which Redis must answer.
    pub response_timeout: Duration,
    /// Longest time that an instance's leftovers may stay in Redis: the index of instances lives as long.
    pub index_ttl: Duration,
    /// Bounds of the announcements' logs, into which the ends of lost sessions are written.
    pub announcements: super::sessions::Limits,
    /// How fast an instance counts as dead.
    pub pace: Pace,
}

impl Settings {
    /// The parameters of this configuration.
    #[must_use]
    pub fn new(config: &Config, server_id: &Arc<str>, names: &Names) -> Self {
        let announcements = super::sessions::Limits::new(&config.sessions);
        Self {
            server_id: Arc::clone(server_id),
            names: names.clone(),
            response_timeout: config.redis.response_timeout,
            index_ttl: config.events.registry_ttl.max(announcements.ttl),
            announcements,
            pace: Pace::default(),
        }
    }
}

/// How fast an instance counts as dead.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// An instance that was silent for this long is dead.
    pub lease: Duration,
    /// Time between two renewals.
    pub refresh: Duration,
    /// Pause after a failure.
    pub retry: Duration,
    /// Time that a change may wait for others, so that those that cancel each other are never written.
    pub linger: Duration,
}

impl Default for Pace {
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
}

/// The latest renewal, for the parts of an instance that keep state in Redis under the lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Beat {
    /// Renewals so far.
    pub(super) renewals: u64,
    /// How many of them found that the lease had not been held all the time: what this instance has in Redis
    /// may have been removed. The first renewal is one of them.
    pub(super) lapses: u64,
    /// Who held the lease before this renewal.
    pub(super) holder: Holder,
}

/// Who held a lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Holder {
    /// Nobody: the first start, a lease that has run out, or a Redis that lost its data.
    #[default]
    Nobody,
    /// This instance.
    Us,
    /// Another instance, or an earlier run of this one, with the same name.
    Another,
}

/// Tells an instance with the same name from an earlier run whose lease came back: a Redis that was rolled back, or a
/// replica that took over, may hold an old value, but only once. Another instance takes the lease again and again.
#[derive(Debug, Default)]
struct Namesake(AtomicBool);

impl Namesake {
    /// Whether a renewal that found this holder is the second in a row that found another one.
    fn is_alive(&self, holder: Holder) -> bool {
        let is_another = holder == Holder::Another;
        self.0.swap(is_another, Relaxed) && is_another
    }
}

#[derive(Debug, Clone, Copy)]
struct Held {
    since: Instant,
    until: Instant,
}

/// A kind of state that instances keep in Redis under their own names. It cleans up after lost instances,
/// wherever it is switched on or off itself.
pub(super) trait Family: Send + Sync {
    /// Removes what a lost instance left, and says whether nothing is left. Looks at
    /// [`Lost::is_certain`] before every piece of work, since an instance that was only frozen may come
    /// back at any time. May be called again for the same instance.
    fn clean<'a>(&'a self, lost: &'a Lost<'a>) -> BoxFuture<'a, Result<bool, StoreError>>;
    /// Whether nothing of an instance is left.
    fn is_clean<'a>(&'a self, server: &'a str) -> BoxFuture<'a, Result<bool, StoreError>>;
}

/// An instance that is lost, as far as its reaper knows.
pub(super) struct Lost<'a> {
    /// Name of the lost instance.
    pub(super) server: &'a str,
    keys: &'a LeaseKeys,
    /// Counters of the reaper.
    pub(super) counters: &'a LeaseCounters,
    /// End of the claim, with time to spare.
    until: Instant,
}

impl Lost<'_> {
    /// Whether the instance is still dead and this one its only reaper.
    pub(super) async fn is_certain(&self) -> Result<bool, StoreError> {
        Ok(Instant::now() < self.until && !self.keys.is_alive(self.server).await?)
    }
}

impl Lease {
    /// Takes the lease up and renews it in the background, until [`Self::close`].
    #[must_use]
    pub fn start(settings: Settings, bus: &Bus) -> Arc<Self> {
        let mut families: Vec<Box<dyn Family>> = Vec::new();
        let keys = match bus {
            Bus::Memory(_) => None,
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.clone(), settings.response_timeout);
                families.push(Box::new(Members::new(commands.clone(), &settings)));
                families.push(Box::new(Leftovers::new(commands.clone(), &settings)));
                Some(LeaseKeys::new(commands, &settings))
            }
        };
        let lease = Arc::new(Self {
            settings,
            keys,
            families,
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

    /// Follows the renewals, beginning with the latest.
    pub(super) fn beats(&self) -> watch::Receiver<Beat> {
        let mut beats = self.beat.subscribe();
        beats.mark_changed();
        beats
    }

    /// Whether the lease runs for certain. State of an instance whose lease may have run out must not be
    /// written: a reaper may be removing it at this moment.
    pub(super) fn is_held(&self) -> bool {
        self.held.lock().is_some_and(|held| Instant::now() < held.until)
    }

    /// Whether a reaper is at work on what this instance left.
    pub(super) async fn is_claimed(&self) -> Result<bool, StoreError> {
        match &self.keys {
            Some(keys) => keys.is_claimed().await,
            None => Ok(false),
        }
    }

    /// How many connections the lease tells from its next renewal on.
    pub(super) fn tell_connections(&self, connections: usize) {
        self.connections.store(connections as u64, Relaxed);
    }

    /// The parameters of the lease.
    pub(super) const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How fast an instance counts as dead.
    pub(super) const fn pace(&self) -> &Pace {
        &self.settings.pace
    }

    /// Gives the lease up. What keeps state under it must have ended.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let Some(keys) = &self.keys else { return };
        match timeout(FAREWELL, self.release(keys)).await {
            Ok(Ok(())) => debug!("The lease is given up."),
            Ok(Err(error)) => warn!(%error, "The lease cannot be given up; it will run out."),
            Err(_) => warn!("There was no time to give the lease up; it will run out."),
        }
    }

    async fn release(&self, keys: &LeaseKeys) -> Result<(), StoreError> {
        let mut clean = true;
        for family in &self.families {
            clean &= family.is_clean(&self.settings.server_id).await?;
        }
        keys.release(clean).await
    }

    /// Notes a renewal that began at this time.
    fn renewed(&self, holder: Holder, begun: Instant) {
        // The answer to an earlier renewal may have been lost: then the key is ours although the lease had run
        // out before, which only our own clock tells.
        let unbroken = *self.held.lock();
        let unbroken = unbroken.filter(|held| holder == Holder::Us && begun < held.until);
        let lapsed = unbroken.is_none();
        let before = *self.beat.borrow();
        let server_id = &*self.settings.server_id;
        if before.renewals > 0 {
            if self.namesake.is_alive(holder) {
                error!(server_id, "Another instance has the same SERVER_ID.");
            } else if lapsed {
                info!(server_id, "The lease was lost and is taken up again.");
            }
        }
        self.beat.send_replace(Beat {
            renewals: before.renewals + 1,
            lapses: before.lapses + u64::from(lapsed),
            holder,
        });
        // Last: a writer that sees the lease held also sees the lapse before it.
        let since = unbroken.map_or(begun, |held| held.since);
        let until = begun + self.settings.pace.lease;
        *self.held.lock() = Some(Held { since, until });
    }

    /// Whether this instance may say that others are dead: it has kept its own lease for the length of one.
    /// After an outage of Redis all leases have run out, and the first instance that is back must not bury
    /// all others.
    fn may_judge(&self) -> bool {
        let (now, lease) = (Instant::now(), self.settings.pace.lease);
        self.held.lock().is_some_and(|held| now < held.until && now >= held.since + lease)
    }
}

/// Renews the lease until it is closed.
async fn keep(lease: Arc<Lease>) {
    let Some(keys) = &lease.keys else { return };
    let pace = lease.settings.pace;
    let (mut due, mut linked) = (Instant::now(), true);
    loop {
        tokio::select! {
            () = lease.closing.cancelled() => return,
            () = sleep_until(due) => {}
        }
        // From the beginning: the lease counts from when Redis does it.
        let begun = Instant::now();
        let renewal = tokio::select! {
            () = lease.closing.cancelled() => return,
            renewal = keys.renew(lease.connections.load(Relaxed)) => renewal,
        };
        match renewal {
            Ok(holder) => {
                linked = true;
                due = begun + pace.refresh;
                lease.renewed(holder, begun);
            }
            Err(error) => {
                lease.counters.failures.add(1);
                if std::mem::replace(&mut linked, false) {
                    warn!(%error, "The lease cannot be renewed now; it is tried again.");
                }
                due = Instant::now() + pace.retry;
            }
        }
    }
}

/// Time that Redis gets at the end.
const FAREWELL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rolled_back_lease_is_no_namesake() {
        let namesake = Namesake::default();
        let seen = [Holder::Another, Holder::Us, Holder::Another, Holder::Nobody, Holder::Us];
        assert!(!seen.into_iter().any(|holder| namesake.is_alive(holder)));
        let seen = [Holder::Another; 3].map(|holder| namesake.is_alive(holder));
        assert_eq!(seen, [false, true, true]);
    }
}
