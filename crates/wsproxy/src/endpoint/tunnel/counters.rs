//! Counters of the tunnel, which many files add to and the metrics read. Labels are bounded.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use hashbrown::HashMap;
use http::StatusCode;
use parking_lot::{Mutex, RwLock};
use wsproxy_proto::{names::Id, tunnel::code::Code as Reset};

use crate::{
    endpoint::tunnel::{patterns::OTHER, refusal::Code},
    telemetry::{
        counter::Counter,
        histogram::Histogram,
        scrape::{Scrape, Section},
        throttle::Throttle,
    },
};

/// Counters of the tunnel.
#[derive(Debug, Default)]
pub struct TunnelCounters {
    /// Requests by cluster and pattern.
    requests: RwLock<Requests>,
    /// Guards the losses of lanes by their reason, which is a word of the program.
    losses: Mutex<BTreeMap<&'static str, u64>>,
    /// Time for which lanes were connected that had been ready.
    lane_duration: Histogram<20, 2>,
    /// Round trips of pings on lanes.
    round_trip: Histogram<6, 2>,
    /// Lanes that were not read for five seconds, though bytes waited.
    pub reader_stalls: Counter,
    /// Bytes of bodies from clients.
    pub bytes_in: Counter,
    /// Bytes of bodies to clients.
    pub bytes_out: Counter,
    /// Resets of agents by their code.
    resets: [Counter; Reset::ALL.len()],
    /// Requests that were sent again since they had reached no upstream.
    pub retries_undispatched: Counter,
    /// Requests that were sent again since their lane was lost.
    pub retries_lost: Counter,
    /// Requests that were answered from the cache.
    pub cache_hits: Counter,
    /// Requests whose answer could have been in the cache.
    pub cache_misses: Counter,
    /// Answers that were put into the cache.
    pub cache_stored: Counter,
    /// Throttle of the log lines about requests whose credential opens no cluster.
    pub unopened_lines: Throttle,
}

/// Requests by cluster and pattern.
///
/// Bound: [`CLUSTERS_MAX`] clusters and [`PAIRS_MAX`] pairs; further ones count as `other`.
#[derive(Debug, Default)]
struct Requests {
    clusters: HashMap<Arc<str>, HashMap<Arc<str>, Arc<Pair>>>,
    pairs: usize,
    /// All others.
    other: Arc<Pair>,
    /// Durations by pattern.
    durations: HashMap<Arc<str>, Arc<Histogram<12, 2>>>,
    other_durations: Arc<Histogram<12, 2>>,
}

/// Requests of a cluster with a pattern.
#[derive(Debug, Default)]
struct Pair {
    /// By the class of the upstream's status.
    classes: [Counter; CLASSES.len()],
    /// By the code of a refusal, or of the reason why an answer broke off.
    codes: [Counter; Code::ALL.len()],
    head: Histogram<12, 2>,
}

/// End of a request, for the numbers.
#[derive(Debug, Clone, Copy)]
pub struct Ended<'a> {
    /// Cluster.
    pub cluster: &'a str,
    /// Pattern of the path.
    pub pattern: &'a str,
    /// Status of the upstream.
    pub status: Option<StatusCode>,
    /// Code of the refusal, or of the reason why the answer broke off.
    pub code: Option<Code>,
    /// Time until the head of the answer.
    pub head: Option<Duration>,
    /// Time until the end.
    pub total: Duration,
}

impl Ended<'_> {
    /// Returns whether the credential of the request opened the cluster.
    #[must_use]
    pub const fn has_opened(&self) -> bool {
        !matches!(self.code, Some(Code::Unauthorized | Code::Forbidden | Code::ClusterUnknown))
    }
}

