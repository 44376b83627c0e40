//! Logs outages of the bus as a whole, and when the instance is ready. Knows no backend.
//!
//! The backend itself logs each connection that is lost and made again within a moment.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bus::Bus;

/// A change of state that is logged.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// The bus has been away for too long.
    Away,
    /// The bus is there: for the first time, or again after this time.
    Ready(Option<Duration>),
}

/// State of the bus as it was logged last.
#[derive(Debug)]
struct Watch {
    /// Time since which the bus is away.
    away: Option<Instant>,
    /// Set if the outage was logged.
    is_told: bool,
    was_ready: bool,
}

impl Watch {
    /// Creates the state before the first connection.
    const fn new(now: Instant) -> Self {
        Self { away: Some(now), is_told: false, was_ready: false }
    }

    fn look(&mut self, is_there: bool, now: Instant) -> Option<Turn> {
        if !is_there {
            let since = *self.away.get_or_insert(now);
            let is_due = !self.is_told && now.duration_since(since) >= PATIENCE;
            self.is_told |= is_due;
            return is_due.then_some(Turn::Away);
        }
        let gap = self.away.take().map(|since| now.duration_since(since))?;
        let is_told = std::mem::replace(&mut self.is_told, false);
        let is_first = !std::mem::replace(&mut self.was_ready, true);
        (is_told || is_first).then(|| Turn::Ready(is_told.then_some(gap)))
    }
}

/// Watches the bus until `end`.
pub async fn run(bus: Bus, end: CancellationToken) {
    let (mut watch, mut part) = (Watch::new(Instant::now()), Watch::new(Instant::now()));
    loop {
        let status = bus.status();
        let turn = watch.look(status.connected && status.subscribed, Instant::now());
        let kind = bus.kind();
        match turn {
            Some(Turn::Away) => tracing::error!(
                bus = kind,
                error = status.last_error.as_deref().unwrap_or("no answer yet"),
                "Redis is away: no client can connect, and no message arrives. Open connections stay: do not restart."
            ),
            Some(Turn::Ready(gap)) => {
                let away_ms = gap.map(|gap| gap.as_millis() as u64);
                tracing::info!(bus = kind, away_ms, "Ready.");
            }
            None => {}
        }
        let is_there = status.connected && status.subscribed;
        match part.look(!is_there || status.away.is_none(), Instant::now()) {
            Some(Turn::Away) => tracing::error!(
                bus = kind,
                away = status.away,
                "A part of the Redis Cluster is away: clients whose keys are there cannot connect, and their \
                messages do not arrive. All others are served."
            ),
            Some(Turn::Ready(Some(gap))) => {
                let away_ms = gap.as_millis() as u64;
                tracing::info!(
                    bus = kind,
                    away_ms,
                    "Every part of the Redis Cluster is there again."
                );
            }
            Some(Turn::Ready(None)) | None => {}
        }
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// Interval between looks at the bus.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time within which a connection that is made again is no outage. Also bounds the rate of lines to one a second.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_and_so_is_its_end() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut watch = Watch::new(start);
        assert_eq!(watch.look(false, at(100)), None);
        assert_eq!(watch.look(true, at(200)), Some(Turn::Ready(None)));
        assert_eq!(watch.look(true, at(300)), None);
        // A connection was lost for a moment.
        assert_eq!(watch.look(false, at(400)), None);
        assert_eq!(watch.look(true, at(500)), None);
        assert_eq!(watch.look(false, at(1000)), None);
        assert_eq!(watch.look(false, at(1999)), None);
        assert_eq!(watch.look(false, at(2000)), Some(Turn::Away));
        assert_eq!(watch.look(false, at(9000)), None);
        assert_eq!(
            watch.look(true, at(9500)),
            Some(Turn::Ready(Some(Duration::from_millis(8500))))
        );
        assert_eq!(watch.look(true, at(9600)), None);
    }

    #[test]
    fn a_bus_that_is_not_there_at_the_start_is_told() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        assert_eq!(watch.look(false, start + PATIENCE), Some(Turn::Away));
        assert_eq!(watch.look(true, start + PATIENCE * 2), Some(Turn::Ready(Some(PATIENCE * 2))));
    }
}
