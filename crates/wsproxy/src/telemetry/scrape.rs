//! One scrape of the metrics: parts of an instance add their numbers, and the page of metrics is written from them.
//! Knows none of these parts.

use std::{fmt, mem::discriminant, sync::Arc};

use prometheus_client::{
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

/// A part of an instance that has counters.
pub trait Source: Send + Sync {
    /// Adds the numbers of this part.
    fn collect(&self, scrape: &mut Scrape);
}

/// The sections of the page of metrics, in their order.
///
/// Several parts add to one section. Within a section, metrics stand in the order in which they were added first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// Connections and their traffic.
    Connections,
    /// The time that messages take.
    Latency,
    /// Messages that were dropped, refused or not received.
    Messages,
    /// Counters of a single endpoint family beyond those.
    Families,
    /// Histories and resumes.
    Histories,
    /// The bus.
    Bus,
    /// Keys of the issuers of tokens.
    Issuers,
    /// The registry of connections.
    Registry,
    /// The worker API.
    Api,
    /// The leases of instances.
    Leases,
    /// The log of sessions.
    SessionLog,
    /// The database.
    Database,
    /// The audit log.
    Audit,
    /// Traces.
    Traces,
    /// The process.
    Process,
}

/// The numbers that were added so far.
#[derive(Debug)]
pub struct Scrape {
    section: Section,
    metrics: Vec<Metric>,
}

/// A metric with its samples.
#[derive(Debug)]
struct Metric {
    section: Section,
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    samples: Vec<Sample>,
}

/// One value of a metric.
#[derive(Debug)]
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Counter(u64),
    Gauge(i64),
    Histogram { sum: f64, count: u64, buckets: Vec<(f64, u64)> },
}

impl Scrape {
    /// Creates a scrape without numbers.
    #[must_use]
    pub(super) const fn new() -> Self {
        Self { section: Section::Connections, metrics: Vec::new() }
    }

    /// Chooses the section that further numbers belong to.
    pub fn section(&mut self, section: Section) -> &mut Self {
        self.section = section;
        self
    }

    /// Adds a counter without labels.
    pub fn counter(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.counters(name, help, [([], value)]);
    }

    /// Adds samples of a counter, each with its labels.
    pub fn counters<'v, const N: usize>(
        &mut self,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = ([(&'static str, &'v str); N], u64)>,
    ) {
        let metric = self.metric((name, None), help, MetricType::Counter);
        let samples = samples.into_iter();
        metric.samples.extend(samples.map(|(labels, n)| Sample::new(&labels, Value::Counter(n))));
    }

    /// Adds a gauge without labels.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, value: i64) {
        self.gauges(name, help, [([], value)]);
    }

    /// Adds a gauge without labels whose value has a unit.
    pub fn gauge_in(&mut self, unit: Unit, name: &'static str, help: &'static str, value: i64) {
        let metric = self.metric((name, Some(unit)), help, MetricType::Gauge);
        metric.samples.push(Sample::new(&[], Value::Gauge(value)));
    }

    /// Adds samples of a gauge, each with its labels.
    pub fn gauges<'v, const N: usize>(
        &mut self,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = ([(&'static str, &'v str); N], i64)>,
    ) {
        let metric = self.metric((name, None), help, MetricType::Gauge);
        let samples = samples.into_iter();
        metric.samples.extend(samples.map(|(labels, n)| Sample::new(&labels, Value::Gauge(n))));
    }

    /// Adds a histogram of seconds: counts by upper bound, and the sum of all values.
    pub fn seconds(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &[(&'static str, &str)],
        values: (Vec<(f64, u64)>, f64),
    ) {
        self.histogram((name, Some(Unit::Seconds)), help, labels, values);
    }

    /// Adds a histogram: counts by upper bound, and the sum of all values.
    pub fn histogram(
        &mut self,
        (name, unit): (&'static str, Option<Unit>),
        help: &'static str,
        labels: &[(&'static str, &str)],
        (buckets, sum): (Vec<(f64, u64)>, f64),
    ) {
        let metric = self.metric((name, unit), help, MetricType::Histogram);
        let count = buckets.iter().map(|(_, count)| count).sum();
        metric.samples.push(Sample::new(labels, Value::Histogram { sum, count, buckets }));
    }

    /// Writes all numbers.
    ///
    /// # Errors
    /// The encoder cannot write.
    pub(super) fn encode(mut self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // The sort is stable, so that metrics of a section keep their order.
        self.metrics.sort_by_key(|metric| metric.section);
        for Metric { name, help, unit, kind, samples, .. } in self.metrics {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for Sample { labels, value } in samples {
                if labels.is_empty() {
                    value.encode(&mut metric)?;
                } else {
                    value.encode(&mut metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }

    fn metric(
        &mut self,
        (name, unit): (&'static str, Option<Unit>),
        help: &'static str,
        kind: MetricType,
    ) -> &mut Metric {
        // Two units of one name are two metrics.
        let unit_of = |unit: &Option<Unit>| unit.as_ref().map(discriminant);
        let known = self
            .metrics
            .iter()
            .position(|metric| metric.name == name && unit_of(&metric.unit) == unit_of(&unit));
        let index = known.unwrap_or_else(|| {
            let section = self.section;
            self.metrics.push(Metric { section, name, help, unit, kind, samples: Vec::new() });
            self.metrics.len() - 1
        });
        &mut self.metrics[index]
    }
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn collect(&self, scrape: &mut Scrape) {
        (**self).collect(scrape);
    }
}

impl Sample {
    fn new(labels: &[(&'static str, &str)], value: Value) -> Self {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self { labels, value }
    }
}

impl Value {
    fn encode(self, metric: &mut MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Counter(n) => metric.encode_counter::<NoLabelSet, _, u64>(&n, None),
            Self::Gauge(n) => metric.encode_gauge(&n),
            Self::Histogram { sum, count, buckets } => {
                metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
            }
        }
    }
}
