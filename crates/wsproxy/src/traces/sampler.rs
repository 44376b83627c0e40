//! The choice of the traces that are recorded. Knows neither spans nor requests.

use parking_lot::Mutex;
use wsproxy_proto::{
    rate::{Bucket, Rate},
    trace_context::TraceContext,
};

use crate::config::traces::{Sampler, TracesConfig};

/// Chooses the traces to record.
#[derive(Debug)]
pub(super) struct Choice {
    sampler: Sampler,
    ratio: f64,
    /// Wishes of clients that are followed; `None`: no wish is.
    client_rate: Option<Rate>,
    wishes: Mutex<Bucket>,
}

/// The party that began a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// Anyone on the network: the request has shown no credential yet.
    Client,
    /// A worker.
    Worker,
    /// Another instance, which has shown the secret of the instances.
    Instance,
}

impl Choice {
    pub(super) fn new(config: &TracesConfig) -> Self {
        let most = config.client_samples_per_second;
        Self {
            sampler: config.sampler,
            ratio: config.sampler_arg,
            client_rate: Rate::new(most, 1000, most),
            wishes: Mutex::default(),
        }
    }

    /// Returns whether to record the trace with the id `trace`. `now` is in nanoseconds.
    pub(super) fn records(
        &self,
        trace: u128,
        parent: Option<&TraceContext>,
        asker: Asker,
        now: u64,
    ) -> bool {
        let by_parent = |alone: bool| match parent {
            Some(TraceContext { is_sampled: false, .. }) => false,
            // Without this bound, clients could have all of their handshakes recorded, and the collector pay for it.
            Some(_) if asker == Asker::Client => self.follows_wish(now) || alone,
            Some(_) => true,
            None => alone,
        };
        match self.sampler {
            Sampler::AlwaysOn => true,
            Sampler::AlwaysOff => false,
            Sampler::TraceIdRatio => self.is_in_ratio(trace),
            Sampler::ParentBasedAlwaysOn => by_parent(true),
            Sampler::ParentBasedAlwaysOff => by_parent(false),
            Sampler::ParentBasedTraceIdRatio => by_parent(self.is_in_ratio(trace)),
        }
    }

    fn follows_wish(&self, now: u64) -> bool {
        self.client_rate.is_some_and(|rate| self.wishes.lock().take(rate, now).is_ok())
    }

    /// Compares 63 random bits of the id with the ratio, as the libraries of OpenTelemetry do, so that all services
    /// with the same ratio record the same traces.
    fn is_in_ratio(&self, trace: u128) -> bool {
        let random = (trace as u64) >> 1;
        // The product is exact enough: a ratio has 53 bits.
        self.ratio >= 1.0 || (random as f64) < self.ratio * (1_u64 << 63) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(sampler: Sampler, ratio: f64, wishes: u32) -> Choice {
        Choice::new(&TracesConfig {
            sampler,
            sampler_arg: ratio,
            client_samples_per_second: wishes,
            ..TracesConfig::default()
        })
    }

    fn parent(is_sampled: bool) -> Option<TraceContext> {
        Some(TraceContext { trace: 1, span: 1, is_sampled })
    }

    /// A trace with a low and one with a high random part.
    const TRACES: [u128; 2] = [1, u64::MAX as u128];

    #[test]
    fn samplers_choose_by_id_and_parent() {
        use Sampler::*;
        for (sampler, alone, below_sampled, below_unsampled) in [
            (AlwaysOn, [true; 2], [true; 2], [true; 2]),
            (AlwaysOff, [false; 2], [false; 2], [false; 2]),
            (TraceIdRatio, [true, false], [true, false], [true, false]),
            (ParentBasedAlwaysOn, [true; 2], [true; 2], [false; 2]),
            (ParentBasedAlwaysOff, [false; 2], [true; 2], [false; 2]),
            (ParentBasedTraceIdRatio, [true, false], [true; 2], [false; 2]),
        ] {
            let choice = choice(sampler, 0.5, 0);
            let chosen = |parent: Option<TraceContext>| {
                TRACES.map(|trace| choice.records(trace, parent.as_ref(), Asker::Worker, 1))
            };
            let all = [chosen(None), chosen(parent(true)), chosen(parent(false))];
            assert_eq!(all, [alone, below_sampled, below_unsampled], "{sampler:?}");
        }
    }

    #[test]
    fn a_ratio_of_one_records_all_and_of_zero_none() {
        for (ratio, all) in [(1.0, true), (0.0, false)] {
            let choice = choice(Sampler::TraceIdRatio, ratio, 0);
            assert!(TRACES.iter().all(|t| choice.records(*t, None, Asker::Client, 1) == all));
        }
    }

    #[test]
    fn clients_can_ask_only_so_often() {
        let choice = choice(Sampler::ParentBasedAlwaysOff, 0.0, 3);
        let now = 1_000_000_000_000;
        let count = |now| (0..9).filter(|_| asked(&choice, now)).count();
        assert_eq!(count(now), 3);
        assert_eq!(count(now + 1_000_000_000), 3);
        assert!(choice.records(1, parent(true).as_ref(), Asker::Worker, now));
    }

    fn asked(choice: &Choice, now: u64) -> bool {
        choice.records(1, parent(true).as_ref(), Asker::Client, now)
    }
}
