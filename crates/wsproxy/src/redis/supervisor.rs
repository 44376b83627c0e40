//! Keeps one connection made: connects, waits, connects again, and reports to log and status.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;
use wsproxy_proto::backoff::Backoff;

use crate::redis::{
    connection::RedisConnection, fault::Fault, health::Purpose, shared::RedisShared,
};

/// Makes one connection again and again.
pub(super) struct Supervisor {
    shared: Arc<RedisShared>,
    purpose: Purpose,
    failures: u32,
    up_since: Option<Instant>,
    complaints: Complaints,
}

impl Supervisor {
    /// Creates a supervisor without a connection.
    pub(super) fn new(shared: Arc<RedisShared>, purpose: Purpose) -> Self {
        Self { shared, purpose, failures: 0, up_since: None, complaints: Complaints::default() }
    }

    /// Connects, with as many attempts as it takes; `None` at shutdown.
    pub(super) async fn connect(&mut self) -> Option<RedisConnection> {
        let shared = self.shared.clone();
        let attempts = async {
            loop {
                tokio::time::sleep(self.delay()).await;
                // Taken before the server's name is looked up: of two connections that differ the newer stays.
                let birth = shared.next_birth();
                let name = format!("{}-{}", shared.client_name, self.purpose.name());
                match shared.connector.connect(&name).await {
                    Ok(connection) => break (connection, birth),
                    Err(fault) => self.failed(&fault),
                }
            }
        };
        let (mut connection, birth) = tokio::select! {
            made = attempts => made,
            () = shared.shutdown.cancelled() => return None,
        };
        connection.birth = birth;
        self.up_since = Some(Instant::now());
        shared.counters.connects.add(1);
        if matches!(self.purpose, Purpose::Command) {
            shared.command_connections.fetch_add(1, Ordering::Release);
        }
        shared.health.up(self.purpose);
        let address = shared.connector.address();
        tracing::info!(link = self.purpose.name(), %address, "Connected to Redis.");
        Some(connection)
    }

    /// Notes the loss of the connection.
    pub(super) fn lost(&mut self, fault: &Fault) {
        self.shared.counters.links_lost.add(1);
        if matches!(fault, Fault::Role(_)) {
            self.shared.counters.role_refused.add(1);
        }
        self.shared.health.down(self.purpose, fault);
        let stable = self.up_since.take().is_some_and(|since| since.elapsed() > STABLE);
        self.failures = if stable { 1 } else { self.failures.saturating_add(1) };
        if self.complaints.due() || stable {
            let address = self.shared.connector.address();
            tracing::warn!(link = self.purpose.name(), %address, error = %fault, "Lost Redis.");
        }
    }

    fn failed(&mut self, fault: &Fault) {
        self.shared.counters.connects_failed.add(1);
        if matches!(fault, Fault::Role(_)) {
            self.shared.counters.role_refused.add(1);
        }
        self.shared.health.down(self.purpose, fault);
        self.failures = match fault.needs_a_person() {
            true => PATIENT_FAILURES.max(self.failures),
            false => self.failures.saturating_add(1),
        };
        if self.complaints.due() {
            let address = self.shared.connector.address();
            let attempts = self.failures;
            tracing::warn!(
                link = self.purpose.name(), %address, attempts, error = %fault,
                "Cannot connect to Redis; it is tried again."
            );
        }
    }

    fn delay(&self) -> Duration {
        match self.failures.checked_sub(1) {
            None => Duration::ZERO,
            Some(attempt) => BACKOFF.delay(attempt, rand::random()),
        }
    }
}

/// Throttle that lets one of many equal log lines through every ten seconds.
#[derive(Default)]
pub(super) struct Complaints(Option<Instant>);

impl Complaints {
    /// Returns whether a line may be logged now, which counts as logged then.
    pub(super) fn due(&mut self) -> bool {
        let now = Instant::now();
        let due = self.0.is_none_or(|last| now.duration_since(last) >= COMPLAINT_INTERVAL);
        if due {
            self.0 = Some(now);
        }
        due
    }
}

const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(20), max: Duration::from_millis(2000) };

/// Number of failed attempts that gives the longest wait.
const PATIENT_FAILURES: u32 = 8;

/// Lifetime after which a connection was a good one: its loss starts the backoff afresh.
const STABLE: Duration = Duration::from_secs(2);

const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);
