//! The announcements of opened and closed sessions, kept in a log at least once. Knows the open sessions and the
//! announcements that wait; one task writes them to Redis.
//!
//! **Order of writes.** An instance that is killed cannot announce the end of its sessions, so another one
//! must know which were open: the hash `ws:server:{server_id}:sessions`. It lies in another slot than the
//! logs, so no script writes both. For each opened session, in this order:
//! 1. the hash gets the session, marked as not announced;
//! 2. the log gets `opened`;
//! 3. the hash marks the session as announced.
//!
//! For each closed session: the log gets `closed`, then the session leaves the hash. After a crash at any
//! point another instance finds in the hash every announcement that is missing: `opened` too without the mark.
//! It may repeat an announcement, but never leaves one out. Step 1 and the removal count only under a lease
//! that runs: otherwise a reaper may be changing the hash.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;
use wsproxy_proto::names::{Id, Names};

use crate::{
    bus::Bus,
    config,
    embedded::store::EmbeddedStore,
    hub::Hub,
    registry::{
        Transport,
        commands::Commands,
        lease::Lease,
        sessions::{keys::SessionKeys, outbox::AnnouncementQueue},
    },
    telemetry::counter::Counter,
    traces::Handover,
};

mod keys;
mod leftovers;
mod outbox;
mod writer;

pub(super) use leftovers::Leftovers;

/// The log of this instance's sessions. Every call returns at once.
pub struct SessionLog {
    server_id: Arc<str>,
    names: Names,
    limits: SessionLogLimits,
    backend: SessionLogBackend,
    lease: Arc<Lease>,
    /// Guards the open sessions and the waiting announcements; held for a few steps.
    outbox: Mutex<AnnouncementQueue>,
    /// Signals the writer that an announcement waits.
    changed: Notify,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// Counters that the metrics read.
    pub counters: SessionLogCounters,
}

/// Storage of the logs.
enum SessionLogBackend {
    /// This process: the logs end with it.
    Embedded(EmbeddedStore, Arc<Hub>),
    /// Redis.
    Redis(Box<SessionKeys>),
}

/// Bounds of an agent's log.
#[derive(Debug, Clone, Copy)]
pub struct SessionLogLimits {
    /// Most entries.
    pub entries_max: u64,
    /// Lifetime of an entry, and of the log after its last entry.
    pub ttl: Duration,
}

impl SessionLogLimits {
    /// Returns the bounds of a configuration.
    #[must_use]
    pub const fn new(config: &config::sessions::SessionsConfig) -> Self {
        Self { entries_max: config.events_log_entries_max, ttl: config.events_log_ttl }
    }
}

/// Counters of the log.
#[derive(Debug, Default)]
pub struct SessionLogCounters {
    /// Announcements that are in a log.
    pub appended: Counter,
    /// Announcements that are tried again, since a log refused them or may not have them.
    pub retried: Counter,
    /// Announcements that were dropped, since too many waited.
    pub dropped: Counter,
    /// Sessions of an earlier run of this instance whose end was announced.
    pub lost: Counter,
    /// Open sessions that were announced again, since Redis had lost them or a reaper took this instance for dead.
    pub reopened: Counter,
}

/// A connection of a session, as announcements name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    /// The agent.
    pub agent: Id,
    /// The session.
    pub session: Id,
    /// Transport of the client.
    pub transport: Transport,
    /// Time of the opening: RFC 3339.
    pub opened: Box<str>,
    /// Trace of the handshake.
    pub trace: Option<Box<Handover>>,
}

impl SessionRecord {
    /// Returns the members that all announcements have.
    #[must_use]
    pub fn announcement(
        &self,
        event: &str,
        connection: Uuid,
        server_id: &str,
        timestamp: &str,
    ) -> serde_json::Value {
        let mut announcement = serde_json::json!({
            "event": event,
            "agent_id": self.agent.as_str(),
            "session_id": self.session.as_str(),
            "connection_id": connection,
            "transport": self.transport.label(),
            "server_id": server_id,
            "timestamp": timestamp,
        });
        if let Some(trace) = &self.trace {
            trace.add_to(&mut announcement);
        }
        announcement
    }
}

impl SessionLog {
    /// Starts writing in the background, until [`Self::close`]. The lease must outlive the log.
    #[must_use]
    pub fn start(
        limits: SessionLogLimits,
        hub: &Arc<Hub>,
        bus: &Bus,
        lease: &Arc<Lease>,
    ) -> Arc<Self> {
        let settings = lease.settings();
        let backend = match bus {
            Bus::Redis(bus) => {
                let commands = Commands::new(bus.client().clone(), settings.response_timeout);
                SessionLogBackend::Redis(SessionKeys::new(commands, settings, limits).into())
            }
            Bus::Embedded(bus) => SessionLogBackend::Embedded(bus.store(), Arc::clone(hub)),
        };
        let log = Arc::new(Self {
            server_id: Arc::clone(&settings.server_id),
            names: settings.names.clone(),
            limits,
            backend,
            lease: Arc::clone(lease),
            outbox: Mutex::new(AnnouncementQueue::new(WAITING_BYTES_MAX)),
            changed: Notify::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            counters: SessionLogCounters::default(),
        });
        log.tasks.spawn(writer::run(Arc::clone(&log)));
        log
    }

    /// Announces an opened connection.
    pub fn opened(&self, connection: Uuid, record: SessionRecord) {
        let fits = self.outbox.lock().opened(connection, record);
        self.pushed(fits);
    }

    /// Announces a closed connection, with this message.
    pub fn closed(&self, connection: Uuid, announcement: Bytes) {
        let fits = self.outbox.lock().closed(connection, announcement);
        self.pushed(fits);
    }

    /// Returns the bytes of announcements that wait for a log.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.outbox.lock().bytes()
    }

    /// Returns whether every announcement so far is in a log.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.outbox.lock().is_idle()
    }

    /// Writes the waiting announcements and ends. Connections must be gone by then.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn pushed(&self, fits: bool) {
        if !fits {
            self.counters.dropped.add(1);
        }
        self.changed.notify_one();
    }
}

/// Upper bound of waiting announcements, in bytes: some 150,000 of them. While Redis is away no client can
/// connect, so only ends wait. The bound is reached if Redis refuses the log for long, but lets clients come and go.
const WAITING_BYTES_MAX: usize = 64 * 1024 * 1024;
