//! The one task that brings announcements into logs, and keeps the hash of open sessions true.

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
    bus::{Keep, Publish},
    hub::Hub,
    registry::{
        commands::SCAN_START,
        lease::{Beat, Holder},
        sessions::{
            Backend, Record, SessionLog,
            keys::SessionKeys,
            leftovers::announce_lost,
            outbox::{Item, What},
        },
    },
    store::{StoreError, memory::MemoryStore},
};

/// Announcements that are written at a time: others have their turns in between.
const BATCH: usize = 256;

/// Time that the store gets at the end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Refusals are logged this often.
const COMPLAINT: Duration = Duration::from_secs(10);

/// Runs until the log is closed, and then writes what still waits.
pub(super) async fn run(log: Arc<SessionLog>) {
    let mut writer = Writer {
        log: &log,
        beats: log.lease.beats(),
        wait_until: None,
        lapses: 0,
        links: 0,
        check: false,
        reconcile_at: None,
        settle: HashMap::new(),
        linked: true,
        complained: None,
    };
    writer.work().await;
    if timeout(FAREWELL, writer.farewell()).await.is_err() {
        let bytes = log.waiting_bytes();
        warn!(bytes, "There was no time to write all announcements; others announce the ends.");
    }
}

struct Writer<'a> {
    log: &'a SessionLog,
    beats: watch::Receiver<Beat>,
    /// Pause after the store did not answer, or while a reaper is at work.
    wait_until: Option<Instant>,
    /// Lapses of the lease, and links to Redis, that the hash was compared after.
    lapses: u64,
    links: u64,
    /// The lease was renewed: the hash is kept alive and counted.
    check: bool,
    /// When the hash is compared with what is open here.
    reconcile_at: Option<Instant>,
    /// Changes of the hash that belong to what is in a log already.
    settle: HashMap<Uuid, Settlement>,
    linked: bool,
    complained: Option<Instant>,
}

/// A change of the hash after an append to a log.
struct Settlement {
    /// The new value of the field; `None`: the field is removed.
    value: Option<Bytes>,
    /// Links to Redis that there had been before the append.
    links: u64,
}

impl Writer<'_> {
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
                // A burst becomes a few writes.
                () = log.changed.notified(), if self.wait_until.is_none() => {
                    sleep(log.lease.pace().linger).await;
                }
            }
        }
    }

    async fn farewell(&mut self) {
        let pause = self.log.lease.pace().retry.min(Duration::from_millis(100));
        self.log.outbox.lock().wake_all();
        while !self.log.is_written() || !self.settle.is_empty() {
            if !self.turn_noted().await {
                sleep(pause).await;
                self.log.outbox.lock().wake_all();
            }
        }
    }

    /// Says whether there may be more to do at once.
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
                self.wait_until = Some(Instant::now() + self.log.lease.pace().retry);
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
            Backend::Memory(store, hub) => return Ok(self.write_here(store, hub)),
            Backend::Redis(keys) => keys,
        };
        // Under a lease that may have run out a reaper may be at work. The next renewal wakes this task.
        if !log.lease.is_held() {
            self.wait_until = Some(Instant::now() + log.lease.pace().retry);
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
            self.wait_until = Some(Instant::now() + log.lease.pace().retry);
            return Ok(false);
        }
        let batch = log.outbox.lock().take(BATCH, Instant::now());
        match batch.is_empty() {
            true => Ok(false),
            false => self.write(keys, batch).await.map(|()| true),
        }
    }

    /// Finishes what is in the logs already.
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
        let links = keys.links();
        // Behind a new link there may be another Redis. It has the mark of an announcement now that it has not seen.
        let unproven: HashSet<_> = self
            .settle
            .drain()
            .filter(|(_, change)| change.value.is_some() && change.links != links)
            .map(|(connection, _)| connection)
            .collect();
        if !unproven.is_empty() {
            let again = self.log.outbox.lock().announce_again(&unproven);
            self.log.counters.reopened.add(again as u64);
        }
        Ok(())
    }

    /// Looks for signs that the hash is not what it was left as.
    async fn compare_count(&mut self, keys: &SessionKeys) -> Result<(), StoreError> {
        let beat = *self.beats.borrow_and_update();
        let (idle, open, overflow) = {
            let mut outbox = self.log.outbox.lock();
            (outbox.is_idle(), outbox.open_count(), outbox.take_overflow())
        };
        let links = keys.links();
        let entries = keys.keep(&self.log.server_id).await?;
        let differs = idle && entries != open as u64;
        let changed = beat.lapses > self.lapses || links != self.links;
        if differs && !changed {
            warn!(entries, open, "Redis has lost or kept sessions: they are compared.");
        }
        (self.lapses, self.links) = (beat.lapses, links);
        if differs || changed || overflow {
            self.reconcile_at = Some(Instant::now());
        }
        Ok(())
    }

    /// Compares the hash with what is open here: sessions that only Redis knows are announced as lost,
    /// open ones that Redis does not know are announced again. `false`: it is not the time for that.
    async fn reconcile(&mut self, keys: &SessionKeys) -> Result<bool, StoreError> {
        let log = self.log;
        let beat = *self.beats.borrow();
        if beat.holder == Holder::Another {
            // Another run with our name may still be alive: its sessions are not lost. The next renewal
            // tells. Until then nothing keeps new announcements back.
            self.reconcile_at = Some(Instant::now() + log.lease.pace().refresh);
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
                // After a reaper was here the hash proves nothing: all that is open is announced again.
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
            Instant::now() + log.lease.pace().refresh
        });
        Ok(true)
    }

    /// Those that are not open here. Open ones that are marked as announced are `found`.
    fn strays(
        &self,
        entries: Vec<(Bytes, Bytes)>,
        mut found: impl FnMut(Uuid),
    ) -> Vec<(Bytes, Bytes)> {
        let outbox = self.log.outbox.lock();
        let mut is_stray = |(name, value): &(Bytes, Bytes)| {
            let Ok(connection) = Uuid::try_parse_ascii(name) else { return true };
            if outbox.is_open(connection) {
                // One that is not marked is announced once more.
                if Record::read(value).is_some_and(|(_, announced)| announced) {
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
        let links = keys.links();
        let appends = batch.into_iter().map(async |(agent, items)| {
            let payloads = items.iter().map(|item| payload(log, item)).collect();
            (keys.append(&agent, payloads).await, agent, items)
        });
        let mut lost = None;
        for (result, agent, items) in join_all(appends).await {
            match result {
                Ok(()) => self.appended(&agent, &items, links)?,
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

    /// Enters the sessions that opened, but for those that closed since.
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

    fn appended(&mut self, agent: &Id, items: &[Item], links: u64) -> Result<(), StoreError> {
        self.log.counters.appended.add(items.len() as u64);
        self.log.outbox.lock().done(agent, items);
        for Item { connection, what } in items {
            let value = match what {
                What::Opened { record, .. } => Some(record.store(true)?),
                What::Closed(_) => None,
            };
            self.settle.insert(*connection, Settlement { value, links });
        }
        Ok(())
    }

    /// The same for the embedded bus, whose logs and sessions end with this process.
    fn write_here(&mut self, store: &MemoryStore, hub: &Hub) -> bool {
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
                // The log has it: a follower that misses the message finds it there a little later.
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

/// The words of an announcement.
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
