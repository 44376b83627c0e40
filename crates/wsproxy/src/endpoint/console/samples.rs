//! Samples of the instance's numbers, every ten seconds for an hour. Read from the page of metrics, so that no part counts
//! twice.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    core::Core,
    endpoint::console::{Console, troubles},
    http::admin,
    telemetry::{family::Family, metrics::readings::Readings, time},
};

/// The samples of the last hour.
///
/// Invariant: holds at most [`SAMPLES_MAX`] samples, some 150 KB.
#[derive(Debug, Default)]
pub(super) struct Samples(Mutex<Series>);

#[derive(Debug, Default)]
struct Series {
    samples: VecDeque<Sample>,
    /// Numbers at the time of the last sample, from which the next one counts.
    before: Option<(Instant, Totals)>,
}

/// Numbers of one interval.
#[derive(Debug, Clone)]
struct Sample {
    /// Time, in seconds since 1970.
    at: u64,
    /// Open connections by family.
    connections: [u32; Family::ALL.len()],
    /// Messages a second from clients, to clients, from the bus and to the bus.
    rates: [f32; 4],
    /// Latency in milliseconds that half of the messages kept, and 99 of 100; `None` without messages.
    latency: Option<[f32; 2]>,
    /// The bus was connected, subscribed and took writes.
    is_bus_whole: bool,
    /// Bytes of memory, and of messages that wait for clients.
    bytes: [u64; 2],
    /// Events of each row of the table of troubles.
    troubles: Box<[u32]>,
}

/// Numbers that only grow.
#[derive(Debug, Clone, Default)]
struct Totals {
    messages: [f64; 4],
    /// Messages by upper bound of their latency in seconds; each bucket holds those before it too.
    latency: Vec<(f64, f64)>,
    troubles: Box<[f64]>,
}

/// Takes samples until `end`.
pub(super) async fn run(console: Arc<Console>, core: Arc<Core>, end: CancellationToken) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let (core, console) = (Arc::clone(&core), Arc::clone(&console));
        // The page of metrics takes a moment, for which no connection is to wait.
        let taken = tokio::task::spawn_blocking(move || {
            let readings = Readings::new(core.metrics.text());
            let is_bus_whole = admin::is_whole(&core.bus.status());
            console.samples.take(&readings, is_bus_whole, Instant::now());
        });
        if let Err(error) = taken.await {
            warn!(%error, "A sample for the console could not be taken.");
        }
    }
}

impl Samples {
    fn take(&self, readings: &Readings, is_bus_whole: bool, now: Instant) {
        let totals = Totals::read(readings);
        let mut series = self.0.lock();
        let Some((then, before)) = series.before.replace((now, totals.clone())) else {
            // The numbers before the start are zero, but no rate is known yet.
            let zero =
                Totals { troubles: vec![0.0; troubles::TABLE.len()].into(), ..totals.clone() };
            let sample = Sample::new(readings, is_bus_whole, &zero, &totals, EVERY);
            series.samples.push_back(sample);
            return;
        };
        let sample = Sample::new(readings, is_bus_whole, &before, &totals, now - then);
        if series.samples.len() == SAMPLES_MAX {
            series.samples.pop_front();
        }
        series.samples.push_back(sample);
    }

    /// Returns the samples behind that of the time `after`, in seconds since 1970, column by column.
    pub(super) fn columns(&self, after: u64) -> Value {
        let series = self.0.lock();
        // By its place, since the clock may have been set back since then: later samples then have earlier times.
        let known = series.samples.iter().rposition(|sample| sample.at == after);
        let behind = series.samples.iter().skip(known.map_or(0, |place| place + 1));
        let samples: Vec<_> =
            behind.filter(|sample| known.is_some() || sample.at > after).collect();
        let column =
            |of: fn(&Sample) -> Value| samples.iter().map(|one| of(one)).collect::<Value>();
        let families = Family::ALL.iter().map(|family| {
            let number = *family as usize;
            let column = samples.iter().map(|sample| sample.connections[number]);
            (family.label().to_owned(), column.collect::<Value>())
        });
        json!({
            "at": column(|sample| sample.at.into()),
            "connections": families.collect::<serde_json::Map<_, _>>(),
            "received": column(|sample| rounded(sample.rates[0])),
            "sent": column(|sample| rounded(sample.rates[1])),
            "bus_in": column(|sample| rounded(sample.rates[2])),
            "bus_out": column(|sample| rounded(sample.rates[3])),
            "latency_p50_ms": column(|sample| sample.latency.map_or(Value::Null, |of| rounded(of[0]))),
            "latency_p99_ms": column(|sample| sample.latency.map_or(Value::Null, |of| rounded(of[1]))),
            "bus_whole": column(|sample| sample.is_bus_whole.into()),
            "memory_bytes": column(|sample| sample.bytes[0].into()),
            "waiting_bytes": column(|sample| sample.bytes[1].into()),
        })
    }

