//! Keeps one link made: connects, waits, connects again, and says so in log and status.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;
use wsproxy_proto::backoff::Backoff;

use crate::bus::redis::{Shared, fault::Fault, link::Link};

/// One of the three links of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Carries subscriptions and what arrives on them.
    Subscribe,
    /// Carries what is published.
    Publish,
    /// Carries the store's commands.
    Command,
}

impl Purpose {
    /// The name in logs and in the server's `CLIENT LIST`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Subscribe => "subscribe",
            Self::Publish => "publish",
            Self::Command => "command",
        }
    }
}

/// Makes one link again and again.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    purpose: Purpose,
    failures: u32,
    up_since: Option<Instant>,
    complaints: Complaints,
}

impl Supervisor {
    /// Connects nothing yet.
    pub(super) fn new(shared: Arc<Shared>, purpose: Purpose) -> Self {
        Self { shared, purpose, failures: 0, up_since: None, complaints: Complaints::default() }
    }

    /// Tries until there is a link; `None` at shutdown.
    pub(super) async fn connect(&mut self) -> Option<Link> {
        let shared = self.shared.clone();
        let attempts = async {
            loop {
                tokio::time::sleep(self.delay()).await;
                // Taken before the server's name is looked up: of two links that differ the newer stays.
                let birth = shared.next_birth();
                let name = format!("{}-{}", shared.client_name, self.purpose.name());
                match shared.connector.connect(&name).await {
                    Ok(link) => break (link, birth),
                    Err(fault) => self.failed(&fault),
                }
            }
        };
        let (mut link, birth) = tokio::select! {
            made = attempts => made,
            () = shared.shutdown.cancelled() => return None,
        };
        link.birth = birth;
        self.up_since = Some(Instant::now());
        shared.counters.connects.add(1);
        if matches!(self.purpose, Purpose::Command) {
            shared.command_links.fetch_add(1, Ordering::Release);
        }
        shared.health.up(self.purpose);
        let address = shared.connector.address();
        tracing::info!(link = self.purpose.name(), %address, "Connected to Redis.");
        Some(link)
    }

    /// The link that was made is of no more use.
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

/// Lets one of many equal complaints through every ten seconds.
#[derive(Default)]
pub(super) struct Complaints(Option<Instant>);

impl Complaints {
    /// Whether it is time for another one; it counts as made then.
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

/// As if so many attempts had failed: the longest wait.
const PATIENT_FAILURES: u32 = 8;

/// A link that lived this long was a good one; its loss starts the backoff afresh.
const STABLE: Duration = Duration::from_secs(2);

const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);
