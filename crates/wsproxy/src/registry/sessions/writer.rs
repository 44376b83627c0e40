//! The one task that writes announcements into logs, and keeps the hash of open sessions equal to this instance.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use hashbrown::{HashMap, HashSet};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::{
    bus::publish::{Keep, Publish},
    embedded::store::EmbeddedStore,
    hub::Hub,
    registry::{
        commands::SCAN_START,
        lease::{Beat, Holder},
        sessions::{
            SessionLog, SessionLogBackend, SessionRecord,
            keys::SessionKeys,
            leftovers::announce_lost,
            outbox::{Item, What},
        },
    },
    store::command::StoreError,
};

/// Runs until the log is closed, and then writes the announcements that still wait.
pub(super) async fn run(log: Arc<SessionLog>) {
    let mut writer = SessionLogWriter {
        log: &log,
        beats: log.lease.beats(),
        wait_until: None,
        lapses: 0,
        connections_made: 0,
        check: false,
        reconcile_at: None,
        settle: HashMap::new(),
        linked: true,
        complained: None,
    };
    writer.work().await;
    if timeout(RELEASE_TIMEOUT, writer.release()).await.is_err() {
        let bytes = log.waiting_bytes();
        warn!(
            bytes,
            "There was no time to write all announcements; another instance announces the ends."
        );
    }
}

struct SessionLogWriter<'a> {
    log: &'a SessionLog,
    beats: watch::Receiver<Beat>,
    /// Pause after the store did not answer, or while a reaper is at work.
    wait_until: Option<Instant>,
    /// Lapses of the lease, and connections to Redis, up to which the hash was compared.
    lapses: u64,
    connections_made: u64,
    /// Set after a renewal of the lease: the hash's time to live is to be renewed and its entries counted.
    check: bool,
    /// Time of the next comparison of the hash with the open sessions.
    reconcile_at: Option<Instant>,
    /// Changes of the hash for announcements that are in a log already.
    settle: HashMap<Uuid, Settlement>,
    linked: bool,
    complained: Option<Instant>,
}

/// A change of the hash after an append to a log.
struct Settlement {
    /// The new value of the field; `None`: the field is removed.
    value: Option<Bytes>,
    /// Number of connections to Redis before the append.
    connections_made: u64,
}

