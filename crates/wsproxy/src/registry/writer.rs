//! The one task that writes entries of an instance to Redis under its lease: changes in batches, and everything again
//! after Redis lost data. Knows no kind of entry.

use std::time::Duration;

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    registry::lease::{Beat, Holder, Lease},
    store::command::StoreError,
    telemetry::counter::Counter,
};

pub(super) mod connections;

/// Entries that Redis should have of this instance while its lease runs.
pub(super) trait Mirrored {
    /// Name of the entries in log lines.
    const NAME: &'static str;

    /// Returns the signal that there are changes.
    fn changed(&self) -> &Notify;
    /// Waits for further changes, at most for `pause`: short-lived entries cancel out, and bursts become one write.
    fn linger(&self, pause: Duration) -> impl Future<Output = ()> + Send {
        sleep(pause)
    }
    /// Returns the counters of the writing.
    fn counters(&self) -> &WriterCounters;
    /// Returns the number of entries that Redis should have, and whether changes wait.
    fn state(&self) -> (usize, bool);
    /// Notes that Redis has lost or kept entries although the lease ran.
    fn differs(&self) {}
    /// Marks every entry to be written again, since Redis has lost its data.
    fn rewrite_all(&self);
    /// Marks entries to be written again that would expire; called once within `refresh`.
    fn renew(&self);
    /// Returns the number of entries that Redis has, and renews their time to live.
    fn count(&self) -> impl Future<Output = Result<u64, StoreError>> + Send;
    /// Removes the entries that Redis has under this instance's name and that are not here.
    fn sweep(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Writes some changes.
    fn write(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// Counters of the writing of entries.
#[derive(Debug, Default)]
pub struct WriterCounters {
    /// Changes that were written to Redis.
    pub written: Counter,
    /// Commands that Redis refused or did not answer.
    pub failures: Counter,
    /// Times that all entries were written again since Redis had lost them.
    pub rewrites: Counter,
}

/// Writes entries until `closing`, and then the changes that still wait.
pub(super) async fn run<M: Mirrored>(entries: M, lease: &Lease, closing: &CancellationToken) {
    let mut writer = Writer {
        beats: lease.beats(),
        entries,
        lease,
        closing,
        due: None,
        linked: false,
        lapses: 0,
        strays: false,
    };
    writer.work().await;
    match timeout(RELEASE_TIMEOUT, writer.release()).await {
        Ok(Ok(())) => debug!(of = M::NAME, "The registry is left."),
        Ok(Err(error)) => {
            warn!(of = M::NAME, %error, "The registry cannot be left; the lease will run out.");
        }
        Err(_) => {
            warn!(of = M::NAME, "There was no time to leave the registry; the lease will run out.");
        }
    }
}

struct Writer<'a, M> {
    entries: M,
    lease: &'a Lease,
    closing: &'a CancellationToken,
    beats: watch::Receiver<Beat>,
    /// Time of the next count of the entries in Redis: after a renewal of the lease, or some time after a failure.
    due: Option<Instant>,
    /// Set if the latest command succeeded.
    linked: bool,
    /// Lapses of the lease after which everything was written again.
    lapses: u64,
    /// Set while Redis may have entries of an earlier run with our name; they are removed once no other run has it.
    strays: bool,
}

impl<M: Mirrored> Writer<'_, M> {
    async fn work(&mut self) {
        loop {
            if self.closing.is_cancelled() {
                return;
            }
            // Checked before any write: the lease may have lapsed, and a reaper may have removed entries.
            if self.beats.has_changed().unwrap_or(false) {
                self.due = Some(Instant::now());
            }
            let is_due = self.due.is_some_and(|due| Instant::now() >= due);
            if is_due {
                self.due = None;
                let closing = self.closing;
                tokio::select! {
                    result = self.check() => self.note(result),
                    () = closing.cancelled() => return,
                }
            } else if self.may_write() && self.entries.state().1 {
                let result = self.entries.write().await;
                self.note(result);
            } else {
                let due = self.due.unwrap_or_else(Instant::now);
                tokio::select! {
                    () = self.closing.cancelled() => return,
                    () = sleep_until(due), if self.due.is_some() => {}
                    changed = self.beats.changed() => match changed {
                        Ok(()) => self.due = Some(Instant::now()),
                        Err(_) => return,
                    },
                    () = self.entries.changed().notified(), if self.linked => {
                        self.entries.linger(self.lease.timing().linger).await;
                    }
                }
            }
        }
    }

    /// Returns whether changes that are written now will stay: Redis answers, and the lease runs.
    fn may_write(&self) -> bool {
        self.linked && self.lease.is_held()
    }

    fn note(&mut self, result: Result<(), StoreError>) {
        match result {
            Ok(()) => self.linked = true,
            Err(error) => {
                self.entries.counters().failures.add(1);
                if self.linked {
                    warn!(of = M::NAME, %error, "The registry cannot be written now; the changes are written later.");
                }
                self.linked = false;
                self.due = Some(Instant::now() + self.lease.timing().retry);
            }
        }
    }

    /// Compares the entries in Redis with those here.
    async fn check(&mut self) -> Result<(), StoreError> {
        let beat = *self.beats.borrow_and_update();
        let (count, has_changes) = self.entries.state();
        let entries = self.entries.count().await?;
        if beat.lapses > self.lapses {
            let first = std::mem::replace(&mut self.lapses, beat.lapses) == 0;
            if !first {
                info!(of = M::NAME, entries = count, "The registry is written again.");
                self.entries.counters().rewrites.add(1);
            }
            self.rewrite();
        } else if self.strays && beat.holder == Holder::Us {
            self.entries.sweep().await?;
            self.strays = false;
        } else if beat.lapses > 0 && !has_changes && entries != count as u64 {
            warn!(
                of = M::NAME,
                entries,
                wanted = count,
                "Redis has lost or kept entries: all are written again."
            );
            self.entries.differs();
            self.rewrite();
        } else {
            self.entries.renew();
        }
        Ok(())
    }

    fn rewrite(&mut self) {
        self.strays = true;
        self.entries.rewrite_all();
    }

    async fn release(&self) -> Result<(), StoreError> {
        while self.entries.state().1 {
            self.entries.write().await?;
        }
        Ok(())
    }
}

/// Changes that are written at a time: other tasks run in between.
pub(super) const BATCH: usize = 128;

/// Time for the removal of our entries at the end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
