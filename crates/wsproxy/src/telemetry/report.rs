//! Members that parts of an instance add to the answers for operators. Knows none of these parts.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

/// A part of an instance that tells operators more than its numbers.
pub trait Reporter: Send + Sync {
    /// Returns the part's health.
    fn health(&self) -> Health;
    /// Returns the members that the JSON form of the metrics has beside the samples. With `details` they may name users.
    fn overview(&self, details: bool) -> Map<String, Value>;
    /// Writes one log line about the time since the last call.
    fn sum_up(&self);
}

/// Health of a part.
#[derive(Debug, Default)]
pub struct Health {
    /// The part cannot do its work now.
    pub is_degraded: bool,
    /// Members of `/health` for all who may ask.
    pub members: Map<String, Value>,
    /// Members of `/health` for operators.
    pub details: Map<String, Value>,
}

/// The parts of an instance that tell operators more than their numbers.
#[derive(Default)]
pub struct Reports(OnceLock<Vec<Arc<dyn Reporter>>>);

impl Reports {
    /// Sets the parts; called once.
    pub fn read(&self, parts: Vec<Arc<dyn Reporter>>) {
        let _ = self.0.set(parts);
    }

    /// Returns the health of all parts together.
    #[must_use]
    pub fn health(&self) -> Health {
        self.parts().map(|part| part.health()).fold(Health::default(), |mut all, part| {
            all.is_degraded |= part.is_degraded;
            all.members.extend(part.members);
            all.details.extend(part.details);
            all
        })
    }

    /// Returns the members of all parts for the JSON form of the metrics.
    #[must_use]
    pub fn overview(&self, details: bool) -> Map<String, Value> {
        self.parts().flat_map(|part| part.overview(details)).collect()
    }

    /// Lets each part write its log line at intervals, until `end`.
    pub async fn sum_up(&self, interval: Duration, end: CancellationToken) {
        if interval.is_zero() {
            return;
        }
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
            self.parts().for_each(|part| part.sum_up());
        }
    }

    fn parts(&self) -> impl Iterator<Item = &Arc<dyn Reporter>> {
        self.0.get().into_iter().flatten()
    }
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reports")
    }
}