impl TunnelCounters {
    /// Counts the end of a request.
    pub fn ended(&self, ended: &Ended<'_>) {
        // A client that opens no cluster must not fill the table.
        let names = (ended.cluster, ended.pattern);
        let (cluster, pattern) = if ended.has_opened() { names } else { NOTHING };
        let known = self.requests.read().find(cluster, pattern);
        let (pair, durations) =
            known.unwrap_or_else(|| self.requests.write().add(cluster, pattern));
        let class = ended.status.map(|status| usize::from(status.as_u16() / 100) - 1);
        match (ended.code, class) {
            (Some(code), _) => pair.codes[code as usize].add(1),
            (None, Some(class)) => pair.classes[class.min(CLASSES.len() - 1)].add(1),
            (None, None) => {}
        }
        if let Some(head) = ended.head {
            pair.head.observe(micros(head));
        }
        durations.observe(micros(ended.total));
    }

    /// Gives a cluster a name in the metrics, where there is room. Call it for clusters that have, or had, a lane at any
    /// instance: names stay, and clients must not fill the table with those of clusters that do not exist.
    pub fn name(&self, cluster: &Id) {
        if !self.is_named(cluster.as_str()) {
            self.requests.write().name(cluster.as_str());
        }
    }

    /// Counts the end of a lane. `duration`: its life, where it was ready.
    pub fn lane_ended(&self, reason: &'static str, duration: Option<Duration>) {
        *self.losses.lock().entry(reason).or_default() += 1;
        if let Some(duration) = duration {
            self.lane_duration.observe(micros(duration));
        }
    }

    /// Counts a round trip of a ping.
    pub fn round_trip(&self, time: Duration) {
        self.round_trip.observe(micros(time));
    }

    /// Counts a reset of an agent.
    pub fn reset(&self, code: Reset) {
        self.resets[usize::from(code.number())].add(1);
    }

    /// Returns whether a cluster has a name in the metrics.
    #[must_use]
    pub fn is_named(&self, cluster: &str) -> bool {
        self.requests.read().clusters.contains_key(cluster)
    }

    /// Adds the numbers.
    pub fn collect(&self, scrape: &mut Scrape) {
        scrape.section(Section::Families);
        self.collect_lanes(scrape);
        self.collect_requests(scrape);
        let directions = [("in", &self.bytes_in), ("out", &self.bytes_out)];
        let bytes = directions.map(|(direction, n)| ([("direction", direction)], n.value()));
        let help = "Bytes of bodies and upgraded connections; in: from clients";
        scrape.counters("tunnel_bytes", help, bytes);
        let resets = Reset::ALL.into_iter().zip(&self.resets);
        let resets = resets.map(|(code, n)| ([("code", code.label())], n.value()));
        let help = "Requests that agents ended before their answer was complete";
        scrape.counters("tunnel_resets", help, resets.filter(|(_, n)| *n > 0));
        let retries =
            [("undispatched", &self.retries_undispatched), ("lane_lost", &self.retries_lost)];
        let retries = retries.map(|(reason, n)| ([("reason", reason)], n.value()));
        let help = "Requests that were sent again";
        scrape.counters("tunnel_retries", help, retries);
        let results = [
            ("hit", &self.cache_hits),
            ("miss", &self.cache_misses),
            ("stored", &self.cache_stored),
        ];
        let results = results.map(|(result, n)| ([("result", result)], n.value()));
        let help = "Requests for which the cache was asked, and answers that were kept";
        scrape.counters("tunnel_cache", help, results);
    }

    fn collect_lanes(&self, scrape: &mut Scrape) {
        let losses = self.losses.lock().clone();
        let losses = losses.iter().map(|(reason, n)| ([("reason", *reason)], *n));
        let help = "Ends of lanes, by their reason";
        scrape.counters("tunnel_reconnects", help, losses);
        let help = "Time for which lanes were connected that had been ready";
        scrape.seconds("tunnel_lane_duration", help, &[], self.lane_duration.read(MICROSECOND));
        let help =
            "Times that a lane was not read for five seconds, though bytes waited in its socket";
        scrape.counter("tunnel_reader_stalls", help, self.reader_stalls.value());
        let help = "Round trips of pings on lanes";
        scrape.seconds("tunnel_lane_round_trip", help, &[], self.round_trip.read(MICROSECOND));
    }