    /// Returns the events of each row of the table of troubles within the hour, and the time of the last one.
    pub(super) fn troubles(&self) -> Vec<(u64, u64)> {
        let mut sums = vec![(0, 0); troubles::TABLE.len()];
        for sample in &self.0.lock().samples {
            for ((count, at), new) in sums.iter_mut().zip(&sample.troubles) {
                *count += u64::from(*new);
                if *new > 0 {
                    *at = sample.at;
                }
            }
        }
        sums
    }
}

impl Sample {
    fn new(
        readings: &Readings,
        is_bus_whole: bool,
        before: &Totals,
        totals: &Totals,
        time: Duration,
    ) -> Self {
        let mut connections = [0; Family::ALL.len()];
        for one in readings.iter().filter(|one| one.name == "wsproxy_active_connections") {
            let of =
                Family::ALL.iter().find(|family| Some(family.label()) == one.label("endpoint"));
            if let Some(family) = of {
                connections[*family as usize] = one.value as u32;
            }
        }
        let seconds = time.as_secs_f64().max(0.001);
        let rate = |n: usize| ((totals.messages[n] - before.messages[n]).max(0.0) / seconds) as f32;
        let bytes = ["wsproxy_process_resident_memory_bytes", "wsproxy_buffer_utilization_bytes"];
        let pairs = totals.troubles.iter().zip(&before.troubles);
        Self {
            at: time::since_epoch().as_secs(),
            connections,
            rates: std::array::from_fn(rate),
            latency: latency(before, totals),
            is_bus_whole,
            bytes: bytes.map(|name| readings.sum(name) as u64),
            troubles: pairs.map(|(now, then)| (now - then).max(0.0) as u32).collect(),
        }
    }
}

impl Totals {
    fn read(readings: &Readings) -> Self {
        let mut totals =
            Self { troubles: vec![0.0; troubles::TABLE.len()].into(), ..Self::default() };
        for one in readings.iter() {
            if let Some(n) = MESSAGES.iter().position(|name| *name == one.name) {
                totals.messages[n] += one.value;
            }
            if one.name == LATENCY
                && let Some(bound) = one.label("le").and_then(bound)
            {
                match totals.latency.iter_mut().find(|(known, _)| *known == bound) {
                    Some((_, count)) => *count += one.value,
                    None => totals.latency.push((bound, one.value)),
                }
            }
            for (count, trouble) in totals.troubles.iter_mut().zip(troubles::TABLE) {
                if trouble.counts(&one) {
                    *count += one.value;
                }
            }
        }
        totals.latency.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        totals
    }
}

fn bound(text: &str) -> Option<f64> {
    if text == "+Inf" { Some(f64::INFINITY) } else { text.parse().ok() }
}

/// Returns the latency in milliseconds that half of the messages between two readings kept, and 99 of 100.
fn latency(before: &Totals, totals: &Totals) -> Option<[f32; 2]> {
    let earlier = |bound: f64| {
        let known = before.latency.iter().find(|(known, _)| *known == bound);
        known.map_or(0.0, |(_, count)| *count)
    };
    let counts: Vec<_> =
        totals.latency.iter().map(|(bound, count)| (*bound, count - earlier(*bound))).collect();
    let all = counts.last().map(|(_, count)| *count).filter(|all| *all > 0.0)?;
    Some([0.5, 0.99].map(|share| (quantile(&counts, share * all) * 1000.0) as f32))
}

