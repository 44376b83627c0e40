//! How what is counted elsewhere becomes samples when somebody asks.

use std::{
    fmt::{self, Debug},
    sync::{Arc, OnceLock, Weak},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use super::EndpointLabels;
use crate::gateway::Gateway;

/// Where the collector reads.
#[derive(Clone, Default)]
pub(super) struct Source(Arc<OnceLock<Weak<Gateway>>>);

impl Source {
    /// The instance to read from; it is not kept alive.
    pub(super) fn connect(&self, gateway: &Arc<Gateway>) {
        // An instance is connected once, by whoever made it.
        let _ = self.0.set(Arc::downgrade(gateway));
    }
}

impl Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Source")
    }
}

impl Collector for Source {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(gateway) = self.0.get().and_then(Weak::upgrade) else { return Ok(()) };
        let mut scrape = Scrape { encoder, gateway: &gateway };
        scrape.connections()?;
        scrape.latency()?;
        scrape.messages()?;
        scrape.acks()?;
        scrape.histories()?;
        scrape.bus()?;
        scrape.keys()?;
        scrape.registry()?;
        scrape.api()?;
        scrape.lease()?;
        scrape.session_log()?;
        scrape.process()
    }
}

/// One look at everything that is counted.
pub(super) struct Scrape<'a, 'b> {
    pub(super) encoder: DescriptorEncoder<'a>,
    pub(super) gateway: &'b Gateway,
}

impl Scrape<'_, '_> {
    /// A gauge by endpoint.
    pub(super) fn gauges(
        &mut self,
        name: &str,
        help: &str,
        values: [(&'static str, i64); 3],
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (endpoint, value) in values {
            family.encode_family(&EndpointLabels { endpoint })?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// A counter by endpoint.
    pub(super) fn counters(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let values = values.into_iter();
        self.counters_by(name, help, values.map(|(endpoint, n)| (EndpointLabels { endpoint }, n)))
    }

    /// A counter by any labels.
    pub(super) fn counters_by<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in values {
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    pub(super) fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        value: i64,
    ) -> fmt::Result {
        self.encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }
}
