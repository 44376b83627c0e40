//! The figures of one thread since the last report, and their sum over several threads.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

/// The end of a connection by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// Close code; 1006 where the socket just ended.
    pub code: u16,
    /// Time, in monotonic nanoseconds.
    pub at_ns: u64,
}

/// Figures of a phase.
#[derive(Debug, Clone)]
pub struct Tally {
    /// From the intended time of sending to arrival, in nanoseconds.
    pub latency: Histogram<u64>,
    /// The same for messages to all clients, where they are numbered separately.
    pub shared_latency: Histogram<u64>,
    /// From the start of a connection (its intended start where a rate is given) to `101`.
    pub handshake: Histogram<u64>,
    /// Failed handshakes, by reason.
    pub failures: BTreeMap<String, u64>,
    /// Connections that the server ended.
    pub endings: Vec<Ending>,
    /// Messages whose number did not follow the one before on the same connection.
    pub out_of_order: u64,
    /// Messages out of order that had come before.
    pub repeated: u64,
    /// Notices that the missed messages follow.
    pub resumed: u64,
    /// Notices that some missed messages are lost.
    pub history_lost: u64,
    /// Notices that messages may have been missed.
    pub bus_recovered: u64,
    /// Messages that were to be sent before the mark of [`Fleet::mark`](super::Fleet::mark) and came after it was set.
    pub late: u64,
    /// Arrival of the last of these late messages, in monotonic nanoseconds.
    pub late_last_ns: u64,
    /// Messages without a stamp: the server's own.
    pub unstamped: u64,
    /// Payload bytes that arrived.
    pub bytes: u64,
    /// Pings that were answered.
    pub pings: u64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            latency: histogram(),
            shared_latency: histogram(),
            handshake: histogram(),
            failures: BTreeMap::new(),
            endings: Vec::new(),
            out_of_order: 0,
            repeated: 0,
            resumed: 0,
            history_lost: 0,
            bus_recovered: 0,
            late: 0,
            late_last_ns: 0,
            unstamped: 0,
            bytes: 0,
            pings: 0,
        }
    }
}

impl Tally {
    /// Adds the figures of another thread.
    pub fn add(&mut self, other: &Self) {
        // `histogram` made both, so that neither addition can fail.
        let _ = self.latency.add(&other.latency);
        let _ = self.shared_latency.add(&other.shared_latency);
        let _ = self.handshake.add(&other.handshake);
        for (reason, count) in &other.failures {
            *self.failures.entry(reason.clone()).or_insert(0) += count;
        }
        self.endings.extend_from_slice(&other.endings);
        self.out_of_order += other.out_of_order;
        self.repeated += other.repeated;
        self.resumed += other.resumed;
        self.history_lost += other.history_lost;
        self.bus_recovered += other.bus_recovered;
        self.late += other.late;
        self.late_last_ns = self.late_last_ns.max(other.late_last_ns);
        self.unstamped += other.unstamped;
        self.bytes += other.bytes;
        self.pings += other.pings;
    }

    pub(crate) fn fail(&mut self, reason: impl Into<String>) {
        *self.failures.entry(reason.into()).or_insert(0) += 1;
    }

    /// Returns the close codes of the connections that the server ended.
    #[must_use]
    pub fn codes(&self) -> BTreeMap<u16, u64> {
        let mut codes = BTreeMap::new();
        for ending in &self.endings {
            *codes.entry(ending.code).or_insert(0) += 1;
        }
        codes
    }
}

fn histogram() -> Histogram<u64> {
    // The bounds are constants that satisfy the constructor; the fallback has the same precision.
    Histogram::new_with_bounds(LATENCY_NS_MIN, LATENCY_NS_MAX, DIGITS).unwrap_or_else(|_| {
        let mut histogram = Histogram::new(DIGITS).unwrap_or_else(|_| unreachable!());
        histogram.auto(true);
        histogram
    })
}

const LATENCY_NS_MIN: u64 = 1_000;
const LATENCY_NS_MAX: u64 = 120_000_000_000;
const DIGITS: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_two_threads_add_up() {
        let (mut one, mut two) = (Tally::default(), Tally::default());
        for value in 1..=50u64 {
            one.latency.saturating_record(value * 1_000_000);
            two.latency.saturating_record((value + 50) * 1_000_000);
        }
        one.fail("status 503");
        two.fail("status 503");
        two.endings.push(Ending { code: 1012, at_ns: 7 });
        one.add(&two);
        assert_eq!(one.latency.len(), 100);
        let p99 = one.latency.value_at_quantile(0.99);
        assert!((98_900_000..99_200_000).contains(&p99), "{p99}");
        assert_eq!(one.failures["status 503"], 2);
        assert_eq!(one.codes()[&1012], 1);
    }
}