    fn collect_requests(&self, scrape: &mut Scrape) {
        let requests = self.requests.read();
        let other = ((OTHER, OTHER), &requests.other);
        let pairs = requests.clusters.iter().flat_map(|(cluster, patterns)| {
            patterns.iter().map(move |(pattern, pair)| ((&**cluster, &**pattern), pair))
        });
        let mut pairs: Vec<_> = pairs.chain([other]).collect();
        pairs.sort_unstable_by_key(|(names, _)| *names);
        let counts = pairs.iter().flat_map(|((cluster, pattern), pair)| {
            let classes = CLASSES.into_iter().zip(&pair.classes);
            let codes = Code::ALL.iter().map(|code| code.label()).zip(&pair.codes);
            classes.chain(codes).filter(|(_, n)| n.value() > 0).map(|(code, n)| {
                ([("cluster", *cluster), ("pattern", *pattern), ("code", code)], n.value())
            })
        });
        let help =
            "Proxied requests; code: class of the upstream's status, or the code of the error";
        scrape.counters("tunnel_requests", help, merged(counts));
        let help = "Time until the head of the upstream's answer";
        for ((cluster, pattern), pair) in pairs {
            let labels = [("cluster", cluster), ("pattern", pattern)];
            let (buckets, sum) = pair.head.read(MICROSECOND);
            // A pair without a head is left out, but not the metric itself.
            if (cluster, pattern) == (OTHER, OTHER) || buckets.iter().any(|(_, n)| *n > 0) {
                scrape.seconds("tunnel_head", help, &labels, (buckets, sum));
            }
        }
        let help = "Time until the end of proxied requests";
        let durations = requests.durations.iter().map(|(pattern, times)| (&**pattern, times));
        for (pattern, times) in durations.chain([(OTHER, &requests.other_durations)]) {
            let read = times.read(MICROSECOND);
            scrape.seconds("tunnel_request", help, &[("pattern", pattern)], read);
        }
    }
}

impl Requests {
    fn find(&self, cluster: &str, pattern: &str) -> Option<(Arc<Pair>, Arc<Histogram<12, 2>>)> {
        let pair = match (cluster, pattern) {
            (OTHER, OTHER) => &self.other,
            _ => self.clusters.get(cluster)?.get(pattern)?,
        };
        let durations = match pattern {
            OTHER => &self.other_durations,
            _ => self.durations.get(pattern)?,
        };
        Some((Arc::clone(pair), Arc::clone(durations)))
    }

    fn name(&mut self, cluster: &str) {
        if self.clusters.len() < CLUSTERS_MAX {
            self.clusters.entry(cluster.into()).or_default();
        }
    }

    /// Adds a pair where there is room. A cluster without a name is one of the others.
    fn add(&mut self, cluster: &str, pattern: &str) -> (Arc<Pair>, Arc<Histogram<12, 2>>) {
        let cluster = if self.clusters.contains_key(cluster) { cluster } else { OTHER };
        let is_known = self.clusters.get(cluster).is_some_and(|all| all.contains_key(pattern));
        let pair = if is_known || (self.pairs < PAIRS_MAX && (cluster, pattern) != (OTHER, OTHER)) {
            self.pairs += usize::from(!is_known);
            let patterns = self.clusters.entry(cluster.into()).or_default();
            Arc::clone(patterns.entry(pattern.into()).or_default())
        } else {
            Arc::clone(&self.other)
        };
        let has_room = self.durations.len() < PATTERNS_MAX || self.durations.contains_key(pattern);
        let durations = match pattern {
            OTHER => &self.other_durations,
            _ if has_room => &*self.durations.entry(pattern.into()).or_default(),
            _ => &self.other_durations,
        };
        (pair, Arc::clone(durations))
    }
}

