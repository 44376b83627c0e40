//! The status keys of agents: one task writes them, of each user the newest status only.

use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use wsproxy_proto::names::{Id, Names};

use crate::{
    registry::agents::leftovers::STATUS_TTL,
    store::{Store, command::StoreError},
};

/// Statuses that wait to be written.
///
/// Invariant: at most one status of each user waits, and at most [`WAITING_MAX`]. Beyond it a status is left out; the
/// next heartbeat of the agent writes it.
pub(super) struct Statuses {
    store: Store,
    names: Names,
    /// Time within which Redis must answer.
    response_timeout: Duration,
    /// Guards the statuses: whether each user's agent is connected.
    waiting: Mutex<HashMap<Id, bool>>,
    changed: Notify,
}

impl Statuses {
    pub(super) fn new(store: Store, names: Names, response_timeout: Duration) -> Self {
        Self { store, names, response_timeout, waiting: Mutex::default(), changed: Notify::new() }
    }

    /// Sets the status of a user's agent.
    pub(super) fn set(&self, user: &Id, connected: bool) {
        let mut waiting = self.waiting.lock();
        if waiting.len() < WAITING_MAX || waiting.contains_key(user) {
            waiting.insert(user.clone(), connected);
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Writes statuses until `end`.
    pub(super) async fn run(self: std::sync::Arc<Self>, end: CancellationToken) {
        let mut linked = true;
        loop {
            let pause = match self.write().await {
                Ok(0) => None,
                Ok(_) => {
                    linked = true;
                    continue;
                }
                Err(error) => {
                    if std::mem::replace(&mut linked, false) {
                        warn!(%error, "The status of agents cannot be written now.");
                    }
                    Some(RETRY)
                }
            };
            tokio::select! {
                () = end.cancelled() => return,
                () = sleep(pause.unwrap_or_default()), if pause.is_some() => {}
                () = self.changed.notified(), if pause.is_none() => sleep(LINGER).await,
            }
        }
    }

    /// Writes all statuses that wait, within a time limit.
    pub(super) async fn flush(&self) {
        let all = async { while matches!(self.write().await, Ok(1..)) {} };
        if timeout(FLUSH_TIMEOUT, all).await.is_err() {
            warn!("There was no time to write the status of all agents.");
        }
    }

    /// Writes a batch of statuses. Returns its size.
    async fn write(&self) -> Result<usize, StoreError> {
        let batch: Vec<_> = self.waiting.lock().extract_if(|_, _| true).take(BATCH).collect();
        let written = self.save(&batch).await;
        let count = batch.len();
        let mut failed = None;
        for ((user, connected), result) in batch.into_iter().zip(written) {
            match result {
                // A key of another type or a missing permission stays as it is.
                Err(error) if !error.is_of_one_key() => {
                    failed = Some(error);
                    self.waiting.lock().entry(user).or_insert(connected);
                }
                Ok(()) | Err(_) => {}
            }
        }
        failed.map_or(Ok(count), Err)
    }

    async fn save(&self, batch: &[(Id, bool)]) -> Vec<Result<(), StoreError>> {
        let keys: Vec<_> = batch.iter().map(|(user, _)| self.names.agent_status(user)).collect();
        let entries = keys.iter().zip(batch).map(|(key, (_, connected))| match connected {
            true => (&**key, &b"connected"[..], CONNECTED_TTL),
            false => (&**key, &b"disconnected"[..], STATUS_TTL),
        });
        let saved = timeout(self.response_timeout, self.store.save_each(entries)).await;
        saved.unwrap_or_else(|_| {
            vec![Err(StoreError::Lost("no answer in time".into())); batch.len()]
        })
    }
}

/// Time to live of the status of a connected agent, which its heartbeats renew.
const CONNECTED_TTL: Duration = Duration::from_secs(120);

/// Statuses that are written at a time.
const BATCH: usize = 128;

/// Upper bound of waiting statuses.
const WAITING_MAX: usize = 200_000;

/// Time that a status waits for others.
const LINGER: Duration = Duration::from_millis(20);

/// Time limit of the last writes.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

const RETRY: Duration = Duration::from_secs(1);
