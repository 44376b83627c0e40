//! Each message reaches every connection of one session: one at a time, in bursts, or at a steady rate.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use crate::bench::{Bench, Layout};
use crate::fleet::Span;
use crate::load::{self, Flow, Rounds};
use crate::options::Common;
use crate::report::Report;

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Messages published at once; the next ones follow when all have arrived.
    #[arg(long, default_value_t = 1)]
    burst: u64,
    /// Messages per second on a schedule, instead of rounds.
    #[arg(long)]
    rate: Option<f64>,
}

/// Runs the scenario.
pub fn run(options: &Options) -> Result<Report> {
    let common = &options.common;
    let clients = common.connections;
    let layout = Layout { clients, measured: clients, shared: true, resumes: false };
    let mut bench = Bench::start("fanout", common, layout)?;
    bench.open(Span::all(clients))?;
    let receivers = bench.fleet.counters().open_now();
    let mut flow = Flow::new(0, 1, common.size, options.rate.unwrap_or(0.0));

    bench.progress.phase("warm up");
    publish(&mut bench, &mut flow, options, receivers, common.warmup)?;
    let warm = bench.fleet.report()?;
    bench.judge(&warm, false);

    bench.progress.phase("measure");
    let (published, delivered) = (flow.published(), bench.fleet.counters().delivered());
    let start = bench.moment();
    publish(&mut bench, &mut flow, options, receivers, common.duration)?;
    let published = flow.published() - published;
    let delivered = bench.fleet.counters().delivered() - delivered;
    bench.note_cpu(&start, delivered, "delivery");
    let tally = bench.fleet.report()?;

    match options.rate {
        Some(rate) => bench.report.set("rate_per_s", rate),
        None => bench.report.set("burst", options.burst),
    }
    bench.report.figure("published", published);
    bench.report.ratio("deliveries_per_s", delivered as f64, bench.report.seconds("measured_s"));
    bench.report.quantiles("latency", &tally.latency);
    bench.judge(&tally, false);
    bench.judge_deliveries(published * receivers, delivered);
    bench.judge_unheard();
    Ok(bench.report)
}

fn publish(
    bench: &mut Bench,
    flow: &mut Flow,
    options: &Options,
    receivers: u64,
    duration: Duration,
) -> Result<()> {
    let timeout = bench.common.timeout;
    let Bench { publisher, fleet, progress, .. } = bench;
    let counters = fleet.counters();
    if options.rate.is_none() {
        let plan = Rounds { burst: options.burst.max(1), receivers, duration, timeout };
        load::rounds(publisher, counters, progress, flow, plan)?;
        return Ok(());
    }
    let before = counters.delivered();
    let flows = std::slice::from_mut(flow);
    let tick = bench.common.tick();
    let steady = load::steady(publisher, flows, tick, duration, || progress.tick(counters))?;
    // Messages that do not come show in the figures.
    let _ = counters.wait_delivered(before + steady.published * receivers, timeout.min(LATE));
    Ok(())
}

/// Longest wait for messages after the last one was published; later ones count as lost.
const LATE: Duration = Duration::from_secs(5);