/// Adds up samples whose labels are the same: two codes have one word.
fn merged<'v>(
    samples: impl Iterator<Item = ([(&'static str, &'v str); 3], u64)>,
) -> impl Iterator<Item = ([(&'static str, &'v str); 3], u64)> {
    let mut merged = BTreeMap::new();
    for (labels, n) in samples {
        *merged.entry(labels).or_insert(0) += n;
    }
    merged.into_iter()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Cluster and pattern of requests that no credential opens.
const NOTHING: (&str, &str) = (OTHER, OTHER);

/// Classes of the upstream's status.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Upper bound of the clusters that have a name in the metrics.
const CLUSTERS_MAX: usize = 500;

/// Upper bound of the pairs of a cluster and a pattern.
const PAIRS_MAX: usize = 2000;

/// Upper bound of the patterns with durations of their own.
const PATTERNS_MAX: usize = 500;

/// A microsecond in seconds.
const MICROSECOND: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;

    fn ended<'a>(cluster: &'a str, pattern: &'a str) -> Ended<'a> {
        let time = Duration::from_millis(3);
        let status = Some(StatusCode::OK);
        Ended { cluster, pattern, status, code: None, head: Some(time), total: time }
    }

    fn name(counters: &TunnelCounters, cluster: &str) {
        counters.name(&Id::parse(cluster).unwrap());
    }

    fn count(counters: &TunnelCounters, cluster: &str, pattern: &str) -> u64 {
        let (pair, _) = counters.requests.read().find(cluster, pattern).unwrap();
        pair.classes.iter().chain(&pair.codes).map(Counter::value).sum()
    }

    #[test]
    fn requests_count_by_cluster_pattern_and_code() {
        let counters = TunnelCounters::default();
        name(&counters, "c1");
        name(&counters, "c2");
        counters.ended(&ended("c1", "/api"));
        counters.ended(&ended("c1", "/api"));
        counters.ended(&Ended { code: Some(Code::LaneLost), ..ended("c1", "/api") });
        counters.ended(&ended("c2", OTHER));
        assert_eq!([count(&counters, "c1", "/api"), count(&counters, "c2", OTHER)], [3, 1]);
        let (pair, _) = counters.requests.read().find("c1", "/api").unwrap();
        assert_eq!([pair.classes[1].value(), pair.codes[Code::LaneLost as usize].value()], [2, 1]);
        counters.reset(Reset::Overloaded);
        assert_eq!(counters.resets[16].value(), 1);
        counters.lane_ended("lost", Some(Duration::from_secs(1)));
        counters.lane_ended("hello_timeout", None);
        assert_eq!(counters.losses.lock()["lost"], 1);
        assert_eq!(counters.losses.lock()["hello_timeout"], 1);
        let (buckets, _) = counters.lane_duration.read(MICROSECOND);
        assert_eq!(buckets.iter().map(|(_, n)| *n).max(), Some(1));
    }

    #[test]
    fn names_of_clusters_that_no_credential_opens_are_not_kept() {
        let counters = TunnelCounters::default();
        for code in [Code::Unauthorized, Code::Forbidden, Code::ClusterUnknown] {
            counters.ended(&Ended { code: Some(code), ..ended("secret", "/api") });
        }
        assert!(!counters.is_named("secret"));
        assert_eq!(count(&counters, OTHER, OTHER), 3);
        // Nor are those of clusters that had no lane.
        counters.ended(&ended("junk", "/api"));
        assert!(!counters.is_named("junk"));
        assert_eq!(count(&counters, OTHER, "/api"), 1);
    }

    #[test]
    fn labels_are_bounded() {
        let counters = TunnelCounters::default();
        for n in 0..2 * CLUSTERS_MAX {
            name(&counters, &format!("c{n}"));
            for pattern in ["/a", "/b", "/c", "/d", "/e"] {
                counters.ended(&ended(&format!("c{n}"), pattern));
            }
        }
        let requests = counters.requests.read();
        let pairs: usize = requests.clusters.values().map(HashMap::len).sum();
        assert_eq!((pairs, requests.pairs), (PAIRS_MAX, PAIRS_MAX));
        assert!(requests.clusters.len() <= CLUSTERS_MAX + 1, "{}", requests.clusters.len());
        assert_eq!(requests.durations.len(), 5);
        drop(requests);
        let all = 10 * CLUSTERS_MAX as u64;
        assert_eq!(count(&counters, OTHER, OTHER), all - PAIRS_MAX as u64);
        for n in 0..2 * PATTERNS_MAX {
            counters.ended(&ended("c0", &format!("/{n}")));
        }
        assert_eq!(counters.requests.read().durations.len(), PATTERNS_MAX);
    }
}