/// Returns the value in seconds below which `rank` messages lie: between the bounds of its bucket, in proportion.
fn quantile(counts: &[(f64, f64)], rank: f64) -> f64 {
    let (mut lower, mut fewer) = (0.0, 0.0);
    for (bound, count) in counts {
        if *count >= rank {
            let share = if *count > fewer { (rank - fewer) / (count - fewer) } else { 1.0 };
            return if bound.is_finite() { lower + (bound - lower) * share } else { lower };
        }
        (lower, fewer) = (*bound, *count);
    }
    lower
}

/// Returns a number with three digits behind the point.
fn rounded(value: f32) -> Value {
    ((f64::from(value) * 1000.0).round() / 1000.0).into()
}

/// Interval of the samples.
pub(super) const EVERY: Duration = Duration::from_secs(10);

/// Upper bound of the samples: an hour.
const SAMPLES_MAX: usize = 360;

/// Series of messages: from clients, to clients, from the bus, to the bus.
const MESSAGES: [&str; 4] = [
    "wsproxy_messages_received_total",
    "wsproxy_messages_sent_total",
    "wsproxy_bus_messages_received_total",
    "wsproxy_bus_publishes_total",
];

const LATENCY: &str = "wsproxy_message_latency_seconds_bucket";

#[cfg(test)]
mod tests {
    use super::*;

    fn page(sent: u64, fast: u64, slow: u64, lost: u64) -> Readings {
        let all = fast + slow;
        Readings::new(format!(
            "wsproxy_active_connections{{endpoint=\"rooms\"}} 7\n\
             wsproxy_messages_sent_total{{endpoint=\"rooms\"}} {sent}\n\
             wsproxy_message_latency_seconds_bucket{{le=\"0.001\",endpoint=\"rooms\"}} {fast}\n\
             wsproxy_message_latency_seconds_bucket{{le=\"0.1\",endpoint=\"rooms\"}} {all}\n\
             wsproxy_message_latency_seconds_bucket{{le=\"+Inf\",endpoint=\"rooms\"}} {all}\n\
             wsproxy_bus_publishes_lost_total {lost}\n"
        ))
    }

    #[test]
    fn a_sample_holds_what_happened_since_the_last_one() {
        let samples = Samples::default();
        let start = Instant::now();
        samples.take(&page(100, 100, 0, 2), true, start);
        samples.take(&page(300, 150, 50, 2), false, start + EVERY);
        let columns = samples.columns(0);
        assert_eq!(columns["connections"]["rooms"], json!([7, 7]));
        assert_eq!(columns["sent"], json!([0.0, 20.0]));
        assert_eq!(columns["bus_whole"], json!([true, false]));
        // Half of the hundred were fast, and the rest is spread over the slow bucket.
        assert_eq!(columns["latency_p50_ms"], json!([null, 1.0]));
        let slow = columns["latency_p99_ms"][1].as_f64().unwrap();
        assert!((97.0..=99.0).contains(&slow), "{slow}");
        assert_eq!(samples.troubles().iter().map(|(count, _)| count).sum::<u64>(), 2);
        assert_eq!(samples.columns(u64::MAX)["at"], json!([]));
    }

    #[test]
    fn samples_go_on_when_the_clock_is_set_back() {
        let samples = Samples::default();
        let mut now = Instant::now();
        for n in 0..4 {
            samples.take(&page(n * 10, 0, 0, 0), true, now);
            now += EVERY;
        }
        for (sample, at) in samples.0.lock().samples.iter_mut().zip([9000, 9010, 5000, 5010]) {
            sample.at = at;
        }
        assert_eq!(samples.columns(9010)["at"], json!([5000, 5010]));
        assert_eq!(samples.columns(5000)["at"], json!([5010]));
        assert_eq!(samples.columns(5010)["at"], json!([]));
        assert_eq!(samples.columns(0)["at"], json!([9000, 9010, 5000, 5010]));
        // A sample that is no longer kept.
        assert_eq!(samples.columns(8000)["at"], json!([9000, 9010]));
    }

    #[test]
    fn an_hour_of_samples_is_kept() {
        let samples = Samples::default();
        let mut now = Instant::now();
        for n in 0..SAMPLES_MAX as u64 + 50 {
            samples.take(&page(n * 10, 0, 0, n), true, now);
            now += EVERY;
        }
        let columns = samples.columns(0);
        assert_eq!(columns["sent"].as_array().unwrap().len(), SAMPLES_MAX);
        assert_eq!(samples.troubles().iter().map(|(count, _)| count).sum::<u64>(), 360);
    }
}
