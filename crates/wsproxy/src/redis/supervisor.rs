//! Keeps one connection made: connects, waits, connects again, and reports to log and status.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;
use wsproxy_proto::backoff::Backoff;

use crate::redis::{
    address::RedisEndpoint,
    connection::RedisConnection,
    fault::Fault,
    health::{Link, Purpose},
    node::Target,
    shared::RedisShared,
};

/// Makes one connection again and again.
pub(super) struct Supervisor<'a> {
    shared: Arc<RedisShared>,
    link: &'a Link,
    target: Target,
    failures: u32,
    up_since: Option<Instant>,
    complaints: Complaints,
}

impl<'a> Supervisor<'a> {
    /// Creates a supervisor without a connection.
    pub(super) fn new(shared: Arc<RedisShared>, link: &'a Link, target: Target) -> Self {
        let complaints = Complaints::default();
        Self { shared, link, target, failures: 0, up_since: None, complaints }
    }

    /// Connects to the target, with as many attempts as it takes. Returns the connection and the server at its end;
    /// `None` at shutdown.
    pub(super) async fn connect(&mut self) -> Option<(RedisConnection, Arc<RedisEndpoint>)> {
        let (shared, target) = (self.shared.clone(), self.target.clone());
        let part = target.part(&shared);
        let attempts = async {
            loop {
                let server = target.server(&shared).await;
                let attempt = async {
                    tokio::time::sleep(self.delay()).await;
                    // Taken before the server's name is looked up: of two connections that differ the newer stays.
                    let birth = shared.next_birth();
                    let name = format!("{}-{}", shared.client_name, self.link.purpose.name());
                    (shared.connector.connect(&server, part, &name).await, birth)
                };
                let made = tokio::select! {
                    made = attempt => Some(made),
                    () = target.left(&shared, &server) => None,
                };
                match made {
                    Some((Ok(connection), birth)) => break (connection, birth, server),
                    Some((Err(fault), _)) => self.failed(&server, &fault),
                    // The failures were those of another server.
                    None => self.failures = 0,
                }
            }
        };
        let (mut connection, birth, server) = tokio::select! {
            made = attempts => made,
            () = shared.shutdown.cancelled() => return None,
        };
        connection.birth = birth;
        self.up_since = Some(Instant::now());
        shared.counters.connects.add(1);
        if self.link.purpose == Purpose::Command {
            shared.command_connections.fetch_add(1, Ordering::Release);
        }
        self.link.up();
        tracing::info!(link = self.link.purpose.name(), address = %server, "Connected to Redis.");
        Some((connection, server))
    }

    /// Notes the loss of the connection to a server.
    pub(super) fn lost(&mut self, server: &RedisEndpoint, fault: &Fault) {
        self.shared.counters.links_lost.add(1);
        if matches!(fault, Fault::Role(_)) {
            self.shared.counters.role_refused.add(1);
        }
        self.link.down(fault);
        self.leave(server);
        let stable = self.up_since.take().is_some_and(|since| since.elapsed() > STABLE);
        self.failures = match fault {
            // Another server waits.
            Fault::Moved => 0,
            _ if stable => 1,
            _ => self.failures.saturating_add(1),
        };
        if self.complaints.due() || stable {
            tracing::warn!(link = self.link.purpose.name(), address = %server, error = %fault, "Lost Redis.");
        }
    }

    fn failed(&mut self, server: &RedisEndpoint, fault: &Fault) {
        self.shared.counters.connects_failed.add(1);
        if matches!(fault, Fault::Role(_)) {
            self.shared.counters.role_refused.add(1);
        }
        self.link.down(fault);
        self.leave(server);
        self.failures = match fault.needs_a_person() {
            true => PATIENT_FAILURES.max(self.failures),
            false => self.failures.saturating_add(1),
        };
        if self.complaints.due() {
            let attempts = self.failures;
            tracing::warn!(
                link = self.link.purpose.name(), address = %server, attempts, error = %fault,
                "Cannot connect to Redis; it is tried again."
            );
        }
    }

    /// Has the instance subscribe at another node of a Cluster.
    fn leave(&self, server: &RedisEndpoint) {
        let Some(cluster) = self.shared.nodes.cluster() else { return };
        if matches!(self.target, Target::Named) {
            cluster.find_home(&self.shared.topology, Some(server));
        }
        cluster.doubt();
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