impl SessionLogWriter<'_> {
    async fn work(&mut self) {
        let log = self.log;
        while !log.closing.is_cancelled() {
            if self.turn_noted().await {
                continue;
            }
            let next = self.next_turn();
            tokio::select! {
                () = log.closing.cancelled() => return,
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                beat = self.beats.changed() => match beat {
                    // Redis answered the lease, so there is nothing to wait for.
                    Ok(()) => (self.check, self.wait_until) = (true, None),
                    Err(_) => return,
                },
                // Wait `linger`, so that a burst becomes a few writes.
                () = log.changed.notified(), if self.wait_until.is_none() => {
                    sleep(log.lease.timing().linger).await;
                }
            }
        }
    }

    async fn release(&mut self) {
        let pause = self.log.lease.timing().retry.min(Duration::from_millis(100));
        self.log.outbox.lock().wake_all();
        while !self.log.is_written() || !self.settle.is_empty() {
            if !self.turn_noted().await {
                sleep(pause).await;
                self.log.outbox.lock().wake_all();
            }
        }
    }

    /// Does one turn, and returns whether there may be more to do at once.
    async fn turn_noted(&mut self) -> bool {
        match self.turn().await {
            Ok(more) => {
                self.linked |= more;
                more
            }
            Err(error) => {
                if std::mem::replace(&mut self.linked, false) {
                    warn!(%error, "Announcements of sessions cannot be written now; they are tried again.");
                }
                self.wait_until = Some(Instant::now() + self.log.lease.timing().retry);
                false
            }
        }
    }

    fn next_turn(&self) -> Option<Instant> {
        if self.wait_until.is_some() {
            return self.wait_until;
        }
        let rest = self.log.outbox.lock().next_due();
        [rest, self.reconcile_at].into_iter().flatten().min()
    }

    async fn turn(&mut self) -> Result<bool, StoreError> {
        let log = self.log;
        if self.wait_until.is_some_and(|until| Instant::now() < until) {
            return Ok(false);
        }
        self.wait_until = None;
        let keys = match &log.backend {
            SessionLogBackend::Embedded(store, hub) => return Ok(self.write_here(store, hub)),
            SessionLogBackend::Redis(keys) => keys,
        };
        // A reaper may be changing the hash if the lease has run out. The next renewal wakes this task.
        if !log.lease.is_held() {
            self.wait_until = Some(Instant::now() + log.lease.timing().retry);
            return Ok(false);
        }
        self.check |= self.beats.has_changed().unwrap_or(false);
        self.settle(keys).await?;
        if self.check {
            self.compare_count(keys).await?;
            self.check = false;
        }
        if self.reconcile_at.is_some_and(|at| Instant::now() >= at) && !self.reconcile(keys).await?
        {
            self.wait_until = Some(Instant::now() + log.lease.timing().retry);
            return Ok(false);
        }
        let batch = log.outbox.lock().take(BATCH, Instant::now());
        match batch.is_empty() {
            true => Ok(false),
            false => self.write(keys, batch).await.map(|()| true),
        }
    }

    /// Changes the hash for announcements that are in the logs.
    async fn settle(&mut self, keys: &SessionKeys) -> Result<(), StoreError> {
        if self.settle.is_empty() {
            return Ok(());
        }
        let entered: Vec<_> = self
            .settle
            .iter()
            .filter_map(|(connection, change)| Some((*connection, change.value.clone()?)))
            .collect();
        let left = self.settle.iter().filter(|(_, change)| change.value.is_none());
        keys.change(&self.log.server_id, entered.into_iter(), left.map(|(id, _)| *id)).await?;
        let connections_made = keys.connections_made();
        // A new connection may lead to another Redis, whose hash is marked now without the announcement in its log.
        let unproven: HashSet<_> = self
            .settle
            .drain()
            .filter(|(_, change)| {
                change.value.is_some() && change.connections_made != connections_made
            })
            .map(|(connection, _)| connection)
            .collect();
        if !unproven.is_empty() {
            let again = self.log.outbox.lock().announce_again(&unproven);
            self.log.counters.reopened.add(again as u64);
        }
        Ok(())
    }

    /// Looks for signs that the hash differs from the open sessions.
    async fn compare_count(&mut self, keys: &SessionKeys) -> Result<(), StoreError> {
        let beat = *self.beats.borrow_and_update();
        let (idle, open, overflow) = {
            let mut outbox = self.log.outbox.lock();
            (outbox.is_idle(), outbox.open_count(), outbox.take_overflow())
        };
        let connections_made = keys.connections_made();
        let entries = keys.keep(&self.log.server_id).await?;
        let differs = idle && entries != open as u64;
        let changed = beat.lapses > self.lapses || connections_made != self.connections_made;
        if differs && !changed {
            warn!(entries, open, "Redis has lost or kept sessions: they are compared.");
        }
        (self.lapses, self.connections_made) = (beat.lapses, connections_made);
        if differs || changed || overflow {
            self.reconcile_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Compares the hash with the open sessions. Sessions that only Redis has are announced as lost, open ones that
    /// Redis does not have are announced again. Returns `false` while a reaper is at work.
    async fn reconcile(&mut self, keys: &SessionKeys) -> Result<bool, StoreError> {
        let log = self.log;
        let beat = *self.beats.borrow();
        if beat.holder == Holder::Other {
            // Another run with our name may still be alive, and its sessions are not lost. The next renewal
            // shows it. New announcements do not wait for that.
            self.reconcile_at = Some(Instant::now() + log.lease.timing().refresh);
            return Ok(true);
        }
        if log.lease.is_claimed().await? {
            return Ok(false);
        }
        let mut missing = log.outbox.lock().announced();
        let reaped = keys.is_reaped(&log.server_id).await?;
        let mut refused = None;
        let mut cursor = SCAN_START;
        loop {
            let (next, entries) = keys.scan(&log.server_id, &cursor).await?;
            let strays = self.strays(entries, |connection| {
                // A reaper may have announced any open session as closed: all are announced again.
                if !reaped {
                    missing.remove(&connection);
                }
            });
            if !strays.is_empty() {
                let announced = announce_lost(keys, &log.server_id, strays).await?;
                log.counters.lost.add(announced.count);
                info!(
                    sessions = announced.count,
                    "Sessions that are gone were announced as closed."
                );
                refused = refused.or(announced.refused);
            }
            if next == SCAN_START {
                break;
            }
            cursor = next;
        }
        let again = log.outbox.lock().announce_again(&missing);
        if again > 0 {
            log.counters.reopened.add(again as u64);
            info!(sessions = again, "Open sessions are announced again.");
        }
        if reaped {
            keys.clear_reaped(&log.server_id).await?;
        }
        self.reconcile_at = refused.map(|error| {
            self.complain(&error);
            Instant::now() + log.lease.timing().refresh
        });
        Ok(true)
    }

    /// Returns the entries whose session is not open here. Calls `found` for open ones that are marked as announced.
    fn strays(
        &self,
        entries: Vec<(Bytes, Bytes)>,
        mut found: impl FnMut(Uuid),
    ) -> Vec<(Bytes, Bytes)> {
        let outbox = self.log.outbox.lock();
        let mut is_stray = |(name, value): &(Bytes, Bytes)| {
            let Ok(connection) = Uuid::try_parse_ascii(name) else { return true };
            if outbox.is_open(connection) {
                // An open session without the mark is announced once more.
                if SessionRecord::read(value).is_some_and(|(_, announced)| announced) {
                    found(connection);
                }
                return false;
            }
            !outbox.is_closing(connection)
        };
        entries.into_iter().filter(|entry| is_stray(entry)).collect()
    }

    async fn write(
        &mut self,
        keys: &SessionKeys,
        batch: Vec<(Id, Vec<Item>)>,
    ) -> Result<(), StoreError> {
        let log = self.log;
        if let Err(error) = self.enter(keys, &batch).await {
            let mut outbox = log.outbox.lock();
            batch.into_iter().for_each(|(agent, items)| outbox.give_back(agent, items));
            return Err(error);
        }
        let connections_made = keys.connections_made();
        let appends = batch.into_iter().map(async |(agent, items)| {
            let payloads = items.iter().map(|item| payload(log, item)).collect();
            (keys.append(&agent, payloads).await, agent, items)
        });
        let mut lost = None;
        for (result, agent, items) in join_all(appends).await {
            match result {
                Ok(()) => self.appended(&agent, &items, connections_made)?,
                Err(error) if error.is_answer() => {
                    log.counters.retried.add(items.len() as u64);
                    self.complain(&error);
                    log.outbox.lock().refused(agent, items, Instant::now());
                }
                Err(error) => {
                    log.counters.retried.add(items.len() as u64);
                    log.outbox.lock().give_back(agent, items);
                    lost = Some(error);
                }
            }
        }
        self.settle(keys).await?;
        lost.map_or(Ok(()), Err)
    }

    /// Enters opened sessions into the hash, except for those that have closed since.
    async fn enter(&self, keys: &SessionKeys, batch: &[(Id, Vec<Item>)]) -> Result<(), StoreError> {
        let items = || batch.iter().flat_map(|(_, items)| items);
        let is_closed = |item: &&Item| matches!(item.what, What::Closed(_));
        let closed: HashSet<_> = items().filter(is_closed).map(|item| item.connection).collect();
        let mut entered = Vec::new();
        for Item { connection, what } in items() {
            if let What::Opened { record, .. } = what
                && !closed.contains(connection)
            {
                entered.push((*connection, record.store(false)?));
            }
        }
        keys.change(&self.log.server_id, entered.into_iter(), std::iter::empty()).await
    }

    fn appended(
        &mut self,
        agent: &Id,
        items: &[Item],
        connections_made: u64,
    ) -> Result<(), StoreError> {
        self.log.counters.appended.add(items.len() as u64);
        self.log.outbox.lock().done(agent, items);
        for Item { connection, what } in items {
            let value = match what {
                What::Opened { record, .. } => Some(record.store(true)?),
                What::Closed(_) => None,
            };
            self.settle.insert(*connection, Settlement { value, connections_made });
        }
        Ok(())
    }

    /// Writes announcements for the embedded bus, whose logs and sessions end with this process.
    fn write_here(&mut self, store: &EmbeddedStore, hub: &Hub) -> bool {
        let log = self.log;
        let batch = log.outbox.lock().take(BATCH, Instant::now());
        let any = !batch.is_empty();
        for (agent, mut items) in batch {
            let key = log.names.agent_sessions_log(&agent);
            let channel: Arc<str> = log.names.agent_sessions(&agent).into();
            let mut written = 0;
            let mut refusal = None;
            for item in &items {
                let payload = payload(log, item);
                let (entries_max, ttl) = (log.limits.entries_max, log.limits.ttl);
                if let Err(error) =
                    store.append(&key, payload.clone(), (entries_max, u64::MAX), ttl)
                {
                    refusal = Some(error);
                    break;
                }
                let (channel, keep) = (Arc::clone(&channel), Keep::Nothing);
                // A follower that misses the message finds the announcement in the log a little later.
                if let Err(error) = hub.publish(Publish { channel, payload, keep, receipt: None }) {
                    debug!(%error, "An announcement is in the log but was not published.");
                }
                written += 1;
            }
            log.counters.appended.add(written as u64);
            let rest = items.split_off(written);
            let mut outbox = log.outbox.lock();
            outbox.forget(&items);
            match refusal {
                None => outbox.done(&agent, &[]),
                Some(error) => {
                    log.counters.retried.add(rest.len() as u64);
                    outbox.refused(agent, rest, Instant::now());
                    drop(outbox);
                    self.complain(&error);
                }
            }
        }
        if log.outbox.lock().take_overflow() {
            log.outbox.lock().announce_again(&HashSet::new());
        }
        any
    }

    fn complain(&mut self, error: &StoreError) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAINT) {
            self.complained = Some(Instant::now());
            warn!(%error, "A log of sessions takes no announcement now; it is tried again.");
        }
    }
}

/// Returns the message of an announcement.
fn payload(log: &SessionLog, Item { connection, what }: &Item) -> Bytes {
    match what {
        What::Closed(payload) => payload.clone(),
        What::Opened { record, again } => {
            let mut opened =
                record.announcement("opened", *connection, &log.server_id, &record.opened);
            if *again {
                opened["again"] = true.into();
            }
            opened.to_string().into()
        }
    }
}

/// Announcements that are written at a time: other tasks run in between.
const BATCH: usize = 256;

/// Time for the last writes at the end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of log lines about refusals.
const COMPLAINT: Duration = Duration::from_secs(10);
